"""Named points at which a test can end this process, or fail the call, for real.

    TESSERA_FAULT=NAME[:NTH]=ACTION   strike when a process reaches the point for the NTH time (the first by default)
    TESSERA_FAULT=count               count what is reached, for `reached`

Every step of the protocols that have to survive a crash has a point. Without the variable a point does nothing.
"""

import errno
import os
import signal
from collections import Counter
from collections.abc import Mapping
from threading import Lock
from types import MappingProxyType
from typing import NamedTuple

from components.core.base.errors import InputError, StoreError

VARIABLE = "TESSERA_FAULT"

POINTS: Mapping[str, str] = MappingProxyType(
    {
        "folder.created": "a file beside the target is there, empty",
        "folder.written": "it has its contents, not flushed to the disk",
        "folder.flushed": "they are on the disk, without their name",
        "folder.named": "the object is there",
        "folder.delete": "an object is about to go",
        "s3.upload": "a file is about to be sent",
        "s3.part": "a piece of it is about to be sent",
        "s3.uploaded": "the object is there",
        "s3.put": "small data is about to be sent",
        "s3.was-put": "it is there",
        "s3.download": "an object is about to be read",
        "s3.delete": "an object is about to go",
        "artifact.blobs": "all blobs of an artifact are there, the manifest is not",
        "artifact.named": "the manifest is there",
        "copy.begun": "a working copy has its folder, under another name",
        "copy.filled": "it has all files",
        "copy.named": "the working copy is there",
        "record.write": "the record of a stage is about to be written",
        "record.written": "it is there",
        "mirror.begun": "a resume point is about to be sent to a remote store",
        "mirror.files": "its files are there, the list that makes it count is not",
        "mirror.list": "the list is there",
        "mirror.trimmed": "older points are gone",
        "pull.filled": "a resume point of a remote store is here, under another name",
        "pull.cleared": "what was in its place is gone",
        "pull.named": "the resume point is here",
        "resume.drop": "resume points of a finished stage are about to go",
        "resume.hidden": "they do not count any more",
        "resume.dropped": "those on this machine are gone",
        "point.begun": "a resume point has its folder, under another name",
        "point.written": "it has all files",
        "point.cleared": "what was in its place is gone",
        "point.placed": "it has its name, the list that makes it count is not there",
        "point.named": "it counts",
        "point.mirrored": "a remote store has it",
        "point.trimmed": "older points are gone",
        "event": "an event is about to be written",
        "stage.begun": "the key of a stage is known, nothing is written",
        "stage.alone": "no other process of this machine works on the key",
        "stage.fetched": "its inputs are here",
        "stage.computed": "it has run, nothing of it is stored",
        "stage.stored": "its outputs are stored",
        "stage.recorded": "its record is stored",
        "stage.rested": "its resume points are gone",
        "stage.settle": "the run is about to record the stage",
        "stage.settled": "the run has it",
        "rank.begun": "a training process has joined the others",
        "rank.computed": "a training process has done its work",
        "run.begun": "a run has its record",
        "run.ending": "the record of a run is about to be closed",
    }
)
"""Name to what is so when it is reached."""


class Order(NamedTuple):
    """What is to happen, and where."""

    point: str
    nth: int
    action: str


_reached: Counter[str] = Counter()
_lock = Lock()


def fault_point(name: str) -> None:
    """Do what the environment orders at this point; nothing without an order.

    Raises:
        OSError: the order is to fail (`fail`: input/output error; `enospc`: no space), in the way of the system.
        StoreError: the same, in the way of a remote store.
        InputError: the order cannot be understood.
    """
    text = os.environ.get(VARIABLE)
    if text:
        with _lock:
            _reached[name] += 1
            count = _reached[name]
        if text != "count":
            order = parse(text)
            if (order.point, order.nth) == (name, count):
                _ACTIONS[order.action](name)


def reached() -> dict[str, int]:
    """How often this process has come to each point since there was an order."""
    return dict(_reached)


def parse(text: str) -> Order:
    """Read an order.

    Raises:
        InputError: it cannot be understood.
    """
    place, _, action = text.partition("=")
    name, _, nth = place.partition(":")
    if name not in POINTS or action not in _ACTIONS or not (nth or "1").isdigit():
        raise InputError(
            f"{VARIABLE}={text} is no order", hint=f"write NAME[:NTH]={'|'.join(_ACTIONS)}, NAME of {', '.join(POINTS)}"
        )
    return Order(name, int(nth or "1"), action)


def _kill(name: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _terminate(name: str) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def _fail(name: str) -> None:
    if name.startswith("s3."):
        raise StoreError(f"the S3 server cannot be reached (ordered at {name})")
    raise OSError(errno.EIO, os.strerror(errno.EIO), name)


def _no_space(name: str) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)


_ACTIONS = {"kill": _kill, "term": _terminate, "fail": _fail, "enospc": _no_space}
