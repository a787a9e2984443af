"""The recipe: what a user writes, checked as a whole before any work starts."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast

from pydantic import BeforeValidator, Field, JsonValue, field_serializer

from components.core.base.config import Config, digest_of
from components.core.base.errors import CheckpointError, RecipeError
from components.core.base.yaml_text import read_yaml
from components.core.model.architecture import Architecture
from components.core.model.inspection import read_architecture, read_config, stored_dtype
from components.core.runtime.placement import Placement
from components.core.serving.serving_config import ServingConfig
from components.data.config import DataConfig
from components.deploy.config import DeployConfig
from components.distill.config import DistillConfig
from components.eval.config import EvalConfig
from components.pretrain.config import PretrainConfig
from components.rl.config import RlConfig
from components.search.config import Limits, SearchConfig
from components.sft.config import SftConfig
from pipelines.recipe.filled_settings import ParentFacts, filled_settings
from pipelines.recipe.setting_rules.facts import DEFAULT_CONTEXT, Setting
from pipelines.recipe.source_files import SourceSize, quick_size
from pipelines.recipe.targets import Targets

StageConfig = TypeVar("StageConfig", bound=Config)

Paths = Annotated[tuple[Path, ...], BeforeValidator(lambda value: [value] if isinstance(value, str | Path) else value)]

Addresses = Annotated[tuple[str, ...], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]
"""Paths, or addresses of artifacts."""


class Placed(Config):
    """A stage with a place to run in."""

    placement: Placement | None = None
    """Where and how wide this stage runs; what is left out comes from the recipe's own `placement`."""

    @field_serializer("serving", check_fields=False)
    def _what_is_set(self, serving: ServingConfig) -> dict[str, Any]:
        """A recorded recipe too leaves out what comes from the recipe's own `serving`."""
        return serving.model_dump(mode="json", exclude_unset=True)


class DataSection(DataConfig, Placed):
    """The data stage."""


class ParentSection(PretrainConfig, Placed):
    """The parent trained from scratch."""

    num_steps: int = Field(default=800, gt=0)
    """Optimizer steps."""


class SearchSection(SearchConfig, Placed):
    """The search stages."""

    shards: int = Field(default=2, gt=0)
    """Tasks that the block library is built by, each with its share of the layers."""
    costs: str | None = None
    """Block costs measured before, a `costs.json` or `run://RUN/costs`; measured anew where not given."""
    libraries: Addresses = ()
    """Block libraries of earlier searches, such as `run://RUN/library` of the search of this parent's own parent: what
    they trained against the same sub-block is reused, and else begun from where that errs less."""


class DistillSection(DistillConfig, Placed):
    """The distillation stage."""

    num_steps: int = Field(default=200, gt=0)
    """Optimizer steps."""


class PretrainSection(PretrainConfig, Placed):
    """Continued pretraining of the child."""

    num_steps: int = Field(default=100, gt=0)
    """Optimizer steps."""


class SftSection(SftConfig, Placed):
    """Supervised fine-tuning; a path or a list of paths stands for `data`."""

    num_steps: int = Field(default=200, gt=0)
    """Optimizer steps."""
    data: Paths = ()
    """Files of chats of your own; the data stage makes chats where none are given."""


class RlSection(RlConfig, Placed):
    """Reinforcement learning; a path or a list of paths stands for `data`."""

    data: Paths = ()
    """Files of problems with answers of your own; the data stage makes problems where none are given."""


class EvalSection(EvalConfig, Placed):
    """The evaluation stage."""

    task_files: Path | None = None
    """Folder with task files of lm-eval of your own, YAML, and the data that they name by paths relative to it."""


class DeploySection(DeployConfig, Placed):
    """The deployment stage."""


class Trust(Config):
    """Which artifacts have to be signed, and by whom."""

    keys: Paths = Field(min_length=1)
    """Public keys, PEM, ECDSA on P-256 or Ed25519; a signature of one of them is enough."""
    require: tuple[Literal["parent", "data", "deploy"], ...] = ("parent", "data", "deploy")
    """What has to be signed: the parent that is given, data of your own, the model before it is served."""


def _switch(value: object) -> object:
    """`false` leaves a stage out, as `null` does; `true` takes it with its defaults."""
    return {} if value is True else None if value is False else value


def _switch_or_paths(value: object) -> object:
    """The same, and paths alone stand for a section with nothing but `data`."""
    return {"data": value} if isinstance(value, str | list) else _switch(value)


def _also_false(schema: dict[str, Any]) -> None:
    """Tell editors about the switch."""
    schema["anyOf"].append({"type": "boolean"})


def _also_paths(schema: dict[str, Any]) -> None:
    """Tell editors about the switch and the shorthand."""
    _also_false(schema)
    schema["anyOf"] += [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]


SWITCH = BeforeValidator(_switch)
SWITCH_OR_PATHS = BeforeValidator(_switch_or_paths)


class Recipe(Config):
    """From a dense model to a served reasoning model; a stage set to null is left out."""

    name: str = Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$")
    """Name of the recipe, and the first part of the names of its runs: lower case, digits and hyphens."""
    seed: int = Field(default=0, ge=0)
    """Seed of every stage that does not set its own."""
    parent: str | None = None
    """The dense model to start from: a Hugging Face folder or the address of an artifact; null trains a new one."""
    corpus: Paths = ()
    """Text of your own to train and to search on."""
    placement: Placement = Placement()
    """Where and how wide stages run that do not say so themselves."""
    serving: ServingConfig = ServingConfig()
    """How vLLM serves models, for `eval`, `rl`, `deploy`, `tessera serve` and `tessera chat`."""
    trust: Trust | None = None
    """What has to be signed; nothing where not given."""
    targets: Targets = Targets()
    """What the report measures the run by."""
    data: Annotated[DataSection | None, SWITCH] = Field(default=DataSection(), json_schema_extra=_also_false)
    """Tokenizer, corpus, chats and problems."""
    parent_pretrain: Annotated[ParentSection | None, SWITCH] = Field(
        default=ParentSection(), json_schema_extra=_also_false
    )
    """How the parent is trained from scratch; without meaning where `parent` is given."""
    search: Annotated[SearchSection | None, SWITCH] = Field(default=SearchSection(), json_schema_extra=_also_false)
    """Search of the child architecture."""
    distill: Annotated[DistillSection | None, SWITCH] = Field(default=DistillSection(), json_schema_extra=_also_false)
    """Distillation of the child from its parent."""
    pretrain: Annotated[PretrainSection | None, SWITCH] = Field(
        default=PretrainSection(), json_schema_extra=_also_false
    )
    """Continued pretraining."""
    sft: Annotated[SftSection | None, SWITCH_OR_PATHS] = Field(default=SftSection(), json_schema_extra=_also_paths)
    """Supervised fine-tuning of both modes of thinking."""
    rl: Annotated[RlSection | None, SWITCH_OR_PATHS] = Field(default=RlSection(), json_schema_extra=_also_paths)
    """Reinforcement learning."""
    eval: Annotated[EvalSection | None, SWITCH] = Field(default=EvalSection(), json_schema_extra=_also_false)
    """Evaluation of every model so far."""
    deploy: Annotated[DeploySection | None, SWITCH] = Field(default=DeploySection(), json_schema_extra=_also_false)
    """Gate, registry and serving."""

    @property
    def digest(self) -> str:
        """Names the recipe by what it says."""
        return digest_of(self.canonical())

    @property
    def ruled_sections(self) -> dict[str, Config | None]:
        """Sections for which there are rules of what a parent of the user's own needs, by name."""
        names = ("search", "distill", "pretrain", "sft", "rl", "eval", "deploy")
        return {name: getattr(self, name) for name in names}

    def config(self, section: Config, kind: type[StageConfig]) -> StageConfig:
        """The configuration of a stage as its section has it, with the recipe's seed and serving where it sets none."""
        values = section.model_dump(include=set(kind.model_fields))
        if (serving := self.serving_of(section)) is not None:
            values["serving"] = serving.on_loopback().model_dump()
        if "seed" in values and values["seed"] is None:
            values["seed"] = self.seed
        return kind.parse(values)

    def serving_of(self, section: Config) -> ServingConfig | None:
        """How a section serves models, with the recipe's own settings where it sets none; None of one that does not."""
        own = getattr(section, "serving", None)
        if not isinstance(own, ServingConfig):
            return None
        return ServingConfig(**{**self.serving.model_dump(), **own.model_dump(exclude_unset=True)})

    def place(self, section: Placed) -> Placement:
        """Where the stage of a section runs; an evaluation has as many replicas as its GPUs are enough for."""
        own = section.placement.model_dump(exclude_unset=True) if section.placement else {}
        place = self.placement.model_copy(update=own)
        if isinstance(section, EvalSection) and "processes" not in place.model_fields_set:
            replicas = place.gpus // self.config(section, EvalConfig).serving.tensor_parallel
            place = place.model_copy(update={"processes": max(1, replicas)})
        return place


def without_placements(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The canonical values of a recipe, without where its stages run: what decides its results."""
    return {
        name: {key: inner for key, inner in value.items() if key != "placement"} if isinstance(value, dict) else value
        for name, value in recipe.items()
        if name != "placement"
    }


SCHEMA_FILE = Path(__file__).parents[1] / "recipes" / "schema.json"
"""JSON Schema of recipes, for editors; `make golden` renews it."""


def recipe_schema() -> dict[str, Any]:
    """JSON Schema by which an editor completes and checks a recipe."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, check it, and fill what it leaves out: see `fill_left_out`.

    Args:
        path: the YAML file; paths in it are relative to its folder.
        overrides: `dotted.key=value` with YAML values; paths are taken as they stand, relative to the working folder.

    Raises:
        RecipeError: the file is not there, is not YAML, has a key twice, or has a wrong key or value.
    """
    values = _absolute(_read(path), path.resolve().parent)
    for override in overrides:
        values = _merge(values, _absolute(_parse_override(override), Path.cwd()))
    return fill_left_out(Recipe.parse({"name": path.stem, **values}))


def fill_left_out(recipe: Recipe) -> Recipe:
    """The same recipe, with keys that it leaves out as the rules choose them, where its parent is a folder.

    A new parent is described by the recipe itself; a parent in a store is known only there; of one that cannot be read
    the check of the recipe tells. These are not filled. A key that was filled still counts as not set, so that to fill
    twice is to fill once.
    """
    for setting in rules_of(recipe):
        recipe = _with_default(recipe, setting.key.split("."), setting.value)
    return recipe


def filled_as_recorded(recipe: Recipe, recorded: Mapping[str, Any]) -> Recipe:
    """The same recipe, with what the rules have filled as a run of it has recorded it.

    So a run goes on with its settings where its stages move to another kind of device.
    """
    for setting in rules_of(recipe):
        *above, key = setting.key.split(".")
        values: Any = recorded
        for part in above:
            values = values.get(part) if isinstance(values, Mapping) else None
        if isinstance(values, Mapping) and key in values:
            recipe = _with_default(recipe, [*above, key], values[key])
    return recipe


def rules_of(recipe: Recipe) -> list[Setting]:
    """What the rules choose for the parent of a recipe; nothing where it is not a folder."""
    facts = parent_facts(recipe)
    return [] if facts is None else filled_settings(recipe.ruled_sections, facts)


def _with_default(config: StageConfig, path: Sequence[str], value: JsonValue) -> StageConfig:
    """The same, with a value for a key unless it is set; the key still counts as not set."""
    key, *rest = path
    if rest:
        inner = getattr(config, key)
        changed = inner if inner is None else _with_default(inner, rest, value)
    elif key in config.model_fields_set:
        return config
    else:
        changed = tuple(value) if isinstance(value, list) else value
    values = {**dict(config), key: changed}
    made = type(config).model_construct(_fields_set=set(config.model_fields_set), **values)
    return cast("StageConfig", made)  # pydantic's plug-in for mypy takes it for the base class


def parent_facts(recipe: Recipe) -> ParentFacts | None:
    """What the rules look at of a parent that is a folder, and of the data; None of any other."""
    shape = own_parent(recipe)
    if recipe.parent is None or shape is None:
        return None
    folder, placed = Path(recipe.parent), recipe.ruled_sections.items()
    context = read_config(folder).get("max_position_embeddings")
    return ParentFacts(
        shape,
        stored=stored_dtype(folder),
        context=context if isinstance(context, int) and context > 1 else DEFAULT_CONTEXT,
        corpus=_size_of_files(recipe.corpus),
        chats=_size_of_files(recipe.sft.data if recipe.sft else ()),
        problems=_size_of_files(recipe.rl.data if recipe.rl else ()),
        max_model_len=dict(_max_model_lens(recipe)),
        on_gpu=frozenset(
            name for name, section in placed if isinstance(section, Placed) and recipe.place(section).gpus
        ),
        limits=recipe.search.limits if recipe.search else Limits(),
    )


def _max_model_lens(recipe: Recipe) -> Iterator[tuple[str, int]]:
    """Sections whose servers a recipe limits; the engine of `rl` is as long as its prompts and answers need."""
    for name in ("eval", "deploy"):
        section = recipe.ruled_sections[name]
        serving = None if section is None else recipe.serving_of(section)
        if serving is not None and serving.max_model_len is not None:
            yield name, serving.max_model_len


def _size_of_files(paths: Sequence[Path]) -> SourceSize | None:
    """Size of files that a recipe names; None where it names none, or artifacts, which only the store knows."""
    texts = [str(path) for path in paths]
    return None if not texts or any(map(is_address, texts)) else quick_size(texts)


def own_parent(recipe: Recipe) -> Architecture | None:
    """The shape of a parent that is a folder; None of any other."""
    if recipe.parent is None or is_address(recipe.parent):
        return None
    try:
        return read_architecture(Path(recipe.parent))
    except CheckpointError:
        return None


def load_settings(path: Path | None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The settings of a single stage: a YAML or JSON file, and `dotted.key=value` over it."""
    values = _read(path) if path is not None else {}
    for override in overrides:
        values = _merge(values, _parse_override(override))
    return values


def _read(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file."""
    if not path.is_file():
        raise RecipeError(f"there is no file {path}")
    try:
        values = read_yaml(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text: {error}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path} holds {type(values).__name__}, not a mapping of keys to values")
    return values


def _parse_override(text: str) -> dict[str, Any]:
    """`a.b=value` as nested mappings."""
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise RecipeError(
            f"--set {text!r} is not of the form key=value", hint="e.g. --set search.limits.latency_ms=55%"
        )
    names_files = tuple(key.split(".")) in PATH_KEYS
    nested: Any = value if names_files and _is_path(value) else read_yaml(value, f"--set {text}")
    for part in reversed(key.split(".")):
        nested = {part: nested}
    override: dict[str, Any] = nested
    return override


def _is_path(text: str) -> bool:
    """Whether the value of a key that names files is a path as it stands, and not YAML.

    YAML are a list, a section and a quoted text by their brackets and quotes, and the words that switch a stage. What
    YAML would make of a ` #`, `: `, `%` or `~` in a path is of no interest.
    """
    if os.path.exists(text):
        return True
    enclosed = text[:1] + text[-1:] in ("[]", "{}", "''", '""')
    return not enclosed and text.lower() not in ("", "null", "true", "false", "yes", "no", "on", "off")


def _merge(values: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with those of `override` in their place, mapping by mapping."""
    merged = dict(values)
    for key, value in override.items():
        old = merged.get(key)
        if key in ("sft", "rl") and isinstance(value, str | list) and isinstance(old, Mapping):
            value = {"data": value}  # the shorthand gives the data and leaves the other settings of the section
        elif key in ("sft", "rl") and isinstance(value, Mapping) and isinstance(old, str | list):
            old = {"data": old}
        merged[key] = _merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


PATH_KEYS: tuple[tuple[str, ...], ...] = (
    ("parent",),
    ("corpus",),
    ("search", "costs"),
    ("search", "libraries"),
    ("eval", "task_files"),
    ("sft",),
    ("sft", "data"),
    ("rl",),
    ("rl", "data"),
    ("trust", "keys"),
)
"""Where a recipe names files."""


def _absolute(values: dict[str, Any], base: Path) -> dict[str, Any]:
    """The same values with paths made absolute."""
    for *above, key in PATH_KEYS:
        holder: Any = values
        for part in above:
            holder = holder.get(part) if isinstance(holder, dict) else None
        if isinstance(holder, dict) and key in holder:
            holder[key] = _absolute_value(holder[key], base)
    return values


def _absolute_value(value: JsonValue, base: Path) -> JsonValue:
    """A path or a list of them, absolute; addresses and everything else as they are."""
    if isinstance(value, list):
        return [_absolute_value(item, base) for item in value]
    if isinstance(value, str) and not is_address(value):
        return str(base / os.path.expanduser(value))  # a file may begin with ~ and name no user
    return value


ADDRESS = re.compile(r"^(run://[^/]+/[^/]+|(.+#)?[0-9a-f]{64})$")
"""How an artifact is named that is no path: by run and role, by digest, or by digest in another store."""


def is_address(value: str) -> bool:
    """Whether a text names an artifact in a store, `run://RUN/ROLE`, `DIGEST` or `STORE#DIGEST`, rather than a path."""
    return ADDRESS.match(value) is not None
