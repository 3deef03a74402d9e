"""What uvicorn, Serve's HTTP server, lacks under attack and overload: a time limit for headers, refusals that cost little, and
connections that are accepted as fast as they come.

It refuses with 429 as soon as the headers are parsed, before a request is built: a third of the work of a refusal by
an ASGI application, which decides how much is left for the requests that are answered.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import uvicorn
import uvicorn.protocols.http.auto
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from cllm4rec.serving.refusals import refusal

HEADER_TIMEOUT_S = 5.0
"""Seconds within which the headers of a request must arrive."""
ACCEPTED_AT_ONCE = 16
"""Connections that are accepted in one turn of the event loop."""
NOT_LIMITED = ("/healthz", "/readyz", "/-/healthz", "/-/routes")
"""Paths that are answered however many requests wait."""

_NOT_LIMITED = tuple(path.encode() for path in NOT_LIMITED)


_REFUSED: Any = SimpleNamespace(response_complete=True, message_event=asyncio.Event())
"""Stands for a request that was answered before it was built; uvicorn then ignores the rest of it."""


def limited_protocol(
    is_full: Callable[[], bool], header_timeout_s: float = HEADER_TIMEOUT_S
) -> type[HttpToolsProtocol]:
    """uvicorn's protocol with both. is_full: whether no further request is let through."""
    head, body = refusal(429)
    lines = [b"HTTP/1.1 429 Too Many Requests", *(b"%s: %s" % header for header in head["headers"]), b"", body["body"]]
    answer = b"\r\n".join(lines)

    class LimitedProtocol(HttpToolsProtocol):
        _header_clock: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._header_clock = self.loop.call_later(header_timeout_s, self.timeout_keep_alive_handler)

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_header_clock()
            super().connection_lost(exc)

        def on_message_begin(self) -> None:
            super().on_message_begin()
            if self._header_clock is None:
                self._header_clock = self.loop.call_later(header_timeout_s, self.timeout_keep_alive_handler)

        def on_headers_complete(self) -> None:
            self._stop_header_clock()
            is_pipelined = self.cycle is not None and not self.cycle.response_complete
            if is_pipelined or not is_full() or self.url.partition(b"?")[0] in _NOT_LIMITED:
                return super().on_headers_complete()
            self.cycle = _REFUSED
            self.transport.write(answer)
            if not self.parser.should_keep_alive():
                self.transport.close()

        def on_message_complete(self) -> None:
            if self.cycle is _REFUSED:
                self._unset_keepalive_if_required()
                self.timeout_keep_alive_task = self.loop.call_later(
                    self.timeout_keep_alive, self.timeout_keep_alive_handler
                )
            super().on_message_complete()

        def _stop_header_clock(self) -> None:
            if self._header_clock is not None:
                self._header_clock.cancel()
                self._header_clock = None

    return LimitedProtocol


class QuickServer(uvicorn.Server):
    """Accepts ACCEPTED_AT_ONCE connections in a turn of the event loop.

    uvloop accepts one for each listening socket (libuv 1.48). A turn of a busy proxy takes 10 ms, so that callers who connect
    anew waited for seconds. Hence the socket is listened to several times.
    """

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._copies = [one.dup() for one in sockets or () for _ in range(ACCEPTED_AT_ONCE - 1)]
        await super().startup([*sockets, *self._copies] if sockets else None)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown([*sockets, *self._copies] if sockets else None)


def limit_servers_of_this_process(is_full: Callable[[], bool]) -> None:
    """Serve has no options for uvicorn's classes, so this replaces those that it takes."""
    uvicorn.protocols.http.auto.AutoHTTPProtocol = limited_protocol(is_full)
    uvicorn.Server = QuickServer  # type: ignore[misc]
