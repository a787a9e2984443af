"""A compiled pipeline as an Argo Workflow: as much of KFP's representation and its Kubernetes settings as ours uses.

Parameters, containers, groups, loops over constants, outputs collected from a loop, exit handlers, retries, resources.
Anything else is refused by name, so that no test runs less than was compiled. There is no driver and no launcher: Argo
fills in values, and the addresses of artifacts are known when the Workflow is made.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

Values = dict[str, Any]
OUTPUTS = "/tmp/kfp/outputs"
EXECUTOR_OUTPUT = "/tmp/kfp/executor_output.json"
ARTIFACT_ROOT = "/minio"
"""Folder that KFP's launcher copies to the bucket; here it ends with the pod."""
SHOWN = "executor-output"
"""Argo parameter with the metadata of a task's artifacts."""
CONTAINER_KEYS = {"image", "command", "args", "resources", "env"}
TASK_KEYS = {
    "cachingOptions",
    "componentRef",
    "dependentTasks",
    "inputs",
    "iteratorPolicy",
    "parameterIterator",
    "retryPolicy",
    "taskInfo",
    "triggerPolicy",
}
ENDED = ("Succeeded", "Failed", "Errored", "Skipped", "Omitted")


class Unsupported(ValueError):
    """The pipeline uses something of KFP that this translation does not know."""


class PodAdditions(BaseModel):
    """What the tests add to every pod, as a cluster's administrator would."""

    model_config = ConfigDict(frozen=True)

    image: str
    """Takes the place of every image, since the tests have none of the project's."""
    environment: dict[str, str] = {}
    mounts: tuple[Values, ...] = ()
    volumes: tuple[Values, ...] = ()


def workflow(
    pipeline: Values, platform: Values, parameters: Mapping[str, Any], additions: PodAdditions, labels: dict[str, str]
) -> Values:
    """The Workflow of one run.

    Args:
        pipeline: KFP's representation, the first document of a compiled pipeline.
        platform: its second document, empty where there is none.
        parameters: of the pipeline.
        additions: to every pod.
        labels: of the Workflow and its pods.

    Raises:
        Unsupported: see the module's page.
    """
    maker = _Maker(pipeline, platform, additions)
    root = pipeline["root"]
    declared = root.get("inputDefinitions", {}).get("parameters", {})
    if unknown := parameters.keys() - declared.keys():
        raise Unsupported(f"parameters that the pipeline does not have: {sorted(unknown)}")
    maker.add_dag("root", root)
    values = {name: parameters.get(name, each.get("defaultValue")) for name, each in declared.items()}
    if absent := [name for name, value in values.items() if value is None]:
        raise Unsupported(f"parameters without a value: {absent}")
    return {
        "apiVersion": "argoproj.io/v1alpha1",
        "kind": "Workflow",
        "metadata": {"generateName": f"{pipeline['pipelineInfo']['name']}-", "labels": labels},
        "spec": {
            "entrypoint": "root",
            "serviceAccountName": "pipeline-runner",
            "arguments": {"parameters": [{"name": name, "value": _text(value)} for name, value in values.items()]},
            "templates": maker.templates,
            "podMetadata": {"labels": labels},
            "securityContext": {"seccompProfile": {"type": "RuntimeDefault"}},
        },
    }


class _Maker:
    """Collects the templates of a Workflow; each task has one of its own, since Argo's retries belong to templates."""

    def __init__(self, pipeline: Values, platform: Values, additions: PodAdditions) -> None:
        self.templates: list[Values] = []
        self._components = pipeline.get("components", {})
        self._executors = pipeline.get("deploymentSpec", {}).get("executors", {})
        kubernetes = platform.get("platforms", {}).get("kubernetes", {})
        self._settings = kubernetes.get("deploymentSpec", {}).get("executors", {})
        self._bucket = f"kfp/{pipeline['pipelineInfo']['name']}"
        self._additions = additions

    def add_dag(self, name: str, component: Values) -> None:
        """Add the template of a group of tasks."""
        tasks = component["dag"]["tasks"]
        outputs = component["dag"].get("outputs", {}).get("parameters", {})
        self.templates.append(
            {
                "name": name,
                "inputs": _inputs(component),
                "dag": {
                    "tasks": [self._task(name, key, task) for key, task in tasks.items()],
                    # With all tasks as targets, a failure before an exit handler is a failure of the group.
                    "target": " ".join(tasks),
                    "failFast": False,
                },
                "outputs": {
                    "parameters": [
                        {"name": key, "valueFrom": {"parameter": _output(_known_selector(key, output))}}
                        for key, output in outputs.items()
                    ]
                },
            }
        )

    def _task(self, group: str, key: str, task: Values) -> Values:
        """A task of a group, and the templates that it needs."""
        _refuse_unknown(f"task {key}", task, TASK_KEYS)
        component = self._components[task["componentRef"]["name"]]
        template = f"{group}-{key}"
        if "dag" in component:
            self.add_dag(template, component)
        else:
            self._add_container(template, component, task)
        if task.get("inputs", {}).keys() - {"parameters"}:
            raise Unsupported(f"task {key}: inputs other than parameters")
        arguments = {
            name: _argument(key, value) for name, value in task.get("inputs", {}).get("parameters", {}).items()
        }
        made: Values = {"name": key, "template": template}
        if "parameterIterator" in task:
            iterator = task["parameterIterator"]
            if "raw" not in iterator["items"]:
                raise Unsupported(f"task {key}: a loop over an output")
            made["withParam"] = iterator["items"]["raw"]
            arguments[iterator["itemInput"]] = "{{item}}"
        made["arguments"] = {"parameters": [{"name": name, "value": value} for name, value in arguments.items()]}
        if depends := _depends(key, task):
            made["depends"] = depends
        return made

    def _add_container(self, name: str, component: Values, task: Values) -> None:
        label = component["executorLabel"]
        container = self._executors[label].get("container")
        if container is None:
            raise Unsupported(f"{label}: an executor that is no container")
        _refuse_unknown(label, container, CONTAINER_KEYS)
        declared = component.get("outputDefinitions", {})
        fill = _placeholders(component, f"minio://{self._bucket}/{{{{workflow.name}}}}/{{{{pod.name}}}}")
        environment = {
            **self._additions.environment,
            **{each["name"]: each["value"] for each in container.get("env", [])},
        }
        template: Values = {
            "name": name,
            "inputs": _inputs(component),
            "container": {
                "image": self._additions.image,
                "command": [fill(text) for text in container.get("command", [])],
                "args": [fill(text) for text in container.get("args", [])],
                "env": [{"name": key, "value": value} for key, value in environment.items()],
                "resources": _resources(label, container.get("resources", {})),
                "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
                "volumeMounts": [*self._additions.mounts, {"name": "artifacts", "mountPath": ARTIFACT_ROOT}],
            },
            "volumes": [*self._additions.volumes, {"name": "artifacts", "emptyDir": {}}],
            "outputs": {
                "parameters": [
                    *(
                        {"name": key, "valueFrom": {"path": f"{OUTPUTS}/{key}"}}
                        for key in declared.get("parameters", {})
                    ),
                    {"name": SHOWN, "valueFrom": {"path": EXECUTOR_OUTPUT, "default": "{}"}},
                ]
            },
        }
        if retries := task.get("retryPolicy", {}).get("maxRetryCount", 0):
            template["retryStrategy"] = {"limit": str(retries)}
        for key, setting in self._settings.get(label, {}).items():
            if key not in _SETTINGS:
                raise Unsupported(f"{label}: the Kubernetes setting {key}")
            _SETTINGS[key](template, setting)
        self.templates.append(template)


def _placeholders(component: Values, address: str) -> Callable[[str], str]:
    """A function that gives KFP's placeholders in a text the values of this Workflow."""
    artifacts = {
        key: {"artifacts": [{"name": key, "type": each["artifactType"], "uri": f"{address}/{key}", "metadata": {}}]}
        for key, each in component.get("outputDefinitions", {}).get("artifacts", {}).items()
    }
    parameters = component.get("outputDefinitions", {}).get("parameters", {})
    files = {key: {"outputFile": f"{OUTPUTS}/{key}"} for key in parameters}
    executor_input = {"outputs": {"parameters": files, "artifacts": artifacts, "outputFile": EXECUTOR_OUTPUT}}

    def fill(text: str) -> str:
        text = text.replace("{{$}}", json.dumps(executor_input))
        text = re.sub(r"\{\{\$\.inputs\.parameters\['([^']+)'\]\}\}", r"{{inputs.parameters.\1}}", text)
        text = re.sub(r"\{\{\$\.outputs\.parameters\['([^']+)'\]\.output_file\}\}", rf"{OUTPUTS}/\1", text)
        if "{{$" in text:
            raise Unsupported(f"the placeholder in {text!r}")
        return text

    return fill


def _inputs(component: Values) -> Values:
    """A template's parameters, without defaults: KFP's driver fails where a command line needs one."""
    return {"parameters": [{"name": name} for name in component.get("inputDefinitions", {}).get("parameters", {})]}


def _argument(task: str, value: Values) -> str:
    """The value of a task's parameter, as Argo's text or expression."""
    if "runtimeValue" in value:
        text = _text(value["runtimeValue"]["constant"])
        if "{{" in text:
            raise Unsupported(f"task {task}: a placeholder in a constant")
        return text
    if "componentInputParameter" in value:
        return f"{{{{inputs.parameters.{value['componentInputParameter']}}}}}"
    if "taskOutputParameter" in value:
        made = value["taskOutputParameter"]
        return _output({"producerSubtask": made["producerTask"], "outputParameterKey": made["outputParameterKey"]})
    raise Unsupported(f"task {task}: a parameter from {sorted(value)}")


def _output(selector: Values) -> str:
    """What a task made; of a loop, Argo gives a JSON list."""
    return f"{{{{tasks.{selector['producerSubtask']}.outputs.parameters.{selector['outputParameterKey']}}}}}"


def _known_selector(name: str, output: Values) -> Values:
    if "valueFromParameter" not in output:
        raise Unsupported(f"the group's output {name} from {sorted(output)}")
    selector: Values = output["valueFromParameter"]
    return selector


def _depends(key: str, task: Values) -> str:
    """Argo's condition for a task to start."""
    policy = task.get("triggerPolicy", {})
    if "condition" in policy:
        raise Unsupported(f"task {key}: a condition")
    before = task.get("dependentTasks", [])
    if policy.get("strategy") == "ALL_UPSTREAM_TASKS_COMPLETED":
        return " && ".join(f"({' || '.join(f'{each}.{state}' for state in ENDED)})" for each in before)
    return " && ".join(f"{each}.Succeeded" for each in before)


def _resources(label: str, asked: Values) -> Values:
    known = {
        "resourceCpuRequest": ("requests", "cpu"),
        "resourceMemoryRequest": ("requests", "memory"),
        "resourceCpuLimit": ("limits", "cpu"),
        "resourceMemoryLimit": ("limits", "memory"),
    }
    # The same values as numbers, which KFP's compiler still writes for older backends.
    _refuse_unknown(
        f"{label}: resources", asked, {*known, "cpuRequest", "memoryRequest", "cpuLimit", "memoryLimit", "accelerator"}
    )
    made: Values = {"requests": {}, "limits": {}}
    for key, (kind, name) in known.items():
        if key in asked:
            made[kind][name] = asked[key]
    if "accelerator" in asked:
        accelerator = asked["accelerator"]
        made["limits"][accelerator["resourceType"]] = accelerator["resourceCount"]
    return made


def _text(value: Any) -> str:
    """A value as Argo hands it on: a string as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value)


def _refuse_unknown(what: str, values: Values, known: set[str]) -> None:
    if unknown := values.keys() - known:
        raise Unsupported(f"{what}: {sorted(unknown)}")


def _pod_metadata(template: Values, setting: Values) -> None:
    template["metadata"] = setting


def _node_selector(template: Values, setting: Values) -> None:
    _refuse_unknown("nodeSelector", setting, {"labels"})
    template["nodeSelector"] = setting["labels"]


def _tolerations(template: Values, setting: list[Values]) -> None:
    template["tolerations"] = setting


def _security_context(template: Values, setting: Values) -> None:
    template["container"]["securityContext"] |= setting


def _empty_dirs(template: Values, setting: list[Values]) -> None:
    for each in setting:
        _refuse_unknown("emptyDirMounts", each, {"volumeName", "mountPath", "medium", "sizeLimit"})
        kind = {key: each[key] for key in ("medium", "sizeLimit") if key in each}
        template["volumes"].append({"name": each["volumeName"], "emptyDir": kind})
        template["container"]["volumeMounts"].append({"name": each["volumeName"], "mountPath": each["mountPath"]})


def _environment_from(holder: str, reference: str, key_name: str) -> Callable[[Values, list[Values]], None]:
    """Environment variables from Secrets or ConfigMaps."""

    def add(template: Values, setting: list[Values]) -> None:
        for each in setting:
            name, optional = _constant(each, holder), each.get("optional", False)
            for pair in each["keyToEnv"]:
                source = {"name": name, "key": pair[key_name], "optional": optional}
                template["container"]["env"].append({"name": pair["envVar"], "valueFrom": {reference: source}})

    return add


def _environment_of_pod(template: Values, setting: list[Values]) -> None:
    for each in setting:
        _refuse_unknown("fieldPathAsEnv", each, {"name", "fieldPath"})
        source = {"fieldRef": {"fieldPath": each["fieldPath"]}}
        template["container"]["env"].append({"name": each["name"], "valueFrom": source})


def _constant(setting: Values, name: str) -> str:
    """A name in kfp-kubernetes' settings, which is written as a constant of a parameter."""
    value: str = (
        setting[f"{name}Parameter"]["runtimeValue"]["constant"] if f"{name}Parameter" in setting else setting[name]
    )
    return value


_SETTINGS: dict[str, Callable[[Values, Any], None]] = {
    "podMetadata": _pod_metadata,
    "nodeSelector": _node_selector,
    "tolerations": _tolerations,
    "securityContext": _security_context,
    "emptyDirMounts": _empty_dirs,
    "fieldPathAsEnv": _environment_of_pod,
    "secretAsEnv": _environment_from("secretName", "secretKeyRef", "secretKey"),
    "configMapAsEnv": _environment_from("configMapName", "configMapKeyRef", "configMapKey"),
}
