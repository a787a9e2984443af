"""ASGI middleware of a vLLM server behind a gateway: `--middleware components.core.serving.middleware.RequestLimit`."""

import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

LIMIT = "TESSERA_MAX_REQUEST_BYTES"
"""Environment variable with the largest body of a request, bytes."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]


class RequestLimit:
    """Answers a larger request with status 413 before the application has read it.

    The Gateway API has no such limit, and proxies that have one hold back the whole answer too, which ends streaming.
    """

    def __init__(self, app: Application) -> None:
        self._app, self._limit = app, int(os.environ[LIMIT])

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass a request on with its whole body, or refuse it; what is no request passes."""
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD"):
            return await self._app(scope, receive, send)
        announced = int(dict(scope["headers"]).get(b"content-length", 0))
        body = None if announced > self._limit else await self._read(receive)
        if body is None:
            return await self._refuse(send)
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        await self._app(scope, replay, send)

    async def _read(self, receive: Receive) -> bytes | None:
        """The body; None where it is larger than the limit, or the client has left."""
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return None
            body, more = body + message.get("body", b""), message.get("more_body", False)
            if len(body) > self._limit:
                return None
        return body

    async def _refuse(self, send: Send) -> None:
        """Answer as vLLM does in case of an error."""
        text = f"the request is larger than {self._limit} bytes"
        body = json.dumps({"error": {"message": text, "type": "BadRequestError", "code": 413}}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 413, "headers": [*headers, (b"connection", b"close")]})
        await send({"type": "http.response.body", "body": body})


class LateStart:
    """Sends the status of an answer together with its first bytes.

    vLLM sends it as soon as it has read the request. A proxy written in Go, such as Traefik, then cuts the answer if it
    has not noticed the end of the request yet: it stops reading a request once it passes on an answer. On a busy
    machine one streamed answer in five came to its end empty, with status 200 (golang/go#40747).
    """

    def __init__(self, app: Application) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass a request on; what is no request passes."""
        held: list[Message] = []

        async def send_late(message: Message) -> None:
            held.append(message)
            if message["type"] != "http.response.start":
                while held:
                    await send(held.pop(0))

        await self._app(scope, receive, send_late if scope["type"] == "http" else send)
