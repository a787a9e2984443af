"""What a user asks of a promotion: the measures that decide, and where in Git the served model is named."""

from typing import Literal

from pydantic import Field

from components.core.base.kubernetes_objects import Section
from pipelines.promotion.measures import Measure, served_key

Mode = Literal["pullRequest", "commit", "none"]


class PromotionRules(Section):
    """When a model takes the place of the one that is served.

    In each measure the candidate must be shown not to be worse than the champion by more than the tolerance. With a
    tolerance of 0 it must be shown to be better.
    """

    when: tuple[Measure, ...] = Field(default=("accuracy_on",), min_length=1)
    """Measures that decide."""
    confidence: float = Field(default=0.95, ge=0.5, le=0.999)
    """Confidence of the intervals of accuracy and format, whose lower end decides."""
    tolerance: float = Field(default=0.03, ge=0, le=1)
    """Largest loss that is accepted: a difference of fractions for accuracy and format, relative for the others."""


class GitFile(Section):
    """A file at the head of a branch."""

    repository: str = Field(min_length=1)
    """Name of a repository in the settings of the operator."""
    path: str = Field(pattern=r"^[^/\s.][^\s]*\.(yaml|yml|json)$")
    """The file in the repository."""
    branch: str = Field(default="main", pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$")
    """Branch that the cluster follows."""


class GitTarget(GitFile):
    """The file that names the served model."""

    key: str = Field(default="", pattern=r"^([^.\s]+(\.[^.\s]+)*)?$")
    """Dotted key of the digest of the served bundle in the file; it must be there, empty before the first promotion.
    Where left out, `serving.models.NAME.digest` of the chart's values, NAME being that of the `Retraining`."""
    mode: Mode = "pullRequest"
    """Open a request, commit to the branch, or leave it to a person."""

    def naming(self, model: str) -> "GitTarget":
        """The same with its key: that of a model in the chart's values, where it has none."""
        return self.model_copy(update={"key": self.key or served_key(model)})


class Promotion(PromotionRules):
    """How a run that has succeeded becomes what is served."""

    against: Literal["champion"] = "champion"
    """The model that the candidate is compared with: the one that the file in Git names."""
    git: GitTarget
    """Where the served model is named."""
    rollout: str | None = Field(default=None, min_length=1)
    """Name of the Rollout, in this namespace, whose canary decides; None where nothing is watched after the commit."""
