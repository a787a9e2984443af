"""A limit on the size of requests to a vLLM server: `--middleware components.core.serving.request_limit.RequestLimit`.

The Gateway API has no such limit, and proxies that have one hold back the whole answer too, which ends streaming.
"""

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
    """ASGI middleware that answers a larger request with status 413 before the application has read it."""

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
