"""Replace-one-block scores: how far the parent's predictions move when a single sub-block is swapped.

One walk through the parent's layers scores all variants of all layers. Where a sub-block has variants, each of them
branches off the parent's hidden states and continues through the parent's own later sub-blocks. So what comes before a
replaced sub-block is computed once for all variants, a no-op itself costs nothing, what follows runs with all variants
stacked as rows of one batch, and after the last attention only the positions that count are carried on.

Only the measures that are asked for are computed, in one pass over the last hidden states; the logits, which only some
of them need, are made for so many positions at a time as fit a fixed amount of memory.

Shape letters: V hidden states in flight (the parent's come first), B rows, T tokens, D hidden size, M measures, R rows
so far, N positions that count, W vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from components.core.model.attention import segment_mask
from components.core.model.decoder import Attention, TesseraForCausalLM
from components.core.model.layer_files import is_paged
from components.core.runtime.context import Interrupted, StageContext
from components.core.text.packing import IGNORE, Batch
from components.search.config import TextMeasure
from components.search.memory_limits import CHUNK_BYTES, MAX_BYTES_IN_FLIGHT, VALUES_A_LOGIT
from components.search.space.layer_space import PARTS, Part
from components.search.space.subblocks import BlockKey, Subblock, block_name

TOKENS_IN_FLIGHT = 1 << 14
"""Tokens of all variants together in a walk: enough to keep the cores busy, few enough for the caches."""
CHUNK_TOKENS = 1 << 11
"""Tokens in one call of a sub-block."""

POINT = "scores.safetensors"
WHAT = "replace-one-block scores"

Slot = tuple[int, Part]
"""The attention or the FFN of a layer."""
Replacements = Mapping[BlockKey, Subblock | None]
"""The module that replaces the parent's sub-block of that layer and part; None is the no-op."""


@dataclass
class Scores:
    """Measures of each variant, summed over each row of held-out text.

    Attributes:
        measures: what was measured, in the order of the sums.
        tokens_R: positions of each row that count.
        sums: of each variant (R, M), float64, over those positions.
    """

    measures: tuple[TextMeasure, ...]
    tokens_R: Tensor
    sums: dict[BlockKey, Tensor]


@torch.no_grad()
def score_replacements(
    parent: TesseraForCausalLM,
    replacements: Replacements,
    batches: Sequence[Batch],
    measures: Sequence[TextMeasure],
    context: StageContext,
) -> Scores:
    """Measure the parent with one sub-block replaced against the parent, for every variant.

    All variants see the same rows in the same order: at any moment each has a mean with a standard error, and the
    difference of two has a smaller one than either.

    Args:
        parent: frozen.
        replacements: all variants.
        batches: held-out text.
        measures: what is measured.
        context: takes progress, stores resume points, and tells when the stage must stop.

    Raises:
        Interrupted: the stage was asked to stop; a checkpoint was saved.

    Source: arXiv 2411.19146, section 4.2.
    """
    rows = len(batches[0].input_ids_BT) if is_paged(parent.model.layers) else 0
    parts = [part for batch in batches for part in _few_rows(batch, 1 + len(replacements), at_least=rows)]
    own = {(n, part): Subblock.of(layer, part) for n, layer in enumerate(parent.model.layers) for part in PARTS}
    done, scores = _resumed(context, list(replacements), tuple(measures))
    context.progress(done, len(parts), WHAT)
    while done < len(parts):
        _add_rows(scores, parent, own, replacements, parts[done])
        done += 1
        context.progress(done, len(parts), WHAT)
        if done < len(parts) and (context.stopping() or context.resume.due()):
            context.resume.save(done, lambda folder: _save(folder, scores))
            if context.stopping():
                raise Interrupted
    return scores


def _few_rows(batch: Batch, in_flight: int, at_least: int) -> list[Batch]:
    """The batch in parts that fit a walk; not divided if layers are read from a file."""
    rows, tokens = batch.input_ids_BT.shape
    size = max(1, at_least, TOKENS_IN_FLIGHT // (in_flight * tokens))
    return [batch.rows(start, start + size) for start in range(0, rows, size)]


def _add_rows(
    scores: Scores,
    parent: TesseraForCausalLM,
    own: Mapping[Slot, Subblock | None],
    replacements: Replacements,
    batch: Batch,
) -> None:
    """Score more rows."""
    walk = _Walk(parent, own, batch.to(parent.device), scores.measures)
    fit = max(1, MAX_BYTES_IN_FLIGHT // walk.hidden_BTD.nbytes - 1)
    order = {slot: number for number, slot in enumerate(own)}
    keys = iter(sorted(replacements, key=lambda key: order[key[0], key[1].part]))
    while group := list(islice(keys, fit)):
        for key, sums_BM in walk.score({key: replacements[key] for key in group}).items():
            scores.sums[key] = torch.cat([scores.sums[key], sums_BM])
    scores.tokens_R = torch.cat([scores.tokens_R, walk.counted.tokens_of_rows.cpu()])


class _Walk:
    """Some rows that go through the parent, once for each group of variants."""

    def __init__(
        self,
        parent: TesseraForCausalLM,
        own: Mapping[Slot, Subblock | None],
        batch: Batch,
        measures: tuple[TextMeasure, ...],
    ) -> None:
        self.norm, self.lm_head, self.measures = parent.model.norm, parent.lm_head, measures
        self.own = dict(own)
        self.counted = Counted.of(batch.labels_BT)
        self.hidden_BTD = parent.model.embed_tokens(batch.input_ids_BT)
        self.rotary = parent.model.rotary_emb(self.hidden_BTD, batch.position_ids_BT)
        self.mask_B1TT = segment_mask(batch.segment_ids_BT)

    def score(self, replacements: Replacements) -> dict[BlockKey, Tensor]:
        """Sums (B, M) of each variant of a group, on the CPU.

        The next group branches off no earlier than the last of this one.
        """
        branches = {slot: [key for key in replacements if (key[0], key[1].part) == slot] for slot in self.own}
        last = [slot for slot, keys in branches.items() if keys][-1]
        states_VBTD = self.hidden_BTD.new_empty(1 + len(replacements), *self.hidden_BTD.shape)
        states_VBTD[0] = self.hidden_BTD
        branched: list[BlockKey] = []
        left = dict(self.own)
        for slot, own in self.own.items():
            if slot == last:
                self.hidden_BTD, self.own = states_VBTD[0].clone(), dict(left)
            for number, key in enumerate(branches[slot], 1 + len(branched)):
                states_VBTD[number] = states_VBTD[0]
                self._add_output(replacements[key], states_VBTD[number : number + 1])
            self._add_output(own, states_VBTD[: 1 + len(branched)])
            branched += branches[slot]
            del left[slot]
            if states_VBTD.dim() == 4 and not any(_is_attention(block) for block in left.values()):
                states_VBTD = states_VBTD[:, self.counted.mask_BT]
        parent_ND, *_ = states_VND = self.norm(states_VBTD)
        sums_VBM = measure_sums(parent_ND, states_VND[1:], self.lm_head, self.counted, self.measures).cpu()
        return dict(zip(branched, sums_VBM, strict=True))

    def _add_output(self, block: Subblock | None, states_VBTD: Tensor) -> None:
        """Add the output of a sub-block to each of the hidden states."""
        if block is None:
            return
        size = max(1, CHUNK_TOKENS // states_VBTD[0, ..., 0].numel())
        for start in range(0, len(states_VBTD), size):
            chunk = states_VBTD[start : start + size]
            chunk += block(chunk.flatten(0, -3), self._context(block, len(chunk))).view_as(chunk)

    def _context(self, block: Subblock, copies: int) -> tuple[Any, ...]:
        """Positions and mask for so many copies of the rows; empty for an FFN."""
        if not _is_attention(block):
            return ()
        cos, sin = (part.repeat(copies, 1, 1) for part in self.rotary)
        mask_B1TT = None if self.mask_B1TT is None else self.mask_B1TT.repeat(copies, 1, 1, 1)
        return (cos, sin), mask_B1TT, None


def _is_attention(block: Subblock | None) -> bool:
    return block is not None and isinstance(block.module, Attention)


def _save(folder: Path, scores: Scores) -> None:
    """Write a resume point."""
    sums = {block_name(key): sums_RM for key, sums_RM in scores.sums.items()}
    save_file({"tokens": scores.tokens_R, **sums}, folder / POINT)


def _resumed(context: StageContext, keys: Sequence[BlockKey], measures: tuple[TextMeasure, ...]) -> tuple[int, Scores]:
    """Number of parts done, and their scores, from a resume point of the same variants; else nothing."""
    nothing = torch.zeros(0, len(measures), dtype=torch.float64)
    scores = Scores(measures, torch.zeros(0, dtype=torch.int64), dict.fromkeys(keys, nothing))
    point = context.resume.latest()
    if point is None or not (point / POINT).exists():
        return 0, scores
    saved = load_file(point / POINT)
    if saved.keys() != {"tokens", *map(block_name, keys)}:
        return 0, scores
    sums = {key: saved[block_name(key)] for key in keys}
    context.note(f"goes on with the scores of {len(saved['tokens'])} rows")
    return int(point.name), Scores(measures, saved["tokens"], sums)


@dataclass(frozen=True)
class Counted:
    """The positions of some rows that count.

    Attributes:
        mask_BT: where they are.
        labels_N: what they should predict.
        rows_NB: 1 in the row of each position.
    """

    mask_BT: Tensor
    labels_N: Tensor
    rows_NB: Tensor

    @classmethod
    def of(cls, labels_BT: Tensor) -> "Counted":
        """The positions whose label counts."""
        mask_BT = labels_BT != IGNORE
        rows_N = mask_BT.nonzero()[:, 0]
        return cls(mask_BT, labels_BT[mask_BT], F.one_hot(rows_N, len(labels_BT)).double())

    @property
    def tokens_of_rows(self) -> Tensor:
        """Positions of each row."""
        return self.mask_BT.sum(dim=1)


def measure_sums(
    parent_ND: Tensor,
    children_VND: Tensor,
    lm_head: nn.Linear,
    counted: Counted,
    measures: tuple[TextMeasure, ...],
) -> Tensor:
    """Measures of every child, summed over the positions of each row.

    Args:
        parent_ND: the parent's hidden states after the final norm, at the positions that count.
        children_VND: those of the children.
        lm_head: of all of them.
        counted: the positions.
        measures: what is measured.

    Returns:
        (V, B, M), float64; logits are made chunk by chunk.
    """
    shape = (len(children_VND), counted.rows_NB.shape[1], len(measures))
    sums_VBM = torch.zeros(shape, dtype=torch.float64, device=parent_ND.device)
    size = max(1, CHUNK_BYTES // (VALUES_A_LOGIT * torch.float32.itemsize * lm_head.out_features))
    for start in range(0, len(parent_ND), size):
        here = slice(start, start + size)
        parent = Predictions.of(parent_ND[here], lm_head, counted.labels_N[here], measures)
        for child, child_ND in enumerate(children_VND):
            sums_VBM[child] += counted.rows_NB[here].T @ parent.distances(child_ND[here], lm_head)
    return sums_VBM


@dataclass(frozen=True)
class Predictions:
    """What the parent predicts at some positions, as far as the measures need it; computed once for all children."""

    measures: tuple[TextMeasure, ...]
    hidden_ND: Tensor
    labels_N: Tensor
    logprobs_NW: Tensor | None = None
    probs_NW: Tensor | None = None
    best_N: Tensor | None = None

    @classmethod
    def of(
        cls, hidden_ND: Tensor, lm_head: nn.Linear, labels_N: Tensor, measures: tuple[TextMeasure, ...]
    ) -> "Predictions":
        """Predictions from last hidden states."""
        if set(measures) == {"cosine"}:
            return cls(measures, hidden_ND, labels_N)
        logprobs_NW = F.log_softmax(lm_head(hidden_ND).float(), dim=-1)
        probs_NW = logprobs_NW.exp() if "kl" in measures else None
        best_N = logprobs_NW.argmax(dim=-1) if "top1" in measures else None
        return cls(measures, hidden_ND, labels_N, logprobs_NW, probs_NW, best_N)

    def distances(self, child_ND: Tensor, lm_head: nn.Linear) -> Tensor:
        """(N, M), float64: see `Measure`."""
        distances: dict[TextMeasure, Tensor] = {}
        if "cosine" in self.measures:
            distances["cosine"] = 1 - F.cosine_similarity(child_ND.float(), self.hidden_ND.float(), dim=-1)
        if self.logprobs_NW is not None:
            logprobs_NW = F.log_softmax(lm_head(child_ND).float(), dim=-1)
            if self.best_N is not None:
                distances["top1"] = (logprobs_NW.argmax(dim=-1) != self.best_N).float()
            lost_NW = torch.sub(self.logprobs_NW, logprobs_NW, out=logprobs_NW)
            if self.probs_NW is not None:
                distances["kl"] = torch.linalg.vecdot(self.probs_NW, lost_NW).clamp(min=0)
            if "lm_loss" in self.measures:
                distances["lm_loss"] = lost_NW.gather(1, self.labels_N[:, None])[:, 0]
        return torch.stack([distances[measure] for measure in self.measures], dim=1).double()
