"""Requests over the limit get status 413 and never reach the application, and an answer begins with its first bytes."""

import asyncio
from typing import Any

import pytest

from components.core.serving.middleware import LIMIT, LateStart, RequestLimit


def sent(monkeypatch: pytest.MonkeyPatch, pieces: list[bytes], **headers: str) -> tuple[int, list[bytes]]:
    """Status of the answer, and the bodies that an application behind a limit of 10 bytes has read."""
    monkeypatch.setenv(LIMIT, "10")
    read: list[bytes] = []
    answers: list[dict[str, Any]] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        assert not message["more_body"]
        read.append(message["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive() -> dict[str, Any]:
        piece = pieces.pop(0)
        return {"type": "http.request", "body": piece, "more_body": bool(pieces)}

    async def send(message: Any) -> None:
        answers.append(message)

    named = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": named}
    asyncio.run(RequestLimit(application)(scope, receive, send))
    return answers[0]["status"], read


def test_a_request_within_the_limit_arrives_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sent(monkeypatch, [b"12345", b"67890"], content_length="10") == (200, [b"1234567890"])


def test_a_larger_request_is_refused_by_its_header_and_by_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sent(monkeypatch, [b"x"], content_length="11") == (413, [])
    assert sent(monkeypatch, [b"12345", b"67890", b"1"]) == (413, [])


def test_what_is_no_request_with_a_body_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIMIT, "1")
    passed: list[str] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        passed.append(scope["type"])

    async def run() -> None:
        limit = RequestLimit(application)
        for scope in ({"type": "lifespan"}, {"type": "http", "method": "GET", "headers": []}):
            await limit(scope, None, None)  # type: ignore[arg-type]

    asyncio.run(run())
    assert passed == ["lifespan", "http"]


def test_an_answer_begins_with_its_first_bytes() -> None:
    seen: list[str] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        seen.append("first token")
        for more in (True, False):
            await send({"type": "http.response.body", "body": b"x", "more_body": more})

    async def send(message: Any) -> None:
        seen.append(message["type"].rpartition(".")[2])

    asyncio.run(LateStart(application)({"type": "http"}, None, send))  # type: ignore[arg-type]
    assert seen == ["first token", "start", "body", "body"]


def test_what_is_no_answer_is_sent_as_it_is() -> None:
    seen: list[str] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "lifespan.startup.complete"})

    async def send(message: Any) -> None:
        seen.append(message["type"])

    asyncio.run(LateStart(application)({"type": "lifespan"}, None, send))  # type: ignore[arg-type]
    assert seen == ["lifespan.startup.complete"]
