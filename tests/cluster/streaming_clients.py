"""Clients that stream answers through the gateway without a pause, and count those that did not come in full."""

import contextlib
import http.client
import json
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime

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


@contextlib.contextmanager
def asking_clients() -> Iterator[Tally]:
    """Clients at work during the block; answers that are open at its end are waited for."""
    tally, stop = Tally(), threading.Event()

    def work(stream: bool) -> None:
        while not stop.is_set():
            ask(tally, stream=stream)
            if not stream:
                stop.wait(PAUSE_S)

    threads = [threading.Thread(target=work, args=(number < STREAMS,)) for number in range(STREAMS + SHORT)]
    for thread in threads:
        thread.start()
    try:
        yield tally
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def ask(tally: Tally, *, stream: bool) -> None:
    """One request on a connection of its own."""
    messages = [{"role": "user", "content": "3+4="}]
    body = json.dumps({"model": "nano", "messages": messages, "stream": stream})
    connection = http.client.HTTPConnection("127.0.0.1", GATEWAY_PORT, timeout=TIMEOUT_S)
    versions: list[str] = []
    try:
        headers = {"Host": HOST, "Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", body, headers)
        answer = connection.getresponse()
        if answer.status != 200:
            tally.add([], False, f"status {answer.status}: {answer.read(200)!r}")
        elif not stream:
            tally.add([json.loads(answer.read())["id"]], True)
        else:
            lines = [line.strip().removeprefix(b"data: ") for line in answer if line.strip()]
            versions = [json.loads(line)["id"] for line in lines if line != b"[DONE]"]
            tally.add(versions, lines[-1:] == [b"[DONE]"])
    except (OSError, http.client.HTTPException, ValueError) as error:
        tally.add(versions, False, repr(error))
    finally:
        connection.close()
