"""What a server of objects reports, and the error for the user: the cause, the values, and the way out."""

import re
import time
import urllib.error
import urllib.request
from email.utils import parsedate_to_datetime
from typing import Any

from obstore.exceptions import BaseError

from components.core.base.errors import StoreError
from components.core.store.bucket import Bucket

MAX_SKEW_S = 300.0
"""Difference of clocks that is named as the cause where a server refuses; S3 allows 900 s."""
MAX_MESSAGE_CHARACTERS = 200
TRANSIENT_STATUS = frozenset({408, 429, 500, 502, 503, 504})
"""Answers of a server that is overloaded or still starting."""
_PROBE = "tessera-never-exists"


class ServerError:
    """Status, code and message of the server, parsed from an error of obstore; or why there was no answer."""

    def __init__(self, error: BaseException) -> None:
        text, _, debug = str(error).partition("\n\nDebug source:")
        body = text.partition("non-2xx status code: ")[2]
        self.status = int(body[:3]) if body[:3].isdigit() else 0
        self.code = _first(r"<Code>(.*?)</Code>", body) or _first(r"\(code: (\w+)\)", text)
        self.message = _first(r"<Message>(.*?)</Message>", body)
        self._body = " ".join(body.partition(": ")[2].split())
        timed_out = "timed out" if re.search(r"\bTimedOut\b|\bTimeout\b", debug) else ""
        causes: list[str] = re.findall(r'(?:message|error): "(.*?)"', debug) or [timed_out]
        self._is_certificate = "certificate" in debug.lower()
        self._cause = causes[-1] or text.rpartition(" - ")[2].strip()

    @property
    def is_absent_object(self) -> bool:
        """Whether the bucket exists and the object does not."""
        return self.status == 404 and self.code not in (*_NO_BUCKET, "NoSuchUpload")

    @property
    def is_transient(self) -> bool:
        """Whether the same request may succeed a moment later."""
        if not self.status and not self.code:
            return not self._is_certificate
        return self.code not in _FULL and (self.status in TRANSIENT_STATUS or self.code in _REPEATABLE)

    @property
    def description(self) -> str:
        """The fault, to follow the name of the server in a sentence."""
        if not self.status:
            return f"cannot be reached: {self._cause}"
        words = f"{self.code}: {self.message}" if self.code else self._body
        return f"answers {self.status}" + (f" ({words[:MAX_MESSAGE_CHARACTERS]})" if words else "")


def check_access(bucket: Bucket, client: Any) -> None:
    """Request an object that never exists, so that a wrong server, bucket or key shows before any work.

    Only an object store answers that with an error code of its own; obstore takes any web page for an empty listing.
    """
    try:
        client.get(_PROBE)
    except FileNotFoundError as caught:
        error = ServerError(caught)
        if error.is_absent_object and error.code:
            return
        if error.code:
            raise
    raise _not_an_object_store(bucket, "")


def refused_request(
    bucket: Bucket, client: Any, error: ServerError, doing: str, size: int, *, was_reached: bool
) -> StoreError:
    """The error for a request that will not be repeated.

    Args:
        bucket: the bucket of the request.
        client: for a second request where the refusal had no body, as after a HEAD request.
        error: the server's answer.
        doing: what was refused: `read`, `list`, `write to` or `delete from`.
        size: bytes that were to be stored.
        was_reached: whether an earlier request succeeded.
    """
    if not error.status and not error.code:
        return server_away(bucket, error)
    if error.status == 403 and not error.code:
        error = _refusal_with_body(client) or error
    code = error.code
    skew_s = _clock_skew_s(bucket) if error.status == 403 else 0.0
    if code not in _WRONG_KEYS and abs(skew_s) > MAX_SKEW_S:
        side = "ahead of" if skew_s > 0 else "behind"
        return StoreError(
            f"this machine's clock is {abs(skew_s):,.0f} s {side} the S3 server's",
            hint="set it; S3 refuses requests that are more than 15 minutes off",
        )
    if code in _FULL:
        return StoreError(
            f"no space left in bucket {bucket.name!r}: {size:,} bytes are needed ({code})",
            hint="free some, run `tessera store gc`, or choose another --store",
        )
    if code in _NO_BUCKET:
        create = f"create it with `tessera store init {bucket.uri}`" if bucket.scheme == "s3" else "create it"
        return StoreError(f"there is no bucket {bucket.name!r} at {bucket.host}", hint=f"{create}, or check --store")
    denied = error.status in (401, 403)
    if code in _WRONG_KEYS or (denied and not was_reached):
        return StoreError(
            f"the S3 server refuses these credentials for bucket {bucket.name!r} ({code or error.status})",
            hint="check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, that they have not expired, and that they may "
            "use the bucket",
        )
    if denied:
        return StoreError(
            f"these credentials may not {doing} bucket {bucket.name!r} ({code or error.status})",
            hint="use others, or give them the right to",
        )
    if code == "PreconditionFailed":
        return StoreError("an object was overwritten while it was being read", hint="try again")
    if not code:
        return _not_an_object_store(bucket, error.description)
    return StoreError(f"the S3 server answers {code}: {error.message}")


def server_away(bucket: Bucket, error: ServerError) -> StoreError:
    """The error for a server that did not recover in time."""
    hint = (
        "its log has the cause; a server that is out of space may answer so, too"
        if error.status
        else "check TESSERA_S3_ENDPOINT and that the server is running"
    )
    return StoreError(f"{bucket.server} {error.description}", hint=f"{hint}; the same command goes on from here")


def interrupted_download(bucket: Bucket, error: ServerError) -> StoreError:
    """The error for a download that is interrupted again and again."""
    return StoreError(
        f"{bucket.server} breaks off its answers: {error.description}",
        hint="check the network; the same command goes on from here",
    )


def _not_an_object_store(bucket: Bucket, description: str) -> StoreError:
    kind = "S3 server" if bucket.scheme == "s3" else "object store"
    words = f": it {description}" if description else ""
    return StoreError(f"what answers at {bucket.host} is no {kind}{words}", hint="check TESSERA_S3_ENDPOINT")


def _clock_skew_s(bucket: Bucket) -> float:
    """How far this machine's clock is ahead of the server's, s; 0 where the server does not send its time."""
    if bucket.endpoint is None:
        return 0.0
    try:
        with urllib.request.urlopen(bucket.endpoint, timeout=5) as answer:
            date = answer.headers["Date"]
    except urllib.error.HTTPError as error:  # a refusal has the time as well
        date = error.headers["Date"]
        error.close()
    except OSError:
        return 0.0
    return time.time() - parsedate_to_datetime(date).timestamp() if date else 0.0


def _refusal_with_body(client: Any) -> ServerError | None:
    """The server's refusal of a request whose answer has a body."""
    try:
        client.list(_PROBE).collect()
    except BaseError as error:
        return ServerError(error)
    return None


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text, re.DOTALL)
    return found.group(1) if found else ""


_NO_BUCKET = frozenset({"NoSuchBucket", "ContainerNotFound"})
_WRONG_KEYS = frozenset({"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"})
_FULL = frozenset({"InsufficientStorage", "QuotaExceeded", "XMinioStorageFull", "XMinioAdminBucketQuotaExceeded"})
_REPEATABLE = frozenset({"ConditionalRequestConflict", "OperationAborted", "NoSuchUpload", "BadDigest"})
"""Refusals because of a concurrent request, of a repeated request whose first answer was lost, or of contents that
changed on the way."""
