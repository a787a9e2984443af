"""Replicas of the evaluation: the processes of the stage, each with a vLLM server of its own.

Each replica answers its share of the requests. All replicas then exchange their answers as JSON, so that every one of
them knows what one process alone would know; the first writes the outputs.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist

from components.core.runtime.placement import Placement

Item = TypeVar("Item")

PATIENCE = timedelta(days=7)
"""Longest time that a replica waits for the others; the process of one that is lost closes its connection at once."""
VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"


def share_of(items: Sequence[Item], index: int, count: int) -> list[Item]:
    """The items that replica `index` of `count` takes: every `count`-th, so that long and short ones are mixed."""
    return list(items[index::count])


def merge_shares(shares: Sequence[Sequence[Item]]) -> list[Item]:
    """The items in the order that they had before `share_of`, from the shares of all replicas in their order."""
    merged: list[Any] = [None] * sum(map(len, shares))
    for index, share in enumerate(shares):
        merged[index :: len(shares)] = share
    return merged


@dataclass(frozen=True)
class Replicas:
    """The replicas of an evaluation, as one of them sees them.

    Attributes:
        index: number of this replica.
        count: number of replicas.
    """

    index: int = 0
    count: int = 1
    _group: Any = field(default=None, repr=False)

    @classmethod
    def of_ranks(cls) -> Self:
        """The ranks of this stage; a single replica where the stage runs as one process."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return cls()
        return cls(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo", timeout=PATIENCE))

    @property
    def is_first(self) -> bool:
        """Whether this replica saves checkpoints and writes the outputs."""
        return self.index == 0

    def share(self, items: Sequence[Item]) -> list[Item]:
        """This replica's share of the items."""
        return share_of(items, self.index, self.count)

    def exchange(self, value: Any) -> list[Any]:
        """The values of all replicas in their order; every replica calls this with a value of its own.

        Args:
            value: plain JSON values.
        """
        if self.count == 1:
            return [value]
        content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.count)]
        dist.all_gather(sizes, torch.tensor([content.numel()]), group=self._group)
        longest = int(max(size.item() for size in sizes))
        padded = torch.nn.functional.pad(content, (0, longest - content.numel()))
        received = [torch.empty_like(padded) for _ in range(self.count)]
        dist.all_gather(received, padded, group=self._group)
        return [
            json.loads(bytes(part[: int(size)].numpy()).decode()) for part, size in zip(received, sizes, strict=True)
        ]


def gpus_of_replica(placement: Placement, tensor_parallel: int) -> str | None:
    """The GPUs of this process's server, as `CUDA_VISIBLE_DEVICES` lists them; None where it may use all."""
    if placement.gpus == 0 or placement.num_ranks == 1:
        return None
    visible = os.environ.get(VISIBLE_GPUS) or ",".join(map(str, range(placement.nodes * placement.gpus)))
    first = int(os.environ["LOCAL_RANK"]) * tensor_parallel
    return ",".join(visible.split(",")[first : first + tensor_parallel])
