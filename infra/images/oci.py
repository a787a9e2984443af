"""Image layouts of the Open Container Initiative: folders of images that share their layers, and archives of them."""

import hashlib
import json
import os
import tarfile
import tempfile
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import IO, Any

from pydantic import BaseModel, ConfigDict

from infra.images.layers import Layer, Member, tar_entry, write_layer

CREATED = "2026-01-01T00:00:00Z"
NAME = "io.containerd.image.name"
"""Annotation of an image in the index: containerd imports the image under this name."""
TAG = "org.opencontainers.image.ref.name"
"""Annotation by which other tools name an image of a layout."""
PLATFORM = {"architecture": "amd64", "os": "linux"}
LAYOUT = json.dumps({"imageLayoutVersion": "1.0.0"}).encode()
_TYPE = "application/vnd.oci.image"


class Start(BaseModel):
    """How a container of an image starts."""

    model_config = ConfigDict(frozen=True)

    environment: dict[str, str] = {}
    entrypoint: tuple[str, ...] = ()
    user: str = ""
    working_folder: str = "/"


class Layout:
    """A folder of images in the layout of OCI; `skopeo` and `podman` read it as `oci:FOLDER`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._blobs = folder / "blobs" / "sha256"

    def create(self) -> None:
        """Make the folder, if it is not there."""
        self._blobs.mkdir(parents=True, exist_ok=True)
        (self.folder / "oci-layout").write_bytes(LAYOUT)

    def add_layer(self, members: Iterable[Member]) -> Layer:
        """Write a layer that images can share."""
        with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
            layer = write_layer(members, Path(scratch, "layer"))
            Path(scratch, "layer").rename(self.blob(layer.digest))
        return layer

    def add_image(self, name: str, layers: Sequence[Layer], start: Start) -> str:
        """Add an image, or replace the one of this name; returns the digest of its manifest."""
        config = self._add_json(_config(layers, start))
        manifest = {
            "schemaVersion": 2,
            "mediaType": f"{_TYPE}.manifest.v1+json",
            "config": {"mediaType": f"{_TYPE}.config.v1+json", **config},
            "layers": [{"mediaType": f"{_TYPE}.layer.v1.tar", **layer.model_dump()} for layer in layers],
        }
        made = self._add_json(manifest)
        annotations = {NAME: full_name(name), TAG: name.rpartition("/")[2]}
        entry = {"mediaType": manifest["mediaType"], **made, "platform": PLATFORM, "annotations": annotations}
        others = [each for each in self.manifests() if each["annotations"][NAME] != annotations[NAME]]
        entries = sorted([*others, entry], key=lambda each: str(each["annotations"][NAME]))
        (self.folder / "index.json.new").write_bytes(_index(entries))
        (self.folder / "index.json.new").replace(self.folder / "index.json")
        return str(made["digest"])

    def manifests(self) -> list[dict[str, Any]]:
        """The index's entry of each image."""
        index = self.folder / "index.json"
        return list(json.loads(index.read_bytes())["manifests"]) if index.exists() else []

    def layers(self, entry: dict[str, Any]) -> list[Layer]:
        """The layers of an image, the lowest first."""
        manifest = json.loads(self.blob(entry["digest"]).read_bytes())
        return [Layer(digest=each["digest"], size=each["size"]) for each in manifest["layers"]]

    def blob(self, digest: str) -> Path:
        """The file of a digest."""
        return self._blobs / digest.removeprefix("sha256:")

    def remove_unused(self) -> None:
        """Delete what no image of the index uses."""
        used = {digest for entry in self.manifests() for digest in self._digests(entry)}
        for file in self._blobs.iterdir():
            if f"sha256:{file.name}" not in used:
                file.unlink()

    def write_archive(self, names: Iterable[str], stream: IO[bytes]) -> None:
        """Write images as one tar archive, which `ctr images import` takes.

        Raises:
            KeyError: the layout has no image of a name.
        """
        by_name = {entry["annotations"][NAME]: entry for entry in self.manifests()}
        entries = [by_name[full_name(name)] for name in names]
        digests = sorted({digest for entry in entries for digest in self._digests(entry)})
        with tarfile.open(fileobj=stream, mode="w|") as tar:
            for path, content in (("oci-layout", LAYOUT), ("index.json", _index(entries))):
                tar.addfile(tar_entry(path, len(content)), BytesIO(content))
            for digest in digests:
                with self.blob(digest).open("rb") as blob:
                    path = f"blobs/sha256/{digest.removeprefix('sha256:')}"
                    tar.addfile(tar_entry(path, os.fstat(blob.fileno()).st_size), blob)

    def _digests(self, entry: dict[str, Any]) -> list[str]:
        manifest = json.loads(self.blob(entry["digest"]).read_bytes())
        return [entry["digest"], manifest["config"]["digest"], *(layer["digest"] for layer in manifest["layers"])]

    def _add_json(self, document: dict[str, Any]) -> dict[str, Any]:
        content = json.dumps(document, sort_keys=True).encode()
        digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
        self.blob(digest).write_bytes(content)
        return {"digest": digest, "size": len(content)}


def full_name(name: str) -> str:
    """The name of an image with the registry that Kubernetes assumes where a name has none."""
    first, slash, _ = name.partition("/")
    if slash and (first == "localhost" or "." in first or ":" in first):
        return name
    return f"docker.io/{name}" if slash else f"docker.io/library/{name}"


def _index(entries: list[dict[str, Any]]) -> bytes:
    index = {"schemaVersion": 2, "mediaType": f"{_TYPE}.index.v1+json", "manifests": entries}
    return json.dumps(index, sort_keys=True).encode()


def _config(layers: Sequence[Layer], start: Start) -> dict[str, Any]:
    return {
        **PLATFORM,
        "created": CREATED,
        "rootfs": {"type": "layers", "diff_ids": [layer.digest for layer in layers]},
        "history": [{"created": CREATED}] * len(layers),
        "config": {
            "Env": [f"{name}={value}" for name, value in start.environment.items()],
            "Entrypoint": list(start.entrypoint) or None,
            "User": start.user,
            "WorkingDir": start.working_folder,
        },
    }
