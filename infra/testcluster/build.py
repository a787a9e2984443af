"""Builds the cluster's programs from pinned Go modules and caches them by the digest of what they are built from.

Each folder in `modules/` is one set of versions that resolve together. Kubernetes, Kueue and Trainer need different
versions of the same libraries, so they cannot share one `go.mod`.
"""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from infra.testcluster.layout import Layout, TestClusterError

MODULES = Path(__file__).parent / "modules"
KUBERNETES = "1.36.3"
CONTAINERD = "2.4.2"
ARGO = "4.0.5"
ROLLOUTS = "1.10.1"
_COMPONENT_VERSION = "-X k8s.io/component-base/version.git"


class SourceFolder(BaseModel):
    """A folder of a Go module that is needed at run time: CRDs, roles, webhooks, KWOK's stages."""

    model_config = ConfigDict(frozen=True)

    module: str
    folder: str


class ModuleSet(BaseModel):
    """One `go.mod` and what is built from it."""

    model_config = ConfigDict(frozen=True)

    name: str
    """Name of the folder in `modules/`."""
    packages: str = "tool"
    """What `go build` builds; `tool` stands for the `tool` lines of go.mod, nothing for a set of manifests alone."""
    ldflags: str = ""
    tags: str = ""
    renamed: dict[str, str] = {}
    """Programs whose Go name says too little, with the name that they get."""
    manifests: dict[str, SourceFolder] = {}
    """Folders copied beside the binaries, by name."""
    incomplete_module: str = ""
    """A module whose published archive misses files."""
    copied_files: dict[str, str] = {}
    """Missing files of that module, each with the file of the same module that replaces it."""

    @property
    def source(self) -> Path:
        """The folder with go.mod."""
        return MODULES / self.name

    def digest(self) -> str:
        """SHA-256 over the sources and the build's settings."""
        digest = hashlib.sha256(self.model_dump_json().encode())
        for path in sorted(path for path in self.source.rglob("*") if path.is_file()):
            digest.update(f"{path.relative_to(self.source)}\0".encode() + path.read_bytes())
        return digest.hexdigest()

    def folder(self, layout: Layout) -> Path:
        """Where the finished binaries are."""
        return layout.binaries / f"{self.name}-{self.digest()[:16]}"


MODULE_SETS = (
    ModuleSet(name="etcd", renamed={"server": "etcd"}),
    ModuleSet(
        name="kube",
        ldflags=f"{_COMPONENT_VERSION}Version=v{KUBERNETES} {_COMPONENT_VERSION}Major=1 {_COMPONENT_VERSION}Minor=36",
    ),
    ModuleSet(
        name="cri",
        ldflags=f"-X github.com/containerd/containerd/v2/version.Version={CONTAINERD}",
        tags="no_btrfs no_devmapper no_zfs osusergo netgo",
    ),
    ModuleSet(name="coredns", packages="."),
    ModuleSet(name="pause", packages="."),
    ModuleSet(
        name="ctrl",
        tags="exclude_scheduler_library",
        manifests={
            "kueue": SourceFolder(module="sigs.k8s.io/kueue", folder="config"),
            "jobset": SourceFolder(module="sigs.k8s.io/jobset", folder="config"),
            "kwok": SourceFolder(module="sigs.k8s.io/kwok", folder="kustomize/stage"),
        },
    ),
    ModuleSet(
        name="trainer",
        manifests={"trainer": SourceFolder(module="github.com/kubeflow/trainer/v2", folder="manifests")},
    ),
    ModuleSet(
        name="argo",
        ldflags=f"-X github.com/argoproj/argo-workflows/v4.version=v{ARGO}",
        manifests={
            "argo": SourceFolder(module="github.com/argoproj/argo-workflows/v4", folder="manifests/base/crds/minimal")
        },
        incomplete_module="github.com/argoproj/argo-workflows/v4",
        copied_files={
            "workflow/executor/osspecific/signal_linux.go": "workflow/executor/osspecific/signal_darwin.go",
        },
    ),
    ModuleSet(
        name="rollouts",
        ldflags=f"-X github.com/argoproj/argo-rollouts/utils/version.version=v{ROLLOUTS}",
        manifests={"rollouts": SourceFolder(module="github.com/argoproj/argo-rollouts", folder="manifests/crds")},
    ),
    ModuleSet(
        name="gateway",
        packages="",
        manifests={"gateway": SourceFolder(module="sigs.k8s.io/gateway-api", folder="config/crd")},
    ),
    ModuleSet(
        name="flux",
        manifests={
            name: SourceFolder(module=f"github.com/fluxcd/{name}", folder="config/crd")
            for name in ("source-controller", "kustomize-controller", "helm-controller")
        },
    ),
)


def module_set(name: str) -> ModuleSet:
    """The module set of a name."""
    return next(modules for modules in MODULE_SETS if modules.name == name)


def missing(layout: Layout) -> list[ModuleSet]:
    """The module sets that have no binaries yet."""
    return [modules for modules in MODULE_SETS if not modules.folder(layout).is_dir()]


def build(modules: ModuleSet, layout: Layout) -> float:
    """Build one module set and return the seconds it took; a broken build leaves nothing."""
    started = time.monotonic()
    target = modules.folder(layout)
    layout.binaries.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{modules.name}-", dir=layout.binaries) as scratch:
        folder = Path(scratch, "new")
        folder.mkdir()
        if modules.packages:
            _compile(modules, folder, Path(scratch))
        for old, new in modules.renamed.items():
            folder.joinpath(old).rename(folder / new)
        for name, source in modules.manifests.items():
            copied = folder / "manifests" / name
            shutil.copytree(
                _module_folder(modules, source.module) / source.folder, copied, copy_function=shutil.copyfile
            )
        folder.rename(target)
    return time.monotonic() - started


def _compile(modules: ModuleSet, folder: Path, scratch: Path) -> None:
    """Write the programs of a module set into a folder."""
    with _complete_sources(modules, scratch) as more:
        command = ["go", "build", *more, "-trimpath", "-buildvcs=false", "-tags", modules.tags]
        _go([*command, "-ldflags", f"-s -w {modules.ldflags}".strip(), "-o", f"{folder}/", modules.packages], modules)


def check_go() -> None:
    """Raise where no Go compiler of the pinned version, or a newer one, is installed.

    Raises:
        TestClusterError: go is missing or too old.
    """
    needed = next(
        line.split()[1] for line in (MODULES / "kube" / "go.mod").read_text().splitlines() if line.startswith("go ")
    )
    if shutil.which("go") is None:
        raise TestClusterError(f"no binaries are cached and `go` is not in PATH: install Go {needed} or newer")
    found = subprocess.run(["go", "env", "GOVERSION"], env=_environment(), capture_output=True, text=True, check=True)
    version = found.stdout.strip().removeprefix("go")
    if _numbers(version) < _numbers(needed):
        raise TestClusterError(f"go is {version}, the test cluster's modules need {needed} or newer")


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".") if part.isdigit()]


@contextlib.contextmanager
def _complete_sources(modules: ModuleSet, scratch: Path) -> Iterator[list[str]]:
    """Options of `go build` that replace a module with a copy to which its missing files were added."""
    if not modules.incomplete_module:
        yield []
        return
    copied, gomod = scratch / "source", scratch / "go.mod"
    shutil.copytree(_module_folder(modules, modules.incomplete_module), copied, copy_function=shutil.copyfile)
    for target, origin in modules.copied_files.items():
        shutil.copyfile(copied / origin, copied / target)
    shutil.copyfile(modules.source / "go.mod", gomod)
    shutil.copyfile(modules.source / "go.sum", scratch / "go.sum")
    _go(["go", "mod", "edit", f"-replace={modules.incomplete_module}={copied}", str(gomod)], modules)
    yield [f"-modfile={gomod}"]


def _module_folder(modules: ModuleSet, module: str) -> Path:
    """Where a module lies in the module cache; it is fetched where it is missing."""
    return Path(json.loads(_go(["go", "mod", "download", "-json", module], modules))["Dir"])


def _go(command: list[str], modules: ModuleSet) -> str:
    done = subprocess.run(command, cwd=modules.source, env=_environment(), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        tail = "\n".join((done.stderr or done.stdout).strip().splitlines()[-15:])
        raise TestClusterError(f"`{' '.join(command[:3])}` of the module set {modules.name} failed:\n{tail}")
    return done.stdout


def _environment() -> dict[str, str]:
    """No other Go version is downloaded, and no C compiler is needed."""
    return {**os.environ, "GOTOOLCHAIN": "local", "CGO_ENABLED": "0"}
