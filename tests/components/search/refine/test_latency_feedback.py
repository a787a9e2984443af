"""The latency feedback where the true times are known, and one measurement in vLLM."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.core.model.checkpoint import save_model
from components.core.model.decoder import TesseraForCausalLM
from components.core.runtime.placement import Placement
from components.search.config import LatencyFeedback, Measurement
from components.search.costs.resources import Costs
from components.search.refine.latency_feedback import MeasuredChild, calibrate_latency, correct, measure_child
from components.search.solver.option_table import Option, OptionTable, Slot
from components.search.solver.problem import Choice
from components.search.solver.solve import solve
from components.search.space.subblocks import heterogeneous_model

NEW_TOKENS = 5
LOOP = LatencyFeedback(max_rounds=3)
NAMES = ("attention-4", "attention-2", "attention-0"), ("ffn-64", "ffn-32", "ffn-0")


def costs(latency_ms: float, first_ms: float = 0.0) -> Costs:
    return Costs().timed(latency_ms=latency_ms, time_to_first_token_ms=first_ms, new_tokens=NEW_TOKENS)


def table_of(step_ms: dict[str, float], fixed_ms: float, scores: list[list[float]]) -> OptionTable:
    """Layers of an attention and an FFN with three options each; prefill takes three times as long as a step."""
    slots = tuple(
        Slot(
            layer=number // 2,
            part="ffn" if number % 2 else "attention",
            options=tuple(
                Option(name=name, size=2 - k, score=score, costs=costs(step_ms.get(name, 0), 3 * step_ms.get(name, 0)))
                for k, (name, score) in enumerate(zip(NAMES[number % 2], row, strict=True))
            ),
        )
        for number, row in enumerate(scores)
    )
    return OptionTable(fixed=costs(fixed_ms, 3 * fixed_ms), slots=slots)


SCORES = [[0.0, 0.1 * (k + 1), 0.3 * (k % 3 + 1)] for k in range(12)]
SUMS = {"attention-4": 0.6, "attention-2": 0.45, "ffn-64": 0.3, "ffn-32": 0.2}
TABLE = table_of(SUMS, 1.0, SCORES)
PARENT = TABLE.costs(TABLE.parent_choice)


def truth_of(choice: Choice, *, pace: float = 1.0, fused: float = 0.05) -> MeasuredChild:
    """A machine on which attention costs more than measured, FFNs less, and layers without attention save something."""
    wrong = {"attention-4": 0.66, "attention-2": 0.5, "ffn-64": 0.24, "ffn-32": 0.15}
    real = table_of(wrong, 1.2, SCORES)
    saved = fused * sum(pick == 2 for pick in choice[::2])
    parent, child = real.costs(TABLE.parent_choice), real.costs(choice)
    shorter = costs(pace * (child.latency_ms - saved), pace * (child.time_to_first_token_ms - saved))
    return MeasuredChild(costs(pace * parent.latency_ms, pace * parent.time_to_first_token_ms), shorter, 0.01)


@pytest.mark.parametrize("resource", ["latency_ms", "time_to_first_token_ms", "request_ms"])
def test_sums_that_were_wrong_agree_after_three_rounds_at_most(resource: str) -> None:
    limits = {resource: 0.5 * PARENT.of(resource)}
    settled = calibrate_latency(TABLE, limits, truth_of, LOOP, NEW_TOKENS)
    assert settled.rounds[0].error > 0.02
    assert settled.rounds[-1].agreed
    assert len(settled.rounds) <= 3
    measured = truth_of(settled.solution.choice)
    share = measured.child.of(resource) / measured.parent.of(resource)
    assert settled.table.costs(settled.solution.choice).of(resource) / PARENT.of(resource) == pytest.approx(share, 0.02)
    assert share <= 0.5 * 1.02
    assert settled.table.costs(TABLE.parent_choice).of(resource) == pytest.approx(PARENT.of(resource))


def test_a_machine_that_is_slower_now_changes_nothing() -> None:
    limits = {"latency_ms": 0.5 * PARENT.latency_ms}
    quiet = calibrate_latency(TABLE, limits, truth_of, LOOP, NEW_TOKENS)
    busy = calibrate_latency(TABLE, limits, lambda choice: truth_of(choice, pace=1.7), LOOP, NEW_TOKENS)
    assert busy.solution == quiet.solution
    assert [r.measured["latency_ms"] for r in busy.rounds] == pytest.approx(
        [r.measured["latency_ms"] for r in quiet.rounds]
    )
    assert busy.rounds[0].pace == pytest.approx(1.7 * quiet.rounds[0].pace)


def test_without_rounds_nothing_is_measured_and_sums_that_are_right_stay() -> None:
    limits = {"latency_ms": 0.5 * PARENT.latency_ms}
    plain = calibrate_latency(TABLE, limits, lambda choice: pytest.fail("measured"), LatencyFeedback(), NEW_TOKENS)
    assert (plain.table, plain.rounds, plain.solution) == (TABLE, (), solve(TABLE, limits))
    right = calibrate_latency(
        TABLE, limits, lambda choice: MeasuredChild(PARENT, TABLE.costs(choice), 0.0), LOOP, NEW_TOKENS
    )
    assert (right.table, len(right.rounds)) == (TABLE, 1)
    assert right.rounds[0].error < 1e-12


def test_the_parents_time_is_held_against_a_child_that_noise_made_slower() -> None:
    child: Choice = (1, 1) * (len(SCORES) // 2)
    corrected = correct(TABLE, {child: costs(2 * PARENT.latency_ms, PARENT.time_to_first_token_ms)}, NEW_TOKENS)
    assert corrected.costs(TABLE.parent_choice).latency_ms == pytest.approx(PARENT.latency_ms, 1e-3)
    assert corrected.costs(child).latency_ms > TABLE.costs(child).latency_ms


def differs(choice: Choice) -> bool:
    """Whether a child has enough of its own and of the parent's that both can explain a time."""
    return sum(pick > 0 for pick in choice) >= 4 and sum(pick < 2 for pick in choice) >= 4


choices = st.tuples(*[st.integers(0, 2)] * len(SCORES)).filter(differs)


@settings(max_examples=50)
@given(st.dictionaries(choices, st.floats(0.85, 1.2), min_size=1, max_size=2))
def test_corrected_costs_add_up_to_what_was_measured(errors: dict[Choice, float]) -> None:
    measured = {
        choice: costs(TABLE.costs(choice).latency_ms * error, TABLE.costs(choice).time_to_first_token_ms / error)
        for choice, error in errors.items()
    }
    corrected = correct(TABLE, measured, NEW_TOKENS)
    for slot in corrected.slots:
        assert slot.options[2].costs.request_ms == 0  # the no-op stays free
        assert all(option.costs.latency_ms > 0 for option in slot.options[:2])
    for choice, true in {TABLE.parent_choice: PARENT, **measured}.items():
        found = corrected.costs(choice)
        assert found.request_ms == pytest.approx(found.time_to_first_token_ms + (NEW_TOKENS - 1) * found.latency_ms)
        if len(measured) == 1:
            assert found.latency_ms == pytest.approx(true.latency_ms, rel=0.01)


def test_a_child_and_its_parent_are_measured_in_vllm(
    parent: TesseraForCausalLM, parent_folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("vllm")
    save_model(heterogeneous_model(parent.config, ((4, 64), (0, 32))), tmp_path, tokenizer=None, by_block=True)
    load = Measurement(batch_size=2, prompt_tokens=4, new_tokens=NEW_TOKENS, rounds=2)
    measured = measure_child(parent_folder, tmp_path, load, Placement())
    assert measured.spread >= 0
    for found in (measured.parent, measured.child):
        assert min(found.latency_ms, found.time_to_first_token_ms) > 0
        assert found.request_ms == pytest.approx(found.time_to_first_token_ms + (NEW_TOKENS - 1) * found.latency_ms)
