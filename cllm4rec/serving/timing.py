"""The seconds that a replica took for a request, in the header `Server-Timing` (W3C) of its answer."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = b"server-timing"


class TellTime:
    """ASGI middleware of a replica: adds the header."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = time.monotonic()

        async def send_with_time(message: Message) -> None:
            if message["type"] == "http.response.start":
                milliseconds = 1000 * (time.monotonic() - began)
                message = {**message, "headers": [*message["headers"], (HEADER, b"replica;dur=%.1f" % milliseconds)]}
            await send(message)

        await self._app(scope, receive, send_with_time if scope["type"] == "http" else send)


def replica_seconds(headers: Iterable[tuple[bytes, bytes]]) -> float | None:
    """What `TellTime` of a replica wrote; None if an answer is not of a replica."""
    for name, value in headers:
        if name == HEADER and (found := re.fullmatch(rb"replica;dur=([\d.]+)", value)):
            return float(found[1]) / 1000
    return None
