"""The run that a `Retraining` asks for now: its recipe with the data set in it, and the digests of its inputs."""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import JsonValue

from components.core.base.config import digest_of
from components.core.base.errors import InputError
from components.core.store.store import Store
from pipelines.recipe.llama_nemotron import sources_of
from pipelines.recipe.schema import Recipe, is_address, load_recipe
from pipelines.recipe.source_files import KINDS, recipe_key
from pipelines.run.ingest import source_digest


@dataclass(frozen=True)
class WantedRun:
    """A recipe, what it reads, and where.

    Attributes:
        recipe: what to run.
        inputs: digest of each artifact that it names; an address where only the ingest will tell the digest.
        store: address of the store.
    """

    recipe: Recipe
    inputs: dict[str, str]
    store: str

    @property
    def identity(self) -> str:
        """Equal identities are one run."""
        return digest_of([self.recipe.digest, self.inputs, self.store])

    @property
    def name(self) -> str:
        """Name of the run."""
        return f"{self.recipe.name}-{self.identity[:8]}"


def read_wanted_run(name: str, text: str, values: Mapping[str, JsonValue], store: Store) -> WantedRun:
    """Check a recipe and look up its inputs.

    Args:
        name: of the recipe, where it does not say another.
        text: the recipe, YAML.
        values: values in place of the recipe's, by dotted key.
        store: holds the inputs.

    Raises:
        InputError: the recipe is wrong, or names something that is not there.
    """
    overrides = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    with tempfile.TemporaryDirectory(prefix="tessera-") as folder:
        file = Path(folder) / f"{name}.yaml"
        file.write_text(text, encoding="utf-8")
        recipe = load_recipe(file, overrides)
    inputs = {}
    for source, paths in sources_of(recipe).items():
        for path in paths:
            # A path would be read from the operator's own pod, with the keys that are mounted there.
            if not is_address(path):
                raise InputError(
                    f"{recipe_key(source)} names the file {path}, and the operator reads no files",
                    hint="put it into the store by a run, and name it by digest or as run://RUN/ROLE",
                )
        inputs[source] = source_digest(store, source, paths, KINDS[source]) or ",".join(paths)
    return WantedRun(recipe, inputs, store.uri)


def inline_text(recipe: Mapping[str, JsonValue]) -> str:
    """The text of a recipe that is in the object itself."""
    return yaml.safe_dump(dict(recipe), sort_keys=False)
