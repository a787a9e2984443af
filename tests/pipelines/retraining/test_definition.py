"""The definition of `Retraining`: fresh, structural, and of the same opinion as the models."""

from typing import Any

import pytest
import yaml

from components.core.base.errors import RecipeError
from pipelines.retraining.definition import DEFINITION_FILE, custom_resource_definition, definition_text
from pipelines.retraining.spec import RetrainingSpec


def test_golden_the_definition_in_the_chart_is_fresh(renew_golden: bool) -> None:
    if renew_golden:
        DEFINITION_FILE.write_text(definition_text(), encoding="utf-8")
    assert DEFINITION_FILE.read_text(encoding="utf-8") == definition_text()  # renew with `make golden`
    assert yaml.safe_load(definition_text()) == custom_resource_definition()


def test_the_schema_has_a_type_or_takes_any_value_at_each_place() -> None:
    def check(schema: dict[str, Any], where: str) -> None:
        assert "$ref" not in schema, where
        assert ("type" in schema) != (schema == {"x-kubernetes-preserve-unknown-fields": True}), where
        for name, below in schema.get("properties", {}).items():
            assert name == "openAPIV3Schema" or name[0].islower()
            check(below, f"{where}.{name}")
        if "items" in schema:
            check(schema["items"], f"{where}[]")

    (version,) = custom_resource_definition()["spec"]["versions"]
    schema = version["schema"]["openAPIV3Schema"]
    check(schema, "")
    assert list(schema["properties"]["spec"]["properties"]) == [
        "recipe",
        "set",
        "store",
        "trigger",
        "budget",
        "promote",
        "suspend",
        "history",
    ]


def test_a_specification_in_camel_case_is_read_with_its_defaults() -> None:
    spec = RetrainingSpec.parse(
        {
            "recipe": {"configMap": "nano-recipe"},
            "store": "s3://models/tessera",
            "trigger": {"dataset": {"prefix": "s3://corpora/support/", "quiet": "90m"}},
            "budget": {"approveAboveGpuHours": 50},
        }
    )
    assert spec.recipe.config_map == "nano-recipe"
    assert spec.trigger.on_change
    assert spec.trigger.dataset is not None
    assert spec.trigger.dataset.quiet_time.total_seconds() == 5400
    assert spec.budget.approve_above_gpu_hours == 50
    assert spec.history == 10


def test_a_key_in_the_wrong_spelling_is_named() -> None:
    with pytest.raises(RecipeError, match=r"unknown key 'spec.budget.gpuhours'"):
        RetrainingSpec.parse({"recipe": {"inline": {}}, "store": "s3://b", "budget": {"gpuhours": 1}}, where="spec")
