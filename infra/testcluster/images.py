"""Writes container images as archives that containerd imports; no registry and no Docker engine are needed."""

import hashlib
import io
import json
import tarfile
import tempfile
from pathlib import Path

from pydantic import BaseModel, ConfigDict

PAUSE = "testcluster.tessera.dev/pause:1"
HOST = "testcluster.tessera.dev/host:1"
ARGO_EXECUTOR = "testcluster.tessera.dev/argoexec:1"
NOBODY = 65532
"""User of containers that may not run as root."""
_USERS = f"root:x:0:0:root:/root:/bin/sh\nnobody:x:{NOBODY}:{NOBODY}:nobody:/tmp:/bin/sh\n"
_CREATED = "2026-01-01T00:00:00Z"


class Image(BaseModel):
    """What one image contains; the tag is never `latest`, so that no pull is tried."""

    model_config = ConfigDict(frozen=True)

    name: str
    files: dict[str, Path] = {}
    """Executable files, by their path in the image."""
    texts: dict[str, str] = {}
    folders: dict[str, int] = {}
    """Empty folders with their mode."""
    links: dict[str, str] = {}
    environment: dict[str, str] = {}
    entrypoint: tuple[str, ...] = ()
    user: str = ""


def host_image() -> Image:
    """An empty skeleton: a pod that mounts the host's /usr has the host's Debian programs, Python among them."""
    folders = dict.fromkeys(
        ("usr", "root", "home", "opt", "srv", "work", "run", "var/lib", "proc", "sys", "dev"), 0o755
    )
    return Image(
        name=HOST,
        folders={**folders, "tmp": 0o1777, "var/tmp": 0o1777},
        links={name: f"usr/{name}" for name in ("bin", "sbin", "lib", "lib64")},
        texts={
            "etc/passwd": _USERS,
            "etc/group": f"root:x:0:\nnogroup:x:{NOBODY}:\n",
            "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
        },
        environment={"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8"},
        user=str(NOBODY),
    )


def program_image(name: str, program: Path, user: str = "") -> Image:
    """An image of one static program."""
    return Image(
        name=name,
        files={f"bin/{program.name}": program},
        folders={"tmp": 0o1777, "proc": 0o755, "sys": 0o755, "dev": 0o755},
        texts={"etc/passwd": _USERS},
        environment={"PATH": "/bin"},
        entrypoint=(f"/bin/{program.name}",),
        user=user,
    )


def write_image(image: Image, archive: Path) -> None:
    """Write an image as one layer; the same content gives the same bytes."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=archive.parent) as scratch:
        layer = Path(scratch, "layer.tar")
        with tarfile.open(layer, "w", format=tarfile.PAX_FORMAT) as tar:
            _write_layer(tar, image)
        with layer.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        config = json.dumps(_config(image, digest), sort_keys=True).encode()
        config_name = f"{hashlib.sha256(config).hexdigest()}.json"
        manifest = [{"Config": config_name, "RepoTags": [image.name], "Layers": ["layer.tar"]}]
        whole = Path(scratch, "image.tar")
        with tarfile.open(whole, "w") as tar:
            _add_bytes(tar, config_name, config)
            _add_bytes(tar, "manifest.json", json.dumps(manifest).encode())
            with layer.open("rb") as stream:
                tar.addfile(_entry("layer.tar", size=layer.stat().st_size), stream)
        whole.rename(archive)


def _write_layer(tar: tarfile.TarFile, image: Image) -> None:
    parents = {
        str(p) for path in (*image.files, *image.texts, *image.folders, *image.links) for p in Path(path).parents
    }
    folders = {**dict.fromkeys(parents - {"."}, 0o755), **image.folders}
    for path, mode in sorted(folders.items()):
        tar.addfile(_entry(path, mode=mode, kind=tarfile.DIRTYPE))
    for path, target in sorted(image.links.items()):
        link = _entry(path, kind=tarfile.SYMTYPE)
        link.linkname = target
        tar.addfile(link)
    for path, text in sorted(image.texts.items()):
        _add_bytes(tar, path, text.encode())
    for path, source in sorted(image.files.items()):
        with source.open("rb") as stream:
            tar.addfile(_entry(path, size=source.stat().st_size, mode=0o755), stream)


def _entry(path: str, *, size: int = 0, mode: int = 0o644, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    """A member that belongs to root and has no time of its own."""
    entry = tarfile.TarInfo(path)
    entry.size, entry.mode, entry.type = size, mode, kind
    return entry


def _add_bytes(tar: tarfile.TarFile, path: str, content: bytes) -> None:
    tar.addfile(_entry(path, size=len(content)), io.BytesIO(content))


def _config(image: Image, layer_digest: str) -> dict[str, object]:
    return {
        "architecture": "amd64",
        "os": "linux",
        "created": _CREATED,
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{layer_digest}"]},
        "history": [{"created": _CREATED}],
        "config": {
            "Env": [f"{name}={value}" for name, value in image.environment.items()],
            "Entrypoint": list(image.entrypoint) or None,
            "User": image.user,
            "WorkingDir": "/",
        },
    }
