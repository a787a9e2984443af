"""What a user writes into a `Retraining`: the recipe, its store, when it runs, its price, and what is then served."""

from datetime import timedelta
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, JsonValue

from components.core.base.kubernetes_objects import Section
from pipelines.promotion.rules import GitFile, Promotion

GROUP, VERSION, KIND, PLURAL = "tessera.dev", "v1alpha1", "Retraining", "retrainings"
APPROVED = f"{GROUP}/approved"
"""Annotation by which a person approves a plan; its value is the name of the planned run."""
NOW = f"{GROUP}/now"
"""Annotation by which a person asks for a run; each new value asks once."""
RULES = "x-kubernetes-validations"
"""Key of the rules that the API server checks in the Common Expression Language."""

RecipeKey = Annotated[str, Field(pattern=r"^[a-z0-9_]+(\.[a-z0-9_]+)*$")]
AlertName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Hours = Annotated[float, Field(gt=0)]
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def _rules(*rules: tuple[str, str]) -> dict[str, Any]:
    """Rules for the API server, each an expression and the message of a refusal."""
    return {RULES: [{"rule": rule, "message": message} for rule, message in rules]}


class RecipeSource(Section):
    """Where the recipe is: in a config map of the same namespace, in the object itself, or in a Git repository."""

    model_config = ConfigDict(
        json_schema_extra=_rules(
            (
                "[has(self.configMap), has(self.inline), has(self.git)].filter(given, given).size() == 1",
                "give the recipe as exactly one of configMap, inline and git",
            )
        )
    )

    config_map: str | None = Field(default=None, min_length=1)
    """Name of the config map."""
    key: str = "recipe.yaml"
    """Key of the recipe in the config map."""
    inline: dict[str, JsonValue] | None = None
    """The recipe itself."""
    git: GitFile | None = None
    """The file with the recipe, as it is at the head of its branch."""


class DatasetTrigger(Section):
    """A folder of an object store whose files are an input of the recipe."""

    prefix: str = Field(pattern=r"^(s3|gs|az)://[^/\s]+/\S+$")
    """Address of the folder."""
    quiet: str = Field(default="1h", pattern=r"^[0-9]+[smhd]$")
    """How long the names, sizes and entity tags of its objects must not have changed before they are used."""
    input: Literal["corpus", "sft.data", "rl.data"] = "corpus"
    """Key of the recipe that takes the files."""

    @property
    def quiet_time(self) -> timedelta:
        """The quiet time."""
        return timedelta(**{_UNITS[self.quiet[-1]]: int(self.quiet[:-1])})


class Trigger(Section):
    """What starts a run."""

    on_change: bool = True
    """Run when the recipe or its inputs have changed."""
    schedule: str | None = Field(default=None, pattern=r"^\S+( \S+){4}$")
    """Times, five fields of cron, UTC: run then if the recipe or its inputs have changed, or the last run failed."""
    dataset: DatasetTrigger | None = None
    """Run when a folder has changed."""
    alerts: tuple[AlertName, ...] = ()
    """Names of alerts: while one fires, run if the recipe or its inputs have changed, or the last run failed."""


class Budget(Section):
    """What one run may cost."""

    model_config = ConfigDict(
        json_schema_extra=_rules(
            (
                "!has(self.gpuHours) || !has(self.approveAboveGpuHours) || self.approveAboveGpuHours <= self.gpuHours",
                "approveAboveGpuHours must not be above gpuHours",
            )
        )
    )

    gpu_hours: Hours | None = None
    """GPU hours of the budget; a plan above it waits for a person."""
    approve_above_gpu_hours: Hours | None = None
    """GPU hours above which a plan waits for a person although it is within the budget."""
    wall_hours: Hours | None = None
    """Duration after which a run is ended, h; its stages save a checkpoint."""


class RetrainingSpec(Section):
    """Keep a model up to date: run a recipe when it, its inputs or the time asks for it."""

    recipe: RecipeSource
    """The recipe."""
    set: dict[RecipeKey, JsonValue] = Field(default_factory=dict)
    """Values in place of the recipe's, by dotted key."""
    store: str = Field(pattern=r"^(s3|gs|az)://[^/\s]+(/[^/\s]+)*$")
    """Address of the artifact store."""
    trigger: Trigger = Field(default_factory=Trigger)
    """What starts a run."""
    budget: Budget = Field(default_factory=Budget)
    """What one run may cost."""
    promote: Promotion | None = None
    """How a run that has succeeded becomes what is served; None where people decide."""
    suspend: bool = False
    """Start no run; one that has started goes on."""
    history: int = Field(default=10, ge=1, le=100)
    """Number of ended runs whose records stay; `tessera store gc` then collects what only older ones refer to."""
