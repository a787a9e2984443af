"""Kills in runs of one tiny stage: at named points and at any moment, several times a run, in both kinds of store."""

import os
import random
import signal
import time
from pathlib import Path

from tests.chaos.attempt import INTERRUPTED, TIMEOUT_S, Place, attempt, begin
from tests.chaos.history import State, check_at_rest, check_end, state
from tests.chaos.report import Clock, Tally

MAX_KILLS = 5
STRUCK = {-signal.SIGKILL: "kill -9", -signal.SIGTERM: "SIGTERM", INTERRUPTED: "SIGTERM"}
"""What an attempt's exit code says of how it ended."""


class Expected:
    """What a run without a kill leaves and comes to, and how long it takes."""

    def __init__(self, place: Place) -> None:
        assert attempt(place, "count", clean=True) == 0
        begun = time.monotonic()
        assert attempt(place, "count", clean=True) == 0
        self.seconds = 4 * (time.monotonic() - begun)
        self.points: dict[str, int] = next(e["points"] for e in place.ledger if e["what"] == "reached")
        self.state: State = state(place)


def campaign(kind: str, new_place: Place, clock: Clock, seed: int, tally: Tally) -> None:
    """Runs until the time is up."""
    begun = time.monotonic()
    expected = Expected(_fresh(new_place, "expected"))
    number = 0
    while not clock.is_up:
        number += 1
        _one(kind, _fresh(new_place, str(number)), expected, seed * 1_000_003 + number, tally)
    tally.seconds += time.monotonic() - begun


def replay(kind: str, new_place: Place, seed: int, tally: Tally) -> None:
    """The run of a seed again; kills at a moment hit as the machine has it."""
    _one(kind, _fresh(new_place, "replay"), Expected(_fresh(new_place, "expected")), seed, tally)


def _one(kind: str, place: Place, expected: Expected, seed: int, tally: Tally) -> None:
    """One run: some attempts that are killed, one that is not."""
    chance, kills = random.Random(seed), []
    try:
        for _ in range(chance.randint(1, MAX_KILLS)):
            order, code = _strike(place, expected, chance)
            if code in STRUCK:
                kills.append(order)
                tally.kills[f"{kind}, {STRUCK[code]} {'at a point' if '=' in order else 'at any moment'}"] += 1
            check_at_rest(place)
            if code == 0:
                break
        assert attempt(place) == 0
        check_end(place, expected.state)
        tally.runs += 1
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
        tally.failures.append({"store": kind, "seed": seed, "kills": kills, "what": told, "folder": str(place.folder)})


def _strike(place: Place, expected: Expected, chance: random.Random) -> tuple[str, int]:
    """An attempt that is probably killed; returns how, and its exit code."""
    if chance.random() < 0.6:
        point = chance.choice(sorted(expected.points))
        action = chance.choice(["kill", "kill", "term"])
        order = f"{point}:{chance.randint(1, expected.points[point])}={action}"
        return order, attempt(place, order, clean=chance.random() < 0.2)
    number, after = chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]), chance.uniform(0, expected.seconds)
    process = begin(place, clean=chance.random() < 0.2)
    time.sleep(after)
    if process.is_alive() and process.pid is not None:
        os.kill(process.pid, number)
    process.join(TIMEOUT_S)
    assert process.exitcode is not None, "the attempt hangs"
    return f"{number.name} after {after:.3f} s", process.exitcode


def _fresh(place: Place, name: str) -> Place:
    """A place of its own beside another."""
    folder = place.folder / name
    folder.mkdir(parents=True)
    uri = f"{place.uri}-{name}" if "://" in place.uri else str(Path(place.uri) / name / "store")
    return Place(uri, folder, place.environment)
