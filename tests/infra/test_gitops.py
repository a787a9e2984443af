"""The page for a platform team: its examples agree with each other and with the chart, its commands are shell."""

import re
import subprocess
from pathlib import Path
from string import Template
from typing import Any

import helm_python
import pytest
import yaml

from infra.chart import CHART, render
from pipelines.promotion.served_file import read_value, replace_value
from pipelines.retraining.cluster import BUNDLE_ANNOTATION
from pipelines.retraining.spec import GROUP, KIND, VERSION, RetrainingSpec
from tests.helm.cases import find

FOLDER = Path(__file__).parents[2] / "infra" / "gitops"
PAGE = (FOLDER / "README.md").read_text(encoding="utf-8")
COMMANDS = "".join(re.findall(r"^```\n(.*?)^```$", PAGE, re.M | re.S))
VARIABLES = dict(
    pair.split("=", 1) for line in COMMANDS.splitlines() if line.startswith("export") for pair in line.split()[1:]
)


def filled_in(name: str) -> str:
    """An example with the variables of the page; one that the page does not export is an error."""
    return Template((FOLDER / name).read_text(encoding="utf-8")).substitute(VARIABLES)


def objects_of(name: str) -> dict[str, dict[str, Any]]:
    """The objects of an example by kind and name."""
    return {f"{each['kind']}/{each['metadata']['name']}": each for each in yaml.safe_load_all(filled_in(name))}


@pytest.fixture
def spec() -> RetrainingSpec:
    made = yaml.safe_load(filled_in("retraining.yaml"))
    assert (made["apiVersion"], made["kind"]) == (f"{GROUP}/{VERSION}", KIND)
    assert made["metadata"] == {"name": VARIABLES["NAME"], "namespace": VARIABLES["NAMESPACE"]}
    return RetrainingSpec.parse(made["spec"], where="spec")


def test_the_commands_are_shell_and_thirty_lines_at_most() -> None:
    assert 20 < len(COMMANDS.splitlines()) <= 30
    subprocess.run(["bash", "-n"], input=COMMANDS, text=True, check=True)


def test_the_chart_takes_the_values_and_serves_nothing_before_the_first_promotion(spec: RetrainingSpec) -> None:
    values = yaml.safe_load(filled_in("values.yaml"))
    objects = render(values, namespace=VARIABLES["NAMESPACE"])
    assert {each["metadata"].get("namespace") for each in objects} == {None, VARIABLES["NAMESPACE"]}
    find(objects, "Deployment", "tessera-operator")
    assert "Rollout" not in {each["kind"] for each in objects}
    assert spec.store == values["store"]["uri"]
    assert spec.promote is not None
    assert spec.recipe.git is not None
    assert {spec.recipe.git.repository, spec.promote.git.repository} == set(values["operator"]["repositories"])


def test_flux_follows_the_folders_that_the_page_makes_and_the_release_takes_their_values(spec: RetrainingSpec) -> None:
    flux, release = objects_of("flux.yaml"), objects_of("release.yaml")
    assert {each["metadata"]["namespace"] for each in (flux | release).values()} == {VARIABLES["NAMESPACE"]}
    for each in flux.values():
        if each["kind"] == "Kustomization":
            assert f"GitRepository/{each['spec']['sourceRef']['name']}" in flux
            assert f"$PLATFORM/{each['spec']['path'].removeprefix('./')}" in COMMANDS
    assert flux["GitRepository/platform"]["spec"]["url"] == VARIABLES["GIT_URL"]
    helm = release["HelmRelease/tessera"]["spec"]
    assert f"GitRepository/{helm['chart']['spec']['sourceRef']['name']}" in release
    assert str(CHART.relative_to(FOLDER.parents[1])) == helm["chart"]["spec"]["chart"]
    kustomization = yaml.safe_load(filled_in("kustomization.yaml"))
    (generated,) = kustomization["configMapGenerator"]
    assert [each["name"] for each in helm["valuesFrom"]] == [generated["name"]]
    assert spec.promote is not None
    assert [f"serving/{name}" for name in generated["files"]] == [spec.promote.git.path]


def test_a_promotion_makes_the_rollout_that_the_retraining_follows(spec: RetrainingSpec) -> None:
    assert spec.promote is not None
    git, text = spec.promote.git.naming(VARIABLES["NAME"]), filled_in("values.yaml")
    assert read_value(text, git.key, git.path) == ""
    promoted = replace_value(text, git.key, "a" * 64, git.path)
    with pytest.raises(helm_python.HelmError, match=r"canary\.problems is missing"):
        render(yaml.safe_load(promoted))
    assert 'sed -i "s/problems: .*/problems: $PROBLEMS/"' in COMMANDS
    served = yaml.safe_load(re.sub("problems: .*", f"problems: {'b' * 64}", promoted))
    rollout = find(render(served), "Rollout", str(spec.promote.rollout))
    assert rollout["metadata"]["annotations"][BUNDLE_ANNOTATION] == "a" * 64
    assert yaml.safe_load(re.sub("tag: .*", 'tag: "9"', promoted))["images"]["tag"] == "9"
