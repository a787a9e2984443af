"""A graph as a KFP pipeline: container components made from the declarations of the stages.

Digests travel as string parameters: each stage writes the digest of each output, the next takes it. Whether a result is
there already is decided by our own keys, which know the contents of files; KFP's cache is off.
"""

import functools
import importlib.metadata
import inspect
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from components.core.base.config import canonical_json
from components.core.base.run_name import check_run_name
from components.core.runtime.stage import Stage
from components.core.runtime.stage_command import command_line
from pipelines.recipe.graph import Graph, Source, Task
from pipelines.recipe.registry import STAGES, find_stage, stage_folder

PIPELINE_NAME = "llama-nemotron"
MAX_RETRIES = 3
"""Further attempts at a task: a pod that is evicted or preempted fails its task, and the next attempt resumes.

KFP also retries a stage that refuses its input; `stage_command` answers such a retry at once.
"""
VALUES = ("config", "placement", "store", "run", "label")
"""Parameters of every component beside the digests of its inputs."""


def compile_pipeline(graph: Graph, sources: Mapping[str, str], out: Path, *, run_label: str | None = None) -> None:
    """Write the intermediate representation that a KFP server takes, with the parameters `store` and `run`.

    Args:
        graph: what to run.
        sources: digests of the artifacts that come from the user's files.
        out: the file.
        run_label: the run that the pipeline is built for, a label of its pods; one for any run has no such label.

    Raises:
        InputError: no run can have the name `run_label`.
    """
    from kfp import compiler, dsl

    if run_label is not None:
        check_run_name(run_label)

    def pipeline(store: str, run: str) -> None:
        builder = _Builder(graph, sources, run_label, store=store, run=run)
        for shards, tasks in itertools.groupby(graph.tasks, key=lambda task: task.shards):
            builder.add(list(tasks), shards)

    describe = dsl.pipeline(name=PIPELINE_NAME, description=f"Recipe {graph.name}, {graph.digest[:12]}.")
    out.parent.mkdir(parents=True, exist_ok=True)
    compiler.Compiler().compile(describe(pipeline), package_path=str(out))


def image(stage: str) -> str:
    """The container image of a stage; `TESSERA_IMAGES` names another registry or prefix when a pipeline is compiled."""
    version = importlib.metadata.version("tessera")
    return f"{os.environ.get('TESSERA_IMAGES', 'tessera')}/{stage_folder(stage)}:{version}"


@functools.cache
def component(name: str) -> Callable[..., Any]:
    """The KFP component of a stage: one container that runs `stage_command`.

    Its parameters are `VALUES`, `shard` for a stage that fans out, and a digest for each input: a string, empty where
    the input is absent, or a list. It returns the digest of each output as a string, empty where none was made.
    """
    from kfp import dsl

    stage = find_stage(name)
    parameters = _parameters(stage)

    def container(*placeholders: Any) -> Any:
        given = dict(zip(parameters, placeholders, strict=True))
        values = {key: given[key] for key in parameters if key in (*VALUES, "shard")}
        values["retries"] = str(MAX_RETRIES)
        inputs, outputs = ({key: given[key] for key in declared} for declared in (stage.inputs, stage.outputs))
        command = ["python", *command_line(STAGES[name], values, inputs, outputs)]
        return dsl.ContainerSpec(image=image(name), command=command[:4], args=command[4:])

    # KFP reads parameters from a function's signature, which here is that of the stage.
    container.__name__ = name.replace("-", "_")
    container.__doc__ = stage.doc
    vars(container)["__signature__"] = inspect.Signature(list(parameters.values()))
    made: Callable[..., Any] = dsl.container_component(container)
    return made


def _parameters(stage: Stage) -> dict[str, inspect.Parameter]:
    """Parameters of a stage's component, those with a default last."""
    from kfp import dsl

    def parameter(name: str, kind: object, default: object = inspect.Parameter.empty) -> inspect.Parameter:
        return inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=kind, default=default)

    required = [parameter(name, str) for name in VALUES]
    if "shard" in stage.config.model_fields:
        required.append(parameter("shard", str))
    required += [parameter(name, dsl.OutputPath(str)) for name in stage.outputs]
    digests = [
        parameter(name, list, []) if declared.many else parameter(name, str, "")
        for name, declared in stage.inputs.items()
    ]
    return {one.name: one for one in (*required, *digests)}


class _Builder:
    """Adds the tasks of a graph to the KFP pipeline under construction."""

    def __init__(self, graph: Graph, sources: Mapping[str, str], run_label: str | None, **parameters: object) -> None:
        self.sources, self.parameters = sources, parameters
        self.labels = {"tessera.dev/recipe-digest": graph.digest[:12]}
        if run_label is not None:
            self.labels["tessera.dev/run"] = run_label
        self.made: dict[str, dict[str, Any]] = {}

    def add(self, tasks: Sequence[Task], shards: Sequence[str]) -> None:
        """Add consecutive tasks, those of one fan-out in one loop, and keep their outputs for the tasks that follow."""
        from kfp import dsl

        if not shards:
            for task in tasks:
                self.made[task.label] = self._add(task)
            return
        with dsl.ParallelFor(items=list(shards), name=tasks[0].label.replace("/", "-")) as shard:
            for task in tasks:
                self.made[task.label] = self._add(task, shard=shard)
        for task in tasks:
            self.made[task.label] = {name: dsl.Collected(made) for name, made in self.made[task.label].items()}

    def _add(self, task: Task, **shard: object) -> dict[str, Any]:
        """Add one task; returns its outputs."""
        settings = task.config.canonical()
        if shard:
            del settings["shard"]  # a parameter of its own
        elif "shard" in settings:
            shard = {"shard": settings["shard"] or ""}
        arguments: dict[str, Any] = {
            "config": canonical_json(settings),
            "placement": canonical_json(task.placement.canonical()),
            "label": task.label,
            **self.parameters,
            **shard,
        }
        for name, binding in task.inputs.items():
            if isinstance(binding, Source):
                arguments[name] = self.sources[binding.name]
            elif not isinstance(binding, tuple):
                arguments[name] = self.made[binding.task][binding.output]
        return dict(self._place(component(task.stage.name)(**arguments), task).outputs)

    def _place(self, step: Any, task: Task) -> Any:
        """Name a KFP task, and say what it asks of a cluster."""
        from kfp import kubernetes

        placement = task.placement
        step.set_display_name(task.label)
        step.set_caching_options(False)
        step.set_retry(MAX_RETRIES)
        step.set_cpu_request(str(placement.processes * placement.threads))
        step.set_memory_request(f"{placement.memory_gib:g}Gi")
        for key, value in {**self.labels, "tessera.dev/stage": task.label.replace("/", ".")}.items():
            kubernetes.add_pod_label(step, key, value)
        if placement.node_pool is not None:
            kubernetes.add_node_selector(step, "tessera.dev/pool", placement.node_pool)
        if placement.gpus:
            step.set_accelerator_type("nvidia.com/gpu").set_accelerator_limit(placement.gpus)
        return step
