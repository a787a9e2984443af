"""What a report tells of a search in tables: choices at the same limits, speeds, fusion, candidates, a second step."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.report.margins_view import noise_sentence

RESOURCES = {
    "parameters": ("parameters", 1.0, ",.0f"),
    "memory_bytes": ("memory, MiB", 2.0**20, ",.1f"),
    "kv_bytes_per_token": ("KV bytes<br>a token", 1.0, ",.0f"),
    "attention_layers": ("attentions", 1.0, ".0f"),
    "latency_ms": ("decode step, ms", 1.0, ".2f"),
    "time_to_first_token_ms": ("first token, ms", 1.0, ".1f"),
    "request_ms": ("request, ms", 1.0, ".1f"),
}
"""Title, divisor and format of each resource, in the order of the table."""


@dataclass(frozen=True)
class ChoiceRow:
    """A choice of sub-blocks at the limits of the search."""

    name: str
    score: str
    costs: tuple[str, ...]
    within_limits: bool


@dataclass(frozen=True)
class SpeedRow:
    """How many times faster than the parent a model is."""

    name: str
    predicted: str
    measured: str
    difference: str


@dataclass(frozen=True)
class CandidateRow:
    """A candidate after its short distillation."""

    number: int
    score: str
    kl_before: str
    kl_after: str
    difference: str
    chosen: bool


@dataclass(frozen=True)
class RoundRow:
    """A child of the latency feedback, predicted and measured."""

    number: int
    score: str
    times: tuple[tuple[str, str], ...]
    """Predicted and measured, of each time."""
    error: str
    agreed: bool


@dataclass(frozen=True)
class SearchView:
    """The tables of the search section."""

    titles: tuple[str, ...]
    limits: tuple[str, ...]
    noise: str
    choices: tuple[ChoiceRow, ...]
    speeds: tuple[SpeedRow, ...]
    fusion: tuple[str, ...]
    candidates: tuple[CandidateRow, ...]
    round_titles: tuple[str, ...]
    rounds: tuple[RoundRow, ...]


def search_view(search: Mapping[str, Any], models: Mapping[str, Any]) -> SearchView:
    """Tables of a search.

    Args:
        search: `search.json`.
        models: the run's models by role, with the speeds that were measured.
    """
    known = {name: form for name, form in RESOURCES.items() if search["parent"].get(name)}
    return SearchView(
        titles=tuple(title for title, _, _ in known.values()),
        limits=tuple(
            _shown(search["limits"][name], form) if name in search["limits"] else "" for name, form in known.items()
        ),
        noise=noise_sentence(search),
        choices=tuple(_choices(search, known)),
        speeds=tuple(_speeds(search, models)),
        fusion=tuple(_fusion(search.get("fusion"))),
        candidates=tuple(_candidates(search.get("candidates", ()))),
        round_titles=tuple(RESOURCES[name][0] for name in _times(search)),
        rounds=tuple(_rounds(search)),
    )


Form = tuple[str, float, str]


def _choices(search: Mapping[str, Any], known: Mapping[str, Form]) -> Iterator[ChoiceRow]:
    """The parent, the child and the baselines."""
    baselines = {"greedy": search["greedy_child"], **search.get("baselines", {}), "random": search["random_child"]}
    parent = {"score": 0.0, "costs": search["parent"], "within_limits": True}
    for name, choice in {"parent": parent, "chosen child": search["child"], **baselines}.items():
        costs = tuple(_shown(choice["costs"].get(resource, 0), form) for resource, form in known.items())
        yield ChoiceRow(name, f"{choice['score']:.4f}", costs, choice["within_limits"])


def _shown(value: float, form: Form) -> str:
    _, divisor, style = form
    return format(value / divisor, style)


def _speeds(search: Mapping[str, Any], models: Mapping[str, Any]) -> Iterator[SpeedRow]:
    """Predicted and measured speed of every model that the evaluation has run."""
    measured = {role: model["tokens_per_second"] for role, model in models.items() if model["tokens_per_second"]}
    time = "request_ms" if search["parent"].get("request_ms") else "latency_ms"
    for role, name in (("child", "child"), ("greedy", "greedy_child"), ("random", "random_child")):
        took = search[name]["costs"][time]
        if role in measured and "parent" in measured and took:
            predicted, found = search["parent"][time] / took, measured[role] / measured["parent"]
            yield SpeedRow(role, f"{predicted:.2f}×", f"{found:.2f}×", f"{100 * (found / predicted - 1):+.0f} %")


def _fusion(effect: Mapping[str, Any] | None) -> Iterator[str]:
    """Sentences on what fusion did."""
    if not effect:
        return
    groups = [group for run in effect["runs"] for group in run["groups"]]
    if not groups:
        yield "No FFNs were fused."
        return
    yield "Fused: layers " + "; ".join(", ".join(map(str, group)) for group in groups) + "."
    yield (
        f"KL from the parent before any distillation, on {effect['tokens']:,} held-out tokens: "
        f"{effect['kl_before']:.4f} without fusion, {effect['kl_after']:.4f} with it "
        f"({effect['kl_after'] - effect['kl_before']:+.4f} ± {effect['kl_error']:.4f} nats a token)."
    )
    if effect.get("timing"):
        before, after = (statistics.median(effect[name]) for name in ("before_ms", "after_ms"))
        where = {"decoder": "our own decoder", "vllm": "vLLM"}[effect["timing"]]
        yield (
            f"A decode step in {where}: {before:.2f} ms without fusion, {after:.2f} ms with it "
            f"({100 * (after / before - 1):+.1f} %; medians of {len(effect['before_ms'])}, in turn)."
        )


def _candidates(trials: Sequence[Mapping[str, Any]]) -> Iterator[CandidateRow]:
    for number, trial in enumerate(trials, 1):
        difference = f"{trial['difference']:+.4f} ± {trial['difference_error']:.4f}" if number > 1 else "–"
        yield CandidateRow(
            number=number,
            score=f"{trial['score']:.4f}",
            kl_before=f"{trial['kl_before']:.4f}",
            kl_after=f"{trial['kl_after']:.4f}",
            difference=difference,
            chosen=trial["chosen"],
        )


def _times(search: Mapping[str, Any]) -> list[str]:
    """The times that the latency feedback knows."""
    rounds = search.get("latency_feedback", ())
    return [name for name in RESOURCES if rounds and name in rounds[0]["measured"]]


def _rounds(search: Mapping[str, Any]) -> Iterator[RoundRow]:
    """The rounds of the latency feedback."""
    for number, found in enumerate(search.get("latency_feedback", ()), 1):
        times = tuple(
            (_shown(found["predicted"][name], RESOURCES[name]), _shown(found["measured"][name], RESOURCES[name]))
            for name in _times(search)
        )
        yield RoundRow(number, f"{found['score']:.4f}", times, f"{100 * found['error']:.1f} %", found["agreed"])
