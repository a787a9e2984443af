"""The JSON Schema of recipes, for editors: `python -m pipelines.recipe.json_schema` renews the committed file."""

import json
from pathlib import Path
from typing import Any

from pipelines.recipe.schema import Recipe

SCHEMA_FILE = Path(__file__).parents[1] / "recipes" / "schema.json"


def recipe_schema() -> dict[str, Any]:
    """What an editor completes and checks a recipe by."""
    schema = Recipe.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def schema_text() -> str:
    """The schema as the committed file has it."""
    return json.dumps(recipe_schema(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    SCHEMA_FILE.write_text(schema_text(), encoding="utf-8")
