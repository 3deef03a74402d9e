"""Request bodies: read whole, within a time and a size, before anything behind takes the request."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cllm4rec.serving.refusals import BODY_TIMEOUT_S, MAX_BODY_BYTES, refuse

MAX_UNFINISHED_BYTES = 64_000_000
"""Bytes of unfinished bodies that one process keeps. It bounds the memory that slow senders can take."""
READ_BODY = "cllm4rec.body"
"""Key of the ASGI scope that holds a body which was read before the scope was sent here."""


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
        if READ_BODY in scope:
            return await self._app(scope, replay(scope[READ_BODY], receive), send)
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
                        return await refuse(send, 413)
                    if more and self._unfinished_bytes > self._max_unfinished_bytes:
                        return await refuse(send, 429)
        except TimeoutError:
            return await refuse(send, 408)
        finally:
            self._unfinished_bytes -= len(body)
        await self._app(scope, replay(bytes(body), receive), send)


def replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives a body that was read before, and then what comes after it."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Message:
        return messages.pop() if messages else await receive()

    return next_message
