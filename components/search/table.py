"""What every option of a search scores and costs: what the solver chooses from, and `search.json` holds."""

from collections.abc import Callable, Mapping, Sequence
from typing import Self

from components.core.config import Config
from components.search.problem import Problem
from components.search.space import PARTS, LayerSpace, Part, Size, Variant


class Costs(Config):
    """What a sub-block, or a whole model, takes; all of it adds up over sub-blocks."""

    parameters: int = 0
    """Weights, counted."""
    kv_bytes_per_token: int = 0
    """KV cache of one token, bytes, at 2 bytes a value."""
    attention_layers: int = 0
    """Attentions with a KV cache."""
    weight_bytes: int = 0
    """Weights at the served precision, bytes, on all devices together."""
    memory_bytes: int = 0
    """Those, the KV cache of the batch at its full length, and what is computed meanwhile, bytes."""
    latency_ms: float = 0.0
    """Share of one decode step of the batch, milliseconds."""
    time_to_first_token_ms: float = 0.0
    """Share of the time from the prompts of the batch to its first tokens, milliseconds."""
    request_ms: float = 0.0
    """Share of the time from the prompts to the last tokens, milliseconds."""

    def __add__(self, other: Self) -> Self:
        """Costs add up over sub-blocks."""
        return self.model_copy(update={name: self.of(name) + other.of(name) for name in RESOURCES})

    def of(self, resource: str) -> float:
        """One of them by name."""
        value: float = getattr(self, resource)
        return value

    def timed(self, *, latency_ms: float, time_to_first_token_ms: float, new_tokens: int) -> Self:
        """The same with other times.

        Args:
            latency_ms: one decode step.
            time_to_first_token_ms: prefill.
            new_tokens: of a request; the first comes with the prefill.
        """
        times = {
            "latency_ms": latency_ms,
            "time_to_first_token_ms": time_to_first_token_ms,
            "request_ms": time_to_first_token_ms + (new_tokens - 1) * latency_ms,
        }
        return self.model_copy(update=times)


RESOURCES = tuple(Costs.model_fields)
TIMES = ("latency_ms", "time_to_first_token_ms", "request_ms")
"""Those that depend on the machine."""


class Option(Config):
    """One variant of one slot."""

    name: str
    """Name of the variant."""
    size: Size
    """KV heads or channels; 0 is the no-op, `linear` one matrix."""
    score: float
    """Replace-one-block KL(parent || child), nats a token; the parent's own is 0."""
    costs: Costs
    """What it takes."""


class Slot(Config):
    """A place that holds exactly one sub-block: the attention or the FFN of a layer."""

    layer: int
    """Layer of the parent, from 0."""
    part: Part
    """Attention or FFN."""
    options: tuple[Option, ...]
    """What it may hold, the parent's own first."""
    held: int | None = None
    """Number of the one that it has to hold; None where it may be any."""

    @property
    def picks(self) -> tuple[int, ...]:
        """Numbers of the options that a choice may take."""
        return tuple(range(len(self.options))) if self.held is None else (self.held,)


class OptionTable(Config):
    """All slots of the parent, and what no choice changes."""

    fixed: Costs
    """Embeddings, final norm and head; the part of a decode step that no sub-block takes."""
    slots: tuple[Slot, ...]
    """Attention and FFN of every layer, in the order they are computed."""
    batch_tokens: int = 0
    """New tokens of the batch that `request_ms` is the time of; 0 where it is not known."""

    def costs(self, choice: Sequence[int]) -> Costs:
        """Cost of the model in which slot k holds its option `choice[k]`."""
        return sum((slot.options[pick].costs for slot, pick in zip(self.slots, choice, strict=True)), start=self.fixed)

    def score(self, choice: Sequence[int]) -> float:
        """Estimated quality loss of a model: the sum of its replace-one-block scores, nats a token."""
        return sum(slot.options[pick].score for slot, pick in zip(self.slots, choice, strict=True))

    @property
    def parent_choice(self) -> tuple[int, ...]:
        """The choice that changes nothing."""
        return (0,) * len(self.slots)

    @property
    def held(self) -> dict[int, int]:
        """Slots that have to hold one of their options, and its number."""
        return {number: slot.held for number, slot in enumerate(self.slots) if slot.held is not None}

    @property
    def scores(self) -> list[list[float]]:
        """Score of each option of each slot."""
        return [[option.score for option in slot.options] for slot in self.slots]

    def costs_of(self, resource: str) -> list[list[float]]:
        """What each option of each slot takes of one resource."""
        return [[option.costs.of(resource) for option in slot.options] for slot in self.slots]

    def priced(self, costs: Callable[[Option], Costs]) -> Self:
        """The same options with other costs."""
        slots = tuple(
            slot.model_copy(
                update={"options": tuple(option.model_copy(update={"costs": costs(option)}) for option in slot.options)}
            )
            for slot in self.slots
        )
        return self.model_copy(update={"slots": slots})

    def problem(self, scores: Sequence[Sequence[float]], limits: Mapping[str, float]) -> Problem:
        """What the solver is given; what no choice changes is the first cost that counts against a limit.

        Args:
            scores: what to minimise, of each option of each slot.
            limits: absolute, by resource.
        """
        fixed = {resource: self.fixed.of(resource) for resource in limits}
        costs = {resource: self.costs_of(resource) for resource in limits}
        return Problem.of(scores, costs, limits, fixed).with_fixed(self.held)

    def variants(self, choice: Sequence[int]) -> list[tuple[Variant, Variant]]:
        """The attention and the FFN of each layer of a choice."""
        picked = [Variant(slot.part, slot.options[pick].size) for slot, pick in zip(self.slots, choice, strict=True)]
        return list(zip(picked[::2], picked[1::2], strict=True))


def option_table(
    spaces: Sequence[LayerSpace],
    fixed: Costs,
    blocks: Mapping[str, Costs],
    scores: Mapping[tuple[int, Variant], float],
    batch_tokens: int = 0,
) -> OptionTable:
    """Put together what the solver chooses from.

    Args:
        spaces: options of each layer.
        fixed: what no choice changes.
        blocks: costs by name of the variant.
        scores: replace-one-block KL of every variant but the parent's own, which changes nothing.
        batch_tokens: new tokens of the batch that times are of.
    """
    slots = []
    for layer, space in enumerate(spaces):
        for part in PARTS:
            own, *others = space.of(part)
            kls = {own: 0.0} | {variant: scores[layer, variant] for variant in others}
            options = tuple(
                Option(name=variant.name, size=variant.size, score=kl, costs=blocks[variant.name])
                for variant, kl in kls.items()
            )
            held = [number for number, variant in enumerate(kls) if variant in space.fixed]
            slots.append(Slot(layer=layer, part=part, options=options, held=held[0] if held else None))
    return OptionTable(fixed=fixed, slots=tuple(slots), batch_tokens=batch_tokens)
