"""Rules of the source tree that no linter holds: few files a folder, tests that mirror it, names that exist."""

import ast
import importlib.util
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from components.core.runtime.code_digest import PLATFORM, VLLM_PLUGIN, VLLM_SETTINGS

ROOT = Path(__file__).parents[1]
SOURCE = ("components", "pipelines", "infra", "dashboards")
MAX_FILES = 15
MODULE = re.compile(r"(components|pipelines)(\.[a-z_]\w*)+")
ENTRY = re.compile(rf"({MODULE.pattern}):(\w+)")


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def texts(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_no_folder_of_source_has_more_than_fifteen_files() -> None:
    counts = Counter(path.parent for path in sources(*SOURCE) if path.name != "__init__.py")
    assert {str(folder.relative_to(ROOT)): count for folder, count in counts.items() if count > MAX_FILES} == {}


def test_every_test_module_of_core_search_and_pipelines_stands_where_its_package_does() -> None:
    lost = [
        str(path.relative_to(ROOT))
        for path in sources("tests/components", "tests/pipelines")
        if path.name.startswith("test_") and not (ROOT / path.parent.relative_to(ROOT / "tests")).is_dir()
    ]
    assert lost == []


def module_exists(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def defines(module: str, name: str) -> bool:
    path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    return path.is_file() and re.search(rf"^(def |class )?{name}\b", path.read_text(encoding="utf-8"), re.M) is not None


@pytest.mark.parametrize("path", sources("components", "pipelines"), ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_that_are_named_by_a_string_exist(path: Path) -> None:
    for text in texts(path):
        if entry := ENTRY.fullmatch(text):
            assert defines(entry[1], entry[4]), text
        elif MODULE.fullmatch(text):
            assert module_exists(text), text


def test_the_packages_that_the_code_digest_leaves_out_exist() -> None:
    assert all(map(module_exists, (*PLATFORM, VLLM_SETTINGS, VLLM_PLUGIN)))


def test_no_module_has_the_name_of_one_of_the_standard_library() -> None:
    tops = {path.stem for path in sources("components", "pipelines")} - {"__init__", "__main__"}
    assert tops & set(sys.stdlib_module_names) - {"statistics"} == set()


def test_the_plug_in_that_vllm_loads_exists() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    entry = re.search(r'\[project\.entry-points\."vllm\.general_plugins"\]\ntessera = "([\w.]+):(\w+)"', text)
    assert entry is not None
    assert defines(entry[1], entry[2])
    assert importlib.util.find_spec(entry[1]) is not None


PATH = re.compile(r"(?:components|pipelines|infra|tests|helm|dashboards)/[\w./-]+\.\w+")


@pytest.mark.parametrize(
    "page",
    [path for path in sorted(ROOT.rglob("*.md")) if not {".venv", "node_modules"} & set(path.relative_to(ROOT).parts)],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_files_that_a_page_names_exist(page: Path) -> None:
    if page.name != "CHANGELOG.md":
        named = {name.rstrip(".") for name in PATH.findall(page.read_text(encoding="utf-8")) if "<" not in name}
        assert {name for name in named if not (ROOT / name).exists() and not (page.parent / name).exists()} == set()
