"""A second pass over the library: attention and FFN of one layer, trained together to do what the parent's layer does.

Decoupled, an FFN learns behind the parent's attention, and so cannot make up for what a smaller attention has lost. The
pairs are few: those that a solution of the decoupled search names.

Source: arXiv 2411.19146, section 3.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from components.core.model.decoder import TesseraForCausalLM
from components.core.model.layer_paging import is_paged
from components.core.runtime.context import StageContext
from components.core.text.packing import PackedStream
from components.core.training.train_config import TrainConfig, learning_rate
from components.search.config import Coupled
from components.search.library.activations import SubblockIO, iterate_layers
from components.search.library.block_trainer import normalised_mse
from components.search.space.build import build_subblock
from components.search.space.layer_space import LayerSpace, Variant
from components.search.space.library_files import load_block, save_block
from components.search.space.subblock import Subblock

WHAT = "coupled pairs"

Pair = tuple[Variant, Variant]
"""Attention and FFN of one layer."""


def pairs_to_couple(spaces: Sequence[LayerSpace], choice: Sequence[Pair]) -> dict[int, Pair]:
    """The layers of a choice in which both parts are other than the parent's, and one of them can learn.

    Where only one part is replaced, its decoupled training was already that of the whole layer.
    """
    return {
        layer: (attention, ffn)
        for layer, (space, (attention, ffn)) in enumerate(zip(spaces, choice, strict=True))
        if attention != space.attention[0] and ffn != space.ffn[0] and not (attention.is_no_op and ffn.is_no_op)
    }


class _Layer(nn.Module):
    """Both sub-blocks of a layer; None is the no-op."""

    def __init__(self, attention: Subblock | None, ffn: Subblock | None) -> None:
        super().__init__()
        self.attention, self.ffn = attention, ffn

    def forward(self, hidden_BTD: Tensor, context: tuple[Any, ...]) -> Tensor:
        """What is added to the residual stream by both, the FFN seeing what the attention added."""
        added_BTD = torch.zeros_like(hidden_BTD)
        if self.attention is not None:
            added_BTD = added_BTD + self.attention(hidden_BTD, context)
        if self.ffn is not None:
            added_BTD = added_BTD + self.ffn(hidden_BTD + added_BTD, ())
        return added_BTD


def couple(
    parent: TesseraForCausalLM,
    pairs: Mapping[int, Pair],
    libraries: Sequence[Path],
    folder: Path,
    stream: PackedStream,
    batch_size: int,
    config: Coupled,
    context: StageContext,
) -> dict[int, list[float]]:
    """Train pairs from their decoupled weights on, and write them as a library of their own.

    Args:
        parent: frozen; feeds and teaches them.
        pairs: by layer.
        libraries: the decoupled weights.
        folder: takes the coupled weights.
        stream: packed training text.
        batch_size: packed rows a step.
        config: steps and learning rate.
        context: takes progress.

    Returns:
        Of each layer the normalised error of what it adds to the residual stream, one for each step.
    """
    layers = {layer: _layer(parent, layer, pair, libraries) for layer, pair in pairs.items()}
    optimizers = {layer: torch.optim.AdamW(pair.parameters(), weight_decay=0.0) for layer, pair in layers.items()}
    schedule = TrainConfig(num_steps=config.num_steps, learning_rate=config.learning_rate)
    errors: dict[int, list[float]] = {layer: [] for layer in pairs}
    at_once = config.num_steps if is_paged(parent.model.layers) else 1
    for first in range(0, config.num_steps, at_once):
        batches = [stream.batch(step * batch_size, batch_size) for step in range(first, first + at_once)]
        for layer, number, seen in iterate_layers(parent, batches, max(pairs) + 1, context):
            if layer in pairs:
                rate = learning_rate(schedule, first + number)
                mask_BT = batches[number].segment_ids_BT > 0
                errors[layer].append(
                    _teach(layers[layer], optimizers[layer], rate, seen["attention"], seen["ffn"], mask_BT)
                )
        context.progress(
            first + at_once, config.num_steps, WHAT, error=sum(e[-1] for e in errors.values()) / len(errors)
        )
    for layer, pair in layers.items():
        for variant, block in zip(pairs[layer], (pair.attention, pair.ffn), strict=True):
            if block is not None:
                save_block(folder, (layer, variant), block.weights())
    return errors


def _layer(parent: TesseraForCausalLM, layer: int, pair: Pair, libraries: Sequence[Path]) -> _Layer:
    """A pair with its decoupled weights."""
    attention, ffn = (
        None if variant.is_no_op else build_subblock(parent, layer, variant, load_block(libraries, (layer, variant)))
        for variant in pair
    )
    return _Layer(attention, ffn)


def _teach(
    pair: _Layer, optimizer: torch.optim.Optimizer, rate: float, attention: SubblockIO, ffn: SubblockIO, mask_BT: Tensor
) -> float:
    """One step of a pair; returns its error before it."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    wanted_BTD = attention.output_BTD + ffn.output_BTD
    error = normalised_mse(wanted_BTD[mask_BT], pair(attention.hidden_BTD, attention.context)[mask_BT])
    error.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(error.detach())
