"""Request bodies: read whole, within a time and a size, before anything behind takes the request."""

from __future__ import annotations

import asyncio
import json

from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY_BYTES = 1_000_000
BODY_TIMEOUT_S = 5.0
"""Seconds within which a body must arrive."""
MAX_UNFINISHED_BYTES = 64_000_000
"""Bytes of unfinished bodies that one process keeps. It bounds the memory that slow senders can take."""


class ReadBody:
    """ASGI middleware: passes a request on when its body is complete, and refuses it with 408, 413 or 429 otherwise."""

    def __init__(
        self, app: ASGIApp, timeout_s: float = BODY_TIMEOUT_S, max_unfinished_bytes: int = MAX_UNFINISHED_BYTES
    ) -> None:
        self._app, self._timeout_s, self._max_unfinished_bytes = app, timeout_s, max_unfinished_bytes
        self._unfinished_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        body = bytearray()
        try:
            async with asyncio.timeout(self._timeout_s):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return
                    body += message.get("body", b"")
                    self._unfinished_bytes += len(message.get("body", b""))
                    more = message.get("more_body", False)
                    if len(body) > MAX_BODY_BYTES:
                        return await refuse(send, 413, f"the body is larger than {MAX_BODY_BYTES} bytes", close=True)
                    if more and self._unfinished_bytes > self._max_unfinished_bytes:
                        return await refuse(send, 429, TOO_MANY, retry=True, close=True)
        except TimeoutError:
            seconds = f"{self._timeout_s:g}"
            return await refuse(send, 408, f"the body did not arrive within {seconds} seconds", close=True)
        finally:
            self._unfinished_bytes -= len(body)
        await self._app(scope, replay(bytes(body), receive), send)


TOO_MANY = "too many requests wait; try again after Retry-After seconds"


def replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives a body that was read before, and then what comes after it."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Message:
        return messages.pop() if messages else await receive()

    return next_message


async def refuse(send: Send, status: int, reason: str, *, retry: bool = False, close: bool = False) -> None:
    """Send a refusal: `{"detail": reason}`. retry: with Retry-After. close: end the connection, whose rest is not read."""
    content = json.dumps({"detail": reason}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(content))]
    headers += [(b"retry-after", b"1")] * retry + [(b"connection", b"close")] * close
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
