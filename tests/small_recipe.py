"""The smallest recipe that trains: three stages, for tests in which every stage is a pod."""

from pathlib import Path
from typing import Any

import yaml

from components.core.store.store import open_store
from pipelines.records.runs import run_names

TRAINING = {"num_steps": 1, "global_batch_size": 2}
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
RECIPE: dict[str, Any] = {
    "placement": {"threads": 1, "memory_gib": 2.0},
    "data": {"arithmetic": {"num_train": 60, "num_chats": 20, "num_validation": 10, "num_test": 10}},
    "parent_pretrain": {"shape": {**SHAPE, "intermediate_size": 32}, **TRAINING},
    "sft": TRAINING,
    **dict.fromkeys(("search", "distill", "pretrain", "rl", "eval", "deploy")),
}


def write_recipe(folder: Path, name: str, **changes: Any) -> Path:
    """Write the recipe file, with other values for some of its keys."""
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"name": name, **RECIPE, **changes}))
    return path


def only_run(store: str | Path) -> str:
    """The name of the one run of a store."""
    (name,) = run_names(open_store(store))
    return name
