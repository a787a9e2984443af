"""Builds the three images from layers that they share: a base of Debian, parts of the lock, torch, the project."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from infra.images.layers import Layer, folder_members
from infra.images.lock_parts import Device, lock_part
from infra.images.oci import Layout, Start
from infra.images.root import BUILD, HOME, PATH, USER_ID, Root
from infra.images.sbom import Package, bill_of_materials, debian_packages, python_packages
from infra.lock import ROOT
from pipelines.recipe.kfp_pipeline import image as image_name

SUITE = "bookworm"
PYTHON_BASE = ("python3", "ca-certificates", "libstdc++6")
BASES = {"base": (*PYTHON_BASE, "git"), "compute-base": (*PYTHON_BASE, "g++", "libpython3-dev", "libnuma1")}
"""Debian's packages by the name of the layer. The operator pushes by git; torch and Triton compile kernels at run time,
and vLLM asks for NUMA."""
PARTS: Mapping[str, Sequence[str]] = {
    "core": ("core", "project"),
    "train": ("core", "train", "torch", "project"),
    "serve": ("core", "train", "torch", "serve", "project"),
}
"""The layers of each image above its base, in the order in which they are installed."""
START = Start(
    environment={"PATH": PATH, "HOME": f"/{HOME}", "LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1"},
    entrypoint=("python", "-m", "components.core.runtime.stage_command"),
    user=str(USER_ID),
    working_folder=f"/{HOME}",
)
ENVIRONMENT = "opt/tessera"
SITE_PACKAGES = f"{ENVIRONMENT}/lib/python3.11/site-packages"
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "components", "pipelines")
NO_TRITON = "triton ; sys_platform == 'never'\n"
"""A CUDA build of torch asks for Triton, which has no use for a CPU."""


class Size(BaseModel):
    """A layer of an image, as `make images` prints it."""

    model_config = ConfigDict(frozen=True)

    image: str
    part: str
    size: int


class Builder:
    """Installs the parts one after the other in one tree; what a part adds to it is its layer."""

    def __init__(self, layout: Layout, scratch: Path, device: Device, torch: str) -> None:
        self._layout, self._scratch, self._device, self._torch = layout, scratch, device, torch
        self._layers: dict[str, Layer] = {}
        self._packages: dict[str, list[Package]] = {}
        self._root = Root(scratch)

    def build(self, images: Sequence[str]) -> list[Size]:
        """Build images with their bills of materials; returns the sizes of their layers."""
        for base in dict.fromkeys(map(_base, images)):
            self._root = self._add_base(base)
        self._in_root("venv", "--python", "/usr/bin/python3", f"/{ENVIRONMENT}")
        before: dict[str, tuple[int, int, int]] = {}
        for part in dict.fromkeys(part for image in PARTS if image in images for part in PARTS[image][:-1]):
            before = self._add_part(part, before)
        self._add_part("project", before)
        return [size for image in images for size in self._add_image(image)]

    def _add_base(self, name: str) -> Root:
        root = Root(self._scratch / name)
        root.install_base(SUITE, BASES[name])
        self._layers[name] = self._layout.add_layer(folder_members(root.folder, root.paths()))
        self._packages[name] = debian_packages(root.folder)
        return root

    def _add_part(self, part: str, before: Mapping[str, tuple[int, int, int]]) -> dict[str, tuple[int, int, int]]:
        """Install a part and write its layer; returns what the environment has now."""
        known = {package for packages in self._packages.values() for package in packages}
        {"torch": self._install_torch, "project": self._install_project}.get(part, lambda: self._install_lock(part))()
        self._root.compile(path for path in self._new(before) if path.endswith(".py") and "/tests/" not in path)
        self._layers[part] = self._layout.add_layer(folder_members(self._root.folder, self._new(before)))
        now = python_packages(self._root.folder / SITE_PACKAGES)
        self._packages[part] = [package for package in now if package not in known]
        return self._root.paths(ENVIRONMENT)

    def _new(self, before: Mapping[str, tuple[int, int, int]]) -> list[str]:
        return [path for path, stamp in self._root.paths(ENVIRONMENT).items() if before.get(path) != stamp]

    def _install_lock(self, image: str) -> None:
        part = self._scratch / "part.lock"
        part.write_text("\n".join(lock_part(image, self._device)) + "\n")
        self._install("--no-deps", "--require-hashes", "--requirements", f"/{BUILD}/part.lock", lock=part)

    def _install_torch(self) -> None:
        overrides = self._scratch / "overrides.txt"
        overrides.write_text(NO_TRITON if self._device == "cpu" else "")
        self._install("--overrides", f"/{BUILD}/overrides", f"torch=={self._torch}", overrides=overrides)

    def _install_project(self) -> None:
        sources, wheels = self._scratch / "sources", self._scratch / "wheels"
        sources.mkdir()
        for name in SOURCES:
            source = ROOT / name
            copy = shutil.copytree if source.is_dir() else shutil.copy
            copy(source, sources / name)
        command = [_uv(), "build", "--quiet", "--wheel", "--out-dir", str(wheels), str(sources)]
        subprocess.run(command, check=True)
        version = importlib.metadata.version("tessera")
        self._install(
            "--no-deps", "--no-index", "--find-links", f"/{BUILD}/wheels", f"tessera=={version}", wheels=wheels
        )
        remove_from_distribution(self._root.folder / SITE_PACKAGES / f"tessera-{version}.dist-info", "uv_cache.json")

    def _install(self, *arguments: str, **mounts: Path) -> None:
        named = {"part.lock" if name == "lock" else name: path for name, path in mounts.items()}
        self._in_root("pip", "install", "--python", f"/{ENVIRONMENT}/bin/python", *arguments, **named)

    def _in_root(self, *arguments: str, **mounts: Path) -> None:
        """Run uv in the tree, with the cache of this machine."""
        cache = subprocess.run([_uv(), "cache", "dir"], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
        Path(cache).mkdir(parents=True, exist_ok=True)
        options = ("--quiet", "--link-mode", "copy", "--cache-dir", f"/{BUILD}/cache", "--no-config")
        self._root.run(f"/{BUILD}/uv", *arguments, *options, mounts={"uv": Path(_uv()), "cache": Path(cache), **mounts})

    def _add_image(self, image: str) -> list[Size]:
        parts = [_base(image), *PARTS[image]]
        name = image_name(image)
        digest = self._layout.add_image(name, [self._layers[part] for part in parts], START)
        packages = [package for part in parts for package in self._packages[part]]
        bill = self._layout.folder / f"{image}.cdx.json"
        bill.write_text(bill_of_materials(name, digest, packages), encoding="utf-8")
        return [Size(image=image, part=part, size=self._layers[part].size) for part in parts]


def remove_from_distribution(folder: Path, name: str) -> None:
    """Delete a file of a `dist-info` folder and its line in the record; uv writes the time of a wheel into one."""
    (folder / name).unlink(missing_ok=True)
    lines = (folder / "RECORD").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "RECORD").write_text("".join(line for line in lines if f"/{name}," not in line), encoding="utf-8")


def missing_tools() -> list[str]:
    """What the build needs and this machine does not have."""
    missing = [tool for tool in ("mmdebstrap", "unshare", "chroot") if shutil.which(tool) is None]
    return missing if os.geteuid() == 0 else ["the rights of root", *missing]


def _base(image: str) -> str:
    return "base" if image == "core" else "compute-base"


def _uv() -> str:
    return str(Path(sys.executable).parent / "uv")
