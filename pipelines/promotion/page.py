"""The page of a promotion, as Markdown: for the body of a request, and for a person who decides by hand."""

from collections.abc import Sequence

from components.core.store.signatures import SignedLine
from pipelines.promotion.evaluation import Evaluation
from pipelines.promotion.gate import Check, GateResult
from pipelines.promotion.measures import RELATIVE

TITLES = {
    "accuracy_on": "Accuracy, thinking on",
    "accuracy_off": "Accuracy, thinking off",
    "format": "Answers in the format of their mode",
    "perplexity": "Perplexity on held-out text (lower is better)",
    "speed": "Tokens a second",
}


def promotion_title(name: str, gate: GateResult) -> str:
    """Title of the commit and the request."""
    return f"Serve {name}: bundle {gate.bundle[:12]} of run {gate.run}"


def promotion_page(
    gate: GateResult, candidate: Evaluation, champion: Evaluation | None, signed: SignedLine | None, store: str
) -> str:
    """The page.

    Args:
        gate: the comparison.
        candidate: the model that would be served.
        champion: the model that is served, where the store knows it.
        signed: the signature of the candidate's bundle.
        store: address of the store.
    """
    verdict = "passed" if gate.passed else "**not passed**"
    lines = [
        f"## Bundle `{gate.bundle}`",
        "",
        f"Made by run `{gate.run}`. The gate is {verdict}: {gate.message}.",
        "",
        *_numbers(gate),
        "",
        f"Report: `{store}/runs/{gate.run}/report.html`, or `tessera report {gate.run} --store {store}`.",
        "",
        "### Lineage",
        "",
        *_lineage(gate, candidate, champion),
        "",
        "### Signature",
        "",
        *_signature(signed),
    ]
    return "\n".join(lines) + "\n"


def _numbers(gate: GateResult) -> list[str]:
    """The table of what was compared."""
    compared = [each for each in gate.checks if each.measure != "thresholds"]
    if not compared:
        return ["There is no champion yet: the thresholds of the recipe alone decide."]
    percent = f"{100 * gate.confidence:g} % interval"
    rows = [
        f"| | Candidate | Champion | Difference | {percent} | Problems | |",
        "|---|---|---|---|---|---|---|",
        *map(_row, compared),
    ]
    notes = [
        f"A measure passes where a loss of more than {100 * gate.tolerance:g} points (of perplexity and speed: "
        f"{100 * gate.tolerance:g} %) is ruled out. Accuracy and format are paired by problem.",
    ]
    if any(each.difference is not None and each.low is None for each in compared):
        notes.append("What has no interval is recorded as one number a model, and that decides.")
    return [*rows, "", " ".join(notes)]


def _row(check: Check) -> str:
    """A measure."""
    title = TITLES.get(check.measure, check.measure)
    verdict = ("passed" if check.passed else "**not passed**") if check.decides else "does not decide"
    if check.candidate is None or check.champion is None or check.difference is None:
        return f"| {title} | | | | | | {verdict}: {_cell(check.message)} |"
    if check.measure in RELATIVE:
        values = f"{check.candidate:,.4g} | {check.champion:,.4g} | {100 * check.difference:+.1f} %"
    else:
        values = f"{100 * check.candidate:.1f} % | {100 * check.champion:.1f} % | {100 * check.difference:+.1f}"
    known = check.low is not None and check.high is not None
    interval = f"{100 * (check.low or 0.0):+.1f} to {100 * (check.high or 0.0):+.1f}" if known else ""
    return f"| {title} | {values} | {interval} | {check.problems or ''} | {verdict} |"


def _lineage(gate: GateResult, candidate: Evaluation, champion: Evaluation | None) -> list[str]:
    """Digests of what both were made from."""
    both: Sequence[Evaluation | None] = (candidate, champion)
    names = list(dict.fromkeys(name for each in both if each is not None for name in each.ancestors))
    rows = {
        "Bundle": [f"`{candidate.bundle}`", f"`{gate.champion}`" if gate.champion else "none"],
        "Run": [f"`{each.run}`" if each else "" for each in both],
        "Recipe": [f"`{each.recipe}`" if each else "" for each in both],
        **{
            name: [f"`{each.ancestors[name]}`" if each and name in each.ancestors else "" for each in both]
            for name in names
        },
    }
    return [
        "| | Candidate | Champion |",
        "|---|---|---|",
        *(f"| {name} | {a} | {b} |" for name, (a, b) in rows.items()),
    ]


def _signature(signed: SignedLine | None) -> list[str]:
    """The signature, and how to check it."""
    if signed is None:
        return ["The bundle is not signed."]
    return [
        f"Key `{signed.key}` has signed the line `{signed.statement.strip()}` (with a line feed at its end):",
        "",
        f"```\n{signed.signature}\n```",
        "",
        "`cosign verify-blob --key PUBLIC --signature SIGNATURE LINE` checks it.",
    ]


def _cell(text: str) -> str:
    """A text for a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")
