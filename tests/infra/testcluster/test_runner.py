import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from components.core.base.ports import usable_port
from infra.testcluster.layout import Layout, TestClusterError
from infra.testcluster.runner import Runner
from infra.testcluster.services import Service

STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("up", flush=True)
time.sleep(600)
"""


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path)


@pytest.fixture
def runner(layout: Layout) -> Runner:
    return Runner(layout, [])


def service(*command: str, **more: object) -> Service:
    return Service(name="toy", modules="toy", command=command, **more)


@pytest.fixture
def sleeper(runner: Runner) -> Iterator[Service]:
    """A service that runs until it is stopped."""
    sleeper = service("sleep", "600")
    runner.start(sleeper)
    yield sleeper
    runner.stop(sleeper)


def test_a_service_runs_until_it_is_stopped(runner: Runner, sleeper: Service) -> None:
    process = runner.process(sleeper)
    assert process is not None
    assert process.cmdline() == ["sleep", "600"]
    runner.stop(sleeper)
    assert runner.process(sleeper) is None
    assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_a_service_that_runs_is_not_started_twice(layout: Layout, runner: Runner, sleeper: Service) -> None:
    again = sleeper.model_copy(update={"before": (("false",),)})  # would delete a running kubelet's node
    Runner(layout, []).start(again)
    assert Runner(layout, []).process(sleeper) == runner.process(sleeper)


def test_another_process_with_a_recorded_number_is_left_alone(layout: Layout, runner: Runner) -> None:
    stranger = subprocess.Popen(["sleep", "600"])
    try:
        record = layout.state / "processes" / "toy.json"
        record.parent.mkdir(parents=True)
        record.write_text(json.dumps({"pid": stranger.pid, "created": psutil.Process(stranger.pid).create_time() - 5}))
        runner.stop(service("sleep", "600"))
        assert stranger.poll() is None
        assert not record.exists()
    finally:
        stranger.kill()
        stranger.wait()


def test_files_are_written_and_commands_repeated_before_it_is_ready(layout: Layout, runner: Runner) -> None:
    settings, mark = layout.state / "settings", layout.state / "mark"
    toy = service(
        "sh",
        "-c",
        f"sleep 0.5; cp {settings} {mark}; exec sleep 600",
        files={settings: "hello"},
        before=(("test", "-s", str(settings)),),
        after=(("test", "-s", str(mark)),),
    )
    try:
        runner.start(toy)
        assert mark.read_text() == "hello"
    finally:
        runner.stop(toy)


def test_an_address_is_waited_for(runner: Runner, tmp_path: Path) -> None:
    port = usable_port(None)
    toy = service(
        *(sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "--directory", str(tmp_path)),
        ready_url=f"http://127.0.0.1:{port}/",
    )
    try:
        runner.start(toy)
        assert runner.process(toy) is not None
    finally:
        runner.stop(toy)


def test_a_service_that_ends_is_reported_with_its_last_words(runner: Runner) -> None:
    toy = service("sh", "-c", "echo no certificate; exit 1", ready_url="http://127.0.0.1:9/")
    with pytest.raises(TestClusterError, match=r"toy is not ready \(it has ended\)(.|\n)*no certificate"):
        runner.start(toy)


def test_a_command_that_never_succeeds_is_reported_with_its_error(runner: Runner) -> None:
    toy = service("true", before=(("sh", "-c", "echo refused >&2; exit 1"),), patience_s=0.1)
    with pytest.raises(TestClusterError, match=r"not after 0\.1 s(.|\n)*refused"):
        runner.start(toy)


def test_a_service_that_ignores_sigterm_is_killed_after_its_grace_period(layout: Layout, runner: Runner) -> None:
    toy = service(
        *(sys.executable, "-c", STUBBORN),
        after=(("grep", "-q", "up", str(layout.state / "log" / "toy.log")),),
        grace_period_s=0.2,
    )
    runner.start(toy)
    process, started = runner.process(toy), time.monotonic()
    assert process is not None
    runner.stop(toy)
    assert time.monotonic() - started >= 0.2
    assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_links_outside_the_state_folder_go_with_the_service(layout: Layout, runner: Runner, tmp_path: Path) -> None:
    link = tmp_path / "etc" / "certs"
    toy = service("sleep", "600", links={link: layout.state})
    runner.start(toy)
    assert link.resolve() == layout.state.resolve()
    runner.stop(toy)
    assert not link.is_symlink()
