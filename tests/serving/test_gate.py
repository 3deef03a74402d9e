"""What Serve's proxies do with a request: cllm4rec.serving.gate, without Ray."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
import uvicorn
import uvicorn.protocols.http.auto
from starlette.responses import JSONResponse, Response
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from cllm4rec.cluster import ENVIRONMENT
from cllm4rec.serving.bodies import ReadBody
from cllm4rec.serving.gate import Gate, Outcome, Place, Window, middlewares
from cllm4rec.serving.refusals import REFUSALS
from cllm4rec.serving.timing import TellTime

BATCH, BATCH_S, MAX_WAIT_S = 32, 0.25, 1.0


def simulate(offered_per_s: float, seconds: float, capacity: Callable[[float], int]) -> list[tuple[int, int, int]]:
    """A replica that answers a batch of up to `capacity(time)` requests in BATCH_S and sheds what is too old, behind a window.

    Returns (answered, shed, refused by the window) of each batch.
    """
    now, due, waiting, seen = 0.0, 0.0, deque[tuple[Place, float]](), []
    window = Window()
    while now < seconds:
        now += BATCH_S
        batch = [waiting.popleft() for _ in range(min(capacity(now), len(waiting)))]
        too_old = [waiting.popleft() for _, entered_at in list(waiting) if entered_at < now - MAX_WAIT_S]
        for place, _ in batch:
            window.leave(place, Outcome.ANSWERED)
        for place, _ in too_old:
            window.leave(place, Outcome.SHED)
        due += offered_per_s * BATCH_S
        places = [window.enter() for _ in range(int(due))]
        due -= int(due)
        waiting += [(place, now) for place in places if place is not None]
        seen.append((len(batch), len(too_old), places.count(None)))
    return seen


@pytest.mark.parametrize("times", [0.9, 1.5, 3, 10, 30])
def test_window_lets_through_what_replicas_answer_and_refuses_the_rest_itself(times):
    seen = simulate(times * BATCH / BATCH_S, seconds=20, capacity=lambda _: BATCH)
    answered, shed, refused = (sum(column) for column in zip(*seen, strict=True))
    assert answered > 0.98 * min(times, 1) * 20 * BATCH / BATCH_S
    assert shed < 0.1 * answered, "at first it has to find out"
    assert sum(shed for _, shed, _ in seen[40:]) < 0.02 * sum(batch for batch, _, _ in seen[40:])
    assert (refused > 0) == (times > 1)


def test_window_follows_the_number_of_replicas_down_and_up():
    def capacity(now: float) -> int:
        return BATCH if 20 <= now < 40 else 4 * BATCH

    seen = simulate(10 * BATCH / BATCH_S, seconds=60, capacity=capacity)
    answered = [batch for batch, _, _ in seen]
    per_s = int(1 / BATCH_S)
    assert min(answered[8 * per_s : 19 * per_s]) == 4 * BATCH
    assert min(answered[20 * per_s : 39 * per_s]) == BATCH
    assert sum(shed for _, shed, _ in seen[25 * per_s : 39 * per_s]) < 0.02 * sum(answered[25 * per_s : 39 * per_s])
    assert sum(answered[50 * per_s :]) > 0.9 * 10 * per_s * 4 * BATCH


def test_window_is_as_large_as_before_soon_after_a_time_without_any_answer():
    window = Window()

    def round_trip(outcome: Outcome) -> int:
        places = [place for place in (window.enter() for _ in range(1000)) if place is not None]
        for place in places:
            window.leave(place, outcome)
        return len(places)

    assert round_trip(Outcome.ANSWERED) == Window.START
    assert round_trip(Outcome.SHED) > Window.START
    before = round_trip(Outcome.ANSWERED)
    without = [round_trip(Outcome.NO_ANSWER) for _ in range(20)]
    assert without[-1] == 1, "one request always gets through, to find out"
    after = [round_trip(Outcome.ANSWERED) for _ in range(12)]
    assert after[-1] >= before


# The middleware


async def answers(scope: Any, receive: Any, send: Any) -> None:
    body = (await receive())["body"]
    await JSONResponse({"sent": body.decode()})(scope, receive, send)


async def dies(scope: Any, receive: Any, send: Any) -> None:
    """As Serve's proxy ends for a request whose replica died."""


def says(status: int) -> Callable[..., Awaitable[None]]:
    return Response("of Serve", status_code=status)


def in_turn(*apps: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    left = list(apps)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await left.pop(0)(scope, receive, send)

    return app


@pytest.fixture(autouse=True)
def unchanged_server(monkeypatch):
    """`middlewares` changes the servers of its process."""
    monkeypatch.setattr(uvicorn.protocols.http.auto, "AutoHTTPProtocol", HttpToolsProtocol)
    monkeypatch.setattr(uvicorn, "Server", uvicorn.Server)


def gate_around(app: Any, **options: Any) -> Any:
    """In the order in which Serve applies the middlewares."""
    for middleware in middlewares():
        app = middleware.cls(app, *middleware.args, **(middleware.kwargs | (options if middleware.cls is Gate else {})))
    return app


def ask(app: Any, path: str = "/v1/recommend", count: int = 1, **request: Any) -> list[httpx.Response]:
    async def scenario() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://there") as client:
            return await asyncio.gather(*(client.post(path, **request) for _ in range(count)))

    return asyncio.run(scenario())


def test_request_passes_unchanged():
    (response,) = ask(gate_around(answers), content=b"the body")
    assert (response.status_code, response.json()) == (200, {"sent": "the body"})


def test_body_is_in_the_scope_so_that_a_replica_does_not_come_back_for_it():
    async def replica(scope: Any, receive: Any, send: Any) -> None:
        async def proxy_is_busy() -> Any:
            raise AssertionError("asked the proxy")

        await ReadBody(answers)(scope, proxy_is_busy, send)

    (response,) = ask(gate_around(replica), content=b"the body")
    assert response.json() == {"sent": "the body"}


@pytest.mark.parametrize(("inside", "outside", "is_smaller"), [(0.3, 0.0, False), (0.0, 0.3, True)])
def test_window_shrinks_when_the_way_to_a_replica_takes_long_and_not_when_its_answer_does(
    monkeypatch, inside, outside, is_smaller
):
    monkeypatch.setattr("cllm4rec.serving.gate.MAX_TRANSIT_S", 0.2)

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(inside)
        await answers(scope, receive, send)

    async def far(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(outside)
        await TellTime(slow)(scope, receive, send)

    window = Window()
    (response,) = ask(gate_around(far, window=window), content=b"")
    assert response.status_code == 200
    assert (window.size < Window.START) == is_smaller


def test_request_whose_replica_died_is_sent_to_another_one():
    (response,) = ask(gate_around(in_turn(dies, answers)), content=b"the body")
    assert (response.status_code, response.json()) == (200, {"sent": "the body"})


@pytest.mark.parametrize("app", [in_turn(dies, dies), says(408), says(503)])
def test_where_no_replica_answers_the_caller_is_told_when_to_come_again(app):
    (response,) = ask(gate_around(app))
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert response.json() == {"detail": REFUSALS[503]}


def test_requests_beyond_the_window_are_refused_and_health_is_answered():
    release = asyncio.Event()

    async def waits(scope: Any, receive: Any, send: Any) -> None:
        await release.wait()
        await answers(scope, receive, send)

    window = Window()
    window.size = 3.0
    app = gate_around(waits, window=window)

    async def scenario() -> tuple[list[httpx.Response], httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://there") as client:
            asked = [asyncio.create_task(client.post("/v1/recommend")) for _ in range(5)]
            health = asyncio.create_task(client.get("/healthz"))
            await asyncio.sleep(0.01)
            refused = [task for task in asked if task.done()]
            assert len(refused) == 2
            release.set()
            return [await task for task in asked], await health

    responses, health = asyncio.run(scenario())
    assert sorted(response.status_code for response in responses) == [200, 200, 200, 429, 429]
    assert {response.headers["retry-after"] for response in responses if response.status_code == 429} == {"1"}
    assert health.status_code == 200
    assert window.under_way == 0


def test_commands_give_the_gate_to_the_proxies():
    path, _, name = ENVIRONMENT["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"].partition(":")
    assert (path, name) == (middlewares.__module__, middlewares.__name__)
