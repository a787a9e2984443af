"""The images of the test cluster, as archives that containerd imports; no registry and no Docker engine are needed."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from infra.images.layers import Member
from infra.images.oci import Layout, Start

PAUSE = "testcluster.tessera.dev/pause:1"
HOST = "testcluster.tessera.dev/host:1"
ARGO_EXECUTOR = "testcluster.tessera.dev/argoexec:1"
NOBODY = 65532
"""User of containers that may not run as root."""
_USERS = f"root:x:0:0:root:/root:/bin/sh\nnobody:x:{NOBODY}:{NOBODY}:nobody:/tmp:/bin/sh\n"


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
    start = Start(environment=image.environment, entrypoint=image.entrypoint, user=image.user)
    with tempfile.TemporaryDirectory(dir=archive.parent) as scratch:
        layout, whole = Layout(Path(scratch, "layout")), Path(scratch, "image.tar")
        layout.create()
        layout.add_image(image.name, [layout.add_layer(_members(image))], start)
        with whole.open("wb") as stream:
            layout.write_archive([image.name], stream)
        whole.rename(archive)


def _members(image: Image) -> Iterator[Member]:
    for path, mode in image.folders.items():
        yield Member(path, mode=mode)
    for path, target in image.links.items():
        yield Member(path, target=target)
    for path, text in image.texts.items():
        yield Member(path, content=text.encode())
    for path, source in image.files.items():
        yield Member(path, content=source, mode=0o755)
