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
IMPORT_SYSTEM = ("sys.modules", "sys.meta_path", "sys.path_hooks")
MUTATORS = {"append", "clear", "extend", "insert", "pop", "remove", "setdefault", "update"}
PATCHES_ALLOWED: dict[str, str] = {}
"""Files that may assign into a foreign module, each with the reason."""


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


def imported_names(tree: ast.AST) -> dict[str, str]:
    """Names that stand for foreign modules, or for what they define, and the full name of each."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.partition(".")[0]
                found[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    own = ("components", "pipelines", "infra", "dashboards", "tests")
    return {name: full for name, full in found.items() if full.partition(".")[0] not in own}


def full_name(node: ast.AST, names: dict[str, str]) -> str:
    """Dotted name of what an expression stands for, if that is foreign; else nothing."""
    if isinstance(node, ast.Name):
        return names.get(node.id, "")
    if isinstance(node, ast.Attribute):
        owner = full_name(node.value, names)
        return owner and f"{owner}.{node.attr}"
    if isinstance(node, ast.Call) and full_name(node.func, names) == "importlib.import_module":
        return "imported"
    if isinstance(node, ast.Subscript) and full_name(node.value, names) == "sys.modules":
        return "imported"
    return ""


def foreign_patches(source: str) -> list[str]:
    """Expressions that assign into a foreign module or class, or change Python's import system."""
    tree = ast.parse(source)
    names = imported_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and full_name(node.value, names) == "imported":
            names |= {target.id: "imported" for target in node.targets if isinstance(target, ast.Name)}
    return [ast.unparse(node) for node in ast.walk(tree) if is_patch(node, names)]


def is_patch(node: ast.AST, names: dict[str, str]) -> bool:
    if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load):
        return full_name(node, names) not in ("", "os.environ")  # `os.environ |= {...}` sets variables
    if isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load):
        return full_name(node.value, names).startswith(IMPORT_SYSTEM) or "__dict__" in full_name(node.value, names)
    if not isinstance(node, ast.Call):
        return False
    if isinstance(node.func, ast.Name) and node.func.id in ("setattr", "delattr"):
        return full_name(node.args[0], names) != ""
    owner, _, method = full_name(node.func, names).rpartition(".")
    return owner in IMPORT_SYSTEM and method in MUTATORS


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.set_num_threads = print",
        "from vllm.v1.engine import utils\nutils.get_mp_context = print",
        "from a.b import Class as Other\nOther.method = print",
        "import a\nsetattr(a.b, 'c', 1)",
        "import a\ndel a.b",
        "import a\na.b, c = 1, 2",
        "import a\nwith open('x') as a.b: pass",
        "import a\na.b += 1",
        "import a\na.__dict__['b'] = 1",
        "import importlib\nimportlib.import_module('a').b = 1",
        "from importlib import import_module as load\nmodule = load('a')\nmodule.b = 1",
        "import sys\nsys.modules['scipy'] = None",
        "import sys\nsys.modules['scipy'].stats = None",
        "from sys import modules\ndel modules['scipy']",
        "import sys\nsys.modules.update(scipy=None)",
        "import sys\nsys.modules.setdefault('scipy', None)",
        "import sys\nsys.meta_path.insert(0, print)",
        "import sys\nsys.meta_path = []",
    ],
)
def test_a_patch_is_found(source: str) -> None:
    assert len(foreign_patches(source)) == 1


def test_what_is_no_patch_is_not_taken_for_one() -> None:
    harmless = """
import os, sys
from components.core import base
from foreign import Class
os.environ["A"] = "1"
os.environ.update(B="2")
os.environ |= {"C": "3"}
value = Class()
value.attribute = sys.modules.get("os")
setattr(value, "attribute", 1)
base.own = 1
class Own(Class):
    attribute = 1
    def method(self):
        self.attribute = 2
"""
    assert foreign_patches(harmless) == []


def test_nothing_is_assigned_into_a_foreign_module() -> None:
    found = {
        str(path.relative_to(ROOT)): foreign_patches(path.read_text()) for path in sources("components", "pipelines")
    }
    assert {name: patches for name, patches in found.items() if patches and name not in PATCHES_ALLOWED} == {}
    assert [name for name in PATCHES_ALLOWED if not found.get(name)] == []  # an exception that is no longer needed
