"""A graph as a KFP pipeline: container components made from the declarations of the stages.

Digests travel as string parameters: each stage writes the digest of each output, the next takes it. Whether a result is
there already is decided by our own keys, which know the contents of files; KFP's cache is off. Artifacts are what
somebody opens in KFP's interface: metrics, pages and models. The stages are one group; its exit handler ends the run in
the store and writes the report, whether they succeeded or not.
"""

import functools
import importlib.metadata
import inspect
import itertools
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from components.core.base.config import canonical_json
from components.core.base.run_name import check_run_name
from components.core.runtime.kfp_outputs import METRICS, REPORT, SUMMARY, model_artifact
from components.core.runtime.placement import Placement
from components.core.runtime.stage import Stage
from components.core.runtime.stage_command import command_line
from pipelines.recipe.graph import Graph, Source, Task
from pipelines.recipe.pod_settings import RECIPE_LABEL, RUN_LABEL, STAGE_LABEL, set_up_pod, stage_label
from pipelines.recipe.registry import CORE_IMAGE, STAGES, find_stage, stage_image

PIPELINE_NAME = "llama-nemotron"
COMPILING = threading.Lock()
"""KFP's compiler has a global state, and the operator submits in threads."""
MAX_RETRIES = 3
"""Further attempts at a task: a pod that is evicted or preempted fails its task, and the next attempt resumes.

KFP also retries a stage whose work failed; `stage_command` answers such a retry at once.
"""
EXECUTOR_INPUT = "{{$}}"
"""Placeholder for KFP's executor input."""
FINISH, FINISH_PLACEMENT = "pipelines.run.finish_run", Placement(threads=1, memory_gib=2.0)
"""The module that ends a run on a cluster, and what its pod asks for."""
VALUES = ("config", "placement", "store", "run", "label")
"""Parameters of every component beside the digests of its inputs."""


def compile_pipeline(
    graph: Graph, sources: Mapping[str, str], out: Path, *, run_label: str | None = None, queues: bool = False
) -> None:
    """Write the intermediate representation that a KFP server takes, with the parameters `store` and `run`.

    Args:
        graph: what to run.
        sources: digests of the artifacts that come from the user's files.
        out: the file.
        run_label: the run that the pipeline is built for, a label of its pods; one for any run has no such label.
        queues: whether pods are admitted by Kueue, through the queue of their pool.

    Raises:
        InputError: no run can have the name `run_label`.
    """
    from kfp import compiler, dsl

    if run_label is not None:
        check_run_name(run_label)

    def pipeline(store: str, run: str) -> None:
        builder = _Builder(graph, sources, run_label, queues, store=store, run=run)
        labels = canonical_json([item.label for item in graph.items()])
        # As urgent as the stages: what they made is not reported while the last task waits in a queue.
        placement = FINISH_PLACEMENT.model_copy(update={"priority": graph.tasks[-1].placement.priority})
        finish = builder.place(finish_component()(store=store, run=run, labels=labels), "finish", placement)
        with dsl.ExitHandler(finish, name="stages"):
            for shards, tasks in itertools.groupby(graph.tasks, key=lambda task: task.shards):
                builder.add(list(tasks), shards)

    describe = dsl.pipeline(name=PIPELINE_NAME, description=f"Recipe {graph.name}, {graph.digest[:12]}.")
    out.parent.mkdir(parents=True, exist_ok=True)
    with COMPILING:
        compiler.Compiler().compile(describe(pipeline), package_path=str(out))


def image(name: str) -> str:
    """The reference of a container image; `TESSERA_IMAGES` names another registry or prefix than `tessera`."""
    version = importlib.metadata.version("tessera")
    return f"{os.environ.get('TESSERA_IMAGES', 'tessera')}/{name}:{version}"


@functools.cache
def component(name: str) -> Callable[..., Any]:
    """The KFP component of a stage: one container that runs `stage_command`.

    Its parameters are `VALUES`, `shard` for a stage that fans out, and a digest for each input: a string, empty where
    the input is absent, or a list. It returns the digest of each output as a string, empty where none was made, and as
    artifacts its metrics, a page, and each model that it makes.
    """
    from kfp import dsl

    stage = find_stage(name)
    parameters = _parameters(stage)

    def container(*placeholders: Any) -> Any:
        given = dict(zip(parameters, placeholders, strict=True))
        values = {key: given[key] for key in parameters if key in (*VALUES, "shard")}
        values |= {"retries": str(MAX_RETRIES), "executor-input": EXECUTOR_INPUT}
        inputs, outputs = ({key: given[key] for key in declared} for declared in (stage.inputs, stage.outputs))
        command = ["python", *command_line(STAGES[name], values, inputs, outputs)]
        return dsl.ContainerSpec(image=image(stage_image(name)), command=command[:4], args=command[4:])

    return _as_component(container, name.replace("-", "_"), stage.doc, list(parameters.values()))


@functools.cache
def finish_component() -> Callable[..., Any]:
    """The KFP component that ends a run: its status, MLflow's records, and the report as a page."""
    from kfp import dsl

    def container(store: Any, run: Any, labels: Any, report: Any) -> Any:
        arguments = ["--store", store, "--run", run, "--labels", labels, "--executor-input", EXECUTOR_INPUT]
        return dsl.ContainerSpec(image=image(CORE_IMAGE), command=["python", "-m", FINISH], args=arguments)

    parameters = [
        *(_parameter(name, str) for name in ("store", "run", "labels")),
        _parameter(REPORT, dsl.Output[dsl.HTML]),
    ]
    return _as_component(container, "finish", "Record how the run ended, and write its report.", parameters)


def _as_component(
    container: Callable[..., Any], name: str, doc: str, parameters: Sequence[inspect.Parameter]
) -> Callable[..., Any]:
    """A KFP component of a function of placeholders; KFP reads name, page and parameters from the function."""
    from kfp import dsl

    container.__name__, container.__doc__ = name, doc
    vars(container)["__signature__"] = inspect.Signature(parameters)
    made: Callable[..., Any] = dsl.container_component(container)
    return made


def _parameter(name: str, kind: object) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=kind)


def _parameters(stage: Stage) -> dict[str, inspect.Parameter]:
    """Parameters of a stage's component, all required: KFP's driver resolves no default in a command line."""
    from kfp import dsl

    parameters = [_parameter(name, str) for name in VALUES]
    if "shard" in stage.config.model_fields:
        parameters.append(_parameter("shard", str))
    parameters += [_parameter(name, dsl.OutputPath(str)) for name in stage.outputs]
    parameters += [_parameter(METRICS, dsl.Output[dsl.Metrics]), _parameter(SUMMARY, dsl.Output[dsl.Markdown])]
    models = [name for name, declared in stage.outputs.items() if declared.kind == "model"]
    parameters += [_parameter(model_artifact(name), dsl.Output[dsl.Model]) for name in models]
    parameters += [_parameter(name, list if declared.many else str) for name, declared in stage.inputs.items()]
    return {one.name: one for one in parameters}


class _Builder:
    """Adds the tasks of a graph to the KFP pipeline under construction."""

    def __init__(
        self, graph: Graph, sources: Mapping[str, str], run_label: str | None, queues: bool, **parameters: object
    ) -> None:
        self.sources, self.queues, self.parameters = sources, queues, parameters
        self.labels = {RECIPE_LABEL: graph.digest[:12]}
        if run_label is not None:
            self.labels[RUN_LABEL] = run_label
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
            **{name: [] if declared.many else "" for name, declared in task.stage.inputs.items()},
        }
        for name, binding in task.inputs.items():
            if isinstance(binding, Source):
                arguments[name] = self.sources[binding.name]
            elif not isinstance(binding, tuple):
                arguments[name] = self.made[binding.task][binding.output]
        outputs = self.place(component(task.stage.name)(**arguments), task.label, task.placement).outputs
        return {name: outputs[name] for name in task.stage.outputs}

    def place(self, step: Any, label: str, placement: Placement) -> Any:
        """Name a KFP task, and say what it asks of a cluster."""
        step.set_display_name(label)
        step.set_caching_options(False)
        step.set_retry(MAX_RETRIES)
        labels = {**self.labels, STAGE_LABEL: stage_label(label)}
        set_up_pod(step, placement, labels, queues=self.queues)
        return step
