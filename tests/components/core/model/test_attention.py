"""Attention over packed rows is that of each document alone; the blocks of a mask are those of its pairs.

FlexAttention runs on a CPU too: forward, and its operator, which is not compiled, forward and backward.
"""

import itertools
import math
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from components.core.model import attention
from components.core.model.architecture import masks_by_blocks
from components.core.model.attention import attend, block_mask, packed_mask, segment_mask
from tests.components.core.tiny_models import VOCAB_SIZE, heterogeneous

LENGTHS = [[100, 156, 44], [300], [1, 1, 128, 170]]
"""Documents of three rows of 300 tokens: two blocks and a part of a third."""
HEADS = [(4, 4), (4, 2), (6, 2), (4, 1)]
"""Query heads and KV heads."""


def segments_of(rows: list[list[int]]) -> Tensor:
    """Numbers of the documents, from 1; the last document of a row is padding, with number 0, where it is negative."""
    numbers = [torch.arange(1, len(row) + 1) * (torch.tensor(row) > 0) for row in rows]
    return torch.stack(
        [torch.repeat_interleave(n, torch.tensor(row).abs()) for n, row in zip(numbers, rows, strict=True)]
    )


def inputs(heads: int, kv_heads: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
    """Queries, keys and values of three rows."""
    dice = torch.Generator().manual_seed(heads + kv_heads)
    shapes = [(3, count, 300, 16) for count in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, generator=dice).to(device, dtype).requires_grad_() for shape in shapes]


def each_document_alone(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Brute force in float64: the softmax of each token's scores, one document after the other."""
    group = query.shape[1] // key.shape[1]
    query, key, value = query.double(), key.double(), value.double()
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    rows = []
    for number, lengths in enumerate(LENGTHS):
        documents = [each[number].split(lengths, dim=1) for each in (query, key, value)]
        mixed = []
        for q, k, v in zip(*documents, strict=True):
            scores = q @ k.mT / math.sqrt(q.shape[-1])
            later = torch.ones_like(scores, dtype=torch.bool).triu(1)
            mixed.append(scores.masked_fill(later, -math.inf).softmax(dim=-1) @ v)
        rows.append(torch.cat(mixed, dim=1))
    return torch.stack(rows)


def value_and_gradients(function: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """The output, and the gradients of the inputs for a fixed gradient of the output."""
    output = function(*tensors)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output.device)
    gradients = torch.autograd.grad((output.float() * weights).sum(), tensors)
    return [output.detach(), *gradients]


def assert_alike(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for value, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(value.double(), wanted.double(), atol=tolerance, rtol=tolerance)


def same_score(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return score


def flex_operator(query: Tensor, key: Tensor, value: Tensor, *, block_mask: BlockMask, enable_gqa: bool) -> Tensor:
    """What `flex_attention` calls once it has checked its arguments: it refuses gradients on a CPU, the operator not.

    The operator shares keys within a group of query heads wherever there are fewer of them.
    """
    assert enable_gqa == (query.shape[1] != key.shape[1])
    scale = 1 / math.sqrt(query.shape[-1])
    output, *_ = torch.ops.higher_order.flex_attention(
        query, key, value, same_score, block_mask.as_tuple(), scale, {"BACKEND": "AUTO"}
    )
    return output  # type: ignore[no-any-return]


@pytest.fixture
def operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention that is not compiled, alone or in a compiled layer."""
    monkeypatch.setattr(attention, "_compiled", lambda: flex_operator)
    monkeypatch.setattr(attention, "flex_attention", flex_operator)


@pytest.fixture
def blocks_on_cpu(monkeypatch: pytest.MonkeyPatch, operator: None) -> Iterator[None]:
    """The path of a GPU, on the CPU."""
    monkeypatch.setattr(attention, "masks_by_blocks", lambda *_, **__: True)
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_on_a_cpu_each_document_is_as_if_alone(heads: tuple[int, int]) -> None:
    mask = packed_mask(segments_of(LENGTHS), 16)
    assert isinstance(mask, Tensor)
    found = value_and_gradients(lambda q, k, v: attend(q, k, v, mask), inputs(*heads))
    assert_alike(found, value_and_gradients(each_document_alone, inputs(*heads)), 1e-5)


@pytest.mark.usefixtures("blocks_on_cpu")
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_by_blocks_each_document_is_as_if_alone(heads: tuple[int, int]) -> None:
    mask = packed_mask(segments_of(LENGTHS), 16)
    assert isinstance(mask, BlockMask)
    found = value_and_gradients(lambda q, k, v: attend(q, k, v, mask), inputs(*heads))
    assert_alike(found, value_and_gradients(each_document_alone, inputs(*heads)), 1e-5)


@pytest.mark.usefixtures("blocks_on_cpu")
def test_by_blocks_products_have_the_type_of_autocast() -> None:
    """The rotary positions are float32, so queries and keys are too where values are already bfloat16."""
    q, k, v = (tensor.detach() for tensor in inputs(4, 2))
    with torch.autocast("cpu", torch.bfloat16):
        found = attend(q, k, v.bfloat16(), packed_mask(segments_of(LENGTHS), 16))
    assert found.dtype == torch.bfloat16
    assert_alike([found], [each_document_alone(q, k, v)], 3e-2)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.slow
def test_the_compiled_kernel_reads_the_blocks_of_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uncompiled, FlexAttention asks for each pair; only its kernels go by the blocks."""
    monkeypatch.setattr(attention, "masks_by_blocks", lambda *_, **__: True)
    q, k, v = (tensor.detach() for tensor in inputs(4, 2))
    with torch.no_grad():
        found = attend(q, k, v, packed_mask(segments_of(LENGTHS), 16))
    torch._dynamo.reset()
    assert_alike([found], [each_document_alone(q, k, v)], 1e-5)


@pytest.mark.usefixtures("blocks_on_cpu")
def test_by_blocks_nothing_of_all_pairs_is_kept_for_the_backward_pass() -> None:
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    q, k, v = (torch.randn(1, 1, 1024, 16, requires_grad=True) for _ in range(3))
    mask = packed_mask(torch.zeros(1, 1024, dtype=torch.long), 16)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        attend(q, k, v, mask)
    assert max(kept) == 1024 * 16


def blocks_of(mask: BlockMask) -> dict[str, list[list[list[int]]]]:
    """The blocks of each row of blocks, as sets that are sorted."""
    found = {}
    for name in ("kv", "full_kv", "q", "full_q"):
        counts, numbers = getattr(mask, f"{name}_num_blocks")[:, 0], getattr(mask, f"{name}_indices")[:, 0]
        found[name] = [
            [sorted(row[:count].tolist()) for count, row in zip(*of_batch, strict=True)]
            for of_batch in zip(counts, numbers, strict=True)
        ]
    return found


def rows_of_one_length() -> st.SearchStrategy[list[list[int]]]:
    """Documents of two rows that are equally long; the last one of a row may be padding."""

    def cut(length: int) -> st.SearchStrategy[list[list[int]]]:
        cuts = st.lists(st.integers(1, length - 1), max_size=6, unique=True)
        ends = cuts.map(lambda found: [0, *sorted(found), length])
        row = st.tuples(ends, st.booleans()).map(_lengths)
        return st.lists(row, min_size=2, max_size=2)

    return st.integers(2, 520).flatmap(cut)


def _lengths(drawn: tuple[list[int], bool]) -> list[int]:
    ends, is_padded = drawn
    lengths = [stop - start for start, stop in itertools.pairwise(ends)]
    return [*lengths[:-1], -lengths[-1]] if is_padded else lengths


@settings(max_examples=40)
@given(rows=rows_of_one_length())
def test_the_blocks_are_those_of_the_mask_of_all_pairs(rows: list[list[int]]) -> None:
    segments = segments_of(rows)
    ours, length = block_mask(segments), segments.shape[1]

    def pairs(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (segments[batch, query] == segments[batch, key])

    theirs = create_block_mask(pairs, len(rows), None, length, length, device="cpu")
    assert blocks_of(ours) == blocks_of(theirs)
    assert ours.shape == theirs.shape == (len(rows), 1, length, length)
    batch, query, key = (torch.arange(size) for size in (len(rows), length, length))
    ours_of_pairs = ours.mask_mod(batch[:, None, None], torch.tensor(0), query[:, None], key)
    same = segments[:, :, None] == segments[:, None, :]
    assert torch.equal(ours_of_pairs, same.tril())
    dense = segment_mask(segments)
    if dense is not None:
        assert torch.equal(ours_of_pairs, dense[:, 0])


def test_blocks_are_for_gpus_and_for_rows_that_have_one() -> None:
    assert masks_by_blocks(128, 16, on_gpu=True)
    assert not masks_by_blocks(127, 16, on_gpu=True)
    assert not masks_by_blocks(128, 8, on_gpu=True)  # the kernel refuses it
    assert not masks_by_blocks(4096, 128, on_gpu=False)


@pytest.mark.usefixtures("operator")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_takes_the_path_of_blocks(dtype: torch.dtype) -> None:
    """Fake tensors show device, shape and type; the kernel itself needs a GPU."""
    with FakeTensorMode(), torch.device("cuda"):
        segments = torch.ones(2, 4096, dtype=torch.long)
        mask = packed_mask(segments, 64)
        assert isinstance(mask, BlockMask)
        assert {each.device.type for each in mask.as_tuple() if isinstance(each, Tensor)} == {"cuda"}
        assert max(each.numel() for each in mask.as_tuple() if isinstance(each, Tensor)) == 2 * 32 * 32
        q, k, v = (torch.empty(2, heads, 4096, 64, dtype=dtype) for heads in (8, 2, 2))
        mixed = attend(q, k, v, mask)
    assert (mixed.shape, mixed.dtype, mixed.device.type) == (q.shape, dtype, "cuda")


SHAPES: list[tuple[Any, Any]] = [(4, 40), (None, 24), ("linear", None), (2, "linear"), (1, 17)]
"""Layers with attention of several kinds, or without one."""


def loss_and_gradients(device: str = "cpu", checkpointing: bool = False, backend: str = "") -> list[Tensor]:
    """Of a decoder with rows of 300 tokens in several documents; with a backend its layers are compiled."""
    model = heterogeneous(0, SHAPES)
    model.to(torch.device(device))
    model.train()
    if checkpointing:
        model.model.activation_checkpointing = True
    if backend:
        for layer in model.model.layers:
            layer.compile(backend=backend, fullgraph=True)
    ids = torch.randint(VOCAB_SIZE, (3, 300), generator=torch.Generator().manual_seed(0)).to(device)
    loss = model(ids, labels=ids, segment_ids=segments_of(LENGTHS).to(device)).loss
    loss.backward()
    return [
        loss.detach().cpu(),
        *(parameter.grad.cpu() for parameter in model.parameters() if parameter.grad is not None),
    ]


@pytest.fixture(scope="module")
def on_cpu() -> list[Tensor]:
    return loss_and_gradients()


@pytest.mark.usefixtures("blocks_on_cpu")
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler looks at it
@pytest.mark.parametrize(("checkpointing", "backend"), [(True, ""), (False, "aot_eager"), (True, "aot_eager")])
def test_a_decoder_by_blocks_has_the_gradients_of_the_cpu(
    monkeypatch: pytest.MonkeyPatch, on_cpu: list[Tensor], checkpointing: bool, backend: str
) -> None:
    made: list[BlockMask] = []

    def recorded(segments: Tensor) -> BlockMask:
        made.append(block_mask(segments))
        return made[-1]

    monkeypatch.setattr(attention, "block_mask", recorded)
    found = loss_and_gradients("cpu", checkpointing, backend)
    assert len(made) == 1  # once for all layers, also where they are computed again
    assert_alike(found, on_cpu, 1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_on_a_gpu_each_document_is_as_if_alone(heads: tuple[int, int], dtype: torch.dtype) -> None:
    mask = packed_mask(segments_of(LENGTHS).cuda(), 16)
    assert isinstance(mask, BlockMask)
    tensors = inputs(*heads, dtype, "cuda")
    found = value_and_gradients(lambda q, k, v: attend(q, k, v, mask), tensors)
    expected = value_and_gradients(each_document_alone, tensors)
    assert_alike(found, expected, 1e-4 if dtype == torch.float32 else 3e-2)


@pytest.mark.gpu
def test_on_a_gpu_no_scores_of_all_pairs_are_made() -> None:
    """Scores of 16,384 x 16,384 would take a GiB a head; the gradients are there too."""
    segments = (torch.arange(16_384) // 3000)[None].cuda()
    q, k, v = (
        torch.randn(1, heads, 16_384, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        for heads in (8, 2, 2)
    )
    mask = packed_mask(segments, 64)
    torch.cuda.reset_peak_memory_stats()
    attend(q, k, v, mask).float().sum().backward()
    assert torch.cuda.max_memory_allocated() < 1 << 30


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["", "inductor"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_on_a_gpu_a_decoder_has_the_gradients_of_the_cpu(
    on_cpu: list[Tensor], checkpointing: bool, backend: str
) -> None:
    assert_alike(loss_and_gradients("cuda", checkpointing, backend), on_cpu, 1e-3)
