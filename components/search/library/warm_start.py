"""Warm start of a block library: a search from a distilled child begins with the library of its parent's search.

A variant is reused without training if its teacher (the parent's own sub-block) is the same to the bit. A distilled
child differs from its parent everywhere, so there the earlier variant is only a starting point: it is taken where its
error is smaller than that of a variant made from the new parent's weights.
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
from components.search.library.calibration import SubblockIO, iterate_layers
from components.search.library.local_distillation import normalised_mse
from components.search.space.layer_space import Part, Variant
from components.search.space.library_table import LIBRARY_FILE, ShardLibrary, TrainedBlock
from components.search.space.subblocks import BlockKey, Subblock, Weights, load_block, subblock_weights


@dataclass(frozen=True)
class EarlierBlock:
    """A trained variant of an earlier library.

    Attributes:
        folder: the library.
        key: the variant in it.
        record: its entry in `library.json`.
        teacher: digest of the sub-block that it was trained against; None where the library does not record it.
        num_steps: steps of its distillation.
    """

    folder: Path
    key: BlockKey
    record: TrainedBlock
    teacher: str | None
    num_steps: int

    def weights(self) -> Weights:
        """Its tensors by their name within the layer."""
        return load_block([self.folder], self.key)


def teacher_digests(parent: TesseraForCausalLM, keys: Sequence[BlockKey]) -> dict[tuple[int, Part], str]:
    """Digest of the parent's own sub-block for each layer and part that has variants."""
    return {
        (layer, part): digest_of_weights(subblock_weights(parent.model.layers[layer].state_dict(), part))
        for layer, part in dict.fromkeys((layer, variant.part) for layer, variant in keys)
    }


def reusable_blocks(
    earlier: Mapping[BlockKey, EarlierBlock], teachers: Mapping[tuple[int, Part], str], num_steps: int
) -> dict[BlockKey, EarlierBlock]:
    """The earlier variants that need no training: same teacher, at least as many steps."""
    return {
        (layer, variant): block
        for (layer, variant), block in earlier.items()
        if block.teacher == teachers[layer, variant.part] and block.num_steps >= num_steps
    }


def digest_of_weights(weights: Weights) -> str:
    """SHA-256 of tensors with their names, shapes and precision, 64 hex digits."""
    return hashlib.sha256(save({name: tensor.cpu().contiguous() for name, tensor in weights.items()})).hexdigest()


def earlier_blocks(folder: Path, config: PretrainedConfig, keys: Sequence[BlockKey]) -> dict[BlockKey, EarlierBlock]:
    """The variants that an earlier library has, by their key in the new parent.

    Args:
        folder: the library, or several below it: shards, or libraries of several searches, of which the last counts.
        config: of the new parent; its `parent_layers` maps its layers to those of its own parent.
        keys: variants that are wanted.

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
        records = {(block.layer, Variant(block.part, block.size)): block for block in library.blocks}
        for layer, variant in keys:
            key = (layers.get(layer, -1), variant)
            if key in records:
                teacher = library.teachers.get(f"{key[0]}/{variant.part}")
                found[layer, variant] = EarlierBlock(path.parent, key, records[key], teacher, library.num_steps)
    return found


def layers_before(behind: Sequence[int] | None, depth: int, depth_before: int) -> dict[int, int]:
    """For each layer of a model, its number in the model that an earlier library was made for.

    Args:
        behind: for each layer, how many layers of the model's own parent lead to its output; None without a parent.
        depth: layers of the model.
        depth_before: layers of the model of the earlier library: the model itself, or its parent.
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
    """The variants whose error is smaller with the weights of the earlier library than as `make` initialises them.

    Args:
        parent: the teacher.
        make: initialises a variant without the earlier library.
        earlier: variants of the earlier library.
        batch: the first training batch.
        context: gives scratch space for hidden states.
    """
    last = max((layer for layer, _ in earlier), default=-1)
    mask_BT = batch.segment_ids_BT.to(parent.device) > 0
    return {
        key
        for layer, _, ios in (iterate_layers(parent, [batch], last + 1, context) if earlier else ())
        for key in [key for key in earlier if key[0] == layer]
        if _has_smaller_error(make(key), earlier[key].weights(), ios[key[1].part], mask_BT)
    }


def start_from(block: Subblock, weights: Weights) -> Subblock:
    """Give a variant in training other weights; its precision and its device stay."""
    device = next(block.parameters()).device
    block.load_weights(
        {name: tensor.to(device, block.storage_dtype) for name, tensor in weights.items()}, training=True
    )
    return block


@torch.no_grad()
def _has_smaller_error(block: Subblock, weights: Weights, io: SubblockIO, mask_BT: Tensor) -> bool:
    """Whether these weights give a smaller error than the variant's own; False where their shapes differ."""
    if {name: own.shape for name, own in block.weights().items()} != {name: new.shape for name, new in weights.items()}:
        return False
    target_ND = io.output_BTD[mask_BT]
    own = normalised_mse(target_ND, block(io.hidden_BTD, io.context)[mask_BT])
    start_from(block, weights)
    return bool(normalised_mse(target_ND, block(io.hidden_BTD, io.context)[mask_BT]) < own)
