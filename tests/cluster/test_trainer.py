import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from components.core.base.config import Config
from components.core.runtime.event_mirror import fetch_events
from components.core.runtime.multi_node.train_job import MANIFEST, OWN_POD
from components.core.runtime.placement import Placement
from components.core.runtime.runner import events_path, stage_key
from components.core.runtime.stage_command import command_line
from components.core.serving.load_profile import Workload
from components.core.store.store import Store, open_store
from components.core.text.tokenizer import train_tokenizer
from components.eval.config import STAGE as EVAL
from components.eval.config import EvalConfig
from components.pretrain.config import STAGE, PretrainConfig
from infra.chart import render
from infra.testcluster.layout import POOL_LABEL
from infra.testcluster.services import REAL_POOL
from pipelines.cli import run_command
from pipelines.recipe.pod_settings import STORE_SECRET, train_job
from tests.cluster.api import Cluster
from tests.cluster.conftest import running_pod
from tests.cluster.objects import (
    ENVIRONMENT,
    GPU,
    IMAGE,
    PYTHON,
    SMALL,
    Object,
    flavor,
    host_mounts,
    host_volumes,
    pod,
    pod_spec,
    queues,
)
from tests.components.conftest import write_rows
from tests.components.core import tiny_models
from tests.s3_server import S3Server, fresh_prefix
from tests.small_recipe import RECIPE, write_recipe

pytestmark = pytest.mark.cluster

TRAINER = "trainer.kubeflow.org/v1alpha1"
MEET = """
import json, os, socket, time
for _ in range(100):  # the address of a peer is known when its pod runs
    try:
        address = socket.gethostbyname(os.environ["PET_MASTER_ADDR"])
        break
    except OSError:
        time.sleep(0.3)
print(json.dumps({"rank": int(os.environ["PET_NODE_RANK"]), "nodes": int(os.environ["PET_NNODES"]), "master": address}))
"""


def runtime() -> Object:
    """A runtime of torch jobs whose pods run on the real node."""
    spec = pod_spec([PYTHON])
    spec["containers"][0]["name"] = "node"
    spec["nodeSelector"] = {POOL_LABEL: REAL_POOL}
    job = {
        "name": "node",
        "template": {
            "metadata": {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}},
            "spec": {"template": {"spec": spec}},
        },
    }
    return {
        "apiVersion": TRAINER,
        "kind": "TrainingRuntime",
        "metadata": {"name": "torch", "labels": {"trainer.kubeflow.org/framework": "torch"}},
        "spec": {"mlPolicy": {"numNodes": 1, "torch": {}}, "template": {"spec": {"replicatedJobs": [job]}}},
    }


def test_a_train_job_of_two_nodes_gives_each_pod_its_rank_and_one_master(cluster: Cluster) -> None:
    cluster.need(TRAINER, "TrainJob")
    trainer = {
        "numNodes": 2,
        "numProcPerNode": 1,
        "command": [PYTHON, "-c", MEET],
        "resourcesPerNode": {"requests": SMALL},
    }
    job = {
        "apiVersion": TRAINER,
        "kind": "TrainJob",
        "metadata": {"name": "meet"},
        "spec": {"runtimeRef": {"kind": "TrainingRuntime", "name": "torch"}, "trainer": trainer},
    }
    cluster.create(runtime(), job)

    def complete() -> bool:
        conditions = cluster.get(TRAINER, "TrainJob", "meet").get("status", {}).get("conditions", [])
        return any(each["type"] == "Complete" and each["status"] == "True" for each in conditions)

    cluster.wait("the job is complete", complete)
    pods = cluster.all("v1", "Pod", label_selector="jobset.sigs.k8s.io/jobset-name=meet")
    said = [json.loads(cluster.log(pod["metadata"]["name"])) for pod in pods]
    assert sorted(each["rank"] for each in said) == [0, 1]
    assert {each["nodes"] for each in said} == {2}
    assert len({each["master"] for each in said}) == 1


LABEL, RUN = "parent", "run-1"
TRAINING_PATIENCE_S = 900
"""Four processes that import PyTorch share two cores with the cluster."""
H100_QUOTA = {"cpu": "100", "memory": "1Ti", GPU: "16"}
INSTALLED = {"ServiceAccount", "Role", "RoleBinding", "ConfigMap", "TrainingRuntime"}
"""What a run needs of the chart."""
SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
EXPECTED = ("42", "13", "42", "13")
"""Correct answers to the problems of an evaluation whose model always says 42."""
CONFIG = PretrainConfig.parse(
    {
        "shape": {**SHAPE, "intermediate_size": 16, "max_position_embeddings": 32},
        "num_steps": 20,
        "global_batch_size": 2,
        "micro_batch_size": 1,
        "seq_len": 16,
        "resume_interval_s": 0.1,
        "seed": 0,
    }
)


def events_of(store: Store, kind: str) -> list[Any]:
    """The events of a kind that pods have copied to a store."""
    fetch_events(store, RUN)
    path = events_path(store, RUN, LABEL)
    events = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [event for event in events if event["type"] == kind]


class Training:
    """A stage of two nodes as the task of a pipeline starts it, in the namespace of a test with the chart's objects."""

    declaration = "components.pretrain.config:STAGE"

    def __init__(self, cluster: Cluster, s3: S3Server, store: Store, folder: Path) -> None:
        self.cluster, self.store, self._folder = cluster, store, folder
        values = {"store": {"uri": store.uri, "existingSecret": STORE_SECRET}, "queues": {"enabled": False}}
        values["namespace"] = {"name": cluster.namespace, "create": False}
        installed = [each for each in render(values, namespace=cluster.namespace) if each["kind"] in INSTALLED]
        secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": STORE_SECRET}}
        cluster.create({**secret, "stringData": s3.environment}, *installed)
        self.inputs = self.add_inputs(store)

    def add_inputs(self, store: Store) -> dict[str, str]:
        """Put a tokenizer and a corpus of sums into a store; returns their digests."""
        texts = [f"{a}+{b}={a + b}" for a in range(10) for b in range(10)]
        corpus, tokenizer = self._folder / "corpus", self._folder / "tokenizer"
        corpus.mkdir(exist_ok=True)
        (corpus / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        if not tokenizer.exists():
            train_tokenizer(texts, 300, tokenizer)
        return {
            "tokenizer": store.put_folder(tokenizer, "tokenizer").digest,
            "corpus": store.put_folder(corpus, "data").digest,
        }

    def start(self, config: Config, *, queued: bool) -> None:
        """Create the pod of the task."""
        placement = Placement(nodes=2, threads=1)
        manifest = train_job(placement, {"tessera.dev/run": RUN}, IMAGE, queues=queued)
        manifest["spec"]["trainer"]["resourcesPerNode"] = {"requests": {"cpu": "50m", "memory": "256Mi"}}
        of_image = {name: value for name, value in ENVIRONMENT.items() if name not in ("HOME", "TESSERA_LOCAL")}
        of_image["LOGLEVEL"] = "INFO"  # of torchrun, so that there is a log to follow
        manifest["spec"]["trainer"]["env"] += [{"name": name, "value": value} for name, value in of_image.items()]
        patch: Object = {"volumes": host_volumes(), "containers": [{"name": "node", "volumeMounts": host_mounts()}]}
        if not queued:
            patch["nodeSelector"] = {POOL_LABEL: REAL_POOL}
        job = {"name": "node", "template": {"spec": {"template": {"spec": patch}}}}
        template = {"template": {"spec": {"replicatedJobs": [job]}}}
        manifest["spec"]["runtimePatches"].append({"manager": "tessera.dev/tests", "trainingRuntimeSpec": template})
        task = self._pod("task", config, placement, self.store)
        task["spec"] |= {"serviceAccountName": "tessera-pipelines", "nodeSelector": {POOL_LABEL: REAL_POOL}}
        identity = [{"name": key, "valueFrom": {"fieldRef": {"fieldPath": path}}} for key, path in OWN_POD.items()]
        task["spec"]["containers"][0]["env"] += [{"name": MANIFEST, "value": json.dumps(manifest)}, *identity]
        self.cluster.create(task)

    def start_alone(self, config: Config, store: Store) -> None:
        """Create a pod that runs the same stage as one process, in a store of its own."""
        self.add_inputs(store)
        self.cluster.create(self._pod("alone", config, Placement(threads=1), store))

    def _pod(self, name: str, config: Config, placement: Placement, store: Store) -> Object:
        """A pod with the command line of the stage."""
        values = {"config": config.model_dump_json(), "placement": placement.model_dump_json()}
        values |= {"store": store.uri, "run": RUN, "label": LABEL}
        command = [PYTHON, *command_line(self.declaration, values, self.inputs, {})]
        return pod(name, command, resources={"cpu": "20m", "memory": "256Mi"}, secret=STORE_SECRET)

    def jobs(self) -> list[Any]:
        return self.cluster.all(TRAINER, "TrainJob")

    def nodes(self) -> dict[str, Any]:
        """The pods of the nodes by number."""
        label = "batch.kubernetes.io/job-completion-index"
        pods = self.cluster.all("v1", "Pod", label_selector=f"jobset.sigs.k8s.io/jobset-name,{label}")
        return {each["metadata"]["labels"][label]: each for each in pods}

    def events(self, kind: str) -> list[Any]:
        """What a watcher sees of the stage."""
        return events_of(self.store, kind)

    def describe(self) -> str:
        """What to look at when a test fails."""
        conditions = [job.get("status") for job in self.jobs()]
        logs = [self.cluster.log("task")[-3000:] if self.cluster.get("v1", "Pod", "task") else ""]
        return "\n".join([json.dumps(conditions), *logs])

    def wait(self, what: str, probe: Any) -> Any:
        """Wait for something of a training."""
        return self.cluster.wait(what, probe, TRAINING_PATIENCE_S)


class Evaluation(Training):
    """An evaluation with two replicas, of a model whose answers are known."""

    declaration = "components.eval.config:STAGE"

    def add_inputs(self, store: Store) -> dict[str, str]:
        """Put problems and the model into a store; returns their digests."""
        problems = self._folder / "problems"
        problems.mkdir()
        rows = [{"id": f"p{number}", "answer": answer} for number, answer in enumerate(EXPECTED)]
        write_rows(problems / "test-standard.jsonl", ({"question": "6*7=", "prompt": "6*7=", **row} for row in rows))
        thinking = ["<on>", "<think>", "6", "*", "7", "</think>", "4"]
        model = tiny_models.speaker(thinking, ["<off>", "4", "2", "<eos>"])
        return {
            "problems": store.put_folder(problems, "data").digest,
            "sft": store.put_folder(tiny_models.write(model, self._folder / "sft"), "model").digest,
        }


@pytest.fixture
def training(cluster: Cluster, pod_s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Training]:
    cluster.need(TRAINER, "TrainJob")
    store = open_store(fresh_prefix(pod_s3, monkeypatch), local=tmp_path / "watcher")
    made = Training(cluster, pod_s3, store, tmp_path)
    yield made
    sys.stdout.write(made.describe())


def test_a_queued_train_job_of_two_nodes_trains_to_the_losses_of_one_process(
    training: Training, pod_s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = training.cluster
    cluster.need("kueue.x-k8s.io/v1beta2", "ClusterQueue")
    pool = f"{cluster.namespace}-{REAL_POOL}"
    cluster.create(flavor(pool, REAL_POOL))
    cluster.create(*queues(cluster.namespace, cluster.namespace, {pool: {"cpu": "1", "memory": "4Gi"}}, local="cpu"))
    training.start(CONFIG, queued=True)
    training.wait("two nodes", lambda: training.nodes().keys() == {"0", "1"})
    (job,) = training.jobs()
    task = cluster.get("v1", "Pod", "task")["metadata"]
    assert [each["uid"] for each in job["metadata"]["ownerReferences"]] == [task["uid"]]
    assert cluster.all("kueue.x-k8s.io/v1beta2", "Workload")
    cluster.wait_for_pod("task", patience_s=TRAINING_PATIENCE_S)
    alone = open_store(fresh_prefix(pod_s3, monkeypatch), local=tmp_path / "alone")
    training.start_alone(CONFIG, alone)
    cluster.wait_for_pod("alone", patience_s=TRAINING_PATIENCE_S)
    losses, reference = (
        [event["metrics"]["loss"] for event in events_of(store, "progress")] for store in (training.store, alone)
    )
    assert len(losses) == CONFIG.num_steps
    assert losses == pytest.approx(reference, abs=1e-5)
    record = training.store.stage_record(stage_key(STAGE, CONFIG, training.inputs))
    assert record is not None
    assert record.outputs.keys() == STAGE.outputs.keys()
    assert {"node 0", "node 1"} <= {line.partition(":")[0] for line in cluster.log("task").splitlines()}


def test_the_replicas_of_an_evaluation_on_two_nodes_answer_every_problem_once(
    cluster: Cluster, pod_s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.need(TRAINER, "TrainJob")
    store = open_store(fresh_prefix(pod_s3, monkeypatch), local=tmp_path / "watcher")
    evaluation = Evaluation(cluster, pod_s3, store, tmp_path)
    load = Workload(batch_size=2, prompt_tokens=4, new_tokens=8, rounds=1)
    config = EvalConfig(num_samples=2, max_tokens=8, temperature=0.1, workload=load, seed=1)
    evaluation.start(config, queued=False)
    evaluation.wait("two nodes", lambda: evaluation.nodes().keys() == {"0", "1"})
    cluster.wait_for_pod("task", patience_s=2 * TRAINING_PATIENCE_S)
    record = store.stage_record(stage_key(EVAL, config, evaluation.inputs))
    assert record is not None
    metrics = json.loads(store.read(record.outputs["metrics"], "metrics.json"))
    assert metrics["models"]["sft"]["accuracy"]["standard"] == {"on": 0.5, "off": 0.5}
    answers = store.read(record.outputs["metrics"], "answers.jsonl").splitlines()
    found = [(row["mode"], row["id"], len(row["samples"])) for row in map(json.loads, answers)]
    ids = [f"p{number}" for number in range(len(EXPECTED))]
    assert found == [*(("on", name, 2) for name in ids), *(("off", name, 1) for name in ids)]
    assert {"node 0", "node 1"} <= {line.partition(":")[0] for line in cluster.log("task").splitlines()}


def test_a_training_that_lost_a_node_resumes_and_one_that_lost_its_task_ends(training: Training) -> None:
    cluster, endless = training.cluster, CONFIG.model_copy(update={"num_steps": 100_000})
    training.start(endless, queued=False)
    training.wait("checkpoints", lambda: len(training.events("progress")) > 5)
    key = stage_key(STAGE, endless, training.inputs)
    training.wait("a checkpoint in the store", lambda: list(training.store.backend.list(f"resume/{key}/")))
    lost = training.nodes()["1"]["metadata"]
    cluster.delete("v1", "Pod", lost["name"], gracePeriodSeconds=0)
    training.wait("it goes on", lambda: [each for each in training.events("note") if "goes on" in each["text"]])
    (note,) = [each["text"] for each in training.events("note") if "goes on" in each["text"]]
    assert int(note.split()[-1]) > 0
    assert training.nodes()["1"]["metadata"]["uid"] != lost["uid"]
    cluster.delete("v1", "Pod", "task")
    training.wait("no TrainJob", lambda: not training.jobs())
    training.wait("no nodes", lambda: not training.nodes())


def test_a_stage_of_several_nodes_holds_gpus_in_its_train_job_alone_and_ends_with_its_run(
    cluster: Cluster, submission: list[str], tmp_path: Path
) -> None:
    cluster.need(TRAINER, "TrainJob")
    cluster.need("kueue.x-k8s.io/v1beta2", "ClusterQueue")
    namespace = cluster.namespace
    for pool, quota in {REAL_POOL: {"cpu": "1500m", "memory": "8Gi"}, "h100": H100_QUOTA}.items():
        name = f"{namespace}-{pool}"
        cluster.create(flavor(name, pool), *queues(name, namespace, {name: quota}, local=pool))
    held = {"spec": {"stopPolicy": "Hold"}}  # nothing is admitted to it
    cluster.patch("kueue.x-k8s.io/v1beta2", "ClusterQueue", f"{namespace}-h100", held)
    values = {"namespace": {"name": namespace, "create": False}}
    cluster.create(*(each for each in render(values, namespace=namespace) if each["kind"] == "TrainingRuntime"))
    place = {"nodes": 2, "processes": 4, "gpus": 4, "node_pool": "h100", "memory_gib": 64.0}
    recipe = write_recipe(tmp_path, "nodes", parent_pretrain={**RECIPE["parent_pretrain"], "placement": place})
    command = [submission[0], str(recipe), *submission[2:-1], "--queues"]
    assert run_command(command) == 0

    (job,) = cluster.wait("a TrainJob", lambda: cluster.all(TRAINER, "TrainJob"), TRAINING_PATIENCE_S)
    task = running_pod(cluster, "parent")
    assert [each["uid"] for each in job["metadata"]["ownerReferences"]] == [task["metadata"]["uid"]]
    assert not [one for one in task["spec"]["containers"] if GPU in json.dumps(one["resources"])]
    assert "kueue.x-k8s.io/queue-name" not in task["metadata"]["labels"]

    def waiting() -> Any:
        workloads = cluster.all("kueue.x-k8s.io/v1beta2", "Workload")
        return [one for one in workloads if one["spec"]["queueName"] == "h100"]

    (workload,) = cluster.wait("its workload", waiting)
    (pods,) = workload["spec"]["podSets"]
    assert pods["count"] == 2
    assert pods["template"]["spec"]["containers"][0]["resources"]["requests"][GPU] == "4"
    assert run_command([*command, "--cancel"]) == 0
    cluster.wait("no TrainJob", lambda: not cluster.all(TRAINER, "TrainJob"))
