"""A cluster for a `Retraining`: objects in memory, a Kubeflow Pipelines stand-in, a real object store."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.core.base.errors import ClusterError, InputError
from components.core.store.bucket_store import BucketStore
from components.core.store.store import Store
from pipelines.commands.options import console
from pipelines.promotion.platform_settings import OperatorSettings
from pipelines.recipe.graph import Graph
from pipelines.records.runs import end_run
from pipelines.retraining.cluster import BUNDLE_ANNOTATION, Retraining
from pipelines.retraining.reconcile import Connections, reconcile
from pipelines.retraining.status import RetrainingStatus
from pipelines.run.kfp_server import KfpRun, KfpServer
from pipelines.run.submit import Submitter
from tests.pipelines.conftest import ONLY_DATA
from tests.pipelines.run.fake_kfp import FakeKfp

START = datetime(2026, 3, 2, 12, 0, tzinfo=UTC)
NAMESPACE, NAME = "models", "nano"


class Killed(BaseException):
    """The operator was killed; nothing of it catches this."""


class Writes:
    """Counts writes, and kills the operator before or after one of them."""

    def __init__(self) -> None:
        self.done = 0
        self.is_counting = True
        self.kill_at: float | None = None
        """The write to be killed before; a half more is after it."""

    @contextmanager
    def one(self) -> Iterator[None]:
        if not self.is_counting:
            yield
            return
        number = self.done
        self.done += 1
        if self.kill_at == number:
            raise Killed
        yield
        if self.kill_at == number + 0.5:
            raise Killed


class FakeObjects:
    """The API server's part, with its check of stale writes."""

    def __init__(self, writes: Writes) -> None:
        self.writes, self.bodies, self.config_maps = writes, dict[str, dict[str, Any]](), dict[str, dict[str, str]]()
        self.rollouts: dict[str, dict[str, Any]] = {}

    def read(self, namespace: str, name: str) -> Retraining | None:
        body = self.bodies.get(name)
        return None if body is None else Retraining(copy.deepcopy(body))

    def write_status(self, found: Retraining, status: RetrainingStatus) -> None:
        body = self.bodies[found.name]
        if body["metadata"]["resourceVersion"] != found.body["metadata"]["resourceVersion"]:
            raise ClusterError("the cluster answered 409: Conflict")
        with self.writes.one():
            body["status"] = status.dump()
            self.touch(found.name)
        found.body, found.status = copy.deepcopy(body), status.model_copy(deep=True)

    def config_map(self, namespace: str, name: str, key: str) -> str:
        try:
            return self.config_maps[name][key]
        except KeyError:
            raise InputError(f"there is no config map {name!r} in namespace {namespace}") from None

    def rollout(self, namespace: str, name: str) -> dict[str, Any] | None:
        return self.rollouts.get(name)

    def touch(self, name: str) -> None:
        metadata = self.bodies[name]["metadata"]
        metadata["resourceVersion"] = str(int(metadata["resourceVersion"]) + 1)


class CountedKfpServer(KfpServer):
    """A server whose writes are counted."""

    def __init__(self, url: str, writes: Writes) -> None:
        super().__init__(url, NAMESPACE)
        self._writes = writes

    def upload(self, file: Path, pipeline: str, version: str, description: str) -> tuple[str, str]:
        with self._writes.one():
            return super().upload(file, pipeline, version, description)

    def start(self, name: str, experiment: str, pipeline: tuple[str, str], parameters: dict[str, str]) -> KfpRun:
        with self._writes.one():
            return super().start(name, experiment, pipeline, parameters)

    def terminate(self, run_id: str) -> None:
        with self._writes.one():
            super().terminate(run_id)


@dataclass
class World:
    """Everything that a step reaches; the time passes when a test says so."""

    kfp: FakeKfp
    store: Store
    now: datetime = START
    writes: Writes = field(default_factory=Writes)
    settings: OperatorSettings = field(default_factory=OperatorSettings)

    def __post_init__(self) -> None:
        self.objects = FakeObjects(self.writes)
        self.server = CountedKfpServer(self.kfp.url, self.writes)

    def create(self, **spec: Any) -> None:
        """Create the object; its recipe is a data stage where no other is named."""
        self.objects.config_maps.setdefault("recipe", {"recipe.yaml": ONLY_DATA})
        metadata = {"name": NAME, "namespace": NAMESPACE, "creationTimestamp": START.isoformat(), "generation": 1}
        self.objects.bodies[NAME] = {
            "metadata": metadata | {"resourceVersion": "1", "annotations": {}},
            "spec": {"recipe": {"configMap": "recipe"}, "store": self.store.uri, **spec},
        }

    def change_recipe(self, **values: Any) -> None:
        self.objects.config_maps["recipe"] = {"recipe.yaml": ONLY_DATA + (yaml.safe_dump(values) if values else "")}

    def annotate(self, key: str, value: str) -> None:
        self.objects.bodies[NAME]["metadata"]["annotations"][key] = value
        self.objects.touch(NAME)

    def change_spec(self, **values: Any) -> None:
        self.objects.bodies[NAME]["spec"] |= values
        self.objects.touch(NAME)

    @property
    def connections(self) -> Connections:
        """How a step reaches all this."""
        return Connections(self.objects, lambda _: self.server, self._submitter, lambda: self.now, self.settings)

    def step(self, **passes: float) -> RetrainingStatus:
        """Take one step after some time."""
        self.now += timedelta(**passes)
        outcome = reconcile(self.connections, NAMESPACE, NAME)
        assert outcome is not None
        return outcome.after

    def end(self, outcome: str = "SUCCEEDED") -> None:
        """End the newest run as its last pod does."""
        run = self.kfp.runs[0]
        run["state"] = outcome
        self.writes.is_counting = False  # this is a pod's
        end_run(self.store, run["display_name"], "succeeded" if outcome == "SUCCEEDED" else "failed")
        self.writes.is_counting = True

    @property
    def started(self) -> list[str]:
        """Names of the runs that were started, oldest first."""
        return [run["display_name"] for run in self.kfp.runs][::-1]

    def _submitter(self, store: str, server: KfpServer, namespace: str) -> Submitter:
        return Submitter(store, server, namespace, queues=False, console=console(stderr=True))


def set_rollout(
    world: World, bundle: str, phase: str, *, generation: int = 2, seen: int = 2, message: str = ""
) -> None:
    """The Rollout as its controller leaves it; `seen` is the generation that the status is about."""
    annotations = {BUNDLE_ANNOTATION: bundle}
    world.objects.rollouts["nano"] = {
        "metadata": {"annotations": annotations, "generation": generation},
        "status": {"phase": phase, "message": message, "observedGeneration": str(seen)},
    }


def count_store_writes(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the store's writes be killed too."""

    def counted(method: Callable[..., Any]) -> Callable[..., Any]:
        def write(*arguments: Any, **options: Any) -> Any:
            with world.writes.one():
                return method(*arguments, **options)

        return write

    for name in ("put", "put_file", "delete"):
        monkeypatch.setattr(BucketStore, name, counted(getattr(BucketStore, name)))


def write_digest(graph: Graph, sources: dict[str, str], file: Path, **_: Any) -> None:
    """In place of KFP's compiler, which takes longer than all the rest."""
    file.write_text(graph.digest)


def condition(status: RetrainingStatus, kind: Any) -> tuple[str, str, str]:
    """Judgement, reason and message of a condition."""
    found = status.condition(kind)
    assert found is not None, status.dump()
    return found.status, found.reason, found.message


def step(world: World) -> None:
    """Take a step, and where the operator is killed in it, start it again."""
    try:
        world.step(minutes=1)
    except Killed:
        world.writes.kill_at = None
        world.step(minutes=1)
