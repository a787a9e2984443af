"""The CustomResourceDefinition of `Retraining`, made from the pydantic models.

It is a template of the chart and not in `crds/`: Helm never upgrades what is there. `keep` leaves it, and with it every
`Retraining`, when the chart is uninstalled.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pipelines.retraining.spec import GROUP, KIND, PLURAL, RULES, VERSION, RetrainingSpec
from pipelines.retraining.status import RetrainingStatus

DEFINITION_FILE = Path(__file__).parents[2] / "helm" / "tessera" / "definitions" / "retraining.yaml"
"""`make golden` renews it."""
ANY_VALUE = "x-kubernetes-preserve-unknown-fields"
MAX_NAME = 40
"""The name of the object is that of its recipe, unless the recipe has another."""
COLUMNS = {
    "Phase": ("string", ".status.phase"),
    "Run": ("string", ".status.runId"),
    "Succeeded": ("date", ".status.lastSucceeded"),
    "Last promoted": ("date", ".status.lastPromoted"),
    "Reason": ("string", ".status.reason"),
    "Age": ("date", ".metadata.creationTimestamp"),
}
"""What `kubectl get retrainings` shows: the type and the path of each column."""


def custom_resource_definition() -> dict[str, Any]:
    """The definition as an object of Kubernetes."""
    rule = {
        "rule": f"self.metadata.name.size() <= {MAX_NAME}",
        "message": f"the name has {MAX_NAME} characters at most",
    }
    schema = {
        "type": "object",
        "required": ["spec"],
        "properties": {
            "spec": structural_schema(RetrainingSpec.model_json_schema(by_alias=True)),
            "status": structural_schema(RetrainingStatus.model_json_schema(by_alias=True)),
        },
        RULES: [rule],
    }
    version = {
        "name": VERSION,
        "served": True,
        "storage": True,
        "subresources": {"status": {}},
        "additionalPrinterColumns": [
            {"name": name, "type": kind, "jsonPath": path} for name, (kind, path) in COLUMNS.items()
        ],
        "schema": {"openAPIV3Schema": schema},
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{PLURAL}.{GROUP}", "annotations": {"helm.sh/resource-policy": "keep"}},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {"kind": KIND, "plural": PLURAL, "singular": KIND.lower()},
            "versions": [version],
        },
    }


def definition_text() -> str:
    """The definition as the chart has it."""
    return "# Made from pipelines/retraining; renew with `make golden`.\n" + yaml.safe_dump(
        custom_resource_definition(), sort_keys=False, width=120
    )


def structural_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON schema of pydantic as the structural schema that Kubernetes asks for.

    Such a schema has no references, a type at each place, no `anyOf` with null, and `exclusiveMinimum` as a switch of
    `minimum`. Unknown keys need no mention: the API server refuses or removes them.
    """
    return _structural(schema, schema.get("$defs", {}))


def _structural(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> dict[str, Any]:
    """One place of the schema, and what is below it."""
    if "$ref" in schema:
        target = definitions[schema["$ref"].rpartition("/")[2]]
        description = {"description": schema["description"]} if "description" in schema else {}
        return _structural(target, definitions) | description
    if "anyOf" in schema:
        (value,) = (each for each in schema["anyOf"] if each != {"type": "null"})
        rest = {key: each for key, each in schema.items() if key not in ("anyOf", "default")}
        return _structural({**value, **rest}, definitions)
    if "type" not in schema:
        return {ANY_VALUE: True}
    kept = (
        *("type", "description", "enum", "format", "pattern", "minimum", "maximum"),
        *("minLength", "minItems", "required", RULES),
    )
    made: dict[str, Any] = {key: schema[key] for key in kept if key in schema}
    if "const" in schema:
        made["enum"] = [schema["const"]]
    if "exclusiveMinimum" in schema:
        made |= {"minimum": schema["exclusiveMinimum"], "exclusiveMinimum": True}
    if isinstance(schema.get("default"), str | int | float) and schema["default"] != "":
        made["default"] = schema["default"]
    if "items" in schema:
        made["items"] = _structural(schema["items"], definitions)
    if "properties" in schema:
        made["properties"] = {name: _structural(each, definitions) for name, each in schema["properties"].items()}
    elif schema["type"] == "object":
        values = schema.get("additionalProperties", True)
        if isinstance(values, Mapping) and values.get("type"):
            made["additionalProperties"] = _structural(values, definitions)
        else:
            made[ANY_VALUE] = True
    return made
