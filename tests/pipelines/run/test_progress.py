"""What is shown of a stage follows from its events."""

import json
from pathlib import Path

import pytest

from pipelines.run.progress import Follower, StageState


def progress(time: float, done: int, what: str = "training", **metrics: float) -> dict[str, object]:
    return {"type": "progress", "time": time, "done": done, "total": 100, "what": what, "metrics": metrics}


def test_time_left_is_what_remains_at_the_speed_so_far() -> None:
    stage = StageState("sft")
    stage.apply({"type": "start", "time": 0.0})
    stage.apply(progress(10.0, 20))
    assert stage.seconds_left(10.0) is None
    stage.apply(progress(20.0, 40, loss=0.5))
    assert stage.seconds_left(20.0) == pytest.approx(30.0)  # 20 steps took 10 s, 60 remain
    assert stage.metrics == {"loss": 0.5}


def test_a_new_phase_is_timed_by_itself() -> None:
    stage = StageState("search")
    stage.apply({"type": "start", "time": 0.0})
    stage.apply(progress(0.0, 0, "distilling"))
    stage.apply(progress(90.0, 100, "distilling"))
    stage.apply(progress(100.0, 0, "scoring"))
    stage.apply(progress(110.0, 50, "scoring"))
    assert stage.seconds_left(110.0) == pytest.approx(10.0)


def test_of_a_wait_the_time_so_far_is_known_and_none_that_is_left() -> None:
    stage = StageState("deploy")
    stage.apply({"type": "start", "time": 0.0})
    stage.apply(progress(0.0, 0, "starting a server") | {"total": 0})
    assert stage.activity == "starting a server"
    stage.apply(progress(12.0, 12, "starting a server") | {"total": 0})
    assert stage.activity == "starting a server, 12 s so far"
    assert stage.seconds_left(13.0) is None
    stage.apply(progress(20.0, 1, "smoke test"))
    assert stage.activity == "smoke test"


def test_a_phase_that_is_waited_in_is_timed_as_a_whole() -> None:
    stage = StageState("eval")
    stage.apply({"type": "start", "time": 0.0})
    stage.apply(progress(0.0, 0, "tokens per second"))
    stage.apply(progress(0.0, 0, "starting vLLM") | {"total": 0})
    stage.apply(progress(30.0, 10, "tokens per second"))
    stage.apply(progress(45.0, 15, "starting vLLM") | {"total": 0})
    assert stage.seconds_left(50.0) is None
    stage.apply(progress(60.0, 20, "tokens per second"))
    assert stage.seconds_left(60.0) == pytest.approx(240.0)  # 20 took 60 s, 80 remain


def test_a_new_phase_shows_none_of_the_numbers_of_the_one_before() -> None:
    stage = StageState("eval")
    stage.apply({"type": "start", "time": 0.0})
    stage.apply(progress(1.0, 8, "held-out text of parent", perplexity=28.7))
    assert stage.metrics == {"perplexity": 28.7}
    stage.apply(progress(2.0, 1, "held-out text of child"))
    assert stage.metrics == {}
    stage.apply(progress(3.0, 8, "held-out text of child", perplexity=41.5))
    stage.apply(progress(4.0, 9, "held-out text of child"))
    assert stage.metrics == {"perplexity": 41.5}  # within a phase the last numbers stay


def test_only_whole_lines_after_the_beginning_are_read(tmp_path: Path) -> None:
    path = tmp_path / "sft.jsonl"
    path.write_text(json.dumps({"type": "failed", "time": 0.0, "error": "an earlier attempt"}) + "\n")
    follower = Follower({"sft": path})
    line = json.dumps({"type": "start", "time": 1.0}) + "\n"
    with path.open("a") as stream:
        stream.write(line[:10])
    assert list(follower.poll()) == []
    with path.open("a") as stream:
        stream.write(line[10:])
    assert [event["type"] for _, event in follower.poll()] == ["start"]
    assert follower.stages["sft"].status == "running"
