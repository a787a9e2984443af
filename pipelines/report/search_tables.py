"""Tables and sentences on a search: choices within its limits, speeds, feedback, fusion, candidates, margins."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

RESOURCES = {
    "parameters": ("parameters", 1.0, ",.0f"),
    "memory_bytes": ("memory, MiB", 2.0**20, ",.1f"),
    "kv_bytes_per_token": ("KV bytes a token", 1.0, ",.0f"),
    "attention_layers": ("attention layers", 1.0, ".0f"),
    "latency_ms": ("decode step, ms", 1.0, ".2f"),
    "time_to_first_token_ms": ("first token, ms", 1.0, ".1f"),
    "request_ms": ("request, ms", 1.0, ".1f"),
}
"""Title, divisor and format of each resource, in the order of the columns."""

SlotId = tuple[int, str]
"""Layer of the parent, and `attention` or `ffn`."""


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        label: its heading.
        cells: texts, one a column.
        good: badge that marks it as good; empty for none.
        bad: badge that marks it as bad.
        muted: whether it is of less interest, such as a baseline.
    """

    label: str
    cells: tuple[str, ...]
    good: str = ""
    bad: str = ""
    muted: bool = False


@dataclass(frozen=True)
class Table:
    """A table of the page.

    Attributes:
        id: of its element.
        columns: headings, first that of the row labels.
        rows: as many cells each as there are further columns.
    """

    id: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class SlotNote:
    """How close the choice at one slot is.

    Attributes:
        text: the next best option, what it scores more, and the error of that.
        within_noise: whether other held-out text could change the choice; None where that is not known.
    """

    text: str
    within_noise: bool | None


def slot_notes(search: Mapping[str, Any]) -> dict[SlotId, SlotNote]:
    """A note for each slot where another option fits the limits.

    Margins belong to the choice with the best score, so there are none where distillation preferred another candidate.

    Args:
        search: `search.json`.
    """
    candidates = search.get("candidates")
    if candidates and list(search["child"]["choice"]) != list(candidates[0]["choice"]):
        return {}
    return {
        (margin["layer"], margin["part"]): SlotNote(_margin_text(margin), margin["within_noise"])
        for margin in search.get("margins", ())
        if margin["following"] is not None
    }


def _margin_text(margin: Mapping[str, Any]) -> str:
    error = "" if margin["error"] is None else f" ± {margin['error']:.2g}"
    noise = ", within the noise" if margin["within_noise"] else ""
    return f"{margin['chosen']}; next best {margin['following']}, {margin['difference']:+.4g}{error}{noise}"


def noise_sentence(notes: Mapping[SlotId, SlotNote]) -> str:
    """Number of slots whose choice lies within the noise; empty where no noise is known."""
    known = [note for note in notes.values() if note.within_noise is not None]
    if not known:
        return ""
    count = sum(bool(note.within_noise) for note in known)
    verb = "lies" if count == 1 else "lie"
    meaning = "the next best is less than two standard errors of the held-out text away"
    return f"{count or 'None'} of {len(known)} slots of the choice {verb} within the noise of the scores: {meaning}."


def proof_sentence(search: Mapping[str, Any]) -> str:
    """Size of the search space, the solver's result, and where latency was measured."""
    proof, slots = search["proof"], search["slots"]
    return (
        f"{len(slots)} sub-blocks, {sum(len(slot['options']) for slot in slots)} options. "
        f"The solution is {proof['status'].lower()}: score {proof['objective']:.4g}, bound {proof['bound']:.4g}, "
        f"gap {100 * proof['gap']:.2g} %. Latency was measured on {search['machine']['device']}."
    )


def choices_table(search: Mapping[str, Any]) -> Table:
    """Score and costs of the parent, the child, the baselines, and the limits."""
    resources = [name for name in RESOURCES if search["parent"].get(name)]
    choices = {
        "parent": {"score": 0.0, "costs": search["parent"], "within_limits": True},
        "chosen child": search["child"],
        "greedy": search["greedy_child"],
        **search.get("baselines", {}),
        "random": search["random_child"],
    }
    rows = [
        Row(
            name,
            (f"{choice['score']:.4f}", *(_cost(choice["costs"].get(resource, 0), resource) for resource in resources)),
            bad="" if choice["within_limits"] else "over a limit",
            muted=name not in ("parent", "chosen child"),
        )
        for name, choice in choices.items()
    ]
    limits = [_cost(search["limits"][name], name) if name in search["limits"] else "" for name in resources]
    columns = ("choice", "score", *(RESOURCES[name][0] for name in resources))
    return Table("choices", columns, (*rows, Row("limit", ("", *limits), muted=True)))


def _cost(value: float, resource: str) -> str:
    _, divisor, style = RESOURCES[resource]
    return format(value / divisor, style)


def speeds_table(search: Mapping[str, Any], models: Mapping[str, Any]) -> Table:
    """Speed-up over the parent, predicted and measured, of each model that the evaluation ran.

    Args:
        search: `search.json`.
        models: models of the run by role, with their measured speeds.
    """
    measured = {role: model["tokens_per_second"] for role, model in models.items() if model["tokens_per_second"]}
    time = "request_ms" if search["parent"].get("request_ms") else "latency_ms"
    rows = []
    for role, name in (("child", "child"), ("greedy", "greedy_child"), ("random", "random_child")):
        predicted_ms = search[name]["costs"][time]
        if role in measured and "parent" in measured and predicted_ms:
            predicted, actual = search["parent"][time] / predicted_ms, measured[role] / measured["parent"]
            rows.append(Row(role, (f"{predicted:.2f}×", f"{actual:.2f}×", f"{100 * (actual / predicted - 1):+.0f} %")))
    columns = ("speed-up over the parent", "predicted, before fusion", "measured, after fusion", "difference")
    return Table("speeds", columns, tuple(rows))


def feedback_table(search: Mapping[str, Any]) -> Table:
    """Predicted and measured times of the child in each round of the latency feedback."""
    rounds = search.get("latency_feedback", ())
    times = [name for name in RESOURCES if rounds and name in rounds[0]["measured"]]
    rows = [
        Row(
            str(number),
            (
                f"{each['score']:.4f}",
                *(_cost(each[kind][name], name) for name in times for kind in ("predicted", "measured")),
                f"{100 * each['error']:.1f} %",
            ),
            good="agreed" if each["agreed"] else "",
        )
        for number, each in enumerate(rounds, 1)
    ]
    titles = [f"{RESOURCES[name][0]}, {kind}" for name in times for kind in ("predicted", "measured")]
    return Table("rounds", ("round", "score", *titles, "error"), tuple(rows))


def candidates_table(search: Mapping[str, Any]) -> Table:
    """KL of each candidate before and after its short distillation."""
    rows = [
        Row(
            str(number),
            (
                f"{trial['score']:.4f}",
                f"{trial['kl_before']:.4f}",
                f"{trial['kl_after']:.4f}",
                f"{trial['difference']:+.4f} ± {trial['difference_error']:.4f}" if number > 1 else "–",
            ),
            good="chosen" if trial["chosen"] else "",
        )
        for number, trial in enumerate(search.get("candidates", ()), 1)
    ]
    return Table("candidates", ("candidate", "score", "KL before", "KL after", "difference to the first"), tuple(rows))


def fusion_sentences(fusion: Mapping[str, Any] | None) -> Iterator[str]:
    """What FFN fusion did: the fused layers, the KL before and after, and the time of a decode step."""
    if not fusion:
        return
    groups: Sequence[Sequence[int]] = [group for run in fusion["runs"] for group in run["groups"]]
    if not groups:
        yield "No FFNs were fused."
        return
    yield "Fused: layers " + "; ".join(", ".join(map(str, group)) for group in groups) + "."
    yield (
        f"KL from the parent before any distillation, on {fusion['tokens']:,} held-out tokens: "
        f"{fusion['kl_before']:.4f} without fusion, {fusion['kl_after']:.4f} with it "
        f"({fusion['kl_after'] - fusion['kl_before']:+.4f} ± {fusion['kl_error']:.4f} nats a token)."
    )
    if fusion.get("timing"):
        before, after = (statistics.median(fusion[name]) for name in ("before_ms", "after_ms"))
        engine = {"decoder": "our own decoder", "vllm": "vLLM"}[fusion["timing"]]
        yield (
            f"A decode step in {engine}: {before:.2f} ms without fusion, {after:.2f} ms with it "
            f"({100 * (after / before - 1):+.1f} %; medians of {len(fusion['before_ms'])}, in turn)."
        )
