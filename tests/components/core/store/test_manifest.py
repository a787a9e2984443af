import os
import random
import time
from hashlib import sha256
from pathlib import Path

import pytest

from components.core.store.manifest import FileEntry, read_source, stamp_of

MIB = 1 << 20


@pytest.mark.parametrize("size", [0, 1, MIB, 2 * MIB, 5 * MIB - 1, 5 * MIB, 6 * MIB + 17])
@pytest.mark.parametrize("age_s", [0, 60])
def test_a_file_comes_in_chunks_as_it_was_hashed(size: int, age_s: float, tmp_path: Path) -> None:
    data = random.Random(size).randbytes(size)
    path = tmp_path / "file"
    path.write_bytes(data)
    os.utime(path, (time.time() - age_s,) * 2)
    source = read_source(path)
    assert source.entry == FileEntry(sha256=sha256(data).hexdigest(), size=size)
    chunks = list(source.chunks(2 * MIB))
    assert b"".join(chunks) == data
    assert all(len(chunk) == 2 * MIB for chunk in chunks[:-1])


@pytest.mark.parametrize("age_s", [0, 60])
def test_a_file_has_a_stamp_once_a_change_would_alter_it(age_s: float, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    os.utime(path, (time.time() - age_s,) * 2)
    assert read_source(path).stamp == (stamp_of(path.stat()) if age_s else None)
