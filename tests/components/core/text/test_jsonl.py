from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.core.base.errors import DataError
from components.core.text.jsonl import read_user_rows, write_rows
from components.core.text.row_files import Row

JSON_ROWS = st.lists(st.dictionaries(st.text(), st.text() | st.integers() | st.booleans() | st.none()))


def value(row: Row) -> int:
    if not isinstance(row["value"], int):
        raise ValueError("value is not a number")
    return row["value"]


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    lines = ['{"value": 1}', "", '{"value": ', "[2]", '{"value": "three"}', '{"other": 4}', '{"value": 5}']
    path.write_text("\n".join(lines) + "\n")
    return path


@given(rows=JSON_ROWS)
def test_rows_written_are_the_rows_read(rows: list[Row], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    assert write_rows(path, rows) == len(rows)
    assert read_user_rows([path], lambda row: row, skip_bad=False) == (rows, 0)


def test_a_bad_file_is_refused_with_count_lines_reasons_and_a_way_out(broken: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_user_rows([broken], value, skip_bad=False)
    message = caught.value.message
    assert message.startswith("5 malformed lines: rows.jsonl line 2: empty line; rows.jsonl line 3: not JSON")
    assert "line 4: a JSON list, not an object" in message
    assert "line 5: value is not a number" in message
    assert "line 6: no 'other'" not in message
    assert "line 6: no 'value'" in message
    assert caught.value.hint is not None
    assert "--skip-bad" in caught.value.hint
    assert caught.value.exit_code == 2


def test_bad_lines_are_left_out_and_counted_when_told_to(broken: Path) -> None:
    assert read_user_rows([broken], value, skip_bad=True) == ([1, 5], 5)


def test_a_message_names_each_reason_once_and_counts_its_lines_over_several_files(tmp_path: Path) -> None:
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for file in files:
        file.write_text("\n" * 4)
    with pytest.raises(DataError, match=r"^8 malformed lines: a\.jsonl line 1: empty line \(and 7 more like it\)"):
        read_user_rows(files, value, skip_bad=False)


def test_a_line_that_is_no_utf8_is_malformed_and_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"value": 1}\n{"value": "caf\xe9"}\n\0\0\n{"value": 2}\n')
    with pytest.raises(
        DataError, match=r"2 malformed lines: rows.jsonl line 2: not UTF-8 \(byte 0xe9 at 14\)"
    ) as caught:
        read_user_rows([path], value, skip_bad=False)
    assert "line 3: binary, not text" in caught.value.message
    assert read_user_rows([path], value, skip_bad=True) == ([1, 2], 2)


def test_windows_line_ends_and_a_byte_order_mark_are_no_fault(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes('\ufeff{"value": 1}\r\n{"value": 2}'.encode())
    assert read_user_rows([path], value, skip_bad=False) == ([1, 2], 0)


def test_half_a_surrogate_pair_is_malformed_and_a_whole_one_is_a_character(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "\\uD83D\\uDE00"}\n{"text": "\\ud83d"}\n')
    rows, skipped = read_user_rows([path], lambda row: row, skip_bad=True)
    assert (rows, skipped) == ([{"text": "\N{GRINNING FACE}"}], 1)
    write_rows(tmp_path / "again.jsonl", rows)
