"""Load on an HTTP endpoint from one process: a number of callers that take turns, or requests at a rate whatever comes back.

Plain sockets instead of an HTTP library: the machine that is measured also runs this, and a request must cost it little.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import time
from collections import Counter
from collections.abc import Sequence
from urllib.parse import urlsplit

MAX_CONNECTIONS = 1000
NO_ANSWER = 0


@dataclasses.dataclass(frozen=True)
class Outcome:
    """sent: seconds since the start; status: NO_ANSWER if the connection ended without one; took: seconds."""

    sent: float
    status: int
    took: float
    retry_after: str | None = None


@dataclasses.dataclass(frozen=True)
class Outcomes:
    all: list[Outcome]
    seconds: float

    @property
    def statuses(self) -> Counter[int]:
        return Counter(outcome.status for outcome in self.all)

    @property
    def rate(self) -> float:
        """Requests with status 200 per second."""
        return self.statuses[200] / self.seconds

    def ages(self, status: int = 200) -> list[float]:
        return sorted(outcome.took for outcome in self.all if outcome.status == status)


def take_turns(url: str, question: dict[str, object], callers: int, seconds: float, **headers: str) -> Outcomes:
    """Each caller sends its next request when the last one was answered."""

    async def scenario() -> Outcomes:
        target = _Target(url, question, headers)

        async def caller() -> list[Outcome]:
            outcomes = []
            while time.monotonic() < target.began + seconds:
                outcomes.append(await target.ask())
            return outcomes

        outcomes = await asyncio.gather(*(caller() for _ in range(callers)))
        return Outcomes([one for of_caller in outcomes for one in of_caller], time.monotonic() - target.began)

    return asyncio.run(scenario())


def offer(url: str, question: dict[str, object], rate: float, seconds: float, **headers: str) -> Outcomes:
    """Requests at a constant rate, whatever comes back; all are waited for. At most MAX_CONNECTIONS are open at once: a
    request beyond that waits on this side, and this time counts."""

    async def scenario() -> Outcomes:
        target = _Target(url, question, headers)
        asked = []
        for number in range(int(rate * seconds)):
            due = target.began + number / rate
            if due > time.monotonic():
                await asyncio.sleep(due - time.monotonic())
            asked.append(asyncio.create_task(target.ask(due)))
        return Outcomes(list(await asyncio.gather(*asked)), seconds)

    return asyncio.run(scenario())


class _Target:
    def __init__(self, url: str, question: dict[str, object], headers: dict[str, str]) -> None:
        place = urlsplit(url)
        body = json.dumps(question).encode()
        head = {
            "host": place.netloc, "content-type": "application/json", "content-length": str(len(body)), **headers,
        }  # fmt: skip
        lines = [f"POST {place.path} HTTP/1.1", *(f"{name}: {value}" for name, value in head.items()), "", ""]
        self._request = "\r\n".join(lines).encode() + body
        self._host, self._port = place.hostname, place.port
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._places = asyncio.Semaphore(MAX_CONNECTIONS)
        self.began = time.monotonic()

    async def ask(self, due: float | None = None) -> Outcome:
        due = due or time.monotonic()
        status, headers = NO_ANSWER, {}
        async with self._places:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                status, headers = await self._exchange()
        return Outcome(due - self.began, status, time.monotonic() - due, headers.get("retry-after"))

    async def _exchange(self) -> tuple[int, dict[str, str]]:
        reader, writer = self._idle.pop() if self._idle else await asyncio.open_connection(self._host, self._port)
        try:
            writer.write(self._request)
            first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().splitlines()
            headers = _headers(lines)
            await reader.readexactly(int(headers["content-length"]))
        except BaseException:
            writer.close()
            raise
        if headers.get("connection") == "close":
            writer.close()
        else:
            self._idle.append((reader, writer))
        return int(first.split()[1]), headers


def _headers(lines: Sequence[str]) -> dict[str, str]:
    pairs = (line.partition(":") for line in lines if line)
    return {name.lower(): value.strip() for name, _, value in pairs}
