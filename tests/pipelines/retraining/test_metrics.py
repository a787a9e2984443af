"""What Prometheus reads of an operator, as the steps of a `Retraining` leave it."""

from collections.abc import Mapping

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from components.core.base.errors import ClusterError
from components.core.base.metric_names import (
    OPERATOR,
    OPERATOR_ERRORS,
    RETRAINING_DATASET_TIME,
    RETRAINING_GPU_BUDGET,
    RETRAINING_PHASE,
    RETRAINING_RUN_TIME,
    RETRAINING_STEP_TIME,
    RETRAINING_SUCCESS_TIME,
    RETRAINING_WALL_BUDGET,
    RETRAINING_WANTED_TIME,
    STORE_BYTES,
    Metric,
)
from components.core.store.store import open_object_store
from pipelines.records.runs import run_record
from pipelines.retraining.kopf_operator import take_step
from pipelines.retraining.metrics import OperatorMetrics
from pipelines.run import submit
from tests.pipelines.retraining.world import NAME, NAMESPACE, World, write_digest

LABELS = {metric.name: metric.labels for metric in OPERATOR}


class Operator:
    """An operator with one object, and its page."""

    def __init__(self, world: World) -> None:
        self.world, self.metrics, self._registry = world, OperatorMetrics(), CollectorRegistry()
        self._registry.register(self.metrics)

    def step(self, **passes: float) -> None:
        self.world.step(**passes)
        take_step(self.world.connections, self.metrics, NAMESPACE, NAME)

    def page(self) -> Mapping[str, Mapping[tuple[str, ...], float]]:
        """Values by the name of the metric, and the values of its labels; each is declared."""
        found: dict[str, dict[tuple[str, ...], float]] = {}
        for family in text_string_to_metric_families(generate_latest(self._registry).decode()):
            for sample in family.samples:
                assert set(sample.labels) == set(LABELS[sample.name])
                labels = tuple(sample.labels[name] for name in LABELS[sample.name])
                found.setdefault(sample.name, {})[labels] = sample.value
        return found

    def value(self, metric: Metric, *labels: str) -> float | None:
        return self.page().get(metric.name, {}).get((NAME, *labels))

    @property
    def phase(self) -> str:
        """The one phase that is 1; all others are 0."""
        phases = {labels[1]: value for labels, value in self.page()[RETRAINING_PHASE.name].items()}
        assert sorted(phases.values()) == [0.0] * 6 + [1.0]
        return max(phases, key=lambda name: phases[name])


@pytest.fixture
def operator(world: World, monkeypatch: pytest.MonkeyPatch) -> Operator:
    monkeypatch.setattr(submit, "compile_pipeline", write_digest)
    return Operator(world)


def test_the_page_follows_a_run_from_the_wish_to_the_success(operator: Operator) -> None:
    world = operator.world
    world.create(budget={"gpuHours": 200, "wallHours": 24})
    operator.step()
    run = world.started[0]
    assert operator.phase == "Running"
    wanted = operator.value(RETRAINING_WANTED_TIME)
    assert wanted == world.now.timestamp()
    assert operator.value(RETRAINING_RUN_TIME, run) == int(run_record(world.store, run)["started"])
    assert operator.value(RETRAINING_WALL_BUDGET, run) == 24 * 3600
    assert operator.value(RETRAINING_GPU_BUDGET, run) == 200
    assert operator.value(RETRAINING_SUCCESS_TIME) is None
    world.end("FAILED")
    operator.step(hours=1)
    assert operator.phase == "Failed"
    assert operator.value(RETRAINING_WANTED_TIME) == wanted
    assert RETRAINING_RUN_TIME.name not in operator.page()

    world.change_recipe(seed=2)
    operator.step(hours=1)
    assert operator.value(RETRAINING_WANTED_TIME) == wanted
    world.end()
    operator.step(hours=1)
    assert operator.phase == "Ready"
    assert operator.value(RETRAINING_WANTED_TIME) is None
    assert operator.value(RETRAINING_SUCCESS_TIME) == world.now.timestamp()
    assert operator.value(RETRAINING_STEP_TIME) is not None


def test_a_suspended_object_wants_nothing_and_one_whose_recipe_is_wrong_does(operator: Operator) -> None:
    world = operator.world
    world.create(suspend=True)
    operator.step()
    assert (operator.phase, operator.value(RETRAINING_WANTED_TIME)) == ("Suspended", None)
    world.change_spec(suspend=False)
    world.objects.config_maps["recipe"] = {"recipe.yaml": "sft: ["}
    operator.step(hours=1)
    assert (operator.phase, operator.value(RETRAINING_WANTED_TIME)) == ("Invalid", world.now.timestamp())


def test_a_data_set_and_its_store_have_an_age_and_a_size(operator: Operator, s3_uri: str) -> None:
    folder = open_object_store(f"{s3_uri}/corpora")
    folder.put("a.jsonl", b'{"text": "one"}\n')
    (file,) = folder.list("")
    operator.world.create(trigger={"dataset": {"prefix": f"{s3_uri}/corpora"}})
    operator.step()
    assert operator.phase == "WaitingForData"
    assert operator.value(RETRAINING_DATASET_TIME) == pytest.approx(file.modified, abs=1)
    assert STORE_BYTES.name not in operator.page()
    operator.metrics.measure_stores()
    size = sum(found.size for found in operator.world.store.backend.list(""))
    assert operator.page()[STORE_BYTES.name] == {(s3_uri,): size}
    assert size >= 16
    folder.put("b.jsonl", b'{"text": "two"}\n')
    operator.metrics.measure_stores()  # all objects are listed once an hour alone
    assert operator.page()[STORE_BYTES.name] == {(s3_uri,): size}


def test_steps_that_the_api_server_refuses_are_counted_and_an_object_that_is_gone_is_forgotten(
    operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = operator.world
    world.create()
    operator.step()
    assert operator.page()[OPERATOR_ERRORS.name] == {(): 0}

    def refuse(*_: object) -> None:
        raise ClusterError("the cluster answered 409: Conflict")

    with monkeypatch.context() as patched:
        patched.setattr(world.objects, "write_status", refuse)
        world.end()
        assert take_step(world.connections, operator.metrics, NAMESPACE, NAME) is None
    assert operator.page()[OPERATOR_ERRORS.name] == {(): 1}
    world.objects.bodies.clear()
    assert take_step(world.connections, operator.metrics, NAMESPACE, NAME) is None
    assert operator.page().keys() == {OPERATOR_ERRORS.name}
