"""Runs a compiled pipeline without KFP: its command lines as compiled, placeholders filled in as KFP's launcher does.

As much of KFP's intermediate representation as our pipelines use: parameters, one level of loops over constant items,
outputs collected from a loop.
"""

import json
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
    while left:
        name = next(name for name, task in left.items() if made.keys() >= set(task.get("dependentTasks", ())))
        task = left.pop(name)
        component = spec["components"][task["componentRef"]["name"]]
        given = {key: value["defaultValue"] for key, value in _declared(component).items() if "defaultValue" in value}
        given |= {key: _value(v, inputs, made) for key, v in task.get("inputs", {}).get("parameters", {}).items()}
        if "parameterIterator" in task:
            items = json.loads(task["parameterIterator"]["items"]["raw"])
            key = task["parameterIterator"]["itemInput"]
            inner = [
                _run_dag(spec, component["dag"], {**given, key: item}, folder / name / str(number))
                for number, item in enumerate(items)
            ]
            made[name] = {
                key: [one[v["producerSubtask"]][v["outputParameterKey"]] for one in inner]
                for key, output in component["dag"].get("outputs", {}).get("parameters", {}).items()
                for v in [output["valueFromParameter"]]
            }
        else:
            container = spec["deploymentSpec"]["executors"][component["executorLabel"]]["container"]
            made[name] = _run_container(container, given, folder / name)
    return made


def _declared(component: Values) -> Values:
    declared: Values = component.get("inputDefinitions", {}).get("parameters", {})
    return declared


def _value(source: Values, inputs: Values, made: Mapping[str, Values]) -> Any:
    """The value of an argument: a constant, an input of the graph, or what a task before made."""
    if "runtimeValue" in source:
        return source["runtimeValue"]["constant"]
    if "componentInputParameter" in source:
        return inputs[source["componentInputParameter"]]
    output = source["taskOutputParameter"]
    return made[output["producerTask"]][output["outputParameterKey"]]


def _run_container(container: Values, given: Values, folder: Path) -> Values:
    """Run a container's command line as a process; returns its output parameters."""
    outputs: dict[str, Path] = {}

    def fill(text: str) -> str:
        if found := INPUT.fullmatch(text):
            value = given[found.group(1)]
            return value if isinstance(value, str) else json.dumps(value)
        if found := OUTPUT.fullmatch(text):
            return str(outputs.setdefault(found.group(1), folder / found.group(1)))
        return text

    program, *command = [fill(text) for text in (*container["command"], *container["args"])]
    assert program == "python"
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {name: path.read_text() for name, path in outputs.items()}
