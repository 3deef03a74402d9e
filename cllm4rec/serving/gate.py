"""The gate: what Serve's proxies do with a request before they route it to a replica.

Serve calls `middlewares` in every proxy if this is set in the environment of the cluster's nodes (`cllm4rec serve` sets it):

    RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=cllm4rec.serving.gate:middlewares

1. The body is read within a time limit, so that a slow sender takes no place in a replica.
2. The request is refused with 429 if more requests are under way than replicas answer in time. A refusal here costs a small
   part of a refusal by a replica, so overload does not slow the answers.
3. Where Serve has no answer, the caller gets 503 with Retry-After. If a replica dies, its requests are first sent to another.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import time

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cllm4rec.serving.bodies import READ_BODY, ReadBody, replay
from cllm4rec.serving.connections import NOT_LIMITED, limit_servers_of_this_process
from cllm4rec.serving.refusals import refuse
from cllm4rec.serving.timing import replica_seconds


def middlewares() -> list[Middleware]:
    """For Serve's proxies. The last one gets a request first."""
    window = Window()
    limit_servers_of_this_process(window.is_full)
    return [Middleware(Gate, window=window), Middleware(ReadBody)]


MAX_TRANSIT_S = 0.5
"""Seconds that a request may take to a replica and back, besides its time there. Longer means that the processors of the nodes
are overloaded by requests, and not the models."""


class Outcome(enum.Enum):
    ANSWERED = "a replica answered"
    SHED = "a replica refused it, because it had waited too long, or it was late on its way"
    NO_ANSWER = "no replica answered"


@dataclasses.dataclass(frozen=True)
class Place:
    """A request's place in the window: its number, and how many requests had been answered when it entered."""

    number: int
    answered_before: int


class Window:
    """How many requests may be under way, learned from which of them were answered.

    It is a congestion window, as that of TCP (RFC 5681). While it is in use, it grows with every answer. When a request is
    shed, it shrinks to less than the number of requests that were answered while this one waited in vain, which is what
    replicas can answer in that time, but at most by half; and then not again before a request is shed that entered later. So
    it needs no setting, follows the number and speed of the replicas, and several proxies share them.
    """

    START, LEAST = 64.0, 1.0
    FAST, SLOW = 1.0, 0.05
    """Growth with each answer: it doubles in a round trip below the size at which requests were shed, then adds 5 %."""

    def __init__(self) -> None:
        self.size, self.under_way = self.START, 0
        self._entered = self._answered = self._entered_at_cut = 0
        self._slow_from = math.inf

    def enter(self) -> Place | None:
        """None if the window is full."""
        if self.is_full():
            return None
        self.under_way += 1
        self._entered += 1
        return Place(self._entered, self._answered)

    def is_full(self) -> bool:
        return self.under_way >= int(self.size)

    def leave(self, place: Place, outcome: Outcome) -> None:
        if outcome is Outcome.ANSWERED:
            self._answered += 1
            if self.under_way * 2 > self.size:
                self.size += self.FAST if self.size < self._slow_from else self.SLOW
        elif place.number > self._entered_at_cut:
            answered_meanwhile = self._answered - place.answered_before
            self.size = max(self.LEAST, self.size / 2, min(self.size, 0.9 * answered_meanwhile))
            self._entered_at_cut = self._entered
            if outcome is Outcome.SHED:
                self._slow_from = self.size
        self.under_way -= 1


class Gate:
    """ASGI middleware around Serve's proxy. Must come after `ReadBody`, because it may send a request twice."""

    def __init__(self, app: ASGIApp, window: Window) -> None:
        self._app, self._window = app, window

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in NOT_LIMITED:
            return await self._app(scope, receive, send)
        place = self._window.enter()
        if place is None:
            return await refuse(send, 429)
        outcome = Outcome.NO_ANSWER
        try:
            outcome = await self._forward(scope, receive, send)
        finally:
            self._window.leave(place, outcome)

    async def _forward(self, scope: Scope, receive: Receive, send: Send) -> Outcome:
        began, body = time.monotonic(), (await receive())["body"]
        client = _Client(receive, send)
        for _ in range(2):
            # The body travels with the scope: a replica need not come back for it while the proxy is busy.
            await self._app({**scope, READ_BODY: body}, replay(body, client.receive), client.send)
            if client.status is not None or client.is_gone:
                break
        else:
            await client.send_no_answer()
        if client.status == 503:
            return Outcome.NO_ANSWER
        took, in_replica = time.monotonic() - began, client.seconds_in_replica
        is_late = in_replica is not None and took - in_replica > MAX_TRANSIT_S
        return Outcome.SHED if is_late or client.status == 429 else Outcome.ANSWERED


class _Client:
    """The caller's connection. Serve's own 408 (no replica answered in time) becomes 503, and a 503 gets Retry-After."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        self.status: int | None = None
        self.is_gone = False
        self.seconds_in_replica: float | None = None

    async def receive(self) -> Message:
        message = await self._receive()
        self.is_gone = self.is_gone or message["type"] == "http.disconnect"
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            if message["status"] in (408, 503):
                return await self.send_no_answer()
            self.status = message["status"]
            self.seconds_in_replica = replica_seconds(message["headers"])
        if self.status != 503:
            await self._send(message)

    async def send_no_answer(self) -> None:
        self.status = 503
        await refuse(self._send, 503)
