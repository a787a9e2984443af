"""The stand-in without a cluster: what it makes of a compiled pipeline, and what `kfp.Client` hears from it."""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kfp
import pytest
import yaml
from kfp_server_api.exceptions import ApiException

from tests.cluster.argo_workflow import EXECUTOR_OUTPUT, OUTPUTS, PodAdditions, Unsupported, Values, workflow
from tests.cluster.kfp_standin import RUN_LABEL, KfpStandIn, running_standin
from tests.cluster.toy_pipeline import QUEUE_LABEL, compile_toy

ADDITIONS = PodAdditions(image="example.test/host:1", environment={"PATH": "/venv/bin"})


class MemoryWorkflows:
    """Workflows that nobody runs; tests set their status."""

    def __init__(self) -> None:
        self.made: dict[str, Values] = {}
        self.terminated: list[str] = []

    def create(self, workflow: Values) -> str:
        name = f"{workflow['metadata']['generateName']}{len(self.made)}"
        self.made[name] = {**workflow, "status": {}}
        return name

    def get(self, name: str) -> Values | None:
        return self.made.get(name)

    def terminate(self, name: str) -> None:
        self.terminated.append(name)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_toy(tmp_path_factory.mktemp("toy") / "toy.yaml", queue="main")


@pytest.fixture(scope="module")
def made(compiled: Path) -> Values:
    pipeline, platform = yaml.safe_load_all(compiled.read_text())
    return workflow(pipeline, platform, {"first": "a", "last": "z"}, ADDITIONS, {RUN_LABEL: "run-1"})


def template(made: Values, name: str) -> Values:
    return next(dict(each) for each in made["spec"]["templates"] if each["name"] == name)


def dag_task(made: Values, dag: str, name: str) -> Values:
    return next(dict(each) for each in template(made, dag)["dag"]["tasks"] if each["name"] == name)


def arguments(task: Values) -> dict[str, str]:
    return {each["name"]: each["value"] for each in task["arguments"]["parameters"]}


GROUP = "root-exit-handler-1"


def test_parameters_reach_the_containers_as_expressions(made: Values) -> None:
    assert arguments(dag_task(made, "root", "write"))["text"] == "{{inputs.parameters.last}}"
    container = template(made, f"{GROUP}-write-2")["container"]
    assert container["args"] == ["{{inputs.parameters.text}}", f"{OUTPUTS}/out"]
    assert {"name": "first", "value": "a"} in made["spec"]["arguments"]["parameters"]


def test_the_exit_handler_starts_however_its_group_has_ended(made: Values) -> None:
    depends = dag_task(made, "root", "write")["depends"]
    assert "exit-handler-1.Failed" in depends
    assert "exit-handler-1.Succeeded" in depends
    assert set(template(made, "root")["dag"]["target"].split()) == {"exit-handler-1", "write"}


def test_a_loop_has_its_items_and_what_it_makes_is_collected(made: Values) -> None:
    loop = next(each for each in template(made, GROUP)["dag"]["tasks"] if "withParam" in each)
    assert json.loads(loop["withParam"]) == ["0/2", "1/2"]
    assert "{{item}}" in arguments(loop).values()
    (collected,) = [arguments(dag_task(made, GROUP, "join"))["texts"]]
    assert collected.startswith(f"{{{{tasks.{loop['name']}.outputs.parameters.")
    (output,) = template(made, loop["template"])["outputs"]["parameters"]
    assert output["name"] in collected


def test_the_executor_input_names_an_address_for_each_artifact_and_the_output_file(made: Values) -> None:
    outputs = json.loads(template(made, f"{GROUP}-join")["container"]["args"][1])["outputs"]
    (page,) = outputs["artifacts"]["page"]["artifacts"]
    assert page["uri"].startswith("minio://kfp/toy/")
    assert outputs["outputFile"] == EXECUTOR_OUTPUT


def test_retries_belong_to_the_task_that_asks_for_them(made: Values) -> None:
    retried = [each["name"] for each in made["spec"]["templates"] if "retryStrategy" in each]
    assert retried == [f"{GROUP}-write-2"]
    assert template(made, retried[0])["retryStrategy"]["limit"] == "1"


def test_the_kubernetes_settings_of_a_task_reach_its_pod(made: Values) -> None:
    join = template(made, f"{GROUP}-join")
    assert join["metadata"]["labels"] == {QUEUE_LABEL: "main"}
    assert join["nodeSelector"] == {"tessera.dev/pool": "cpu"}
    assert join["tolerations"] == [{"key": "spot", "operator": "Exists", "effect": "NoSchedule"}]
    assert {"name": "scratch", "emptyDir": {"sizeLimit": "1Gi"}} in join["volumes"]
    container = join["container"]
    assert {"name": "scratch", "mountPath": "/scratch"} in container["volumeMounts"]
    assert container["securityContext"]["runAsNonRoot"] is True
    assert container["resources"]["requests"] == {"cpu": "10m", "memory": "32Mi"}
    environment = {each["name"]: each.get("valueFrom") for each in container["env"]}
    assert environment["TOY_KEY"] == {"secretKeyRef": {"name": "toy-store", "key": "key", "optional": True}}
    assert environment["TOY_REGION"] == {"configMapKeyRef": {"name": "toy-settings", "key": "region", "optional": True}}


def test_what_is_not_known_is_refused_by_name(compiled: Path) -> None:
    pipeline, platform = yaml.safe_load_all(compiled.read_text())
    executors = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    next(iter(executors.values()))["pvcMount"] = []
    with pytest.raises(Unsupported, match="the Kubernetes setting pvcMount"):
        workflow(pipeline, platform, {"first": "a", "last": "z"}, ADDITIONS, {})
    with pytest.raises(Unsupported, match="'lost'"):
        workflow(pipeline, {}, {"first": "a", "last": "z", "lost": ""}, ADDITIONS, {})


def test_the_pipeline_of_a_recipe_uses_nothing_that_is_not_known() -> None:
    golden = Path(__file__).parents[1] / "pipelines" / "recipe" / "golden" / "pipeline.yaml"
    pipeline, platform = yaml.safe_load_all(golden.read_text())
    made = workflow(pipeline, platform, {"store": "s3://tessera/store", "run": "golden-1"}, ADDITIONS, {})
    containers = [each for each in made["spec"]["templates"] if "container" in each]
    assert len(containers) >= len(pipeline["deploymentSpec"]["executors"])


@pytest.fixture
def workflows() -> MemoryWorkflows:
    return MemoryWorkflows()


@pytest.fixture
def standin(workflows: MemoryWorkflows) -> Iterator[KfpStandIn]:
    with running_standin(workflows, ADDITIONS) as standin:
        yield standin


@pytest.fixture
def client(standin: KfpStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("HOME", str(tmp_path))  # the client writes a file there
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kfp.Client(host=standin.url)


def start(client: Any, compiled: Path, name: str = "run-1", **options: str) -> Any:
    pipeline = client.upload_pipeline(str(compiled), "toy")
    version = client.upload_pipeline_version(str(compiled), "v1", pipeline_id=pipeline.pipeline_id)
    experiment = client.create_experiment("tests")
    return client.run_pipeline(
        experiment.experiment_id,
        name,
        params={"first": "a", "last": "z"},
        pipeline_id=pipeline.pipeline_id,
        version_id=version.pipeline_version_id,
        **options,
    )


def test_the_client_uploads_starts_and_finds_a_run_by_its_name(
    client: Any, standin: KfpStandIn, workflows: MemoryWorkflows, compiled: Path
) -> None:
    run = start(client, compiled)
    wanted = {"predicates": [{"operation": 1, "key": "display_name", "stringValue": "run-1"}]}
    (found,) = client.list_runs(filter=json.dumps(wanted)).runs
    assert found.run_id == run.run_id
    (version,) = client.list_pipeline_versions(
        client.list_pipelines().pipelines[0].pipeline_id, filter=json.dumps({"predicates": []})
    ).pipeline_versions[:1]
    assert version.display_name == "v1"
    assert workflows.made[standin.workflow_name(run.run_id)]["metadata"]["labels"] == {RUN_LABEL: run.run_id}


def test_pods_run_under_the_service_account_that_a_run_names(
    client: Any, standin: KfpStandIn, workflows: MemoryWorkflows, compiled: Path
) -> None:
    for options, account in (({}, "pipeline-runner"), ({"service_account": "own"}, "own")):
        run = start(client, compiled, **options)
        assert workflows.made[standin.workflow_name(run.run_id)]["spec"]["serviceAccountName"] == account


def test_a_run_has_the_state_of_its_workflow_and_the_message_of_what_failed(
    client: Any, standin: KfpStandIn, workflows: MemoryWorkflows, compiled: Path
) -> None:
    run = start(client, compiled)
    assert client.get_run(run.run_id).state == "PENDING"
    node = {"type": "Pod", "displayName": "write", "phase": "Failed", "message": "DataError: no rows"}
    status = {"phase": "Failed", "message": "child failed", "nodes": {"n1": node}}
    workflows.made[standin.workflow_name(run.run_id)]["status"] = status
    seen = client.get_run(run.run_id)
    assert (seen.state, seen.error.message) == ("FAILED", "child failed")
    assert seen.run_details.task_details[0].error.message == "DataError: no rows"


def test_a_terminated_run_is_canceling_until_its_workflow_has_ended(
    client: Any, standin: KfpStandIn, workflows: MemoryWorkflows, compiled: Path
) -> None:
    run = start(client, compiled)
    client.terminate_run(run.run_id)
    name = standin.workflow_name(run.run_id)
    assert workflows.terminated == [name]
    assert client.get_run(run.run_id).state == "CANCELING"
    workflows.made[name]["status"] = {"phase": "Failed"}
    assert client.get_run(run.run_id).state == "CANCELED"


def test_a_run_that_does_not_exist_is_not_found(client: Any) -> None:
    with pytest.raises(ApiException, match="404"):
        client.get_run("lost")
