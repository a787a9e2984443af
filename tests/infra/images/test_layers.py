import hashlib
import os
import tarfile
from pathlib import Path

import pytest

from infra.images.layers import MODIFIED, Member, folder_members, write_layer


def tree(root: Path) -> list[str]:
    """A small tree of files; returns the paths in it."""
    (root / "etc").mkdir(parents=True)
    (root / "etc" / "name").write_text("tessera\n")
    (root / "su").write_bytes(b"\x7fELF")
    (root / "su").chmod(0o4755)
    (root / "bin").symlink_to("usr/bin")
    os.mkfifo(root / "pipe")
    return ["su", "pipe", "etc/name", "bin", "etc"]


def test_the_name_of_a_layer_is_the_digest_of_its_bytes(tmp_path: Path) -> None:
    layer = write_layer([Member("a/b", b"text")], tmp_path / "layer")
    written = (tmp_path / "layer").read_bytes()
    assert (layer.digest, layer.size) == (f"sha256:{hashlib.sha256(written).hexdigest()}", len(written))


def test_the_same_files_give_the_same_layer_whatever_their_order_and_times(tmp_path: Path) -> None:
    paths = tree(tmp_path / "one")
    assert sorted(tree(tmp_path / "two")) == sorted(paths)
    os.utime(tmp_path / "two" / "su", (1, 1))
    one = write_layer(folder_members(tmp_path / "one", paths), tmp_path / "1.tar")
    two = write_layer(folder_members(tmp_path / "two", reversed(paths)), tmp_path / "2.tar")
    assert one == two


def test_a_layer_has_links_modes_and_missing_parents_but_no_setuid_and_no_pipe(tmp_path: Path) -> None:
    members = [*folder_members(tmp_path / "one", tree(tmp_path / "one")), Member("opt/x/y", b"", owner=(7, 8))]
    write_layer(members, tmp_path / "layer")
    with tarfile.open(tmp_path / "layer") as tar:
        found = {entry.name: entry for entry in tar}
    assert list(found) == ["bin", "etc", "etc/name", "opt", "opt/x", "opt/x/y", "su"]
    assert found["bin"].linkname == "usr/bin"
    assert (found["su"].mode, found["opt"].mode) == (0o755, 0o755)
    assert (found["opt/x/y"].uid, found["opt/x/y"].gid) == (7, 8)
    assert {entry.mtime for entry in found.values()} == {MODIFIED}


def test_a_file_that_is_gone_ends_the_writing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_layer([Member("a", tmp_path / "gone")], tmp_path / "layer")
