"""A recipe as tasks and the artifacts between them; light, so that it is drawn, checked and cut without KFP."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from components.core.base.config import Config
from components.core.runtime.placement import Placement
from components.core.runtime.stage import Stage


@dataclass(frozen=True)
class Source:
    """An artifact that comes from the user's files or from a store, by its name in the recipe."""

    name: str


@dataclass(frozen=True)
class Made:
    """An artifact that a task makes; of a fan-out, one of each of its items."""

    task: str
    output: str


Binding = Source | Made


@dataclass(frozen=True)
class Task:
    """A stage in a role.

    Attributes:
        label: the role, unique in the graph: `parent` and `pretrain` are one stage in two roles.
        stage: what runs.
        component: `module:name` of its KFP component.
        config: its checked configuration.
        placement: where it runs.
        inputs: what it reads.
        shards: items of a fan-out, values of the configuration's `shard`; empty for a single task.
    """

    label: str
    stage: Stage
    component: str
    config: Config
    placement: Placement
    inputs: Mapping[str, Binding]
    shards: tuple[str, ...] = ()

    def items(self) -> list["Task"]:
        """The single tasks that run: this one, or one a shard."""
        if not self.shards:
            return [self]
        return [
            replace(
                self,
                label=f"{self.label}-{index}",
                config=self.config.model_copy(update={"shard": shard}),
                shards=(),
            )
            for index, shard in enumerate(self.shards)
        ]


@dataclass
class Graph:
    """Tasks in an order in which they can run, and the artifacts by the role that users know them by."""

    name: str
    digest: str
    tasks: list[Task] = field(default_factory=list)
    roles: dict[str, Binding] = field(default_factory=dict)

    def items(self) -> Iterator[Task]:
        """The single tasks, fan-outs expanded."""
        for task in self.tasks:
            yield from task.items()

    def __getitem__(self, label: str) -> Task:
        """The task in a role."""
        return next(task for task in self.tasks if task.label == label)
