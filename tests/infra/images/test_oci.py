import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from infra.images.layers import Member
from infra.images.oci import Layout, Start, full_name

START = Start(environment={"A": "b"}, entrypoint=("python", "-m", "x"), user="10001", working_folder="/home")


def layout_of_two(folder: Path) -> Layout:
    """Two images that share their lower layer."""
    layout = Layout(folder)
    layout.create()
    base = layout.add_layer([Member("etc/name", b"base")])
    for name in ("train", "core"):
        layout.add_image(f"tessera/{name}:1", [base, layout.add_layer([Member("own", name.encode())])], START)
    return layout


def read(layout: Layout, digest: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(layout.blob(digest).read_bytes())
    return content


def test_every_blob_is_named_by_its_digest_and_has_the_size_that_is_said(tmp_path: Path) -> None:
    layout = layout_of_two(tmp_path)
    for file in (tmp_path / "blobs" / "sha256").iterdir():
        assert hashlib.sha256(file.read_bytes()).hexdigest() == file.name
    for entry in layout.manifests():
        manifest = read(layout, entry["digest"])
        for part in (entry, manifest["config"], *manifest["layers"]):
            assert layout.blob(part["digest"]).stat().st_size == part["size"]


def test_a_config_says_how_the_container_starts_and_lists_the_layers(tmp_path: Path) -> None:
    layout = layout_of_two(tmp_path)
    manifest = read(layout, layout.manifests()[0]["digest"])
    config = read(layout, manifest["config"]["digest"])
    assert config["config"] == {
        "Env": ["A=b"],
        "Entrypoint": ["python", "-m", "x"],
        "User": "10001",
        "WorkingDir": "/home",
    }
    assert config["rootfs"]["diff_ids"] == [layer["digest"] for layer in manifest["layers"]]


def test_images_share_layers_and_an_image_that_is_added_again_replaces_the_old_one(tmp_path: Path) -> None:
    layout = layout_of_two(tmp_path)
    core, train = layout.manifests()
    assert layout.layers(core)[0] == layout.layers(train)[0]
    layout.add_image("tessera/core:1", layout.layers(core)[:1], START)
    layout.remove_unused()
    assert [len(layout.layers(entry)) for entry in layout.manifests()] == [1, 2]
    assert len(list((tmp_path / "blobs" / "sha256").iterdir())) == 2 + 2 + 2  # layers, configs, manifests


def test_two_layouts_of_the_same_images_are_equal(tmp_path: Path) -> None:
    one, two = layout_of_two(tmp_path / "one"), layout_of_two(tmp_path / "two")
    assert one.manifests() == two.manifests()


def test_an_archive_holds_the_images_that_it_was_asked_for_and_no_other_blob(tmp_path: Path) -> None:
    layout = layout_of_two(tmp_path)
    stream = io.BytesIO()
    layout.write_archive(["tessera/core:1"], stream)
    with tarfile.open(fileobj=io.BytesIO(stream.getvalue())) as tar:
        index = tar.extractfile("index.json")
        assert index is not None
        (entry,) = json.load(index)["manifests"]
        blobs = {name.rpartition("/")[2] for name in tar.getnames() if name.startswith("blobs")}
    assert entry["annotations"]["io.containerd.image.name"] == "docker.io/tessera/core:1"
    manifest = read(layout, entry["digest"])
    used = [entry, manifest["config"], *manifest["layers"]]
    assert blobs == {part["digest"].removeprefix("sha256:") for part in used}
    with pytest.raises(KeyError, match="serve"):
        layout.write_archive(["tessera/serve:1"], io.BytesIO())


@pytest.mark.parametrize(
    ("name", "full"),
    [
        ("tessera/core:1", "docker.io/tessera/core:1"),
        ("core:1", "docker.io/library/core:1"),
        ("registry.example:5000/team/core:1", "registry.example:5000/team/core:1"),
        ("localhost/core:1", "localhost/core:1"),
    ],
)
def test_names_are_those_that_kubernetes_asks_for(name: str, full: str) -> None:
    assert full_name(name) == full
