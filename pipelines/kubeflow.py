"""A graph as a KFP pipeline: the same for a laptop and for a cluster."""

import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from components.core.config import canonical_json
from pipelines.graph import Binding, Graph, Made, Source, Task

Known = Mapping[str, str | list[str]]
"""Digest of an artifact by its name; a list where a fan-out made one an item."""

PIPELINE_NAME = "llama-nemotron"


def build_pipeline(
    graph: Graph, sources: Mapping[str, str], known: Mapping[str, Known] | None = None
) -> Callable[..., Any]:
    """The KFP pipeline function of a graph, with the parameters `store` and `run`.

    Args:
        graph: what to run.
        sources: digests of the artifacts that come from the user's files.
        known: outputs of finished tasks by label, which are left out of the pipeline; their digests go straight to
            the tasks that read them, as those of `sources` do.
    """
    from kfp import dsl

    finished = known or {}

    @dsl.pipeline(name=PIPELINE_NAME, description=f"Recipe {graph.name}, {graph.digest[:12]}.")
    def pipeline(store: str, run: str) -> None:
        tasks: dict[str, dict[str, Any]] = {}
        for task in graph.tasks:
            if task.label not in finished:
                tasks[task.label] = _add(task, graph, tasks, sources, finished, store=store, run=run)

    built: Callable[..., Any] = pipeline
    return built


def compile_pipeline(graph: Graph, sources: Mapping[str, str], out: Path) -> None:
    """Write the intermediate representation that a KFP server takes."""
    from kfp import compiler

    out.parent.mkdir(parents=True, exist_ok=True)
    compiler.Compiler().compile(build_pipeline(graph, sources), package_path=str(out))


def _add(
    task: Task,
    graph: Graph,
    tasks: Mapping[str, Mapping[str, Any]],
    sources: Mapping[str, str],
    finished: Mapping[str, Known],
    **parameters: object,
) -> dict[str, Any]:
    """Add one task, or its fan-out; returns its outputs for the tasks that follow."""
    from kfp import dsl

    module, _, name = task.component.partition(":")
    component = getattr(importlib.import_module(module), name)
    artifacts: dict[str, Any] = {}
    digests: dict[str, str | list[str]] = {}
    for input_name, binding in task.inputs.items():
        digest = _digest(binding, sources, finished)
        if digest is not None:
            digests[input_name] = digest
        elif isinstance(binding, Made) and binding.task in tasks:
            artifacts[input_name] = tasks[binding.task][binding.output]
    settings = {**task.config.canonical(), "placement": task.placement.canonical()}
    settings = {name: value for name, value in settings.items() if not task.shards or name != "shard"}
    arguments = {
        "config": canonical_json(settings),
        "label": task.label,
        "sources": json.dumps(digests, sort_keys=True),
        **parameters,
        **artifacts,
    }
    if not task.shards:
        return dict(_place(component(**arguments), task, graph).outputs)
    with dsl.ParallelFor(items=list(task.shards), name=task.label.replace("/", "-")) as shard:
        outputs = _place(component(shard=shard, **arguments), task, graph).outputs
    return {name: dsl.Collected(outputs[name]) for name in task.stage.outputs}


def _digest(binding: Binding, sources: Mapping[str, str], finished: Mapping[str, Known]) -> str | list[str] | None:
    """Digest of an artifact that is there before the pipeline starts, else None."""
    if isinstance(binding, Source):
        return sources[binding.name]
    return finished[binding.task].get(binding.output) if binding.task in finished else None


def _place(step: Any, task: Task, graph: Graph) -> Any:
    """Name a KFP task, and say what it needs of a cluster; our own cache decides, so KFP's is off."""
    from kfp import kubernetes

    placement = task.placement
    step.set_display_name(task.label)
    step.set_caching_options(False)
    step.set_cpu_request(str(placement.processes * placement.threads))
    step.set_memory_request(f"{placement.memory_gib:g}Gi")
    labels = {"tessera.dev/stage": task.label.replace("/", "."), "tessera.dev/recipe-digest": graph.digest[:12]}
    for key, value in labels.items():
        kubernetes.add_pod_label(step, key, value)
    if placement.node_pool is not None:
        kubernetes.add_node_selector(step, "tessera.dev/pool", placement.node_pool)
    if placement.gpus:
        step.set_accelerator_type("nvidia.com/gpu").set_accelerator_limit(placement.gpus)
    return step
