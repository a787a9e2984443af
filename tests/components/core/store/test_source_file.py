import os
import random
import time
from hashlib import sha256
from pathlib import Path

import pytest

from components.core.store.manifest import FileEntry
from components.core.store.source_file import read_source, stamp_of

MIB = 1 << 20


@pytest.mark.parametrize("size", [0, 1, MIB, 2 * MIB, 5 * MIB - 1, 5 * MIB, 6 * MIB + 17])
@pytest.mark.parametrize("part_bytes", [None, 2 * MIB, 5 * MIB])
def test_a_file_and_its_parts_are_hashed_in_one_reading(size: int, part_bytes: int | None, tmp_path: Path) -> None:
    data = random.Random(size).randbytes(size)
    (tmp_path / "file").write_bytes(data)
    source = read_source(tmp_path / "file", part_bytes)
    assert source.entry == FileEntry(sha256=sha256(data).hexdigest(), size=size)
    stretches = [] if part_bytes is None else [data[at : at + part_bytes] for at in range(0, size, part_bytes)]
    assert list(source.parts) == [sha256(stretch).hexdigest() for stretch in stretches]


@pytest.mark.parametrize("age_s", [0, 60])
def test_a_file_has_a_stamp_once_a_change_would_alter_it(age_s: float, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    os.utime(path, (time.time() - age_s,) * 2)
    assert read_source(path, None).stamp == (stamp_of(path.stat()) if age_s else None)
