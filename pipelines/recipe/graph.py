"""A recipe as tasks and the artifacts between them; light, so that it is drawn, checked and cut without KFP."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from components.core.base.config import Config
from components.core.runtime.placement import Placement
from components.core.runtime.runner import Digests
from components.core.runtime.stage import Stage, item_label


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
        config: its checked configuration.
        placement: where it runs.
        inputs: what it reads; several artifacts where a fan-out made them.
        shards: items of a fan-out, values of the configuration's `shard`; empty for a single task.
    """

    label: str
    stage: Stage
    config: Config
    placement: Placement
    inputs: Mapping[str, Binding | tuple[Binding, ...]]
    shards: tuple[str, ...] = ()

    @property
    def upstream(self) -> list[Binding]:
        """All artifacts that the task reads, each once."""
        spread = (b if isinstance(b, tuple) else (b,) for b in self.inputs.values())
        return list(dict.fromkeys(binding for several in spread for binding in several))

    def digests(self, sources: Mapping[str, str | list[str]], made: Mapping[str, Mapping[str, str]]) -> Digests | None:
        """Digests of what the task reads; an optional input that nothing made is left out.

        Args:
            sources: digests of the user's own artifacts.
            made: outputs of finished tasks by label.

        Returns:
            None as long as a source or a task before this one is missing.
        """
        if any(b.name not in sources if isinstance(b, Source) else b.task not in made for b in self.upstream):
            return None

        def digest(binding: Binding) -> str | list[str] | None:
            return sources[binding.name] if isinstance(binding, Source) else made[binding.task].get(binding.output)

        digests: dict[str, str | list[str]] = {}
        for name, binding in self.inputs.items():
            if isinstance(binding, tuple):
                digests[name] = [found for one in binding if isinstance(found := digest(one), str)]
            elif found := digest(binding):
                digests[name] = found
        return digests


@dataclass
class Graph:
    """Tasks in an order in which they can run, and the artifacts by the role that users know them by."""

    name: str
    digest: str
    tasks: list[Task] = field(default_factory=list)
    roles: dict[str, Binding] = field(default_factory=dict)

    def items(self) -> Iterator[Task]:
        """The single tasks, fan-outs expanded: a task that reads a whole fan-out reads each of its items."""
        for task in self.tasks:
            for index, shard in enumerate(task.shards or (None,)):
                inputs = {name: self._of_item(task, name, binding, index) for name, binding in task.inputs.items()}
                if shard is None:
                    yield replace(task, inputs=inputs)
                else:
                    config = task.config.model_copy(update={"shard": shard})
                    yield replace(
                        task, label=item_label(task.label, index), config=config, inputs=inputs, shards=(shard,)
                    )

    def _of_item(
        self, task: Task, name: str, binding: Binding | tuple[Binding, ...], index: int
    ) -> Binding | tuple[Binding, ...]:
        """What an item reads of a fan-out: the artifact of its own shard, or all where the input takes a list."""
        if not isinstance(binding, Made) or not (shards := self[binding.task].shards):
            return binding
        items = tuple(Made(item_label(binding.task, number), binding.output) for number in range(len(shards)))
        return items if task.stage.inputs[name].many else items[index]

    def __getitem__(self, label: str) -> Task:
        """The task in a role."""
        return next(task for task in self.tasks if task.label == label)
