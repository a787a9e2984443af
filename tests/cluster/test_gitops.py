"""From a commit to a served model and back, as `infra/gitops/README.md` says it: its commands run as they are written.

Git is served over HTTP, Flux follows it and applies the chart, the operator is the chart's pod, Argo Rollouts shifts
the traffic behind a gateway, a Prometheus judges, MLflow has the registry. Two parts are stand-ins: the backend of
Kubeflow Pipelines (`kfp_standin.py`), and the servers that users ask (`tests/vllm_standin.py`); the evaluation asks
real vLLM.
"""

import base64
import contextlib
import itertools
import logging
import os
import re
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from string import Template
from typing import Any

import pytest
import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from kubernetes import dynamic
from kubernetes.dynamic.exceptions import NotFoundError
from mlflow import MlflowClient

from components.core.lineage.pipeline_runs import TAG
from infra.chart import CHART, render
from infra.testcluster.gateway import GATEWAY_NAME, GATEWAY_NAMESPACE, PROMETHEUS_URL
from infra.testcluster.layout import GATEWAY
from pipelines.promotion.served_file import read_value
from pipelines.retraining.spec import GROUP, KIND, PLURAL, VERSION
from tests.cluster.api import Cluster
from tests.cluster.argo import ARGO, ArgoWorkflows, host_additions
from tests.cluster.kfp_standin import running_standin
from tests.cluster.objects import ROOT, Object, run_on_this_machine, volume_objects
from tests.cluster.streaming_clients import HOST, asking_clients
from tests.helm.cases import pod_templates
from tests.mlflow_server import running_mlflow
from tests.pipelines.promotion.git_http import git_over_http
from tests.pipelines.promotion.git_server import TOKEN, git
from tests.s3_server import S3Server, fresh_prefix

pytestmark = pytest.mark.cluster

HELM_RELEASE = "helm.toolkit.fluxcd.io/v2"
KUSTOMIZATION = "kustomize.toolkit.fluxcd.io/v1"
GITOPS = ROOT / "infra" / "gitops"
BLOCKS = re.findall(r"^```\n(.*?)^```$", (GITOPS / "README.md").read_text(encoding="utf-8"), re.M | re.S)
SETTINGS, INSTALL, FIRST, CHANGE, ROLL_BACK, UPGRADE = BLOCKS
KEY = "serving.models.nano.digest"
PATIENCE_S = 1800
TRAINING = {"global_batch_size": 2, "micro_batch_size": 2, "seq_len": 64}
LOAD = {"batch_size": 2, "prompt_tokens": 4, "new_tokens": 4, "rounds": 1}
RECIPE = {
    "name": "nano",
    "placement": {"threads": 1, "memory_gib": 4.0},
    "data": {"arithmetic": {"num_train": 200, "num_chats": 80, "num_validation": 16, "num_test": 220}},
    "parent_pretrain": {
        "shape": {
            "hidden_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 64,
        },
        "num_steps": 40,
        **TRAINING,
    },
    "search": {
        "shards": 1,
        "seq_len": 64,
        "batch_size": 2,
        "ffn_fractions": [1.0, 0.5],
        "importance_batches": 1,
        "distillation": {"num_steps": 4},
        "scoring_batches": 1,
        "pareto_points": 2,
        "measurement": LOAD,
        "limits": {"parameters": "70%"},
    },
    "distill": {"num_steps": 8, **TRAINING},
    "sft": {"num_steps": 8, **TRAINING},
    "eval": {"num_problems": 2, "num_samples": 1, "max_tokens": 6, "workload": LOAD},
    "deploy": {"max_tokens": 6},
    **dict.fromkeys(("pretrain", "rl")),
}
log = logging.getLogger(__name__)


class Platform:
    """A platform team at its shell, with the page in hand."""

    def __init__(self, cluster: Cluster, folder: Path, variables: Mapping[str, str]) -> None:
        self.cluster, self.copy = cluster, folder / "platform"
        self._folder, self._variables = folder, variables

    def follow(self, what: str, commands: str) -> None:
        """Run commands of the page; what they set is there for the next ones."""
        kept = self._folder / "kept.sh"
        kept.touch()
        keep = f"declare -p FIRST BAD 2>/dev/null > {kept} || true"
        script = "\n".join(["set -euo pipefail", self._settings(), f". {kept}", commands, keep])
        started = time.monotonic()
        done = subprocess.run(
            ["bash", "-c", script], cwd=self._folder / "checkout", capture_output=True, text=True, check=False
        )
        log.info("%s: %.0f s", what, time.monotonic() - started)
        assert done.returncode == 0, f"{what}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"

    def ask_for(self, what: str, **settings: float) -> None:
        """Commit other settings of the recipe, and wait until a run was made of them and the gate has judged it."""
        before = self.status()["runs"][0]["run"]
        line = ", ".join(f"{name.replace('__', '.')}: {value}" for name, value in settings.items())
        self.follow(what, f'sed -i "s/  set: .*/  set: {{{line}}}/" "$PLATFORM/retraining/$NAME.yaml" && push "{what}"')

        def judged() -> bool:
            run, gate = self.status()["runs"][0]["run"], self.status().get("gate", {})
            return bool(before != run == gate.get("run"))

        self.wait(f"the gate has judged: {what}", judged)

    def wait(self, what: str, probe: Callable[[], Any]) -> Any:
        """Wait for something of a run."""
        started = time.monotonic()
        found = self.cluster.wait(what, probe, PATIENCE_S)
        log.info("%s: %.0f s", what, time.monotonic() - started)
        return found

    def status(self) -> Object:
        """Status of the Retraining."""
        found = self.cluster.get(f"{GROUP}/{VERSION}", KIND, "nano")
        return dict((found or {}).get("status") or {})

    def judgement(self, kind: str) -> tuple[str, str]:
        """Status and reason of a condition."""
        (found,) = (each for each in self.status()["conditions"] if each["type"] == kind)
        return str(found["status"]), str(found["reason"])

    def plans(self) -> dict[str, str]:
        """Whether each stage of the last run was computed or reused."""
        return {each["label"]: each["plan"] for each in self.status()["stages"]}

    @property
    def served(self) -> str:
        """The bundle that Git names."""
        git(self.copy, "pull", "--quiet", "--rebase")
        path = self.copy / "serving" / "values.yaml"
        return read_value(path.read_text(encoding="utf-8"), KEY, path.name)

    def rollout_is(self, phase: str, bundle: str) -> bool:
        """Whether the Rollout has a phase with a bundle."""
        found = self.cluster.get(ARGO, "Rollout", "tessera-serving-nano")
        if found is None or found["metadata"]["annotations"]["tessera.dev/bundle"] != bundle:
            return False
        status = found.get("status", {})
        seen = (status.get("observedGeneration"), status.get("phase"))
        return seen == (str(found["metadata"]["generation"]), phase)

    def _settings(self) -> str:
        """The page's first commands with the values of this platform."""

        def own(found: re.Match[str]) -> str:
            name = found["name"]
            return f"{name}={self._variables[name]}" if name in self._variables else found[0]

        return re.sub(r"\b(?P<name>[A-Z_]+)=\S+", own, SETTINGS).replace("--timeout=24h", f"--timeout={PATIENCE_S}s")


@pytest.fixture
def namespace(api: dynamic.DynamicClient) -> Iterator[Cluster]:
    """A namespace that the page creates; what the test cluster needs in it follows by `furnish`."""
    cluster = Cluster(api, f"test-{uuid.uuid4().hex[:8]}")
    for group, kind in ((ARGO, "Workflow"), (ARGO, "Rollout"), (HELM_RELEASE, "HelmRelease")):
        cluster.need(group, kind)
    yield cluster
    for kind in ("retraining", "serving"):
        if cluster.get(KUSTOMIZATION, "Kustomization", kind) is not None:
            cluster.delete(KUSTOMIZATION, "Kustomization", kind)
    cluster.wait("the release is gone", lambda: cluster.get(HELM_RELEASE, "HelmRelease", "tessera") is None)
    with contextlib.suppress(NotFoundError):  # the chart keeps it
        cluster.delete("apiextensions.k8s.io/v1", "CustomResourceDefinition", f"{PLURAL}.{GROUP}")
    with contextlib.suppress(NotFoundError):
        cluster.remove()


@pytest.fixture
def platform(
    namespace: Cluster, pod_s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Platform]:
    """The servers that a platform team has, and a checkout whose examples fit this machine."""
    store, home = fresh_prefix(pod_s3, monkeypatch), tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))  # kfp.Client writes a file there
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    identify(monkeypatch)
    keys = {name: value for name, value in pod_s3.environment.items() if name.startswith("AWS_") and "KEY" in name}
    (tmp_path / "keys.env").write_text("".join(f"{name}={value}\n" for name, value in keys.items()))
    (tmp_path / "git-token").write_text(TOKEN)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    private, public = signing_key()
    (tmp_path / "key.pem").write_bytes(private)
    write_repositories(tmp_path / "git")
    with (
        running_mlflow(tmp_path, host=GATEWAY) as mlflow,
        running_standin(ArgoWorkflows(namespace), host_additions(), GATEWAY) as kfp,
        git_over_http(tmp_path / "git", "tessera", TOKEN, GATEWAY) as private_git,
        git_over_http(tmp_path / "git", "", "", GATEWAY) as open_git,
    ):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow.uri)
        variables = {
            "NAMESPACE": namespace.namespace,
            "GPUS": "0",
            "RECIPE": "../recipe.yaml",
            "STORE": store,
            "TESSERA_STORE": store,
            "AWS_ENDPOINT_URL": pod_s3.endpoint,
            "KFP": kfp.url,
            "GIT_URL": f"{private_git}/platform.git",
            "CHART_URL": f"{open_git}/tessera.git",
            "GATEWAY": GATEWAY_NAME,
            "GATEWAY_NAMESPACE": GATEWAY_NAMESPACE,
            "ROUTER": "traefik",
            "KEYS": "../keys.env",
            "TOKEN": "../git-token",
        }
        write_checkout(tmp_path / "checkout", local_values(mlflow.uri, public), variables)
        yield Platform(namespace, tmp_path, variables)


def identify(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let git know who a person is, as their own settings do."""
    login = base64.b64encode(f"tessera:{TOKEN}".encode()).decode()
    settings = {
        "http.extraHeader": f"Authorization: Basic {login}",
        "user.name": "Person",
        "user.email": "person@example.com",
    }
    monkeypatch.setenv("GIT_CONFIG_COUNT", str(len(settings)))
    for number, (key, value) in enumerate(settings.items()):
        monkeypatch.setenv(f"GIT_CONFIG_KEY_{number}", key)
        monkeypatch.setenv(f"GIT_CONFIG_VALUE_{number}", value)


def signing_key() -> tuple[bytes, str]:
    """A private key and its public half, PEM."""
    key, pem = Ed25519PrivateKey.generate(), serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return private, key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo).decode()


def write_repositories(root: Path) -> None:
    """The platform repository, empty but for its branch, and one with two versions of the chart."""
    for name in ("platform", "tessera"):
        git(root.parent, "init", "--quiet", "--bare", "--initial-branch=main", f"{root}/{name}.git")
        git(root.parent, "clone", "--quiet", f"{root}/{name}.git", f"{root}/{name}")
        git(root / name, "checkout", "--quiet", "-B", "main")
    copy, published = root / "tessera", root / "tessera" / "helm" / "tessera"
    shutil.copytree(CHART, published)
    for version in ("0.1.0", "0.2.0"):
        description = published / "Chart.yaml"
        text = re.sub(r"(?m)^(version|appVersion): .*$", rf"\1: {version}", description.read_text(encoding="utf-8"))
        description.write_text(text, encoding="utf-8")
        git(copy, "add", "-A")
        git(copy, "commit", "--quiet", "--allow-empty", "-m", version)
        git(copy, "tag", f"v{version}")
        git(copy, "push", "--quiet", "origin", "main", f"v{version}")
    (root / "platform" / "README").write_text("a platform\n")
    git(root / "platform", "add", "-A")
    git(root / "platform", "commit", "--quiet", "-m", "begin")
    git(root / "platform", "push", "--quiet", "origin", "main")


def local_values(mlflow: str, public_key: str) -> Object:
    """What the page's example does not say: servers for little memory, short steps, the key, MLflow, Prometheus."""
    model = {
        "hostnames": [HOST],
        "resources": {"requests": {"cpu": "20m", "memory": "64Mi"}, "limits": {"memory": "512Mi"}},
        "longestAnswerSeconds": 30,
        "drainSeconds": 5,
        "startSeconds": 240,
        "cache": {"size": "1Gi"},
    }
    canary = {"stepSeconds": 15, "checkSeconds": 5, "maxTokens": 64}
    return {
        "mlflow": {"trackingUri": mlflow},
        "operator": {"signingSecret": "signing"},
        "dashboards": {"enabled": False},
        "training": {"enabled": False},
        "serving": {
            "prometheus": PROMETHEUS_URL,
            "trustedKeys": [public_key],
            "models": {"${NAME}": {**model, "canary": canary}},
        },
    }


def write_checkout(folder: Path, local: Object, variables: Mapping[str, str]) -> None:
    """A checkout with the page's examples, changed so that their pods run on this machine and their steps are short."""
    examples = folder / "infra" / "gitops"
    shutil.copytree(GITOPS, examples)
    (folder / ".venv").symlink_to(sys.prefix)
    values = merged(yaml.safe_load((examples / "values.yaml").read_text(encoding="utf-8")), local)
    (examples / "values.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    source, release = yaml.safe_load_all((examples / "release.yaml").read_text(encoding="utf-8"))
    patches = host_patches(values, variables)
    release["spec"]["postRenderers"] = [{"kustomize": {"patches": patches}}]
    (examples / "release.yaml").write_text(yaml.safe_dump_all([source, release], sort_keys=False), encoding="utf-8")
    sources, *kustomizations = yaml.safe_load_all((examples / "flux.yaml").read_text(encoding="utf-8"))
    sources["spec"]["interval"] = "5s"
    for each in kustomizations:
        each["spec"]["retryInterval"] = "5s"
    (examples / "flux.yaml").write_text(yaml.safe_dump_all([sources, *kustomizations]), encoding="utf-8")
    retraining = yaml.safe_load((examples / "retraining.yaml").read_text(encoding="utf-8"))
    # A model of this size answers nothing right, so its perplexity decides.
    retraining["spec"]["promote"] |= {"when": ["perplexity"], "tolerance": 0.2}
    retraining["spec"].pop("set")
    lines = yaml.safe_dump(retraining, sort_keys=False).replace("spec:\n", "spec:\n  set: {sft.num_steps: 280}\n")
    (examples / "retraining.yaml").write_text(lines, encoding="utf-8")


def merged(base: Object, more: Object) -> Object:
    """One mapping over another, level by level."""
    both = {key: merged(base[key], more[key]) for key in base.keys() & more.keys() if isinstance(base[key], dict)}
    return {**base, **more, **both}


def host_patches(values: Object, variables: Mapping[str, str]) -> list[Object]:
    """Patches that give every pod of the chart the image and the folders of this machine."""
    defaults = dict(re.findall(r"([A-Z_]+)=(\S+)", SETTINGS))
    given = yaml.safe_load(Template(yaml.safe_dump(values)).substitute({**defaults, **variables}))
    model = given["serving"]["models"][defaults["NAME"]]
    model["digest"], model["canary"]["problems"] = "a" * 64, "b" * 64
    patches = []
    for before, after in zip(render(given), render(given), strict=True):
        for template in pod_templates([after]):
            run_on_this_machine(template["spec"])
        if operations := list(changes(before, after, "")):
            target = {"kind": after["kind"], "name": after["metadata"]["name"]}
            patches.append({"target": target, "patch": yaml.safe_dump(operations)})
    return patches


def changes(before: Any, after: Any, path: str) -> Iterator[Object]:
    """Operations of JSON Patch that make one value of another, of which nothing is removed."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key, value in after.items():
            place = f"{path}/{key.replace('~', '~0').replace('/', '~1')}"
            if key in before:
                yield from changes(before[key], value, place)
            else:
                yield {"op": "add", "path": place, "value": value}
    elif isinstance(before, list) and isinstance(after, list):
        for number, (old, new) in enumerate(itertools.zip_longest(before, after)):
            if number < len(before):
                yield from changes(old, new, f"{path}/{number}")
            else:
                yield {"op": "add", "path": f"{path}/-", "value": new}
    elif before != after:
        yield {"op": "replace", "path": path, "value": after}


def furnish(cluster: Cluster, folder: Path) -> None:
    """What pods need on the test cluster, Pod Security, the key, and the account of the stand-in's pods."""
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    cluster.patch("v1", "Namespace", cluster.namespace, {"metadata": {"labels": labels}})
    key = base64.b64encode((folder / "key.pem").read_bytes()).decode()
    signing = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "signing"}, "data": {"key.pem": key}}
    cluster.create(*volume_objects(cluster.namespace), signing)


def champion() -> str:
    """The bundle that has the alias in MLflow."""
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    (model,) = client.search_registered_models()
    version = client.get_model_version_by_alias(model.name, "champion")
    return str(version.tags[f"{TAG}digest"])


def test_commits_become_served_models_and_worse_ones_do_not(platform: Platform, tmp_path: Path) -> None:
    cluster = platform.cluster
    platform.follow("install", INSTALL)
    furnish(cluster, tmp_path)
    platform.follow("first retraining and promotion", FIRST)
    first = platform.served
    assert platform.rollout_is("Healthy", first)
    assert champion() == first

    with asking_clients() as tally:
        platform.follow("longer fine-tuning: run, gate, commit, canary, all traffic", CHANGE)
        plans = platform.plans()
        reused = {label for label, plan in plans.items() if plan == "Reused"}
        assert {"data", "parent", "search", "distill"} <= reused
        assert not reused & {"sft", "eval", "deploy"}
        second = platform.served
        assert second != first
        assert champion() == second

        platform.follow("roll back", ROLL_BACK)
        platform.wait("the first model serves again", lambda: platform.rollout_is("Healthy", first))
        assert champion() == first
        platform.follow("upgrade", UPGRADE)

        platform.ask_for("a learning rate that ruins it", sft__num_steps=300, sft__learning_rate=0.1)
        assert platform.judgement("Promoted") == ("False", "GateNotPassed")
        assert platform.served == first

        platform.ask_for("a default that no evaluation sees", sft__num_steps=280, deploy__temperature=1.5)
        assert platform.plans()["sft"] == "Reused"
        platform.wait("the canary is stopped", lambda: platform.judgement("Promoted") == ("False", "CanaryFailed"))
        assert platform.served == first
        platform.wait("the cluster agrees with Git", lambda: platform.rollout_is("Healthy", first))
        assert champion() == first
    log.info("answers: %s", dict(tally.complete))
    assert tally.lost == []
    assert set(tally.complete) == {first[:12], second[:12]}
