"""The exact solver on free-form problems: against brute force in fractions, with its proofs checked."""

import itertools
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from components.search.solver.certificate import Certificate, WrongCertificate, check
from components.search.solver.problem import Choice, Problem
from components.search.solver.solve import certify, find_conflict, pool, solve_problem

Rows = list[list[float]]
Table = tuple[Rows, dict[str, Rows]]

tenths = st.integers(-20, 60).map(lambda value: value / 10)
anything = st.floats(-5, 5, allow_nan=False, allow_subnormal=False)


@st.composite
def tables(draw: st.DrawFn, values: st.SearchStrategy[float] | None = None) -> Table:
    """Up to five slots of up to four options and three costs; often ties, zeros and negative numbers."""
    if values is None:
        values = draw(st.sampled_from([tenths, anything, st.just(0.0), st.sampled_from([0.0, 0.1])]))
    widths = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    scores = [[draw(values) for _ in range(width)] for width in widths]
    costs = {name: [[draw(tenths) for _ in range(width)] for width in widths] for name in "abc"}
    return scores, costs


def exact(number: float) -> Fraction:
    return Fraction(str(number))


def total(rows: Rows, choice: Choice) -> Fraction:
    return sum((exact(row[option]) for row, option in zip(rows, choice, strict=True)), start=Fraction(0))


def choices_within(table: Table, limits: dict[str, float]) -> list[Choice]:
    scores, costs = table
    return [
        choice
        for choice in itertools.product(*(range(len(row)) for row in scores))
        if all(total(costs[name], choice) <= exact(limit) for name, limit in limits.items())
    ]


@st.composite
def limited(draw: st.DrawFn) -> tuple[Table, dict[str, float]]:
    """Limits that some choice meets with equality, or a little less or more than that."""
    table = draw(tables())
    scores, costs = table
    choice = tuple(draw(st.integers(0, len(row) - 1)) for row in scores)
    names = draw(st.sets(st.sampled_from("abc")))
    limits = {name: float(total(costs[name], choice) + draw(st.integers(-1, 1)) / Fraction(10)) for name in names}
    return table, limits


CROSSED_OUT_BY_THE_ROOT_ALONE = (
    (
        [[0.0, -0.030890990683460018, 0.0, 0.0], [0.0, 0.0, 0.0]],
        {
            "a": [[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0]],
            "b": [[0.0, 0.0, 0.1, 0.0], [0.0, 0.0, 0.0]],
            "c": [[0.1, 0.2, 0.0, 0.1], [0.0, 0.0, 0.0]],
        },
    ),
    {"b": 0.0, "c": 0.1},
)
"""The multipliers that prove the bound of what is left do not prove it of all options."""


@settings(max_examples=150)
@given(limited())
@example(CROSSED_OUT_BY_THE_ROOT_ALONE)
def test_the_solver_finds_what_brute_force_finds_and_its_proof_holds(case: tuple[Table, dict[str, float]]) -> None:
    (scores, costs), limits = case
    problem = Problem.of(scores, costs, limits)
    best = min((total(scores, choice) for choice in choices_within(*case)), default=None)
    solution = solve_problem(problem)
    if best is None:
        assert solution is None
        return
    assert solution is not None
    assert total(scores, solution.choice) == best
    assert solution.choice in choices_within(*case)
    assert solution.status == "optimal"
    assert (solution.objective, solution.bound, solution.gap) == (float(best), float(best), 0.0)
    certificate = certify(problem, solution.choice)
    assert check(scores, costs, Certificate.model_validate_json(certificate.model_dump_json())) == 0


@settings(max_examples=50)
@given(limited())
def test_no_worse_choice_can_be_certified(case: tuple[Table, dict[str, float]]) -> None:
    (scores, costs), limits = case
    within = choices_within(*case)
    if not within:
        return
    best, worst = (pick(within, key=lambda choice: total(scores, choice)) for pick in (min, max))
    certificate = certify(Problem.of(scores, costs, limits), best)
    if total(scores, best) < total(scores, worst):
        lie = certificate.model_copy(update={"choice": worst, "objective": str(total(scores, worst))})
        with pytest.raises(WrongCertificate):
            check(scores, costs, lie.model_copy(update={"bound": lie.objective}))


@settings(max_examples=40)
@given(limited(), st.integers(1, 6), st.integers(1, 3))
def test_pools_are_the_best_of_what_differs(case: tuple[Table, dict[str, float]], count: int, distance: int) -> None:
    (scores, costs), limits = case
    left, expected = choices_within(*case), []
    found = pool(Problem.of(scores, costs, limits), count, distance=distance)
    for solution in found:
        expected.append(min(total(scores, choice) for choice in left))
        assert solution.choice in left
        left = [
            choice for choice in left if sum(a != b for a, b in zip(choice, solution.choice, strict=True)) >= distance
        ]
    assert [solution.objective for solution in found] == [float(value) for value in expected]
    assert len(found) == count or not left


@settings(max_examples=60)
@given(tables(tenths), st.fixed_dictionaries({name: tenths for name in "abc"}))
def test_the_conflict_is_the_smallest_and_says_what_can_be_reached(table: Table, limits: dict[str, float]) -> None:
    scores, costs = table
    if choices_within(table, limits):
        return
    conflict = find_conflict(Problem.of(scores, costs, limits))
    clashing = [
        names
        for size in range(1, 4)
        for names in itertools.combinations(limits, size)
        if not choices_within(table, {name: limits[name] for name in names})
    ]
    assert tuple(conflict) == clashing[0]
    for name, value in conflict.items():
        others = choices_within(table, {other: limits[other] for other in conflict if other != name})
        assert value == float(min(total(costs[name], choice) for choice in others))


def hard_table(seed: int, num_slots: int = 14) -> Table:
    """Costs that go with quality, so that bounds alone prove nothing."""
    generator = np.random.default_rng(seed)
    sizes = generator.random((num_slots, 5, 3))
    scores = generator.random((num_slots, 1)) * (3 - sizes.sum(axis=2) + 0.3 * generator.random((num_slots, 5)))
    return scores.tolist(), {name: sizes[:, :, index].tolist() for index, name in enumerate("abc")}


def test_scores_of_any_size_give_the_same_choice_and_an_exact_proof() -> None:
    scores, costs = hard_table(0)
    limits = dict.fromkeys("abc", 6.0)
    choices = []
    for factor in (1, 1e-2, 1e-4, 1e-9, 1e6):
        scaled = [[score * factor for score in row] for row in scores]
        problem = Problem.of(scaled, costs, limits)
        solution = solve_problem(problem)
        assert solution is not None
        choices.append(solution.choice)
        assert check(scaled, costs, certify(problem, solution.choice)) == 0
    assert len(set(choices)) == 1


def test_proofs_hold_where_options_are_dominated() -> None:
    generator = np.random.default_rng(5)
    for _ in range(2):
        scores = generator.random((30, 20)).tolist()
        costs = {name: generator.random((30, 20)).tolist() for name in "abc"}
        problem = Problem.of(scores, costs, dict.fromkeys("abc", 9.0))
        solution = solve_problem(problem)
        assert solution is not None
        assert check(scores, costs, certify(problem, solution.choice)) == 0


def test_limits_that_no_choice_meets_by_a_hair() -> None:
    generator = np.random.default_rng(6)
    scores, sizes = generator.random((40, 20)), generator.random((40, 20, 3))
    costs = {name: sizes[:, :, index].tolist() for index, name in enumerate("abc")}
    others = Problem.of(costs["a"], costs, {"b": 9.0, "c": 9.0})
    least = solve_problem(others)
    assert least is not None
    for missing in (0.0, 1e-7, 1e-3):
        problem = Problem.of(scores.tolist(), costs, {"a": least.objective - missing, "b": 9.0, "c": 9.0})
        found = solve_problem(problem)
        assert (found is None) == (missing > 0)
    assert find_conflict(problem)["a"] == least.objective


def test_a_proof_that_was_tampered_with_is_refused() -> None:
    scores, costs = hard_table(1)
    problem = Problem.of(scores, costs, dict.fromkeys("abc", 6.0))
    solution = solve_problem(problem)
    assert solution is not None
    certificate = certify(problem, solution.choice)
    root = certificate.nodes[0]
    assert len(certificate.nodes) > 10
    cut = root.model_copy(update={"children": dict(list(root.children.items())[1:])})
    flat = [node.model_copy(update={"multipliers": (0.0, 0.0, 0.0)}) for node in certificate.nodes]
    negative = root.model_copy(update={"multipliers": (-1.0, 0.0, 0.0)})
    loop = root.model_copy(update={"children": dict.fromkeys(root.children, 0)})
    for nodes in (
        (cut, *certificate.nodes[1:]),
        certificate.nodes[:5],
        flat,
        (negative, *certificate.nodes[1:]),
        (loop,),
    ):
        with pytest.raises(WrongCertificate):
            check(scores, costs, certificate.model_copy(update={"nodes": tuple(nodes)}))
    tighter = certificate.model_copy(update={"limits": dict.fromkeys("abc", 5.0)})
    with pytest.raises(WrongCertificate, match="exceeds a limit"):
        check(scores, costs, tighter)


def test_a_proof_that_would_be_too_large_leaves_an_honest_gap() -> None:
    scores, costs = hard_table(2)
    problem = Problem.of(scores, costs, dict.fromkeys("abc", 6.0))
    solution = solve_problem(problem)
    assert solution is not None
    certificate = certify(problem, solution.choice, max_nodes=1)
    gap = check(scores, costs, certificate)
    assert 0 < gap < Fraction(1, 10)
    assert gap == certificate.gap
    with pytest.raises(WrongCertificate):
        check(scores, costs, certificate.model_copy(update={"bound": certificate.objective}))


@pytest.mark.parametrize("budget", [{"time_limit_s": 0.0}, {"max_nodes": 5000}], ids=["time", "nodes"])
def test_a_search_that_is_stopped_gives_the_best_so_far_with_its_gap(budget: dict[str, Any]) -> None:
    generator = np.random.default_rng(3)
    sizes = generator.random((60, 30, 3))
    scores = (3 - sizes.sum(axis=2) + 0.3 * generator.random((60, 30))).tolist()
    costs = {name: sizes[:, :, index].tolist() for index, name in enumerate("abc")}
    problem = Problem.of(scores, costs, dict.fromkeys("abc", 30.0))
    solution = solve_problem(problem, **budget)
    assert solution is not None
    assert problem.fits(solution.choice)
    assert solution.status == "feasible"
    assert solution.bound < solution.objective
    assert 0 < solution.gap < 0.02


def test_fixed_slots_stay_and_the_proof_says_so() -> None:
    scores, costs = hard_table(4)
    problem = Problem.of(scores, costs, dict.fromkeys("abc", 6.5))
    free = solve_problem(problem)
    assert free is not None
    other = (free.choice[3] + 1) % 5
    held = solve_problem(problem.with_fixed({3: other}))
    assert held is not None
    assert held.choice[3] == other
    assert held.objective >= free.objective
    assert check(scores, costs, certify(problem, held.choice, fixed={3: other})) == 0
