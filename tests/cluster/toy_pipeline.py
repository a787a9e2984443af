"""A pipeline of small containers that uses of KFP what the pipelines of recipes use."""

import json
from pathlib import Path

from kfp import compiler, dsl, kubernetes

QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
WRITE = """
import pathlib, sys, time
text, out = sys.argv[1:]
if text == "fail":
    raise SystemExit("told to fail")
if text == "slow":
    time.sleep(10)
pathlib.Path(out).parent.mkdir(parents=True, exist_ok=True)
pathlib.Path(out).write_text(text)
"""
JOIN = """
import json, os, pathlib, sys
texts, executor_input = json.loads(sys.argv[1]), json.loads(sys.argv[2])["outputs"]
artifact = executor_input["artifacts"]["page"]["artifacts"][0]
page = pathlib.Path("/minio") / artifact["uri"].removeprefix("minio://")
page.parent.mkdir(parents=True, exist_ok=True)
page.write_text("<p>")
shown = {**artifact, "metadata": {"joined": "+".join(texts), "secret": os.environ.get("TOY_KEY", "")}}
output = pathlib.Path(executor_input["outputFile"])
output.parent.mkdir(parents=True, exist_ok=True)
output.write_text(json.dumps({"artifacts": {"page": {"artifacts": [shown]}}}))
"""


@dsl.container_component  # type: ignore[untyped-decorator]
def write(text: str, out: dsl.OutputPath(str)):  # type: ignore[valid-type]
    return dsl.ContainerSpec(image="tessera/toy:1", command=["python", "-c", WRITE], args=[text, out])


@dsl.container_component  # type: ignore[untyped-decorator]
def join(texts: list, page: dsl.Output[dsl.HTML]):  # type: ignore[type-arg]
    return dsl.ContainerSpec(image="tessera/toy:1", command=["python", "-c", JOIN], args=[texts, "{{$}}"])


def compile_toy(path: Path, queue: str | None = None, *, shards: int = 2) -> Path:
    """Compile it: a first text, two in a loop, all joined on a page, and a last text whatever happens."""

    @dsl.pipeline(name="toy")  # type: ignore[untyped-decorator]
    def pipeline(first: str, last: str):
        final = write(text=last)
        with dsl.ExitHandler(final, name="stages"):
            begun = write(text=first).set_retry(1)
            with dsl.ParallelFor(items=[f"{number}/{shards}" for number in range(shards)], name="shards") as shard:
                made = write(text=shard).after(begun)
            joined = join(texts=dsl.Collected(made.outputs["out"]))
        for task in (final, begun, made, joined):
            task.set_cpu_request("10m").set_memory_request("32Mi")
            kubernetes.empty_dir_mount(task, "scratch", "/scratch", size_limit="1Gi")
            kubernetes.set_security_context(task, run_as_non_root=True)
            if queue is not None:
                kubernetes.add_pod_label(task, QUEUE_LABEL, queue)
        kubernetes.add_toleration(joined, key="spot", operator="Exists", effect="NoSchedule")
        kubernetes.add_node_selector(joined, "tessera.dev/pool", "cpu")
        kubernetes.use_secret_as_env(joined, "toy-store", {"key": "TOY_KEY"}, optional=True)
        kubernetes.use_config_map_as_env(joined, "toy-settings", {"region": "TOY_REGION"}, optional=True)

    compiler.Compiler().compile(pipeline, str(path))
    return path


def shown(parameter: str) -> dict[str, object]:
    """Metadata of the page, from the executor output."""
    metadata: dict[str, object] = json.loads(parameter)["artifacts"]["page"]["artifacts"][0]["metadata"]
    return metadata
