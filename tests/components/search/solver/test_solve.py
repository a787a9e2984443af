"""The exact solver against brute force, and what it says when nothing fits."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.core.base.errors import InfeasibleBudget, RecipeError
from components.search.config import Limits
from components.search.costs.resources import Costs
from components.search.solver.baselines import greedy_choice, random_choice
from components.search.solver.certificate import check
from components.search.solver.explain import explain_layer
from components.search.solver.fronts import pareto_front
from components.search.solver.option_table import Option, OptionTable, Slot
from components.search.solver.solve import absolute_limits, certify, fits, solve, solve_table


def option(size: int, score: float, parameters: int, kv: int, latency_ms: float) -> Option:
    costs = Costs(parameters=parameters, kv_bytes_per_token=kv, latency_ms=latency_ms)
    return Option(name=f"option-{size}", size=size, score=score, costs=costs)


def table_of(*slots: list[Option], fixed: Costs | None = None) -> OptionTable:
    parts = ("attention", "ffn")
    return OptionTable(
        fixed=fixed or Costs(),
        slots=tuple(Slot(layer=k // 2, part=parts[k % 2], options=tuple(slot)) for k, slot in enumerate(slots)),
    )


@st.composite
def tables(draw: st.DrawFn) -> OptionTable:
    """Small searches: the parent scores 0 and costs most, the no-op costs nothing."""
    slots = []
    for _ in range(2 * draw(st.integers(1, 3))):
        full = [draw(st.integers(1, 60)) for _ in range(3)]
        middle = [draw(st.integers(0, value)) for value in full]
        scores = [0.0, draw(st.floats(0, 1)), draw(st.floats(0, 3))]
        costs = [full, middle, [0, 0, 0]]
        slots.append([option(2 - j, scores[j], c[0], c[1], c[2] / 8) for j, c in enumerate(costs)])
    fixed = Costs(parameters=draw(st.integers(0, 30)), latency_ms=draw(st.integers(0, 8)) / 8)
    return table_of(*slots, fixed=fixed)


def brute_force(table: OptionTable, limits: dict[str, float]) -> float | None:
    choices = itertools.product(*(slot.allowed_options for slot in table.slots))
    return min((table.score(choice) for choice in choices if fits(table.costs(choice), limits)), default=None)


@st.composite
def held_tables(draw: st.DrawFn) -> OptionTable:
    """The same, some slots of which have to hold one of their options."""
    table = draw(tables())
    slots = [slot.model_copy(update={"fixed_option": draw(st.sampled_from([None, 0, 1, 2]))}) for slot in table.slots]
    return table.model_copy(update={"slots": tuple(slots)})


shares = st.fixed_dictionaries(
    {}, optional={name: st.floats(0.05, 1) for name in ("parameters", "kv_bytes_per_token", "latency_ms")}
)


def limits_of(table: OptionTable, share: dict[str, float]) -> dict[str, float]:
    """Limits as shares of the parent's own costs."""
    parent = table.costs(table.parent_choice)
    return {name: value * parent.of(name) for name, value in share.items()}


@settings(max_examples=60)
@given(tables(), shares)
def test_solver_finds_what_brute_force_finds(table: OptionTable, share: dict[str, float]) -> None:
    limits = limits_of(table, share)
    best = brute_force(table, limits)
    if best is None:
        with pytest.raises(InfeasibleBudget):
            solve(table, limits)
        return
    solution = solve(table, limits)
    assert fits(table.costs(solution.choice), limits)
    assert table.score(solution.choice) == pytest.approx(best, abs=1e-8)
    assert solution.bound == pytest.approx(solution.objective, abs=1e-6)
    assert solution.gap == pytest.approx(0, abs=1e-9)


@settings(max_examples=40)
@given(tables(), shares, st.integers(0, 9))
def test_baselines_stay_within_the_limits_and_never_beat_the_solver(
    table: OptionTable, share: dict[str, float], seed: int
) -> None:
    limits = limits_of(table, share)
    if brute_force(table, limits) is None:
        return
    best = solve(table, limits).objective
    for choice in (greedy_choice(table, limits), random_choice(table, limits, seed)):
        assert fits(table.costs(choice), limits)
        assert table.score(choice) >= best - 1e-8


def test_scores_and_costs_near_nothing_are_solved_too() -> None:
    tiny = 2.0**-1070
    table = table_of([option(2, 0.0, 1, 1, 2 * tiny), option(1, tiny, 1, 1, tiny)], [option(1, 0.0, 0, 0, tiny)])
    solution = solve(table, {"latency_ms": 2 * tiny})
    assert (solution.choice, solution.objective) == ((1, 0), tiny)


@settings(max_examples=40)
@given(held_tables(), shares, st.integers(0, 9))
def test_slots_hold_what_they_have_to_in_every_choice_and_in_the_proof(
    table: OptionTable, share: dict[str, float], seed: int
) -> None:
    limits = limits_of(table, share)
    best = brute_force(table, limits)
    if best is None:
        with pytest.raises(InfeasibleBudget):
            solve(table, limits)
        return
    solution = solve(table, limits)
    assert table.score(solution.choice) == pytest.approx(best, abs=1e-8)
    for choice in (solution.choice, greedy_choice(table, limits), random_choice(table, limits, seed)):
        assert {slot: choice[slot] for slot in table.fixed_options} == table.fixed_options
    proof = certify(table.problem(table.scores, limits), solution.choice, fixed=table.fixed_options)
    costs = {name: table.costs_of(name) for name in limits}
    assert check(table.scores, costs, proof, table.fixed.model_dump()) == 0


def test_the_recipe_is_the_reason_where_it_fixes_an_option() -> None:
    table = table_of([full(0), half(0.1)], [full(0), half(0.2), none(0.9)])
    table = table.model_copy(update={"slots": (table.slots[0].model_copy(update={"fixed_option": 1}), table.slots[1])})
    limits = {"latency_ms": 3.0}
    attention, ffn = explain_layer(table, limits, solve(table, limits).choice, 0)
    assert attention.reason == "option-1 is what the recipe fixes here"
    assert [(found.option, found.objective) for found in attention.alternatives] == [
        ("option-1", pytest.approx(0.1)),
        ("option-2", None),
    ]
    assert ffn.chosen == "option-2"


def full(score: float) -> Option:
    return option(2, score, 100, 8, 2.0)


def half(score: float) -> Option:
    return option(1, score, 50, 4, 1.0)


def none(score: float) -> Option:
    return option(0, score, 0, 0, 0)


def two_layers() -> OptionTable:
    return table_of(
        [full(0), half(0.1)],
        [full(0), half(0.2), none(0.9)],
        [full(0), half(0.3), none(0.4)],
        [full(0), half(0.05), none(1.5)],
        fixed=Costs(parameters=40, latency_ms=1.0),
    )


def test_limits_are_numbers_or_shares_of_the_parent() -> None:
    parent = two_layers().costs(two_layers().parent_choice)
    limits = Limits(parameters="50%", kv_bytes_per_token=10, latency_ms="25.5%")
    expected = {"parameters": 220.0, "kv_bytes_per_token": 10.0, "latency_ms": pytest.approx(2.295)}
    assert absolute_limits(limits, parent) == expected


def test_an_impossible_limit_is_named_with_the_best_that_can_be_reached() -> None:
    with pytest.raises(InfeasibleBudget, match=r"fits latency_ms=1.2; the smallest reachable is 2") as caught:
        solve(two_layers(), {"parameters": 1000.0, "latency_ms": 1.2})
    assert "search.limits.latency_ms" in str(caught.value)


def test_limits_that_only_clash_are_named_together() -> None:
    cheap_or_fast = table_of([option(1, 0, 10, 1, 9.0), option(2, 1, 90, 1, 1.0)])
    with pytest.raises(InfeasibleBudget, match=r"together.* parameters=90 .* latency_ms=9 "):
        solve(cheap_or_fast, {"parameters": 20.0, "latency_ms": 2.0})


def test_greedy_follows_the_papers_order_by_hand() -> None:
    # Layer 0 is easier (mean 0.42 against 0.75) and has half of the 6 ms: half + full (0.1) beats full + half (0.2).
    # Layer 1 has the other 3 ms: full + half (0.05) is its best.
    choice = greedy_choice(two_layers(), {"latency_ms": 7.0})
    assert choice == (1, 0, 0, 1)


def test_random_choice_repeats_with_its_seed() -> None:
    limits = {"latency_ms": 5.0}
    choices = [random_choice(two_layers(), limits, seed) for seed in (1, 1, *range(8))]
    assert choices[0] == choices[1]
    assert len(set(choices)) > 1


def test_pareto_front_ends_at_the_parent_and_never_gets_worse() -> None:
    table = two_layers()
    front = pareto_front(table, {}, 6)
    scores = [solution.objective for _, solution in front]
    assert scores == sorted(scores, reverse=True)
    assert front[-1][1].choice == table.parent_choice
    assert front[0][0] == pytest.approx(2.0)


@pytest.mark.parametrize("resource", ["parameters", "kv_bytes_per_token"])
def test_a_front_over_any_resource_begins_at_the_least_of_it(resource: str) -> None:
    table = two_layers()
    front = pareto_front(table, {"latency_ms": 6.0}, 4, resource)
    limits = [limit for limit, _ in front]
    assert limits[0] == min(
        table.costs(choice).of(resource) for choice in itertools.product((0, 1), (0, 1, 2), (0, 1, 2), (0, 1, 2))
    )
    assert limits[-1] == table.costs(table.parent_choice).of(resource)
    for limit, solution in front:
        assert solution.objective == pytest.approx(brute_force(table, {"latency_ms": 6.0, resource: limit}))


def test_a_written_table_is_solved_again_under_other_limits() -> None:
    written = two_layers().model_dump(mode="json") | {"limits": {}}
    options, solution = solve_table(written, Limits(latency_ms="100%"))
    assert solution.choice == options.parent_choice


def test_the_solver_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    solve(two_layers(), {"latency_ms": 5.0})
    assert capfd.readouterr().out == ""


def test_pareto_front_is_one_point_where_what_the_limits_leave_is_slower_than_the_parent() -> None:
    table = table_of([option(4, 0.0, 10, 64, 1.0), option(1, 0.5, 8, 16, 1.3)])  # as a noisy measurement has it
    ((limit, solution),) = pareto_front(table, {"kv_bytes_per_token": 16}, 6)

    assert limit == pytest.approx(1.3)
    assert solution.choice == (1,)


LIMITED = ("attention_layers", "weight_bytes", "memory_bytes", "time_to_first_token_ms", "request_ms")


@settings(max_examples=40)
@given(
    st.data(), st.dictionaries(st.sampled_from(LIMITED), st.floats(0.2, 1), min_size=1), st.none() | st.floats(1.0, 3.0)
)
def test_any_combination_of_limits_is_met_as_brute_force_meets_it(
    data: st.DataObject, shares: dict[str, float], faster: float | None
) -> None:
    whole = st.integers(1, 16)

    def costs() -> Costs:
        return Costs(**{name: data.draw(whole) for name in LIMITED})

    options = [[(data.draw(whole) if j else 0, costs()) for j in range(3)] for _ in range(4)]
    table = table_of(
        *([Option(name=str(j), size=j, score=s, costs=c) for j, (s, c) in enumerate(slot)] for slot in options),
        fixed=costs(),
    ).model_copy(update={"batch_tokens": 64})
    parent = table.costs(table.parent_choice)
    wanted = Limits(
        **{name: f"{100 * share}%" for name, share in shares.items()},
        tokens_per_s=None if faster is None else f"{100 * faster}%",
    )
    limits = absolute_limits(wanted, parent, table.batch_tokens)
    assert limits.keys() == shares.keys() | ({"request_ms"} if faster else set())
    best = brute_force(table, limits)
    if best is None:
        with pytest.raises(InfeasibleBudget):
            solve(table, limits)
        return
    solution = solve(table, limits)
    assert solution.objective == pytest.approx(best)
    if faster:
        assert table.costs(solution.choice).request_ms <= parent.request_ms / faster * (1 + 1e-9)


def test_throughput_is_a_time_budget_for_the_batch() -> None:
    parent = Costs(request_ms=100.0)
    assert absolute_limits(Limits(tokens_per_s=1280), parent, 64) == {"request_ms": 50.0}
    assert absolute_limits(Limits(tokens_per_s="250%", request_ms="90%"), parent, 64) == {
        "request_ms": pytest.approx(40)
    }
    with pytest.raises(RecipeError, match=r"search\.limits\.tokens_per_s is set, and the given costs do not have it"):
        absolute_limits(Limits(tokens_per_s="250%"), Costs(latency_ms=1.0), 64)
