"""Part of a file as the body of a request: sent from a small buffer, and signed with a digest that is known already.

The MinIO client takes bodies as bytes, and hashes them for their signature, or with MD5 where there is TLS. A file's
name in a store is its SHA-256, which is what a signature over it needs: nothing is hashed again, nothing is held in
memory, and a server that checks signatures checks the file's own digest.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from typing import IO, Any, Self

from minio import Minio

from components.core.base.fault_injection import fault_point
from components.core.store.source_file import Source, changed_meanwhile, stamp_of

BUFFER_BYTES = 1 << 20
"""What is read and sent at a time."""


@dataclass(frozen=True)
class Body:
    """A stretch of an open file. Iterating again sends it again.

    Attributes:
        file: what it is of.
        source: the file, and what it was when it was hashed.
        start: where the stretch begins, bytes.
        size: its length, bytes.
        sha256: its digest, 64 hex digits.
    """

    file: IO[bytes]
    source: Source
    start: int
    size: int
    sha256: str

    @classmethod
    def of(cls, file: IO[bytes], source: Source) -> Self:
        """All of a file."""
        return cls(file, source, 0, source.entry.size, source.entry.sha256)

    def __iter__(self) -> Iterator[memoryview]:
        """Its bytes, in a buffer that is used again; the last of them only if nothing changed, by stamp or by digest.

        Raises:
            StoreError: the file is not what was hashed.
        """
        sha, done = hashlib.sha256(), 0
        for piece in self._pieces():
            fault_point("s3.part")
            done += len(piece)
            if self.source.stamp is None:
                sha.update(piece)
            if done == self.size and not self._is_unchanged(sha.hexdigest()):
                raise changed_meanwhile(self.source.path)
            yield piece
        if done < self.size:
            raise changed_meanwhile(self.source.path)

    def _is_unchanged(self, sha256: str) -> bool:
        if self.source.stamp is None:
            return sha256 == self.sha256
        return stamp_of(os.fstat(self.file.fileno())) == self.source.stamp

    def _pieces(self) -> Iterator[memoryview]:
        """The stretch, or what there is of it, in one buffer."""
        buffer, done = memoryview(bytearray(min(BUFFER_BYTES, self.size))), 0
        while done < self.size:
            length = os.preadv(self.file.fileno(), [buffer[: self.size - done]], self.start + done)
            if not length:
                return
            yield buffer[:length]
            done += length

    def parts(self, size: int) -> Iterator[Self]:
        """Stretches of a whole file of this size, the last one shorter, each with its digest.

        Raises:
            StoreError: the file is not what was hashed, as far as can be told before it is sent.
        """
        starts = range(0, self.size, size)
        parts = [replace(self, start=start, size=min(size, self.size - start)) for start in starts]
        if self.source.parts:
            if len(self.source.parts) != len(parts):
                raise changed_meanwhile(self.source.path)
            yield from (replace(part, sha256=digest) for part, digest in zip(parts, self.source.parts, strict=True))
            return
        whole = hashlib.sha256()
        for part in parts:
            sha = hashlib.sha256()
            for piece in part._pieces():
                sha.update(piece)
                whole.update(piece)
            yield replace(part, sha256=sha.hexdigest())
        if whole.hexdigest() != self.sha256:
            raise changed_meanwhile(self.source.path)


class Client(Minio):  # type: ignore[misc]  # it has no types for us
    """The MinIO client, which also takes a `Body` where it takes bytes."""

    def _build_headers(
        self, host: str, headers: Any = None, body: Any = None, creds: Any = None
    ) -> tuple[dict[str, Any], datetime]:
        """Headers that tell length and digest of a body as they are known."""
        if not isinstance(body, Body):
            built: tuple[dict[str, Any], datetime] = super()._build_headers(host, headers, body, creds)
            return built
        values, date = super()._build_headers(host, headers, None, creds)
        values.pop("Content-MD5", None)
        return {**values, "Content-Length": str(body.size), "x-amz-content-sha256": body.sha256}, date
