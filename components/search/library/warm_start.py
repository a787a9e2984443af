"""An earlier library as the beginning of a new one: what a child's parent left to a search from the child.

A variant whose teacher is to the bit the one that it was trained against is reused as it is. A distilled child differs
from its parent everywhere, so there an earlier variant is a start: it is taken where it errs less than what is made
from the new parent's own weights, and may err so little that it needs no training.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor
from transformers import PretrainedConfig

from components.core.base.errors import InputError
from components.core.model.decoder import TesseraForCausalLM
from components.core.runtime.context import StageContext
from components.core.text.packing import Batch
from components.search.library.activations import SubblockIO, iterate_layers
from components.search.library.block_trainer import normalised_mse
from components.search.library.records import LIBRARY_FILE, ShardLibrary
from components.search.space.layer_space import Variant
from components.search.space.library_files import BlockKey, load_block
from components.search.space.records import TrainedBlock
from components.search.space.subblock import Subblock
from components.search.space.variant_weights import Weights


@dataclass(frozen=True)
class EarlierBlock:
    """A trained variant of an earlier library.

    Attributes:
        folder: the library.
        key: the variant in it.
        told: what is told of its training.
        teacher: digest of the sub-block that taught it; None where the library does not tell.
        num_steps: of its distillation.
    """

    folder: Path
    key: BlockKey
    told: TrainedBlock
    teacher: str | None
    num_steps: int

    def weights(self) -> Weights:
        """Its tensors by their name within the layer."""
        return load_block([self.folder], self.key)


def digest_of_weights(weights: Weights) -> str:
    """SHA-256 of tensors with their names, shapes and precision, 64 hex digits."""
    return hashlib.sha256(save({name: tensor.contiguous() for name, tensor in weights.items()})).hexdigest()


def earlier_blocks(folder: Path, config: PretrainedConfig, keys: Sequence[BlockKey]) -> dict[BlockKey, EarlierBlock]:
    """What an earlier library has of these variants, by their key in the parent at hand.

    Args:
        folder: the library, or several below it: shards, or libraries of several searches, of which the last counts.
        config: of the parent at hand; `parent_layers` tells which layers of its own parent it comes from.
        keys: variants.

    Raises:
        InputError: there is no library.
    """
    paths = sorted(folder.rglob(LIBRARY_FILE))
    if not paths:
        raise InputError("search.libraries: no library.json in it", hint="give what search-library made")
    found: dict[BlockKey, EarlierBlock] = {}
    for path in paths:
        library = ShardLibrary.model_validate_json(path.read_bytes())
        layers = layers_before(getattr(config, "parent_layers", None), config.num_hidden_layers, library.num_layers)
        told = {(block.layer, Variant(block.part, block.size)): block for block in library.blocks}
        for layer, variant in keys:
            key = (layers.get(layer, -1), variant)
            if key in told:
                teacher = library.teachers.get(f"{key[0]}/{variant.part}")
                found[layer, variant] = EarlierBlock(path.parent, key, told[key], teacher, library.num_steps)
    return found


def layers_before(behind: Sequence[int] | None, depth: int, depth_before: int) -> dict[int, int]:
    """For each layer of a model, the layer that it was in the model which an earlier library is of.

    Args:
        behind: for each layer, how many of the model's own parent are behind its output; None where it has no parent.
        depth: layers of the model.
        depth_before: layers of the model of the earlier library: this one itself, or its parent.
    """
    if depth_before == depth:
        return {layer: layer for layer in range(depth)}
    if behind is None or behind[-1] != depth_before:
        return {}
    return dict(enumerate([0, *behind[:-1]]))


def better_starts(
    parent: TesseraForCausalLM,
    make: Callable[[BlockKey], Subblock],
    earlier: Mapping[BlockKey, EarlierBlock],
    batch: Batch,
    context: StageContext,
) -> set[BlockKey]:
    """The variants that err less as the earlier library has them than as they would be made.

    Args:
        parent: teaches them.
        make: initialises one without the earlier library.
        earlier: what that has.
        batch: the first that they will be taught with.
        context: has room for hidden states.
    """
    last = max((layer for layer, _ in earlier), default=-1)
    mask_BT = batch.segment_ids_BT > 0
    return {
        key
        for layer, _, seen in (iterate_layers(parent, [batch], last + 1, context) if earlier else ())
        for key in [key for key in earlier if key[0] == layer]
        if _errs_less(make(key), earlier[key].weights(), seen[key[1].part], mask_BT)
    }


def begin_from(block: Subblock, weights: Weights) -> Subblock:
    """Give a variant in training other weights; its precision stays."""
    block.load_weights({name: tensor.to(block.kept_in) for name, tensor in weights.items()}, training=True)
    return block


@torch.no_grad()
def _errs_less(block: Subblock, weights: Weights, lesson: SubblockIO, mask_BT: Tensor) -> bool:
    """Whether a variant errs less with these weights than with its own; not where they do not fit."""
    if {name: own.shape for name, own in block.weights().items()} != {name: new.shape for name, new in weights.items()}:
        return False
    wanted_ND = lesson.output_BTD[mask_BT]
    own = normalised_mse(wanted_ND, block(lesson.hidden_BTD, lesson.context)[mask_BT])
    begin_from(block, weights)
    return bool(normalised_mse(wanted_ND, block(lesson.hidden_BTD, lesson.context)[mask_BT]) < own)
