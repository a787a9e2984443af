"""A graph as a KFP pipeline: the same for a laptop and for a cluster."""

import importlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from components.core.base.config import canonical_json
from pipelines.recipe.graph import Binding, Graph, Made, Source, Task

Known = Mapping[str, str | list[str]]
"""Digest of an artifact by its name; a list where a fan-out made one an item."""

PIPELINE_NAME = "llama-nemotron"


def build_pipeline(
    graph: Graph,
    sources: Mapping[str, str],
    *,
    known: Mapping[str, Known] | None = None,
    run_label: str | None = None,
) -> Callable[..., Any]:
    """The KFP pipeline function of a graph, with the parameters `store` and `run`.

    Args:
        graph: what to run.
        sources: digests of the artifacts that come from the user's files.
        known: outputs of finished tasks by label, which are left out of the pipeline; their digests go straight to
            the tasks that read them, as those of `sources` do.
        run_label: the run that the pipeline is built for, a label of its pods; one for any run has no such label.
    """
    from kfp import dsl

    def pipeline(store: str, run: str) -> None:
        builder = _Builder(graph, sources, known or {}, run_label)
        left = [task for task in graph.tasks if task.label not in builder.known]
        for shards, tasks in itertools.groupby(left, key=lambda task: task.shards):
            builder.add(list(tasks), shards, store=store, run=run)

    describe = dsl.pipeline(name=PIPELINE_NAME, description=f"Recipe {graph.name}, {graph.digest[:12]}.")
    built: Callable[..., Any] = describe(pipeline)
    return built


def compile_pipeline(graph: Graph, sources: Mapping[str, str], out: Path, *, run_label: str | None = None) -> None:
    """Write the intermediate representation that a KFP server takes."""
    from kfp import compiler

    out.parent.mkdir(parents=True, exist_ok=True)
    compiler.Compiler().compile(build_pipeline(graph, sources, run_label=run_label), package_path=str(out))


class _Builder:
    """Adds the tasks of a graph to the KFP pipeline under construction."""

    def __init__(
        self, graph: Graph, sources: Mapping[str, str], known: Mapping[str, Known], run_label: str | None
    ) -> None:
        self.sources, self.known = sources, known
        self.labels = {"tessera.dev/recipe-digest": graph.digest[:12]}
        if run_label is not None:
            self.labels["tessera.dev/run"] = run_label
        self.made: dict[str, dict[str, Any]] = {}

    def add(self, tasks: Sequence[Task], shards: Sequence[str], **parameters: object) -> None:
        """Add consecutive tasks, those of one fan-out in one loop, and keep their outputs for the tasks that follow."""
        from kfp import dsl

        if not shards:
            for task in tasks:
                self.made[task.label] = self._add(task, **parameters)
            return
        with dsl.ParallelFor(items=list(shards), name=tasks[0].label.replace("/", "-")) as shard:
            for task in tasks:
                self.made[task.label] = self._add(task, shard=shard, **parameters)
        for task in tasks:
            self.made[task.label] = {name: dsl.Collected(made) for name, made in self.made[task.label].items()}

    def _add(self, task: Task, **parameters: object) -> dict[str, Any]:
        """Add one task; returns its outputs."""
        module, _, name = task.component.partition(":")
        component = getattr(importlib.import_module(module), name)
        digests = {name: digest for name, binding in task.inputs.items() if (digest := self._digest(binding))}
        artifacts = {
            name: self.made[binding.task][binding.output]
            for name, binding in task.inputs.items()
            if name not in digests and isinstance(binding, Made) and binding.task in self.made
        }
        arguments = {
            "config": _settings(task),
            "label": task.label,
            "sources": json.dumps(digests, sort_keys=True),
            **parameters,
            **artifacts,
        }
        return dict(self._place(component(**arguments), task).outputs)

    def _digest(self, binding: Binding) -> str | list[str] | None:
        """Digest of an artifact that is there before the pipeline starts, else None."""
        if isinstance(binding, Source):
            return self.sources[binding.name]
        return self.known[binding.task].get(binding.output) if binding.task in self.known else None

    def _place(self, step: Any, task: Task) -> Any:
        """Name a KFP task, and say what it asks of a cluster."""
        from kfp import kubernetes

        placement = task.placement
        step.set_display_name(task.label)
        step.set_caching_options(
            False
        )  # whether a result is there already is decided by our keys, which know file contents
        step.set_cpu_request(str(placement.processes * placement.threads))
        step.set_memory_request(f"{placement.memory_gib:g}Gi")
        for key, value in {**self.labels, "tessera.dev/stage": task.label.replace("/", ".")}.items():
            kubernetes.add_pod_label(step, key, value)
        if placement.node_pool is not None:
            kubernetes.add_node_selector(step, "tessera.dev/pool", placement.node_pool)
        if placement.gpus:
            step.set_accelerator_type("nvidia.com/gpu").set_accelerator_limit(placement.gpus)
        return step


def _settings(task: Task) -> str:
    """The configuration of a task as its component takes it; the shard of a fan-out is a parameter of its own."""
    settings = task.config.canonical()
    if task.shards:
        del settings["shard"]
    return canonical_json({**settings, "placement": task.placement.canonical()})
