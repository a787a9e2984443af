"""Chats in NeMo's packed form, read back with NeMo's own functions, against our own packing."""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from nemo.utils import sequence_packing_utils as nemo

from components.core.text.chat import encode_chats
from components.core.text.example import Example
from components.core.text.packing import IGNORE, pack_rows
from components.core.text.row_files import Row
from components.core.text.toggle import system_message
from components.data.nemo_packed import write_packed

PACK_SIZE = 256


def chat(question: str, answer: str) -> Row:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": [system_message("off"), *turns], "reasoning": "off"}


CHATS = [chat("1+" * n + "1=", str(n + 1) * (n % 3 + 1)) for n in range(9)] * 3 + [chat("1" * 300, "1")]


@pytest.fixture
def packs(tokenizer_folder: Path, tmp_path: Path) -> list[dict[str, Any]]:
    assert write_packed(CHATS, tokenizer_folder, tmp_path, PACK_SIZE, seed=1) == len(CHATS) - 1
    rows: list[dict[str, Any]] = pyarrow.parquet.read_table(tmp_path / "nemo-packed.parquet").to_pylist()
    return rows


def unpack(pack: dict[str, Any]) -> list[dict[str, Any]]:
    """The sequences of a pack, as NeMo's own packer takes them; it shifts the mask to where labels stand."""
    bounds = [*pack["seq_start_id"], len(pack["input_ids"])]
    return [
        {"input_ids": pack["input_ids"][start:stop], "loss_mask": [False, *pack["loss_mask"][start : stop - 1]]}
        for start, stop in pairwise(bounds)
    ]


def encoded(tokenizer_folder: Path) -> list[Example]:
    return encode_chats(CHATS[:-1], tokenizer_folder)


def test_what_is_read_back_are_the_chats_with_their_masks(packs: list[dict[str, Any]], tokenizer_folder: Path) -> None:
    found = sorted((item["input_ids"], item["loss_mask"]) for pack in packs for item in unpack(pack))
    assert found == sorted((list(each.token_ids), list(each.counts)) for each in encoded(tokenizer_folder))


def test_nemo_packs_what_it_reads_back_as_it_did_before(
    packs: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    items = [item for pack in packs for item in unpack(pack)]
    sequences, histogram = nemo.create_hist(items, PACK_SIZE)
    assignments, metadata = nemo.create_packing_strategy(histogram, PACK_SIZE, "first_fit_decreasing")
    again = nemo.fill_packing_strategy(assignments, sequences, PACK_SIZE, 0)
    assert metadata == json.loads((tmp_path / "nemo-packed.json").read_text())
    assert [pack["seq_start_id"] for pack in again] == [pack["seq_start_id"] for pack in packs]
    assert metadata["pack_size"] == PACK_SIZE
    assert len(packs) < len(items) / 2
    capsys.readouterr()


def test_inputs_and_labels_of_a_pack_are_those_of_our_own_packing(packs: list[dict[str, Any]]) -> None:
    for pack in packs:
        bounds = [*pack["seq_start_id"], len(pack["input_ids"])]
        examples = [Example(item["input_ids"], item["loss_mask"]) for item in unpack(pack)]
        ours = pack_rows([examples], len(pack["input_ids"]), 0)
        assert ours.input_ids_BT[0].tolist() == pack["input_ids"]
        assert [ours.position_ids_BT[0, start] for start in pack["seq_start_id"]] == [0] * len(examples)
        for number, (start, stop) in enumerate(pairwise(bounds), 1):
            # As NeMo's dataset cuts a pack: inputs without the last token, labels without the first, the mask beside.
            tokens, mask = pack["input_ids"][start:stop], pack["loss_mask"][start:stop]
            labels = [label if counts else IGNORE for label, counts in zip(tokens[1:], mask[:-1], strict=True)]
            assert ours.labels_BT[0, start : stop - 1].tolist() == labels
            assert set(ours.segment_ids_BT[0, start:stop].tolist()) == {number}
            assert any(mask)


def test_the_same_seed_gives_the_same_bytes(
    packs: list[dict[str, Any]], tokenizer_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "again").mkdir()
    write_packed(CHATS, tokenizer_folder, tmp_path / "again", PACK_SIZE, seed=1)
    for name in ("nemo-packed.parquet", "nemo-packed.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


PROBE = """
import sys
from pathlib import Path
from components.core.text.toggle import system_message
from components.data.nemo_packed import write_packed
turns = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]
write_packed([{"messages": [system_message("off"), *turns]}], Path(sys.argv[1]), Path(sys.argv[2]), 64, 0)
"""


def test_nemo_says_nothing_to_the_terminal(tokenizer_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROBE, str(tokenizer_folder), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3])
    assert (done.stdout, done.stderr) == ("", "")
