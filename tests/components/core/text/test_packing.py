import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from components.core.base.errors import DataError
from components.core.text.corpus.encoding import load_corpus
from components.core.text.example import DocumentList, Example
from components.core.text.packing import IGNORE, PackedStream, best_fit_decreasing, load_batches, pack_rows

EXAMPLES = [Example(list(range(1, n + 2)), [False] + [True] * n) for n in (3, 5, 2, 7, 4, 6, 3, 2)]
DOCUMENTS = DocumentList(EXAMPLES)


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
    assert (batch.num_targets, batch.num_tokens, batch.num_pairs) == (3, 5, 1 + 2 + 3 + 1 + 2)


def test_a_row_is_the_same_wherever_it_is_asked_for():
    whole = PackedStream(DOCUMENTS, seq_len=12, seed=3).batch(0, 12)
    late = PackedStream(DOCUMENTS, seq_len=12, seed=3).batch(8, 4)

    assert torch.equal(whole.rows(8, 12).input_ids_BT, late.input_ids_BT)


def test_an_epoch_holds_every_example_once():
    stream = PackedStream(DOCUMENTS, seq_len=12, seed=0)
    batch = stream.batch(0, stream.num_rows)

    assert int((batch.segment_ids_BT > 0).sum()) == sum(len(e.token_ids) for e in EXAMPLES)


def test_long_documents_are_cut_into_rows():
    stream = PackedStream(DocumentList([Example(list(range(1, 26)), [True] * 25)]), seq_len=10, seed=0)
    batch = stream.batch(0, stream.num_rows)

    assert sorted((batch.segment_ids_BT > 0).sum(dim=1).tolist()) == [5, 10, 10]


def test_pieces_without_a_token_to_learn_from_are_left_out():
    examples = [
        Example(list(range(1, 26)), [False] * 20 + [True] * 5),
        Example([7], [True]),
        Example([7, 8], [False] * 2),
    ]
    stream = PackedStream(DocumentList(examples), seq_len=10, seed=0)

    assert stream.num_rows == 1
    assert stream.batch(0, 1).input_ids_BT.tolist() == [[21, 22, 23, 24, 25, 0, 0, 0, 0, 0]]
    with pytest.raises(DataError, match="no example has a token to learn from"):
        PackedStream(DocumentList(examples[1:]), seq_len=10, seed=0).batch(0, 1)


def test_ranks_share_one_stored_index_which_changes_nothing(tmp_path):
    alone = PackedStream(DOCUMENTS, seq_len=12, seed=3)
    first, second = (PackedStream(DOCUMENTS, seq_len=12, seed=3, folder=tmp_path / "rows") for _ in range(2))
    whole = first.batch(0, 20)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "rows").rglob("*.npy")}

    assert torch.equal(whole.input_ids_BT, alone.batch(0, 20).input_ids_BT)
    assert torch.equal(second.batch(7, 5).labels_BT, whole.rows(7, 12).labels_BT)
    assert written == {path: path.stat().st_mtime_ns for path in (tmp_path / "rows").rglob("*.npy")}


@pytest.mark.parametrize("seed", [0, 1])
def test_epochs_differ_and_seeds_differ(seed):
    stream = PackedStream(DocumentList(EXAMPLES * 4), seq_len=12, seed=seed)
    rows = stream.num_rows

    assert not torch.equal(stream.batch(0, rows).input_ids_BT, stream.batch(rows, rows).input_ids_BT)


@pytest.fixture
def corpus(tmp_path):
    """Seven documents of ten tokens, each a row of its own, and a tokenizer of letters."""
    words = {letter: number for number, letter in enumerate(["<eos>", *"abcdefghi"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    texts = ["".join(np.random.default_rng(seed).permutation(list("abcdefghi"))) for seed in range(7)]
    (tmp_path / "validation.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return tmp_path


@pytest.mark.parametrize(
    ("batch_size", "limit", "sizes"), [(2, 2, [2, 2]), (7, 1, [7]), (4, 2, [4, 3]), (3, 9, [3, 3, 1]), (8, 5, [7])]
)
def test_held_out_batches_have_no_row_twice(corpus, batch_size, limit, sizes):
    batches = load_batches(corpus, corpus, "validation", seq_len=10, batch_size=batch_size, limit=limit)
    rows = [tuple(row) for batch in batches for row in batch.input_ids_BT.tolist()]

    assert [len(batch.input_ids_BT) for batch in batches] == sizes
    assert len(set(rows)) == len(rows)


def test_held_out_rows_are_the_first_of_the_stream(corpus):
    batches = load_batches(corpus, corpus, "validation", seq_len=10, batch_size=3, limit=2, seed=5)
    stream = PackedStream(load_corpus(corpus, corpus, "validation"), 10, 5)

    assert all(torch.equal(b.labels_BT, stream.batch(3 * k, 3).labels_BT) for k, b in enumerate(batches))


def test_a_split_without_rows_is_an_error_with_a_way_out(corpus):
    (corpus / "validation.jsonl").write_text("")
    with pytest.raises(DataError, match="validation split of the corpus has no rows") as error:
        load_batches(corpus, corpus, "validation", seq_len=10, batch_size=3, limit=2)
    assert error.value.hint == "give the data stage more text"
