"""Clients that stream answers through the gateway without a pause, and count those that did not come in full."""

import contextlib
import http.client
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from infra.testcluster.gateway import GATEWAY_PORT

HOST = "nano.models.test"
TIMEOUT_S = 60.0
STREAMS, SHORT = 5, 2
"""Clients that stream, and that ask for a whole answer again and again."""
PAUSE_S = 0.1
"""Between two short requests."""


@dataclass
class Tally:
    """What became of the answers."""

    complete: Counter[str] = field(default_factory=Counter)
    """Answers that came in full, by the version that gave them."""
    lost: list[str] = field(default_factory=list)
    """The others: when they ended, for the logs of the gateway and its controllers, and what was wrong."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, versions: list[str], ended: bool, problem: str = "") -> None:
        """Count one answer; it has to come from one version."""
        with self.lock:
            if ended and len(set(versions)) == 1:
                self.complete[versions[0]] += 1
            else:
                problem = problem or f"{len(versions)} pieces of {sorted(set(versions))}, ended: {ended}"
                self.lost.append(f"{datetime.now(UTC):%H:%M:%S.%f} {problem}")


Versions = Callable[[list[dict[str, Any]]], list[str]]
"""Names the versions that the pieces of an answer are of."""


def ids(pieces: list[dict[str, Any]]) -> list[str]:
    """A stand-in's version is the id of its pieces."""
    return [str(piece["id"]) for piece in pieces]


@contextlib.contextmanager
def asking_clients(
    streams: int = STREAMS, short: int = SHORT, stream_pause_s: float = 0.0, versions: Versions = ids
) -> Iterator[Tally]:
    """Clients at work during the block; answers that are open at its end are waited for.

    Args:
        streams: clients that stream.
        short: clients that ask for a whole answer.
        stream_pause_s: time between two requests of a client that streams.
        versions: names what an answer is of.
    """
    tally, stop = Tally(), threading.Event()

    def work(stream: bool) -> None:
        while not stop.is_set():
            ask(tally, stream=stream, versions=versions)
            stop.wait(stream_pause_s if stream else PAUSE_S)

    threads = [threading.Thread(target=work, args=(number < streams,)) for number in range(streams + short)]
    for thread in threads:
        thread.start()
    try:
        yield tally
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def ask(tally: Tally, *, stream: bool, versions: Versions = ids) -> None:
    """One request on a connection of its own."""
    messages = [{"role": "user", "content": "3+4="}]
    body = json.dumps({"model": "nano", "messages": messages, "stream": stream})
    connection = http.client.HTTPConnection("127.0.0.1", GATEWAY_PORT, timeout=TIMEOUT_S)
    found: list[str] = []
    try:
        headers = {"Host": HOST, "Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", body, headers)
        answer = connection.getresponse()
        if answer.status != 200:
            tally.add([], False, f"status {answer.status}: {answer.read(200)!r}")
        elif not stream:
            tally.add(versions([json.loads(answer.read())]), True)
        else:
            lines = [line.strip().removeprefix(b"data: ") for line in answer if line.strip()]
            found = versions([json.loads(line) for line in lines if line != b"[DONE]"])
            tally.add(found, lines[-1:] == [b"[DONE]"])
    except (OSError, http.client.HTTPException, ValueError) as error:
        tally.add(found, False, repr(error))
    finally:
        connection.close()
