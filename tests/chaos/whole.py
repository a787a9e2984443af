"""Kills in whole runs of a small recipe: the tree, one process of it, by a signal, at points, at any moment."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from components.core import faults
from components.core.store import open_store
from pipelines.runs import artifacts
from tests.chaos.processes import command_of, living_with
from tests.chaos.report import Clock, Tally

RECIPE = Path(__file__).with_name("whole.yaml")
MARKER = "TESSERA_CHAOS"
KINDS = ("tree -9", "command -9", "one child -9", "one child -9", "SIGTERM", "SIGINT", "point")
POINTS = sorted(name for name in faults.POINTS if not name.startswith(("s3.", "mirror.", "pull.", "folder.delete")))
MAX_KILLS = 12
LONGEST_S = 30.0
"""Before a kill at any moment; enough for a task to start and get on."""
PATIENCE_S = 150.0
"""After this a run that was stopped or killed must have no process left."""
RUN_TIMEOUT_S = 900.0
HEAD_ONLY = tuple(f"{name}=null" for name in ("search", "distill", "pretrain", "sft", "rl", "deploy"))


@dataclass(frozen=True)
class Expected:
    """What a run without a kill makes, how long it takes, and the costs that all runs are given."""

    costs: Path
    digests: dict[str, str]
    seconds: float


def expect(folder: Path) -> Expected:
    """Make the parent, write costs for it, then run all of it once."""
    from tests.e2e.test_own_model import write_costs

    store, costs = folder / "expected", folder / "costs.json"
    _finish(_start(store, HEAD_ONLY), RUN_TIMEOUT_S)
    opened = open_store(store)
    write_costs(opened.fetch(artifacts(opened, "chaos")["parent"]), costs)
    shutil.rmtree(store)
    begun = time.monotonic()
    _finish(_start(store, [f"search.costs={costs}"]), RUN_TIMEOUT_S)
    return Expected(costs, artifacts(open_store(store), "chaos"), time.monotonic() - begun)


def campaign(folder: Path, clock: Clock, seed: int, tally: Tally) -> None:
    """Runs until the time is up; the last one goes to its end without further kills."""
    begun, number = time.monotonic(), 0
    expected = expect(folder)
    say(f"whole run without kills: {expected.seconds:.0f} s, {len(expected.digests)} artifacts")
    while not clock.is_up:
        number += 1
        one(folder, expected, seed * 1_000_003 + number, tally, clock)
    tally.seconds += time.monotonic() - begun


def one(folder: Path, expected: Expected, seed: int, tally: Tally, clock: Clock | None = None) -> None:
    """One run: killed again and again, then left alone."""
    chance, kills, store = random.Random(seed), [], folder / str(seed)
    settings = [f"search.costs={expected.costs}"]
    try:
        for _ in range(chance.randint(2, MAX_KILLS)):
            kind, after, point = chance.choice(KINDS), chance.uniform(0, LONGEST_S), chance.choice(POINTS)
            if clock is not None and clock.is_up:
                break
            if (struck := _strike(store, settings, kind, after, point, chance)) is not None:
                tally.kills[kind] += 1
                kills.append(struck)
                say(f"  seed {seed}: {struck}")
            _check_rest(store)
        _finish(_start(store, settings), RUN_TIMEOUT_S)
        _check_rest(store)
        found = artifacts(open_store(store), "chaos")
        different = [role for role in expected.digests if found.get(role) != expected.digests[role]]
        assert not different, f"different: {', '.join(different)}"
        left = [path.name for path in (store / "local" / "tmp").iterdir()]
        assert not left, f"left over: {left}"
        tally.runs += 1
        say(f"seed {seed}: {len(kills)} kills survived; {tally.runs} runs so far")
        shutil.rmtree(store)
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
        tally.failures.append({"seed": seed, "kills": kills, "what": told, "folder": str(store)})
        say(f"seed {seed} FAILED after {kills}: {told}")


def _strike(
    store: Path, settings: Sequence[str], kind: str, after: float, point: str, chance: random.Random
) -> str | None:
    """Start a run and kill it, or part of it; None where it had come to its end before."""
    order = f"{point}:{chance.choice([1, 1, 1, 2])}=kill" if kind == "point" else None
    process, marker, log = _start(store, settings, order)
    deadline = time.monotonic() + (PATIENCE_S * 4 if order else after)
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    target = ""
    if order is None and process.poll() is None:
        target = _kill(kind, process, marker, chance)
    process.wait(PATIENCE_S if order is None and kind != "one child -9" else RUN_TIMEOUT_S)
    _wait_until_gone(marker)
    told = log.read_text(errors="replace")
    assert "Traceback" not in told, told[-2000:]
    if process.returncode == 0:
        return None
    if order is not None:
        return order
    return f"{kind} after {after:.1f} s {target}".strip()


def _kill(kind: str, process: "subprocess.Popen[bytes]", marker: str, chance: random.Random) -> str:
    """Do it; returns what was hit, where that is chance."""
    others = sorted(pid for pid in living_with(MARKER, marker) if pid != process.pid)
    if kind == "one child -9" and others:
        victim = chance.choice(others)
        told = command_of(victim)[-60:]
        _send(victim, signal.SIGKILL)
        return f"({told})"
    if kind == "tree -9":
        for pid in chance.sample([process.pid, *others], len(others) + 1):
            _send(pid, signal.SIGKILL)
    else:
        number = {"SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}.get(kind, signal.SIGKILL)
        _send(process.pid, number)
    return ""


def _send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _start(
    store: Path, settings: Sequence[str], order: str | None = None
) -> "tuple[subprocess.Popen[bytes], str, Path]":
    """Begin a run, or go on with it; returns its process, its marker and its output."""
    marker = uuid.uuid4().hex
    environment = {**os.environ, MARKER: marker, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(RECIPE.parents[2])}
    if order is not None:
        environment[faults.VARIABLE] = order
    command = [sys.executable, "-c", "from pipelines.cli import main; main()", "run", str(RECIPE)]
    options = [part for setting in settings for part in ("--set", setting)]
    log = store.with_suffix(".log")
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [*command, "--run", "chaos", "--store", str(store), *options],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return process, marker, log


def _finish(started: "tuple[subprocess.Popen[bytes], str, Path]", timeout_s: float) -> None:
    """Wait for the good end of a run."""
    process, marker, log = started
    process.wait(timeout_s)
    assert process.returncode == 0, log.read_text(errors="replace")[-2000:]
    _wait_until_gone(marker)


def _wait_until_gone(marker: str) -> None:
    """No process of a run is left, so no port either."""
    deadline = time.monotonic() + PATIENCE_S
    while living := living_with(MARKER, marker):
        if time.monotonic() > deadline:
            told = [command_of(pid)[-100:] for pid in living]
            for pid in living:
                _send(pid, signal.SIGKILL)
            raise AssertionError(f"orphans: {told}")
        time.sleep(0.1)


def _check_rest(store: Path) -> None:
    """Whatever is named is there, whole."""
    if store.is_dir():
        opened = open_store(store)
        assert opened.verify_all() == {}
        for path in opened.documents("runs/"):
            if path.endswith(".json"):
                json.loads(opened.text(path) or "")


def say(text: str) -> None:
    """Tell how far it is."""
    sys.stdout.write(f"{time.strftime('%H:%M:%S')} {text}\n")
    sys.stdout.flush()
