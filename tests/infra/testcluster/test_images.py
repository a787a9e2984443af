import json
import tarfile
from pathlib import Path
from typing import Any

from infra.testcluster.images import HOST, host_image, program_image, write_image


def read(tar: tarfile.TarFile, name: str) -> bytes:
    stream = tar.extractfile(name)
    assert stream is not None
    return stream.read()


def contents(archive: Path) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """The index's entry of the only image of an archive, its config and its layer."""
    with tarfile.open(archive) as tar:
        (entry,) = json.loads(read(tar, "index.json"))["manifests"]
        manifest = json.loads(read(tar, blob(entry)))
        (layer,) = manifest["layers"]
        return entry, json.loads(read(tar, blob(manifest["config"]))), read(tar, blob(layer))


def blob(entry: dict[str, Any]) -> str:
    return f"blobs/{entry['digest'].replace(':', '/')}"


def test_an_archive_has_the_image_by_its_name(tmp_path: Path) -> None:
    write_image(host_image(), tmp_path / "host.tar")
    entry, _, _ = contents(tmp_path / "host.tar")
    assert entry["annotations"]["io.containerd.image.name"] == HOST
    assert [file.name for file in tmp_path.iterdir()] == ["host.tar"]


def test_the_same_image_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.tar", "b.tar"):
        write_image(host_image(), tmp_path / name)
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


def test_the_host_image_is_a_skeleton_for_the_hosts_programs_and_not_roots(tmp_path: Path) -> None:
    write_image(host_image(), tmp_path / "host.tar")
    _, config, layer = contents(tmp_path / "host.tar")
    (tmp_path / "layer.tar").write_bytes(layer)
    with tarfile.open(tmp_path / "layer.tar") as tar:
        assert tar.getmember("lib64").linkname == "usr/lib64"
        assert tar.getmember("tmp").mode == 0o1777
        assert tar.getnames().index("var") < tar.getnames().index("var/tmp")
    assert config["config"]["User"] == "65532"


def test_a_program_image_starts_its_program(tmp_path: Path) -> None:
    (tmp_path / "pause").write_bytes(b"\x7fELF")
    write_image(program_image("example.test/pause:1", tmp_path / "pause"), tmp_path / "pause.tar")
    _, config, layer = contents(tmp_path / "pause.tar")
    (tmp_path / "layer.tar").write_bytes(layer)
    assert config["config"]["Entrypoint"] == ["/bin/pause"]
    with tarfile.open(tmp_path / "layer.tar") as tar:
        assert read(tar, "bin/pause") == b"\x7fELF"
        assert tar.getmember("bin/pause").mode == 0o755
