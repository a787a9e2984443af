"""Requests to an S3 server that is away, busy or slow: repeated while there is hope, then one error that says why."""

import itertools
import logging
import random
import re
import threading
import time
from collections.abc import Mapping

import urllib3
from urllib3 import BaseHTTPResponse
from urllib3.exceptions import HTTPError, LocationValueError, SSLError

from components.core.base.errors import StoreError

PATIENCE_S = 30.0
"""How long a server may be away: the time from its first failure to the last try."""
BACKOFF_S = 0.1
"""Pause before the second try; doubled before each further one."""
LONGEST_BACKOFF_S = 2.0
CONNECT_S, READ_S = 5.0, 30.0
"""How long a connection, and the next bytes of an answer, may take."""
MAY_PASS = frozenset({408, 429, 500, 502, 503, 504})
"""Answers of a server that is overloaded or just starting."""
QUIET_S = 2.0
"""Shorter outages are bridged without a word."""
MESSAGE_CHARACTERS = 200
CONNECTION = re.compile(r"^HTTPS?Connection(Pool)?\(.*?\): ")
"""What urllib3 begins its messages with, and the user knows."""

log = logging.getLogger("tessera.store")


class PatientHttp(urllib3.PoolManager):
    """Connections as the MinIO client wants them, with patience.

    All requests share what is known of the server, so that a transfer of many parts gives up as soon as one request
    does. Every request is repeated, also those that are not idempotent in HTTP: what S3 does with a repeated one is in
    the hands of `s3.py`.
    """

    def __init__(self, server: str) -> None:
        super().__init__(timeout=urllib3.Timeout(connect=CONNECT_S, read=READ_S), maxsize=16, retries=False)
        self._server = server
        self._lock = threading.Lock()
        self._away_since: float | None = None
        self._failed_at = 0.0
        self._noted = False

    def urlopen(  # type: ignore[override]
        self,
        method: str,
        url: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        preload_content: bool = True,
    ) -> BaseHTTPResponse:
        """Send a request until it is answered.

        Raises:
            StoreError: the server cannot be reached, or goes on failing, for longer than `PATIENCE_S`.
        """
        first_failure: float | None = None
        for attempt in itertools.count():
            try:
                response = super().urlopen(method, url, body=body, headers=headers, preload_content=preload_content)
                if response.status not in MAY_PASS and not _fails_late(method, response):
                    self._is_back()
                    return response
                trouble, hint = f"answers {response.status}{_words(response)}", LOOK
            except LocationValueError as error:
                raise StoreError(f"no request can be sent to {self._server}: {error}", hint=CHECK) from None
            except HTTPError as error:
                trouble, hint = f"cannot be reached: {CONNECTION.sub('', str(error))}", CHECK
                if isinstance(error, SSLError) and "certificate" in str(error).lower():
                    raise StoreError(f"the S3 server at {self._server} {trouble}", hint=hint) from None
            now = time.monotonic()
            first_failure = first_failure or now
            if now - min(first_failure, self._is_away(now, trouble)) >= PATIENCE_S:
                raise StoreError(f"the S3 server at {self._server} {trouble}", hint=hint)
            time.sleep(min(BACKOFF_S * 2**attempt, LONGEST_BACKOFF_S) * random.uniform(0.5, 1))
        raise AssertionError("unreachable")

    def _is_away(self, now: float, trouble: str) -> float:
        """Remember a failure; returns the time of the first one since the server last answered."""
        with self._lock:
            if self._away_since is None or now - self._failed_at > PATIENCE_S + READ_S:  # long ago, and given up then
                self._away_since = now
            self._failed_at = now
            if not self._noted and now - self._away_since >= QUIET_S:
                self._noted = True
                log.warning("the S3 server at %s %s; trying for %.0f s", self._server, trouble, PATIENCE_S)
            return self._away_since

    def _is_back(self) -> None:
        """Forget failures."""
        with self._lock:
            if self._noted and self._away_since:
                away_s = time.monotonic() - self._away_since
                log.warning("the S3 server at %s answers again, after %.0f s", self._server, away_s)
            self._away_since, self._noted = None, False


def _fails_late(method: str, response: BaseHTTPResponse) -> bool:
    """Whether a server that had begun to answer well ends with an error, as S3 may for uploads and copies."""
    return method in ("POST", "PUT") and response.status == 200 and b"<Error>" in response.data


def _words(response: BaseHTTPResponse) -> str:
    """What the answer says beside its number: code and message as S3 has them, or the beginning of whatever it is."""
    try:
        text = " ".join(response.data.decode(errors="replace").split())
    except HTTPError:
        return ""
    finally:
        response.release_conn()
    told = re.search(r"<Code>(.*?)</Code>.*?<Message>(.*?)</Message>", text)
    text = ": ".join(told.groups()) if told else text
    return f" ({text[:MESSAGE_CHARACTERS]})" if text else ""


CHECK = "check TESSERA_S3_ENDPOINT and that the server is running; the same command goes on from here"
LOOK = "its log tells why; one that is out of space may answer so, too; the same command goes on from here"
