"""A bucket by its address: how obstore opens it, and how MinIO's client creates it and sets its lifecycle rule.

Keys come from the environment or from a mounted file, through MinIO's credential providers. Where neither has any,
obstore uses the workload identity itself.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote, urlparse

from components.core.base.errors import StoreError
from components.core.base.ports import never_proxy_loopback

SCHEMES = ("s3", "gs", "az")
UPLOAD_DAYS = 2
"""Age from which the server ends an unfinished upload."""
KEYS_S = 900.0
"""Time after which keys are read again, since a mounted file may change, s."""
_RULE = "tessera-unfinished-uploads:"
"""Start of the names of Tessera's lifecycle rules."""
_ENDPOINTS = ("TESSERA_S3_ENDPOINT", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "MINIO_ENDPOINT")
_REGIONS = ("AWS_REGION", "AWS_DEFAULT_REGION")
_WORKLOAD_IDENTITY = (
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)


class Bucket:
    """A bucket, and the part of it below a prefix: `s3://bucket/prefix`, or the same with `gs` or `az`.

    Attributes:
        uri: the address.
        scheme: `s3`, `gs` or `az`.
        name: the bucket.
        prefix: of all objects, exactly as written in the address, without a slash at the end.
    """

    def __init__(self, uri: str) -> None:
        """Parse an address.

        Raises:
            StoreError: no bucket can have this name, or the prefix would not be stored exactly as written.
        """
        self.uri = uri
        self.scheme, _, location = uri.partition("://")
        self.name, _, prefix = location.partition("/")
        self.prefix = prefix.removesuffix("/")
        if self.scheme == "s3" and not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", self.name):
            raise StoreError(f"no bucket can have the name {self.name!r}", hint="check --store")
        has_dots = {".", ".."} & set(prefix.split("/"))
        if has_dots or "//" in location or re.search(r"[\\\x00-\x1f\x7f]", prefix):
            raise StoreError(
                f"{uri!r} is no address of a store: its prefix has an empty segment, `.`, `..`, a backslash or a "
                "control character",
                hint=r"write it without //, /./, /../ and \, since servers and clients read these differently",
            )

    @property
    def server(self) -> str:
        """Description of the server, for messages."""
        kind = "S3 server" if self.scheme == "s3" else "object store"
        return f"the {kind} at {self.host}"

    @property
    def host(self) -> str:
        """Host and port of an S3 server; the address of the store where the environment names no endpoint."""
        endpoint = self.endpoint
        return urlparse(endpoint).netloc if endpoint else self.uri

    @property
    def endpoint(self) -> str | None:
        """URL of the S3 server; None for the servers of Amazon, Google and Azure.

        Raises:
            StoreError: the endpoint is not the address of a server alone.
        """
        name = next((name for name in _ENDPOINTS if os.environ.get(name)), None)
        if self.scheme != "s3" or name is None:
            return None
        value = os.environ[name]
        endpoint = value if "://" in value else f"https://{value}"
        if not re.fullmatch(r"https?://[^/?#@\s]+/?", endpoint):
            raise StoreError(
                f"{name} is not the address of an S3 server: {re.sub('//[^/]*@', '//', value)}",
                hint="write http://host:port or https://host:port without a path; bucket and prefix belong to --store",
            )
        return endpoint.rstrip("/")

    def connect(self, client_options: dict[str, Any], retry_config: dict[str, Any]) -> Any:
        """A client of obstore; no request is made.

        Raises:
            StoreError: the environment has no endpoint or no keys.
        """
        from obstore.store import from_url

        never_proxy_loopback()

        options: dict[str, Any] = {}
        if self.scheme == "s3":
            endpoint = self.endpoint
            # Contents carry a checksum that the server verifies. Signing them as well would hash them a second time.
            options = {"checksum_algorithm": "CRC64NVME", "unsigned_payload": True, "disable_bulk_delete": True}
            options |= _credential_options(is_amazon=endpoint is None)
            if endpoint is not None:
                options["endpoint"] = endpoint
                client_options = {**client_options, "allow_http": endpoint.startswith("http://")}
        # The prefix is quoted because obstore reads a URL: `#` and `?` would end it, and `%20` would become a space.
        url = f"{self.scheme}://{self.name}/{quote(self.prefix)}"
        try:
            return from_url(  # type: ignore[call-overload]  # its options depend on the scheme
                url, client_options=client_options, retry_config=retry_config, **options
            )
        except Exception as error:  # obstore's classes differ by scheme and by setting
            text, _, debug = str(error).partition("\n\nDebug source:")
            if "No CA certificates" in debug:  # obstore asks for some even where the address is http://
                raise StoreError(
                    f"{self.uri} cannot be opened: this machine has no certificates of authorities",
                    hint="install ca-certificates, or let SSL_CERT_FILE name a bundle, such as certifi's",
                ) from None
            raise StoreError(f"{self.uri} cannot be opened: {text}", hint="check --store and its settings") from None

    def create(self) -> bool:
        """Create an S3 bucket unless it exists; returns whether it was created.

        Raises:
            StoreError: the server cannot be reached, or refuses.
        """
        with self._minio_errors(f"bucket {self.name!r} cannot be created at {self.host}"):
            client = self._minio_client()
            if client.bucket_exists(self.name):
                return False
            client.make_bucket(self.name)
            return True

    def expire_abandoned_uploads(self) -> None:
        """Add a lifecycle rule to an S3 bucket, unless one applies: uploads that are unfinished after some days end.

        The client replaces all rules of a bucket at once, and does not know every kind. So rules that are not from
        Tessera are never written again.

        Raises:
            StoreError: the rule cannot be set.
        """
        failure = f"abandoned uploads stay in bucket {self.name!r}: its lifecycle rule cannot be set"
        with self._minio_errors(failure):
            from minio.commonconfig import ENABLED, Filter
            from minio.lifecycleconfig import AbortIncompleteMultipartUpload, LifecycleConfig, Rule

            client, prefix = self._minio_client(), f"{self.prefix}/" if self.prefix else ""
            rules = getattr(client.get_bucket_lifecycle(self.name), "rules", [])
            if any(_expires_uploads(rule, prefix) for rule in rules):
                return
            if not all((rule.rule_id or "").startswith(_RULE) for rule in rules):
                raise StoreError(
                    f"{failure} (it has rules of its own)",
                    hint=f"add a rule to them that aborts incomplete multipart uploads below {prefix!r}",
                )
            expiry = AbortIncompleteMultipartUpload(days_after_initiation=UPLOAD_DAYS)
            rule = Rule(
                ENABLED,
                rule_id=f"{_RULE}{prefix}",
                rule_filter=Filter(prefix=prefix),
                abort_incomplete_multipart_upload=expiry,
            )
            client.set_bucket_lifecycle(self.name, LifecycleConfig([*rules, rule]))

    def _minio_client(self) -> Any:
        from minio import Minio

        region = _region() or "us-east-1"
        url = urlparse(self.endpoint or f"https://s3.{region}.amazonaws.com")
        return Minio(url.netloc, credentials=_key_chain(), secure=url.scheme == "https", region=region)

    @contextmanager
    def _minio_errors(self, failure: str) -> Iterator[None]:
        """Turn errors of MinIO's client into a StoreError that begins with the failure."""
        from minio.error import MinioException
        from urllib3.exceptions import HTTPError

        try:
            yield
        except (MinioException, HTTPError, ValueError) as error:
            reason = getattr(error, "code", None) or error
            raise StoreError(f"{failure} ({reason})", hint="check TESSERA_S3_ENDPOINT and the credentials") from None


def _expires_uploads(rule: Any, prefix: str) -> bool:
    """Whether a lifecycle rule ends unfinished uploads below a prefix."""
    limit, scope = rule.abort_incomplete_multipart_upload, rule.rule_filter and rule.rule_filter.prefix
    return limit is not None and rule.status == "Enabled" and scope is not None and prefix.startswith(scope)


def _region() -> str | None:
    return next((os.environ[name] for name in _REGIONS if os.environ.get(name)), None)


def _credential_options(*, is_amazon: bool) -> dict[str, Any]:
    """The option of obstore that provides keys; empty where obstore uses a workload identity itself.

    Raises:
        StoreError: there is neither, or the environment names no server.
    """
    if is_amazon and _region() is None:
        raise StoreError(
            "an s3:// store needs the address of its server in the environment",
            hint=f"set {' or '.join(_ENDPOINTS)}; for Amazon's own servers AWS_REGION",
        )
    try:
        _key_chain(with_identity=False).retrieve()
    except ValueError:
        if is_amazon or _has_workload_identity():
            return {}
        raise StoreError(
            "an s3:// store needs credentials in the environment",
            hint="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_SHARED_CREDENTIALS_FILE",
        ) from None
    return {"credential_provider": _read_keys}


def _read_keys() -> dict[str, Any]:
    """The keys of the environment or the mounted file, in the form that obstore takes."""
    keys = _key_chain(with_identity=False).retrieve()
    return {
        "access_key_id": keys.access_key,
        "secret_access_key": keys.secret_key,
        "token": keys.session_token,
        "expires_at": datetime.now(UTC) + timedelta(seconds=KEYS_S),
    }


def _has_workload_identity() -> bool:
    return any(os.environ.get(name) for name in _WORKLOAD_IDENTITY)


def _key_chain(*, with_identity: bool = True) -> Any:
    """Providers of keys in their order: environment, mounted file, and for MinIO's client the workload identity."""
    from minio.credentials import AWSConfigProvider, ChainedProvider, EnvAWSProvider, EnvMinioProvider, IamAwsProvider

    providers = [EnvAWSProvider(), EnvMinioProvider(), AWSConfigProvider()]
    if with_identity and _has_workload_identity():
        providers.append(IamAwsProvider())
    return ChainedProvider(providers)
