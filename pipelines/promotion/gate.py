"""The gate: the candidate's recorded answers and times against those of the champion.

Accuracy and format are compared problem by problem, which leaves far less noise than the difference of two means; the
definition is that of the evaluation (`components/eval/gains.py`). Perplexity and speed are recorded as one number a
model: speed has an interval where the evaluation has measured one, perplexity has none, and then the number decides.
"""

import math
from collections.abc import Callable, Iterator, Sequence

from pydantic import Field

from components.core.base.kubernetes_objects import StatusPart
from components.core.base.normal_distribution import Z_95, quantile
from components.deploy.gate import ROUNDING, failed_checks
from components.eval.answer_rows import AnswerRow
from components.eval.gains import correctness, paired_gain
from components.eval.scores import PROMPT_MODES
from pipelines.promotion.evaluation import SAME_ANSWERS, Evaluation
from pipelines.promotion.measures import MEASURES, RELATIVE, Measure
from pipelines.promotion.rules import PromotionRules


class Check(StatusPart):
    """One measure of candidate and champion."""

    measure: str
    """What was measured; `thresholds` are those of the recipe's `deploy.gate`."""
    decides: bool
    """Whether the promotion depends on it."""
    passed: bool
    """Whether the candidate is shown not to be worse by more than the tolerance."""
    candidate: float | None = None
    """Value of the candidate."""
    champion: float | None = None
    """Value of the champion."""
    difference: float | None = None
    """Candidate minus champion, for perplexity and speed as a fraction of the champion's value."""
    low: float | None = None
    """Lower end of the confidence interval of the difference; absent where the records have one number a model."""
    high: float | None = None
    """Upper end of the interval."""
    problems: int | None = None
    """Number of problems that both were asked."""
    message: str = ""
    """Why it could not be compared, or why it did not pass."""


class GateResult(StatusPart):
    """The comparison of a candidate with the champion."""

    run: str
    """Run of the candidate."""
    bundle: str
    """Digest of the candidate's bundle."""
    champion: str = ""
    """Digest of the champion's bundle; empty at the first promotion, which passes by the recipe's thresholds alone."""
    champion_run: str = ""
    """Run of the champion; empty where the store does not have it."""
    passed: bool
    """Whether the candidate may take the champion's place."""
    confidence: float
    """Confidence of the intervals."""
    tolerance: float
    """Largest loss that is accepted."""
    checks: list[Check] = Field(default_factory=list)
    """What was compared."""

    @property
    def message(self) -> str:
        """The result in a sentence."""
        failed = [f"{each.measure}: {each.message}" for each in self.checks if each.decides and not each.passed]
        if failed:
            return "; ".join(failed)
        return "; ".join(map(describe, (each for each in self.checks if each.decides)))


def judge(candidate: Evaluation, champion: Evaluation | None, served: str, rules: PromotionRules) -> GateResult:
    """Compare a candidate with the champion.

    Args:
        candidate: the model that would be served.
        champion: the model that is served; None where there is none, or the store does not know it.
        served: digest of the bundle that is served, empty where there is none.
        rules: which measures decide, and how.
    """
    checks = [_thresholds(candidate)]
    if champion is not None:
        checks += [_compare(measure, candidate, champion, rules) for measure in MEASURES]
    elif served:
        unknown = f"the store has no evaluation of the champion {served[:12]}; promote the candidate by hand once"
        checks += [Check(measure=each, decides=True, passed=False, message=unknown) for each in rules.when]
    return GateResult(
        run=candidate.run,
        bundle=candidate.bundle,
        champion=served,
        champion_run="" if champion is None else champion.run,
        passed=all(each.passed for each in checks if each.decides),
        confidence=rules.confidence,
        tolerance=rules.tolerance,
        checks=checks,
    )


def describe(check: Check) -> str:
    """A check in a few words."""
    if check.difference is None:
        return f"{check.measure} passed"
    text = f"{check.measure} {100 * check.difference:+.1f} {'%' if check.measure in RELATIVE else 'points'}"
    if check.low is not None and check.high is not None:
        text += f" ({100 * check.low:+.1f} to {100 * check.high:+.1f})"
    return text if check.problems is None else f"{text} on {check.problems} problems"


def _thresholds(candidate: Evaluation) -> Check:
    """The gate of the recipe, which `deploy` has judged."""
    gate = candidate.deploy.result.get("gate")
    passed = isinstance(gate, dict) and gate.get("passed") is True
    checks = gate.get("checks") if isinstance(gate, dict) else None
    failed = failed_checks([each for each in checks if isinstance(each, dict)]) if isinstance(checks, list) else ""
    message = "" if passed else failed or "nothing was measured"
    return Check(measure="thresholds", decides=True, passed=passed, message=message)


def _compare(measure: Measure, candidate: Evaluation, champion: Evaluation, rules: PromotionRules) -> Check:
    """One measure of both."""
    decides = measure in rules.when
    reason = next(_not_comparable(measure, candidate, champion), None)
    if reason is not None:
        return Check(measure=measure, decides=decides, passed=False, message=reason)
    if measure == "perplexity":
        return _ratio(measure, "perplexity", candidate, champion, rules, is_loss=True)
    if measure == "speed":
        return _ratio(measure, "tokens_per_second", candidate, champion, rules, is_loss=False)
    select, marks = _MARKS[measure]
    own, base = ([row for row in each.answers if row.mode in select] for each in (candidate, champion))
    gain = paired_gain(base, own, marks, rules.confidence)
    if gain is None:
        return Check(measure=measure, decides=decides, passed=False, message="both were asked no common problem")
    low, high = gain.interval
    passed = low >= -rules.tolerance - ROUNDING
    found = Check(
        measure=measure,
        decides=decides,
        passed=passed,
        candidate=gain.base + gain.value,
        champion=gain.base,
        difference=gain.value,
        low=low,
        high=high,
        problems=gain.problems,
    )
    if not passed:
        what = describe(found).removeprefix(measure).strip()
        found.message = f"{what}; a loss of {100 * rules.tolerance:g} points is not ruled out"
    return found


def _not_comparable(measure: Measure, candidate: Evaluation, champion: Evaluation) -> Iterator[str]:
    """Reasons why the records of two models say nothing about their difference."""
    own, other = candidate.record, champion.record
    if own is None or other is None:
        yield f"the {'candidate' if own is None else 'champion'} was not evaluated"
        return
    if measure == "perplexity":
        if candidate.tokenizer != champion.tokenizer:
            yield "perplexities of different tokenizers do not compare"
        if own.inputs.get("corpus") != other.inputs.get("corpus"):
            yield "perplexities on different texts do not compare: the corpora differ"
        if candidate.settings("held_out") != champion.settings("held_out"):
            yield "perplexities on different texts do not compare: the settings eval.held_out differ"
    elif measure == "speed":
        if own.device != other.device:
            devices = " and ".join(each or "unknown" for each in (own.device, other.device))
            yield f"speeds of different devices do not compare: {devices}"
        if candidate.settings("workload") != champion.settings("workload"):
            yield "speeds under different loads do not compare: the settings eval.workload differ"
    elif candidate.settings(*SAME_ANSWERS) != champion.settings(*SAME_ANSWERS):
        yield f"answers were sampled differently: the settings eval.{', '.join(SAME_ANSWERS)} differ"


def _ratio(
    measure: Measure, key: str, candidate: Evaluation, champion: Evaluation, rules: PromotionRules, *, is_loss: bool
) -> Check:
    """A measure with one number a model, as a fraction of the champion's; the worse end of its interval decides."""
    own, base = candidate.measured.get(key), champion.measured.get(key)
    decides = measure in rules.when
    if own is None or base is None:
        who = "candidate" if own is None else "champion"
        return Check(measure=measure, decides=decides, passed=False, message=f"not measured for the {who}")
    ratio, half = own / base, _log_half_width(key, (candidate, champion), rules.confidence)
    worst = ratio * math.exp((half or 0.0) * (1 if is_loss else -1)) - 1
    found = Check(
        measure=measure,
        decides=decides,
        passed=(worst if is_loss else -worst) <= rules.tolerance + ROUNDING,
        candidate=own,
        champion=base,
        difference=ratio - 1,
    )
    if half is not None:
        found.low, found.high = (ratio * math.exp(sign * half) - 1 for sign in (-1, 1))
    if not found.passed:
        found.message = (
            f"{own:.4g} against {base:.4g}; that it is more than {100 * rules.tolerance:g} % worse is not ruled out"
        )
    return found


def _log_half_width(key: str, models: Sequence[Evaluation], confidence: float) -> float | None:
    """Half the width of the interval of the logarithm of a ratio, from the recorded 95 % intervals of both numbers."""
    intervals = [each.measured.get(f"{key}_interval") for each in models]
    if None in intervals:
        return None
    halves = [math.log(high / low) / 2 for low, high in filter(None, intervals)]
    return math.hypot(*halves) * quantile(confidence) / Z_95


def _format(row: AnswerRow) -> Sequence[bool]:
    return row.format_ok or ()


_MARKS: dict[str, tuple[Sequence[str], Callable[[AnswerRow], Sequence[bool]]]] = {
    "accuracy_on": (PROMPT_MODES["on"], correctness),
    "accuracy_off": (PROMPT_MODES["off"], correctness),
    "format": ([mode for modes in PROMPT_MODES.values() for mode in modes], _format),
}
"""Prompt modes of a measure, and what counts in an answer."""
