"""Runs a compiled pipeline without KFP: its command lines as compiled, placeholders filled in as KFP's launcher does.

As much of KFP's intermediate representation as our pipelines use: parameters, groups, loops over constant items,
outputs collected from a loop, an exit handler, retries. Artifacts are declared to a container in its executor input as
by the launcher; their folders are those of this machine. Each container has working copies of its own, as a pod has.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

Values = Mapping[str, Any]
INPUT = re.compile(r"\{\{\$\.inputs\.parameters\['([^']+)'\]\}\}")
OUTPUT = re.compile(r"\{\{\$\.outputs\.parameters\['([^']+)'\]\.output_file\}\}")


class ContainerFailed(Exception):
    """A container ended with an error; its standard error."""


def run_compiled(pipeline: Path, folder: Path, **parameters: str) -> None:
    """Run all tasks of a compiled pipeline, one after another.

    Args:
        pipeline: the file.
        folder: takes the files of output parameters.
        parameters: those of the pipeline.
    """
    spec = next(yaml.safe_load_all(pipeline.read_text()))
    _run_dag(spec, spec["root"]["dag"], parameters, folder)


def _run_dag(spec: Values, dag: Values, inputs: Values, folder: Path) -> dict[str, Values]:
    """Outputs of the tasks of a graph, in an order in which they can run."""
    made: dict[str, Values] = {}
    left = dict(dag["tasks"])
    failure: ContainerFailed | None = None
    while left:
        name = next(name for name, task in left.items() if made.keys() >= set(task.get("dependentTasks", ())))
        task = left.pop(name)
        if failure is not None and "triggerPolicy" not in task:
            made[name] = {}
            continue
        given = {key: _value(v, inputs, made) for key, v in task.get("inputs", {}).get("parameters", {}).items()}
        try:
            made[name] = _run_task(spec, task, given, folder / name)
        except ContainerFailed as error:
            made[name], failure = {}, error
    if failure is not None:
        raise failure
    return made


def _run_task(spec: Values, task: Values, given: Values, folder: Path) -> Values:
    """Outputs of one task: a loop, a group, or a container."""
    component = spec["components"][task["componentRef"]["name"]]
    outputs = {
        key: output["valueFromParameter"]
        for key, output in component.get("dag", {}).get("outputs", {}).get("parameters", {}).items()
    }
    if "parameterIterator" in task:
        items = json.loads(task["parameterIterator"]["items"]["raw"])
        key = task["parameterIterator"]["itemInput"]
        several = [
            _run_dag(spec, component["dag"], {**given, key: item}, folder / str(number))
            for number, item in enumerate(items)
        ]
        return {
            key: [one[v["producerSubtask"]][v["outputParameterKey"]] for one in several] for key, v in outputs.items()
        }
    if "dag" in component:
        made = _run_dag(spec, component["dag"], given, folder)
        return {key: made[v["producerSubtask"]][v["outputParameterKey"]] for key, v in outputs.items()}
    container = spec["deploymentSpec"]["executors"][component["executorLabel"]]["container"]
    for left in reversed(range(1 + task.get("retryPolicy", {}).get("maxRetryCount", 0))):
        try:
            return _run_container(container, given, component.get("outputDefinitions", {}), folder)
        except ContainerFailed:
            if not left:
                raise
    raise AssertionError


def _value(source: Values, inputs: Values, made: Mapping[str, Values]) -> Any:
    """The value of an argument: a constant, an input of the graph, or what a task before made."""
    if "runtimeValue" in source:
        return source["runtimeValue"]["constant"]
    if "componentInputParameter" in source:
        return inputs[source["componentInputParameter"]]
    output = source["taskOutputParameter"]
    return made[output["producerTask"]][output["outputParameterKey"]]


def _run_container(container: Values, given: Values, declared: Values, folder: Path) -> Values:
    """Run a container's command line as a process; returns its output parameters."""
    outputs: dict[str, Path] = {}
    artifacts: dict[str, Any] = {}
    for name, artifact in declared.get("artifacts", {}).items():
        uri = f"s3://{folder.absolute() / name}"
        artifacts[name] = {"artifacts": [{"name": name, "type": artifact["artifactType"], "uri": uri, "metadata": {}}]}
    metadata = folder / "executor_output.json"
    executor_input = {
        "inputs": {"parameterValues": dict(given)},
        "outputs": {"artifacts": artifacts, "outputFile": str(metadata)},
    }

    def fill(text: str) -> str:
        if text == "{{$}}":
            return json.dumps(executor_input)
        if found := INPUT.fullmatch(text):
            value = given[found.group(1)]
            return value if isinstance(value, str) else json.dumps(value)
        if found := OUTPUT.fullmatch(text):
            return str(outputs.setdefault(found.group(1), folder / found.group(1)))
        return text

    program, *command = [fill(text) for text in (*container["command"], *container["args"])]
    assert program == "python"
    environment = {**os.environ, "TESSERA_LOCAL": str(folder / "local")}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise ContainerFailed(done.stderr)
    shown = json.loads(metadata.read_text())["artifacts"]
    assert shown.keys() <= artifacts.keys(), done.stdout
    return {name: path.read_text() for name, path in outputs.items()}
