"""The gate: what two models' records say about their difference, and when they say nothing."""

import math
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from components.core.store.signatures import demand_signature
from components.core.store.store import Store, open_store
from components.eval.answer_rows import AnswerRow
from pipelines.promotion.evidence import Evidence, gather_evidence
from pipelines.promotion.gate import Check
from pipelines.promotion.rules import PromotionRules
from tests.pipelines.promotion.evaluated_run import PROBLEMS, answers, record_run

ALL = PromotionRules(when=("accuracy_on", "accuracy_off", "format", "perplexity", "speed"))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "store")


def compare(
    store: Store,
    own: list[AnswerRow],
    base: list[AnswerRow],
    rules: PromotionRules = ALL,
    base_changes: dict[str, Any] | None = None,
    **changes: Any,
) -> Evidence:
    """Evidence for a candidate whose evaluation has `changes`, against a champion with its own."""
    champion = record_run(store, "champion-1", base, **(base_changes or {}))
    record_run(store, "candidate-1", own, **changes)
    return gather_evidence(store, "candidate-1", champion, rules)


def check(evidence: Evidence, measure: str) -> Check:
    return next(each for each in evidence.gate.checks if each.measure == measure)


def test_accuracy_is_compared_problem_by_problem(store: Store) -> None:
    """Both solve 80 %, the candidate of the other 20 % a quarter and the champion none: worked out by hand."""
    base = answers(0.8)
    unsolved = [row.id for row in base if row.mode == "on" and not row.correct[0]]
    solved_too = set(unsolved[: len(unsolved) // 4])
    own = [
        row.model_copy(update={"correct": (True,)}) if row.mode == "on" and row.id in solved_too else row
        for row in base
    ]
    found = check(compare(store, own, base), "accuracy_on")
    assert (found.candidate, found.champion) == pytest.approx((0.85, 0.8))
    assert found.problems == PROBLEMS
    n, won = PROBLEMS + 2, PROBLEMS * 0.05 + 1  # Bonett and Price: one problem added to each kind of difference
    mean = (won - 1) / n
    half = 1.959963984540054 * math.sqrt(((won + 1) / n - mean**2) / n)
    assert (found.low, found.high) == pytest.approx((mean - half, mean + half))
    assert found.passed


def test_an_equal_model_passes_and_a_worse_one_does_not(store: Store) -> None:
    same = compare(store, answers(0.9), answers(0.9))
    assert same.gate.passed, same.gate.message
    assert "accuracy_on +0.0 points" in same.gate.message
    worse = compare(open_store(Path(store.uri).parent / "other"), answers(0.8), answers(0.9))
    assert not worse.gate.passed
    assert "accuracy_on: -10.0 points" in worse.gate.message
    assert "a loss of 3 points is not ruled out" in worse.gate.message


def test_few_problems_do_not_rule_a_loss_out(store: Store) -> None:
    few = [row for row in answers(0.9) if row.id in {f"p{number}" for number in range(20)}]
    found = check(compare(store, few, answers(0.9)), "accuracy_on")
    assert (found.problems, found.passed, found.difference) == (20, False, 0.0)


def test_with_a_tolerance_of_zero_the_candidate_must_be_better(store: Store) -> None:
    rules = PromotionRules(tolerance=0)
    assert not compare(store, answers(0.9), answers(0.9), rules).gate.passed
    better = open_store(Path(store.uri).parent / "better")
    assert compare(better, answers(0.99, seed=1), answers(0.9), rules).gate.passed


def test_other_problems_are_no_common_ground(store: Store) -> None:
    own = [row.model_copy(update={"question": f"{row.question} "}) for row in answers(1.0)]
    evidence = compare(store, own, answers(0.5))
    assert check(evidence, "accuracy_on").message == "both were asked no common problem"
    assert not evidence.gate.passed


@pytest.mark.parametrize(
    ("measure", "changes", "words"),
    [
        ("speed", {"device": "cpu B"}, "speeds of different devices do not compare: cpu B and cpu A"),
        ("speed", {"settings": {"workload": {"batch_size": 1}}}, "speeds under different loads"),
        ("perplexity", {"corpus": "other"}, "the corpora differ"),
        ("perplexity", {"settings": {"held_out": {"seq_len": 512}}}, "eval.held_out differ"),
        ("accuracy_on", {"settings": {"max_tokens": 64}}, "answers were sampled differently"),
    ],
)
def test_what_was_measured_differently_is_not_compared(
    store: Store, measure: str, changes: dict[str, Any], words: str
) -> None:
    evidence = compare(store, answers(0.9), answers(0.9), **changes)
    found = check(evidence, measure)
    assert words in found.message
    assert (found.passed, found.difference) == (False, None)
    assert not evidence.gate.passed
    assert words in evidence.page
    others = PromotionRules(when=("format",))  # a measure that does not decide refuses nothing
    if measure in ("speed", "perplexity"):
        assert gather_evidence(store, "candidate-1", evidence.gate.champion, others).gate.passed


@pytest.mark.parametrize(
    ("changes", "passes"),
    [({"perplexity": 2.05}, True), ({"perplexity": 2.1}, False), ({"speed": 980.0}, True), ({"speed": 900.0}, False)],
)
def test_perplexity_and_speed_decide_by_their_ratio(store: Store, changes: dict[str, Any], passes: bool) -> None:
    evidence = compare(store, answers(0.9), answers(0.9), **changes)
    assert evidence.gate.passed is passes
    (measure,) = changes
    assert check(evidence, measure).low is None
    assert "What has no interval is recorded as one number a model" in evidence.page


def test_a_speed_with_an_interval_must_be_surely_as_fast(store: Store) -> None:
    """Equal speeds, each known to 1 %: their ratio is known to 1 % times the root of two. Known to 5 %, that is 7 %."""
    changes = {"speed_interval": [1000 / 1.01, 1010.0]}
    evidence = compare(store, answers(0.9), answers(0.9), ALL, base_changes=changes, **changes)
    found = check(evidence, "speed")
    assert found.low == pytest.approx(1.01 ** -math.sqrt(2) - 1)
    assert found.passed
    wide = {"speed_interval": [950.0, 1050.0]}
    other = open_store(Path(store.uri).parent / "wide")
    assert not check(compare(other, answers(0.9), answers(0.9), ALL, base_changes=wide, **wide), "speed").passed


def test_without_a_champion_the_thresholds_of_the_recipe_decide(store: Store) -> None:
    record_run(store, "good-1", answers(0.9))
    record_run(store, "bad-1", answers(0.5), gate=False)
    assert gather_evidence(store, "good-1", "", ALL).gate.passed
    bad = gather_evidence(store, "bad-1", "", ALL)
    assert not bad.gate.passed
    assert "min_accuracy=0.9 (found 0.5)" in bad.gate.message
    assert "There is no champion yet" in bad.page


def test_a_champion_that_the_store_does_not_know_lets_nothing_pass(store: Store) -> None:
    record_run(store, "good-1", answers(0.9))
    evidence = gather_evidence(store, "good-1", "f" * 64, ALL)
    assert not evidence.gate.passed
    assert "the store has no evaluation of the champion ffffffffffff" in evidence.gate.message


def test_the_page_has_numbers_report_lineage_and_a_signature_that_holds(store: Store, tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    private, public = tmp_path / "key.pem", tmp_path / "key.pub"
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    spki = serialization.PublicFormat.SubjectPublicKeyInfo
    public.write_bytes(key.public_key().public_bytes(serialization.Encoding.PEM, spki))
    champion = record_run(store, "champion-1", answers(0.9))
    bundle = record_run(store, "candidate-1", answers(0.9, seed=0))
    evidence = gather_evidence(store, "candidate-1", champion, ALL, private)
    page = evidence.page
    assert "| Accuracy, thinking on | 90.0 % | 90.0 % | +0.0 |" in page
    assert f"{store.uri}/runs/candidate-1/report.html" in page
    assert f"| Bundle | `{bundle}` | `{champion}` |" in page
    demand_signature(store, bundle, [public], "bundle")
    assert f"tessera artifact sha256:{bundle}" in page
    again = gather_evidence(store, "candidate-1", champion, ALL, private)
    assert again.page == page  # it is signed once
