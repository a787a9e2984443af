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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from components.core.base import fault_injection as faults
from components.core.store.store import open_store
from components.core.store.verification import find_faults
from pipelines.records.runs import artifacts
from tests.chaos.processes import command_of, living_with
from tests.chaos.report import Clock, Tally
from tests.components.core.base import fault_points

RECIPE = Path(__file__).with_name("whole.yaml")
MARKER = "TESSERA_CHAOS"
KINDS = ("tree -9", "command -9", "one child -9", "one child -9", "SIGTERM", "SIGINT", "point")
POINTS = sorted(
    name for name in fault_points.POINTS if not name.startswith(("s3.", "mirror.", "pull.", "folder.delete"))
)
MIN_KILLS, MAX_KILLS = 10, 80
MEAN_S = 8.0
"""Before a kill at any moment, on average; exponential, so that all moments are alike and some attempts get far."""
PATIENCE_S = 150.0
"""After this a run that was stopped or killed must have no process left."""
RUN_TIMEOUT_S = 900.0
HEAD_ONLY = tuple(f"{name}=null" for name in ("search", "distill", "pretrain", "sft", "rl", "eval", "deploy"))
EVALUATED = 0.25
"""Share of the runs that evaluate: a server for each of five architectures takes longer than all other stages."""
MEASURED = "metrics.json"
"""The one file that differs from run to run: speeds are in it."""


@dataclass(frozen=True)
class Expected:
    """What a run without a kill makes, and the costs that all runs are given."""

    costs: Path
    files: dict[str, dict[str, str]]
    """By role: digests of the files."""


def expect(folder: Path) -> Expected:
    """Make the parent, write costs for it, then run all of it once; what an earlier campaign left here is taken."""
    from tests.e2e.test_own_model import write_costs

    store, costs = folder / "expected", folder / "costs.json"
    if not costs.exists():
        with _started(folder / "head", HEAD_ONLY) as run:
            run.finish()
        head = open_store(folder / "head")
        write_costs(head.fetch(artifacts(head, "chaos")["parent"]), costs)
    with _started(store, [f"search.costs={costs}"]) as run:
        run.finish()
    return Expected(costs, _files(store))


def _files(store: Path) -> dict[str, dict[str, str]]:
    """What the run in a store has made, without what is measured anew each time."""
    opened = open_store(store)
    made = {role: opened.manifest(digest).files for role, digest in artifacts(opened, "chaos").items()}
    return {
        role: {name: entry.sha256 for name, entry in files.items() if name != MEASURED} for role, files in made.items()
    }


def campaign(folder: Path, clock: Clock, seed: int, tally: Tally) -> None:
    """Runs until the time is up; the last one goes to its end without further kills."""
    begun, number = time.monotonic(), 0
    expected = expect(folder)
    say(f"a whole run without kills makes {len(expected.files)} artifacts")
    try:
        while not clock.is_up:
            number += 1
            one(folder, expected, seed * 1_000_003 + number, tally, clock)
    finally:
        tally.seconds += time.monotonic() - begun


def one(folder: Path, expected: Expected, seed: int, tally: Tally, clock: Clock | None = None) -> None:
    """One run: killed again and again, then left alone."""
    chance, kills, store = random.Random(seed), [], folder / str(seed)
    settings = [f"search.costs={expected.costs}"]
    if chance.random() >= EVALUATED:
        settings.append("eval=null")
    try:
        for _ in range(chance.randint(MIN_KILLS, MAX_KILLS)):
            kind, after, point = chance.choice(KINDS), chance.expovariate(1 / MEAN_S), chance.choice(POINTS)
            if clock is not None and clock.is_up:
                break
            if (struck := _strike(store, settings, kind, after, point, chance)) is not None:
                tally.kills[kind] += 1
                kills.append(struck)
                say(f"  seed {seed}: {struck}")
            _check_rest(store)
        with _started(store, settings) as run:
            run.finish()
        _check_rest(store)
        found = _files(store)
        assert expected.files.keys() - found.keys() <= ({"metrics"} if "eval=null" in settings else set())
        different = [role for role, files in found.items() if files != expected.files[role]]
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
    with _started(store, settings, order) as run:
        deadline, target = time.monotonic() + (RUN_TIMEOUT_S if order else after), ""
        while run.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        if order is None and run.process.poll() is None:
            target = _kill(kind, run, chance)
        run.process.wait(RUN_TIMEOUT_S if kind in ("one child -9", "point") else PATIENCE_S)
        run.check_gone()
        # Python itself, interrupted before our first line, may show one.
        assert "Traceback" not in run.output or "/pipelines/" not in run.output, run.output[-2000:]
        if run.process.returncode == 0:
            return None
    return order or f"{kind} after {after:.1f} s {target}".strip()


def _kill(kind: str, run: "_Started", chance: random.Random) -> str:
    """Do it; returns what was hit, where that is chance."""
    others = sorted(pid for pid in living_with(MARKER, run.marker) if pid != run.process.pid)
    if kind == "one child -9" and others:
        victim = chance.choice(others)
        told = command_of(victim)[-60:]
        _send(victim, signal.SIGKILL)
        return f"({told})"
    if kind == "tree -9":
        for pid in chance.sample([run.process.pid, *others], len(others) + 1):
            _send(pid, signal.SIGKILL)
    else:
        number = {"SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}.get(kind, signal.SIGKILL)
        _send(run.process.pid, number)
    return ""


def _send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


@dataclass(frozen=True)
class _Started:
    """A run under way: its process, what marks all of its processes, what it says."""

    process: "subprocess.Popen[bytes]"
    marker: str
    log: Path

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def finish(self) -> None:
        """Wait for its good end."""
        self.process.wait(RUN_TIMEOUT_S)
        assert self.process.returncode == 0, self.output[-2000:]
        self.check_gone()

    def check_gone(self) -> None:
        """No process is left, so no port either."""
        deadline = time.monotonic() + PATIENCE_S
        while group_pids := living_with(MARKER, self.marker):
            assert time.monotonic() < deadline, f"orphans: {[command_of(pid)[-100:] for pid in group_pids]}"
            time.sleep(0.1)


@contextmanager
def _started(store: Path, settings: Sequence[str], order: str | None = None) -> Iterator[_Started]:
    """Begin a run, or go on with it; whatever is left of it in the end is ended."""
    marker = uuid.uuid4().hex
    environment = {**os.environ, MARKER: marker, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(RECIPE.parents[2])}
    if order is not None:
        environment[faults.VARIABLE] = order
    command = [sys.executable, "-m", "pipelines", "run", str(RECIPE)]
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
    try:
        yield _Started(process, marker, log)
    finally:
        for pid in living_with(MARKER, marker):
            _send(pid, signal.SIGKILL)
        process.wait()


def _check_rest(store: Path) -> None:
    """Whatever is named is there, whole."""
    if store.is_dir():
        opened = open_store(store)
        assert find_faults(opened) == {}
        for path in opened.documents("runs/"):
            if path.endswith(".json"):
                json.loads(opened.text(path) or "")


def say(text: str) -> None:
    """Tell how far it is."""
    sys.stdout.write(f"{time.strftime('%H:%M:%S')} {text}\n")
    sys.stdout.flush()
