"""FFN Fusion: consecutive FFNs without attention between them become one wider FFN.

A run X + FFN_i(norm_i(X)), then X + FFN_{i+1}(norm_{i+1}(X)), … is replaced by X + sum_j FFN_j(norm_j(X)), which is
exactly one wider gated FFN. The only approximation is that all FFNs of the run then read the same X. How much each FFN
depends on those before it measures the error; length, width and dependency decide which FFNs are fused.

Shape letters: B rows, T tokens, N tokens that are no padding, D hidden size.

Source: arXiv 2503.18908, section 3, equation 5 and theorem 3.1, and section 4.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from components.core.model.architecture import LINEAR
from components.core.model.decoder import TesseraForCausalLM
from components.core.text.packing import Batch
from components.search.config import Fusion
from components.search.library.calibration import observe
from components.search.space.layer_space import Size
from components.search.space.subblocks import Subblock, Weights

NORM = "post_attention_layernorm.weight"


@dataclass(frozen=True)
class ChildLayer:
    """A decoder layer in the making.

    Attributes:
        num_key_value_heads: KV heads; 0 where there is no attention, `linear` where it is one matrix.
        intermediate_size: channels of the FFN; 0 where there is none, `linear` where it is one matrix.
        read: makes its tensors, by name within the layer; none of what is not there. They are read when they are
            needed, so that a child larger than memory can be put together.
        parent_layers: the parent's layers that it stands for, by number, in order.
    """

    num_key_value_heads: Size
    intermediate_size: Size
    read: Callable[[], Weights]
    parent_layers: tuple[int, ...]

    @property
    def is_empty(self) -> bool:
        """Whether it has neither attention nor FFN, and passes its input on."""
        return self.num_key_value_heads == 0 and self.intermediate_size == 0


Dependencies = Mapping[tuple[int, int], float]
"""By two of the parent's layers: how much the FFN of the second changes when that of the first is removed."""


def fuse_layers(
    layers: Sequence[ChildLayer], config: Fusion, dependencies: Dependencies | None = None
) -> list[ChildLayer]:
    """The layers that are left when empty ones are dropped and, where wanted, runs of FFNs fused.

    Args:
        layers: one for each of the parent's.
        config: what to fuse.
        dependencies: needed where `config.max_dependency` is set.
    """
    left = drop_empty(layers)
    if config.enabled:
        groups = (group for run in split_runs(left) for group in choose_groups(run, config, dependencies or {}))
        left = [fuse(group) if len(group) > 1 else group[0] for group in groups]
    return left


def drop_empty(layers: Sequence[ChildLayer]) -> list[ChildLayer]:
    """The layers that do anything."""
    return [layer for layer in layers if not layer.is_empty]


def split_runs(layers: Sequence[ChildLayer]) -> list[list[ChildLayer]]:
    """All layers in order: maximal runs of FFNs without attention, any other layer by itself."""
    runs: list[list[ChildLayer]] = []
    for layer in layers:
        if runs and _is_lone_ffn(layer) and _is_lone_ffn(runs[-1][-1]):
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return runs


def _is_lone_ffn(layer: ChildLayer) -> bool:
    """Whether a gated FFN is all that a layer has."""
    return layer.num_key_value_heads == 0 and layer.intermediate_size not in (0, LINEAR)


def choose_groups(run: Sequence[ChildLayer], config: Fusion, dependencies: Dependencies) -> list[Sequence[ChildLayer]]:
    """Cut a run into groups within the limits, as few as possible, and of those cuts the least dependent.

    Source: arXiv 2503.18908, section 4.
    """
    whole = len(run) - (1 if config.keep_last and len(run) > 1 else 0)
    # best[end]: groups of the first `end` layers, what depends within them, and where the last of them begins.
    best: list[tuple[int, float, int]] = [(0, 0.0, 0)]
    for end in range(1, whole + 1):
        found = []
        for start in range(end - 1, -1, -1):
            group = run[start:end]
            within = [
                dependencies.get((first.parent_layers[0], second.parent_layers[0]), 0.0)
                for first, second in itertools.combinations(group, 2)
            ]
            if not _within_limits(group, within, config):
                break
            found.append((best[start][0] + 1, best[start][1] + sum(within), start))
        best.append(min(found))
    cuts = [len(run)] if whole < len(run) else []
    end = whole
    while end:
        cuts.append(end)
        end = best[end][2]
    cuts = [0, *reversed(cuts)]
    return [run[start:end] for start, end in itertools.pairwise(cuts)]


def _within_limits(group: Sequence[ChildLayer], within: Sequence[float], config: Fusion) -> bool:
    """Whether layers may become one; a single layer always stays what it is."""
    if len(group) == 1:
        return True
    return (config.max_channels is None or _channels(group) <= config.max_channels) and (
        config.max_dependency is None or max(within) <= config.max_dependency
    )


def _channels(run: Sequence[ChildLayer]) -> int:
    """Of all gated FFNs together."""
    return sum(layer.intermediate_size for layer in run if layer.intermediate_size != LINEAR)


def fuse(run: Sequence[ChildLayer]) -> ChildLayer:
    """One layer whose FFN is the sum of the run's FFNs."""
    return ChildLayer(
        num_key_value_heads=0,
        intermediate_size=_channels(run),
        read=lambda: fold([layer.read() for layer in run]),
        parent_layers=tuple(number for layer in run for number in layer.parent_layers),
    )


def fold(run: Sequence[Weights]) -> Weights:
    """The tensors of one FFN that is the sum of these.

    It has the norm of the last. What another's own norm scales differently is folded into its gate and up projections,
    so that the sum is exact; a channel that the shared norm would erase is scaled there alone.
    """
    last = run[-1][NORM]
    shared = torch.where(last == 0, torch.ones_like(last), last)
    weights: Weights = {NORM: shared}
    for name in ("mlp.gate_proj.weight", "mlp.up_proj.weight"):
        weights[name] = torch.cat([ffn[name] * (ffn[NORM] / shared) for ffn in run])
    weights["mlp.down_proj.weight"] = torch.cat([ffn["mlp.down_proj.weight"] for ffn in run], dim=1)
    if "mlp.down_proj.bias" in run[0]:
        for name in ("mlp.gate_proj.bias", "mlp.up_proj.bias"):
            weights[name] = torch.cat([ffn[name] for ffn in run])
        weights["mlp.down_proj.bias"] = torch.stack([ffn["mlp.down_proj.bias"] for ffn in run]).sum(dim=0)
    return weights


@torch.no_grad()
def ffn_dependencies(
    child: TesseraForCausalLM, layers: Sequence[ChildLayer], batches: Sequence[Batch]
) -> dict[tuple[int, int], float]:
    """Cosine distance between what an FFN adds and what it adds with an earlier FFN of its run removed.

    The residual streams that each lack one FFN go through the run side by side, so that a layer is needed once.

    Args:
        child: made of these layers.
        layers: none of them empty, nothing fused.
        batches: text.

    Returns:
        By two of the parent's layers, in order: 0 where the second does not notice that the first is gone; 2 at most.

    Source: arXiv 2503.18908, section 4.
    """
    places = {layer.parent_layers[0]: place for place, layer in enumerate(layers)}
    runs = [[layer.parent_layers[0] for layer in run] for run in split_runs(layers) if len(run) > 1]
    sums: dict[tuple[int, int], float] = {}
    tokens = 0
    for batch in batches if runs else ():
        ios, _ = observe(child, batch, [places[number] for run in runs for number in run])
        mask_BT = batch.segment_ids_BT.to(child.device) > 0
        tokens += int(mask_BT.sum())
        for run in runs:
            without: dict[int, Tensor] = {}
            for number in run:
                block = Subblock.of(child.model.layers[places[number]], "ffn")
                assert block is not None, "a run has FFNs only"
                io = ios[places[number], "ffn"]
                whole_ND = io.output_BTD[mask_BT]
                for removed, hidden_ND in without.items():
                    added_ND = block(hidden_ND, ())
                    distance_N = 1 - F.cosine_similarity(added_ND, whole_ND, dim=-1)
                    sums[removed, number] = sums.get((removed, number), 0.0) + float(distance_N.sum())
                    without[removed] = hidden_ND + added_ND
                without[number] = io.hidden_BTD[mask_BT]
    return {pair: max(0.0, total / tokens) for pair, total in sums.items()}
