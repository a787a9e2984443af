import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from components.core.text.example import Example
from components.core.text.packing import IGNORE, PackedStream, best_fit_decreasing, pack_rows

EXAMPLES = [Example(list(range(1, n + 2)), [False] + [True] * n) for n in (3, 5, 2, 7, 4, 6, 3, 2)]


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(50, 80))
def test_packing_places_every_item_once_and_never_overflows(lengths, capacity):
    bins = best_fit_decreasing(lengths, capacity)

    assert sorted(itertools.chain(*bins)) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in items) <= capacity for items in bins)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40))
def test_packing_leaves_at_most_one_bin_half_empty(lengths):
    bins = best_fit_decreasing(lengths, 50)

    assert sum(sum(lengths[i] for i in items) <= 25 for items in bins) <= 1


def test_packed_row_keeps_documents_apart_and_shifts_labels_within_each():
    batch = pack_rows([[Example([5, 6, 7], [False, True, True]), Example([8, 9], [True, True])]], seq_len=7, pad=0)

    assert batch.input_ids_BT.tolist() == [[5, 6, 7, 8, 9, 0, 0]]
    assert batch.labels_BT.tolist() == [[6, 7, IGNORE, 9, IGNORE, IGNORE, IGNORE]]
    assert batch.position_ids_BT.tolist() == [[0, 1, 2, 0, 1, 0, 0]]
    assert batch.segment_ids_BT.tolist() == [[1, 1, 1, 2, 2, 0, 0]]


def test_a_row_is_the_same_wherever_it_is_asked_for():
    whole = PackedStream(EXAMPLES, seq_len=12, seed=3).batch(0, 12)
    late = PackedStream(EXAMPLES, seq_len=12, seed=3).batch(8, 4)

    assert torch.equal(whole.rows(8, 12).input_ids_BT, late.input_ids_BT)


def test_an_epoch_holds_every_example_once():
    stream = PackedStream(EXAMPLES, seq_len=12, seed=0)
    rows = len(stream._pack_epoch(0))
    batch = stream.batch(0, rows)

    assert int((batch.segment_ids_BT > 0).sum()) == sum(len(e.token_ids) for e in EXAMPLES)


def test_long_documents_are_cut_into_rows():
    stream = PackedStream([Example(list(range(1, 26)), [True] * 25)], seq_len=10, seed=0)

    assert sorted(len(piece.token_ids) for piece in stream._pieces) == [5, 10, 10]


@pytest.mark.parametrize("seed", [0, 1])
def test_epochs_differ_and_seeds_differ(seed):
    stream = PackedStream(EXAMPLES * 4, seq_len=12, seed=seed)
    rows = len(stream._pack_epoch(0))

    assert not torch.equal(stream.batch(0, rows).input_ids_BT, stream.batch(rows, rows).input_ids_BT)
