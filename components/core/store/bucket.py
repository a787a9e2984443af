"""A bucket by its address: how it is opened, what its server refuses, and the rule that ends unfinished uploads.

Keys come from the environment or from a mounted file, through the public part of MinIO's client; where neither has
any, obstore looks for a workload identity itself.
"""

import logging
import os
import re
import time
import urllib.error
import urllib.request
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlparse

from obstore.exceptions import BaseError

from components.core.base.errors import StoreError
from components.core.base.ports import never_proxy_loopback

SCHEMES = ("s3", "gs", "az")
UPLOAD_DAYS = 2
"""Age from which the server ends an unfinished upload."""
SKEW_S = 300.0
"""Difference of clocks that is named as the cause where a server refuses; S3 allows 900 s."""
KEYS_S = 900.0
"""Time after which keys are read again, since a mounted file may change, s."""
MESSAGE_CHARACTERS = 200
MAY_PASS = frozenset({408, 429, 500, 502, 503, 504})
"""Answers of a server that is overloaded or just starting."""

log = logging.getLogger("tessera.store")


class Problem:
    """What an error of obstore says: status, code and message of the server, or why there was no answer."""

    def __init__(self, error: BaseException) -> None:
        text, _, debug = str(error).partition("\n\nDebug source:")
        body = text.partition("non-2xx status code: ")[2]
        self.status = int(body[:3]) if body[:3].isdigit() else 0
        self.code = _first(r"<Code>(.*?)</Code>", body) or _first(r"\(code: (\w+)\)", text)
        self.message = _first(r"<Message>(.*?)</Message>", body)
        self._answer = " ".join(body.partition(": ")[2].split())
        timed_out = "timed out" if re.search(r"\bTimedOut\b|\bTimeout\b", debug) else ""
        causes: list[str] = re.findall(r'(?:message|error): "(.*?)"', debug) or [timed_out]
        self._is_certificate = "certificate" in debug.lower()
        self._cause = causes[-1] or text.rpartition(" - ")[2].strip()

    @property
    def is_absent_object(self) -> bool:
        """Whether the bucket is there and the object is not."""
        return self.status == 404 and self.code not in (*_NO_BUCKET, "NoSuchUpload")

    @property
    def may_pass(self) -> bool:
        """Whether the same request may be answered well a moment later."""
        if not self.status and not self.code:
            return not self._is_certificate
        return self.code not in _FULL and (self.status in MAY_PASS or self.code in _REPEATABLE)

    @property
    def trouble(self) -> str:
        """What is wrong with the server, after its name."""
        if not self.status:
            return f"cannot be reached: {self._cause}"
        words = f"{self.code}: {self.message}" if self.code else self._answer
        return f"answers {self.status}" + (f" ({words[:MESSAGE_CHARACTERS]})" if words else "")


class Bucket:
    """A bucket, and the part of it below a prefix: `s3://bucket/prefix`, or the same with `gs` or `az`."""

    def __init__(self, uri: str) -> None:
        url = urlparse(uri)
        self._uri, self._scheme, self._name, self._prefix = uri, url.scheme, url.netloc, url.path.strip("/")

    @property
    def server(self) -> str:
        """The server, for messages."""
        kind = "S3 server" if self._scheme == "s3" else "object store"
        return f"the {kind} at {self._place}"

    @property
    def _place(self) -> str:
        endpoint = _s3_endpoint() if self._scheme == "s3" else None
        return urlparse(endpoint).netloc if endpoint else self._uri

    def connect(self, client_options: dict[str, Any], retry_config: dict[str, Any]) -> Any:
        """A client of obstore; no request is made.

        Raises:
            StoreError: no bucket can have this name, or the environment has no endpoint or no keys.
        """
        from obstore.store import from_url

        never_proxy_loopback()

        options: dict[str, Any] = {}
        if self._scheme == "s3":
            if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", self._name):
                raise StoreError(f"no bucket can have the name {self._name!r}", hint="check --store")
            # Contents carry a checksum that the server verifies; to sign them as well would hash them once more.
            options = {"checksum_algorithm": "CRC64NVME", "unsigned_payload": True, "disable_bulk_delete": True}
            options |= _s3_credentials()
            if (endpoint := _s3_endpoint()) is not None:
                options["endpoint"] = endpoint
                client_options = {**client_options, "allow_http": endpoint.startswith("http://")}
        try:
            return from_url(  # type: ignore[call-overload]  # its options depend on the scheme
                self._uri, client_options=client_options, retry_config=retry_config, **options
            )
        except Exception as error:  # obstore's classes differ by scheme and by setting
            text = str(error).partition("\n\nDebug source:")[0]
            raise StoreError(f"{self._uri} cannot be opened: {text}", hint="check --store and its settings") from None

    def check_access(self, client: Any) -> None:
        """Ask for an object that never exists, so that a wrong server, bucket or key shows before any work."""
        try:
            client.get("tessera-never-exists")
        except FileNotFoundError as error:
            problem = Problem(error)
            if problem.is_absent_object and problem.code:
                return
            if problem.code:
                raise
        raise self._no_object_store("")

    def refusal(self, client: Any, problem: Problem, doing: str, size: int, *, was_reached: bool) -> StoreError:
        """The error for a request that will not be repeated.

        Args:
            client: to ask for words where the refusal came, as to a HEAD request, without any.
            problem: what obstore reports.
            doing: what was not allowed: `read`, `list`, `write to` or `delete from`.
            size: bytes that were to be stored.
            was_reached: whether an earlier request was answered well.
        """
        if not problem.status and not problem.code:
            return self.away(problem)
        if problem.status == 403 and not problem.code:
            problem = _asked_for_words(client) or problem
        code = problem.code
        skew_s = self._skew_s() if problem.status == 403 else 0.0
        if code not in _WRONG_KEYS and abs(skew_s) > SKEW_S:
            side = "ahead of" if skew_s > 0 else "behind"
            return StoreError(
                f"this machine's clock is {abs(skew_s):,.0f} s {side} the S3 server's",
                hint="set it; S3 refuses requests that are more than 15 minutes off",
            )
        if code in _FULL:
            return StoreError(
                f"no space left in bucket {self._name!r}: {size:,} bytes are needed ({code})",
                hint="free some, run `tessera store gc`, or choose another --store",
            )
        if code in _NO_BUCKET:
            return StoreError(f"there is no bucket {self._name!r} at {self._place}", hint="create it, or check --store")
        denied = problem.status in (401, 403)
        if code in _WRONG_KEYS or (denied and not was_reached):
            return StoreError(
                f"the S3 server refuses these credentials for bucket {self._name!r} ({code or problem.status})",
                hint="check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, that they have not expired, and that they may "
                "use the bucket",
            )
        if denied:
            return StoreError(
                f"these credentials may not {doing} bucket {self._name!r} ({code or problem.status})",
                hint="use others, or give them the right to",
            )
        if code == "PreconditionFailed":
            return StoreError("an object was written anew while it was being read", hint="try again")
        if not code:
            return self._no_object_store(problem.trouble)
        return StoreError(f"the S3 server answers {code}: {problem.message}")

    def away(self, problem: Problem) -> StoreError:
        """The error for a server that did not come back in time."""
        hint = (
            "its log tells why; one that is out of space may answer so, too"
            if problem.status
            else "check TESSERA_S3_ENDPOINT and that the server is running"
        )
        return StoreError(f"{self.server} {problem.trouble}", hint=f"{hint}; the same command goes on from here")

    def broken_off(self, problem: Problem) -> StoreError:
        """The error for a download that is interrupted again and again."""
        return StoreError(
            f"{self.server} breaks off its answers: {problem.trouble}",
            hint="check the network; the same command goes on from here",
        )

    def _no_object_store(self, trouble: str) -> StoreError:
        kind = "S3 server" if self._scheme == "s3" else "object store"
        words = f": it {trouble}" if trouble else ""
        return StoreError(f"what answers at {self._place} is no {kind}{words}", hint="check TESSERA_S3_ENDPOINT")

    def _skew_s(self) -> float:
        """How far this machine's clock is ahead of the server's, s; 0 where the server does not tell its time."""
        endpoint = _s3_endpoint() if self._scheme == "s3" else None
        if endpoint is None:
            return 0.0
        try:
            with urllib.request.urlopen(endpoint, timeout=5) as answer:
                date = answer.headers["Date"]
        except urllib.error.HTTPError as error:  # a refusal has the time as well
            date = error.headers["Date"]
            error.close()
        except OSError:
            return 0.0
        return time.time() - parsedate_to_datetime(date).timestamp() if date else 0.0

    def expire_unfinished_uploads(self) -> None:
        """Add a rule to an S3 bucket, unless it has it: what was not completed after `UPLOAD_DAYS` is removed.

        Other servers have such a rule already. Where the rule cannot be set, that is said and nothing fails.
        """
        if self._scheme != "s3" or (endpoint := _s3_endpoint()) is None:
            return
        from minio import Minio
        from minio.commonconfig import ENABLED, Filter
        from minio.error import MinioException
        from minio.lifecycleconfig import AbortIncompleteMultipartUpload, LifecycleConfig, Rule
        from urllib3.exceptions import HTTPError

        url, prefix = urlparse(endpoint), f"{self._prefix}/" if self._prefix else ""
        name = f"tessera-unfinished-uploads:{prefix}"
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        try:
            client = Minio(url.netloc, credentials=_key_chain(), secure=url.scheme == "https", region=region)
            rules = getattr(client.get_bucket_lifecycle(self._name), "rules", [])
            if any(rule.rule_id == name for rule in rules):
                return
            expiry = AbortIncompleteMultipartUpload(days_after_initiation=UPLOAD_DAYS)
            rule = Rule(
                ENABLED, rule_id=name, rule_filter=Filter(prefix=prefix), abort_incomplete_multipart_upload=expiry
            )
            client.set_bucket_lifecycle(self._name, LifecycleConfig([*rules, rule]))
        except (MinioException, HTTPError, ValueError) as error:
            reason = getattr(error, "code", None) or error
            log.warning("unfinished uploads stay in bucket %s: its rules cannot be set (%s)", self._name, reason)


def _asked_for_words(client: Any) -> Problem | None:
    """What the server says to a request whose refusal has a body."""
    try:
        client.list("tessera-never-exists").collect()
    except BaseError as error:
        return Problem(error)
    return None


def _s3_endpoint() -> str | None:
    """Address of the server, `https` where it names no scheme."""
    given = next((os.environ[name] for name in _ENDPOINTS if os.environ.get(name)), None)
    return given if given is None or "://" in given else f"https://{given}"


def _s3_credentials() -> dict[str, Any]:
    """The option for obstore that hands over keys; empty where obstore looks for a workload identity itself.

    Raises:
        StoreError: there is neither, or no server is named.
    """
    is_amazon = _s3_endpoint() is None
    if is_amazon and not any(os.environ.get(name) for name in ("AWS_REGION", "AWS_DEFAULT_REGION")):
        raise StoreError(
            "an s3:// store needs the address of its server in the environment",
            hint=f"set {' or '.join(_ENDPOINTS)}; for Amazon's own servers AWS_REGION",
        )
    try:
        _key_chain().retrieve()
    except ValueError:
        if is_amazon or any(os.environ.get(name) for name in _WORKLOAD_IDENTITY):
            return {}
        raise StoreError(
            "an s3:// store needs credentials in the environment",
            hint="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_SHARED_CREDENTIALS_FILE",
        ) from None
    return {"credential_provider": _read_keys}


def _read_keys() -> dict[str, Any]:
    """The keys of the environment or the mounted file, as obstore takes them."""
    keys = _key_chain().retrieve()
    return {
        "access_key_id": keys.access_key,
        "secret_access_key": keys.secret_key,
        "token": keys.session_token,
        "expires_at": datetime.now(UTC) + timedelta(seconds=KEYS_S),
    }


def _key_chain() -> Any:
    from minio.credentials import AWSConfigProvider, ChainedProvider, EnvAWSProvider, EnvMinioProvider

    return ChainedProvider([EnvAWSProvider(), EnvMinioProvider(), AWSConfigProvider()])


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text, re.DOTALL)
    return found.group(1) if found else ""


_ENDPOINTS = ("TESSERA_S3_ENDPOINT", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "MINIO_ENDPOINT")
_WORKLOAD_IDENTITY = (
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)
_NO_BUCKET = frozenset({"NoSuchBucket", "ContainerNotFound"})
_WRONG_KEYS = frozenset({"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"})
_FULL = frozenset({"InsufficientStorage", "QuotaExceeded", "XMinioStorageFull", "XMinioAdminBucketQuotaExceeded"})
_REPEATABLE = frozenset({"ConditionalRequestConflict", "OperationAborted", "NoSuchUpload", "BadDigest"})
"""Refusals because of another request at the same time, of a repeated request whose first answer was lost, or of
contents that changed on the way."""
