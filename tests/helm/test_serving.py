"""Servers of models, their canary and their route, by the schemas of their kinds and the programs that they start."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer
import yaml

from components.core.base.metric_names import VLLM_FIRST_TOKEN, VLLM_HTTP, VLLM_INTER_TOKEN, VLLM_WAITING
from components.core.serving.first_token import API_KEY, TIMEOUT_S
from components.core.serving.middleware import LIMIT, LateStart, RequestLimit
from components.core.serving.server import COMMAND
from components.core.serving.settings import ENVIRONMENT, PLUGIN
from components.core.store.store import LOCAL_FOLDER, open_store
from infra.chart import render
from pipelines.cli import app
from tests.dashboards.prometheus import PROMTOOL, needs_promtool
from tests.helm.cases import CASES, EXAMPLES, ON_CPUS, Object, find

GO_MODULES = Path(os.environ.get("GOMODCACHE", Path.home() / "go" / "pkg" / "mod"))
SCHEMAS = (
    GO_MODULES / "github.com/argoproj/argo-rollouts@v1.10.1/manifests/crds",
    GO_MODULES / "sigs.k8s.io/gateway-api@v1.6.3/config/crd/standard",
)
NAME = "tessera-serving-nano"
NANO: Object = EXAMPLES["serving"]["serving"]["models"]["nano"]


def served(**changes: Any) -> list[Object]:
    """The example with other values of `serving`."""
    return render(EXAMPLES["serving"] | {"serving": EXAMPLES["serving"]["serving"] | changes})


@pytest.fixture(scope="module")
def example() -> list[Object]:
    return served()


def pod(objects: list[Object], kind: str = "Rollout") -> Object:
    spec: Object = find(objects, kind, NAME)["spec"]["template"]["spec"]
    return spec


def server(objects: list[Object], kind: str = "Rollout") -> Object:
    (container,) = pod(objects, kind)["containers"]
    return dict(container)


def environment(container: Object) -> dict[str, Any]:
    return {one["name"]: one.get("value") for one in container["env"]}


def closed(schema: Any) -> Any:
    """A schema of a CRD in which an unknown field is an error, as the API server takes it in strict validation."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: closed(value) for key, value in schema.items()}
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string"):
        made["type"] = ["integer", "string"]
    return made


@pytest.mark.skipif(not all(map(Path.is_dir, SCHEMAS)), reason="needs the modules that the test cluster is built from")
@pytest.mark.parametrize("router", ["gateway-api", "traefik"])
def test_objects_are_valid_by_the_strict_schemas_of_rollouts_and_the_gateway_api(router: str) -> None:
    definitions = [
        one
        for folder in SCHEMAS
        for path in folder.glob("*.yaml")
        for one in yaml.load_all(path.read_text(), yaml.CSafeLoader)
        if one and one["kind"] == "CustomResourceDefinition"
    ]
    checked = set()
    for each in served(router=router):
        for definition in definitions:
            versions = {f"{definition['spec']['group']}/{one['name']}": one for one in definition["spec"]["versions"]}
            if each["kind"] == definition["spec"]["names"]["kind"] and each["apiVersion"] in versions:
                schema = closed(versions[each["apiVersion"]]["schema"]["openAPIV3Schema"])
                schema["properties"]["metadata"] = {}
                jsonschema.validate(each, schema)
                checked.add(each["kind"])
    assert checked == {"Rollout", "AnalysisTemplate", "HTTPRoute"}


def test_the_server_reads_the_folder_that_the_init_container_fills(
    example: list[Object], monkeypatch: pytest.MonkeyPatch
) -> None:
    (fetch,) = pod(example)["initContainers"]
    monkeypatch.setenv(LOCAL_FOLDER, environment(fetch)[LOCAL_FOLDER])
    uri = find(example, "ConfigMap", "tessera-settings")["data"]["TESSERA_STORE"]
    folder = open_store(uri).local / "artifacts" / NANO["digest"]
    assert f"--model={folder}" in server(example)["args"]
    assert fetch["command"][:3] == ["python", "-m", "pipelines"]
    store = typer.main.get_command(app).commands["store"]  # type: ignore[attr-defined]
    words: list[str] = [*fetch["command"][4:], *fetch["args"]]
    name, *arguments = words
    parsed = store.commands[name].make_context(name, arguments).params
    assert parsed["artifact"] == NANO["digest"]
    assert [str(path) for path in parsed["trust"]] == ["/keys/0.pem"]
    keys = find(example, "ConfigMap", "tessera-serving-keys")["data"]
    assert list(keys.values()) == EXAMPLES["serving"]["serving"]["trustedKeys"]
    assert {"name": "keys", "mountPath": "/keys", "readOnly": True} in fetch["volumeMounts"]
    assert {"name": "models", "mountPath": "/models", "readOnly": True} in server(example)["volumeMounts"]


def test_the_server_starts_as_ours_do_on_this_machine(example: list[Object]) -> None:
    container = server(example)
    assert container["command"] == ["python", *COMMAND[1:]]
    assert environment(container).items() >= ENVIRONMENT.items()
    assert f"--reasoning-parser={PLUGIN}" in container["args"]
    for middleware in (RequestLimit, LateStart):
        assert f"--middleware={middleware.__module__}.{middleware.__name__}" in container["args"]
    assert environment(container)[LIMIT] == "1048576"
    assert API_KEY in environment(container)
    on_cpus = server(render(CASES["everything"]), "Deployment")
    assert environment(on_cpus)["TORCH_COMPILE_DISABLE"] == "1"
    (threads,) = (one["valueFrom"] for one in on_cpus["env"] if one["name"] == "OMP_NUM_THREADS")
    assert threads == {"resourceFieldRef": {"resource": "requests.cpu"}}
    assert "OMP_NUM_THREADS" not in environment(container)
    assert "--enforce-eager" in on_cpus["args"]
    assert "--dtype=auto" in container["args"]
    assert "nvidia.com/gpu" not in json.dumps(on_cpus["resources"])
    assert container["resources"]["limits"] == {"memory": "32Gi", "nvidia.com/gpu": 1}


KNOWN = """
import json, sys
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
for given in sys.argv[1:]:
    read = make_arg_parser(FlexibleArgumentParser()).parse_args(json.loads(given))
    print(json.dumps([read.shutdown_timeout, read.default_chat_template_kwargs, read.middleware, read.port]))
"""


@pytest.mark.slow
def test_vllm_knows_every_option_that_a_server_is_started_with() -> None:
    middleware = [f"{each.__module__}.{each.__name__}" for each in (RequestLimit, LateStart)]
    servers = [server(served(), "Rollout"), server(render(CASES["everything"]), "Deployment")]
    command = [sys.executable, "-c", KNOWN, *(json.dumps(container["args"]) for container in servers)]
    asked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert asked.returncode == 0, asked.stderr[-2000:]
    expected = [[600, {"default_thinking": mode}, middleware, 8000] for mode in ("on", "off")]
    assert [json.loads(line) for line in asked.stdout.splitlines()[-2:]] == expected


def test_ready_means_that_a_first_token_came(example: list[Object]) -> None:
    probe = server(example)["startupProbe"]
    assert probe["exec"]["command"] == ["python", "-m", "components.core.serving.first_token", "8000", "nano"]
    assert probe["timeoutSeconds"] > TIMEOUT_S
    assert probe["periodSeconds"] * probe["failureThreshold"] == 1800


def test_a_server_that_ends_takes_requests_a_while_and_finishes_the_longest_answer(example: list[Object]) -> None:
    assert server(example)["lifecycle"] == {"preStop": {"sleep": {"seconds": 10}}}
    assert pod(example)["terminationGracePeriodSeconds"] == 10 + 600
    assert "--shutdown-timeout=600" in server(example)["args"]
    (rule,) = find(example, "HTTPRoute", NAME)["spec"]["rules"]
    assert rule["timeouts"] == {"request": "600s", "backendRequest": "600s"}
    assert rule["matches"] == [{"path": {"type": "PathPrefix", "value": "/v1"}}]  # no metrics for everybody
    budget = find(example, "PodDisruptionBudget", NAME)["spec"]
    labels = find(example, "Rollout", NAME)["spec"]["template"]["metadata"]["labels"]
    assert (budget["maxUnavailable"], budget["selector"]["matchLabels"]) == (1, labels)


def test_a_canary_is_asked_before_it_has_users_and_then_gets_more_and_more(example: list[Object]) -> None:
    strategy = find(example, "Rollout", NAME)["spec"]["strategy"]["canary"]
    assert "dynamicStableScale" not in strategy  # the old servers stay until the new ones have all users
    steps = strategy["steps"]
    assert steps[:3] == [
        {"setCanaryScale": {"replicas": 1}},
        {"analysis": {"templates": [{"templateName": f"{NAME}-questions"}]}},
        {"setCanaryScale": {"weight": 20}},
    ]
    by_traffic, pause = {"setCanaryScale": {"matchTrafficWeight": True}}, {"pause": {"duration": "300s"}}
    further = [one for weight in (40, 60) for one in ({"setWeight": weight}, pause)]
    assert steps[3:] == [{"setWeight": 20}, by_traffic, pause, *further]
    assert strategy["analysis"]["startingStep"] == 3
    for service in (strategy["stableService"], strategy["canaryService"]):
        assert find(example, "Service", service)["spec"]["selector"]["tessera.dev/model"] == "nano"
    assert strategy["trafficRouting"] == {
        "plugins": {"argoproj-labs/gatewayAPI": {"httpRoute": NAME, "namespace": "tessera"}}
    }


def test_where_servers_are_scarce_the_old_ones_go_as_the_new_ones_come() -> None:
    scarce = {"nano": NANO | {"canary": NANO["canary"] | {"dynamicStableScale": True}}}
    strategy = find(served(models=scarce), "Rollout", NAME)["spec"]["strategy"]["canary"]
    assert strategy["dynamicStableScale"]
    assert "abortScaleDownDelaySeconds" not in strategy  # together they lose requests at an abort


def test_traefik_gets_a_service_of_its_own_kind_without_weights() -> None:
    objects = served(router="traefik")
    routing = find(objects, "Rollout", NAME)["spec"]["strategy"]["canary"]["trafficRouting"]
    assert routing == {"traefik": {"weightedTraefikServiceName": NAME}}
    services = find(objects, "TraefikService", NAME)["spec"]["weighted"]["services"]
    assert services == [{"name": NAME, "port": 8000}, {"name": f"{NAME}-canary", "port": 8000}]
    (rule,) = find(objects, "HTTPRoute", NAME)["spec"]["rules"]
    assert rule["backendRefs"] == [{"group": "traefik.io", "kind": "TraefikService", "name": NAME}]


def test_the_judge_is_started_with_options_that_the_command_has(example: list[Object]) -> None:
    (metric,) = find(example, "AnalysisTemplate", f"{NAME}-questions")["spec"]["metrics"]
    job = metric["provider"]["job"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    assert (job["backoffLimit"], job["template"]["spec"]["restartPolicy"]) == (0, "Never")
    *start, name = container["command"]
    assert start == ["python", "-m", "pipelines"]
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    given = command.make_context(name, list(container["args"])).params
    assert given["stable"] == f"http://{NAME}:8000/v1"
    assert given["canary"] == f"http://{NAME}-canary:8000/v1"
    assert (given["model"], given["problems"]) == ("nano", NANO["canary"]["problems"])
    assert (given["questions"], given["tolerance"], given["timeout"]) == (200, 0.02, 600.0)
    assert [one["name"] for one in container["env"]] == [API_KEY]


def queries(objects: list[Object]) -> Iterator[tuple[str, str]]:
    """Name and query of each metric, with hashes in place of the arguments."""
    for metric in find(objects, "AnalysisTemplate", f"{NAME}-metrics")["spec"]["metrics"]:
        query = metric["provider"]["prometheus"]["query"]
        yield metric["name"], query.replace("{{args.canary}}", "new").replace("{{args.stable}}", "old")


@needs_promtool
def test_prometheus_understands_the_queries_and_the_metrics_are_declared(example: list[Object], tmp_path: Path) -> None:
    asked = dict(queries(example))
    named = {name: set(re.findall(r"(?:vllm:|http_)\w+", query)) for name, query in asked.items()}
    assert named == {
        "errors": {str(VLLM_HTTP)},
        "first-token": {f"{VLLM_FIRST_TOKEN}_sum", f"{VLLM_FIRST_TOKEN}_count"},
        "inter-token": {f"{VLLM_INTER_TOKEN}_sum", f"{VLLM_INTER_TOKEN}_count"},
    }
    assert all('"new"' in query and '"old"' in query and "{{" not in query for query in asked.values())
    labels = find(example, "PodMonitor", "tessera-serving")["spec"]["podTargetLabels"]
    assert all(label.replace("-", "_") in query for label in labels for query in asked.values())
    assert PROMTOOL is not None
    tests = tmp_path / "tests.yaml"
    tests.write_text(yaml.safe_dump({"tests": [worse_canary(asked), equal_canary(asked)]}))
    found = subprocess.run([PROMTOOL, "test", "rules", str(tests)], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr


def worse_canary(asked: dict[str, str]) -> Object:
    """A canary that fails one request in ten, and takes twice as long, as promtool reads it."""
    values = {"errors": 0.1, "first-token": 2.0, "inter-token": 2.0}
    return measured(asked, "0+54x10", "0+6x10", "0+20x10", values)


def equal_canary(asked: dict[str, str]) -> Object:
    return measured(asked, "0+60x10", "0+0x10", "0+10x10", {"errors": 0.0, "first-token": 1.0, "inter-token": 1.0})


def measured(asked: dict[str, str], good: str, failed: str, seconds: str, values: dict[str, float]) -> Object:
    """Series of a canary beside those of a stable version, and the values of the queries."""
    series = []
    for version, numbers in {"old": ("0+60x10", "0+0x10", "0+10x10"), "new": (good, failed, seconds)}.items():
        labels = f'namespace="tessera", rollouts_pod_template_hash="{version}"'
        for status, values_ in zip(("2xx", "5xx"), numbers[:2], strict=True):
            name = f'{VLLM_HTTP}{{handler="/v1/chat/completions", status="{status}", {labels}}}'
            series.append({"series": name, "values": values_})
        for histogram in (VLLM_FIRST_TOKEN, VLLM_INTER_TOKEN):
            series.append({"series": f"{histogram}_sum{{{labels}}}", "values": numbers[2]})
            series.append({"series": f"{histogram}_count{{{labels}}}", "values": "0+100x10"})
    checks = [
        {"expr": asked[name], "eval_time": "10m", "exp_samples": [{"labels": "{}", "value": value}]}
        for name, value in values.items()
    ]
    return {"interval": "1m", "input_series": series, "promql_expr_test": checks}


def test_a_model_waits_for_its_first_promotion_without_a_server() -> None:
    waiting = {"digest": ""}
    kinds = {one["kind"] for one in served(models={"small": waiting})}
    assert kinds.isdisjoint({"Rollout", "AnalysisTemplate", "HTTPRoute", "Service", "PodDisruptionBudget"})
    names = [one["metadata"]["name"] for one in served(models={"small": waiting, "nano": NANO})]
    assert NAME in names
    assert not [name for name in names if "small" in name]


def test_without_rollouts_a_model_is_a_deployment_and_there_is_no_canary() -> None:
    objects = render(CASES["everything"])
    kinds = {one["kind"] for one in objects}
    assert kinds.isdisjoint({"Rollout", "AnalysisTemplate", "TraefikService", "HTTPRoute"})
    assert f"{NAME}-canary" not in {one["metadata"]["name"] for one in objects}
    spec = find(objects, "Deployment", NAME)["spec"]
    assert spec["strategy"] == {"rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}
    assert "replicas" not in spec  # the autoscaler's
    scaler = find(objects, "HorizontalPodAutoscaler", NAME)["spec"]
    assert scaler["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": NAME}
    assert (scaler["minReplicas"], scaler["maxReplicas"]) == (2, 5)
    assert scaler["metrics"][0]["pods"]["metric"]["name"] == str(VLLM_WAITING)
    assert '--default-chat-template-kwargs={"default_thinking": "off"}' in server(objects, "Deployment")["args"]
    (volume,) = (one for one in pod(objects, "Deployment")["volumes"] if one["name"] == "models")
    assert volume == {"name": "models", "persistentVolumeClaim": {"claimName": ON_CPUS["cache"]["claim"]}}
    assert "HorizontalPodAutoscaler" not in {one["kind"] for one in served()}


def test_without_models_nothing_is_served() -> None:
    kinds = {one["kind"] for one in render()}
    assert kinds.isdisjoint({"Rollout", "Deployment", "Service", "HTTPRoute", "PodDisruptionBudget"})
