"""Reading of request bodies (cllm4rec.serving.bodies), at the application and in front of Serve's router."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from cllm4rec.serving.bodies import ReadBody
from cllm4rec.serving.refusals import MAX_BODY_BYTES

Messages = list[dict[str, Any]]


def read(*pieces: bytes | float, is_complete: bool = True, **options: Any) -> tuple[bytes | None, Messages]:
    """Send pieces of a body, waiting for the seconds between them; returns what the application got and what was sent back."""
    return asyncio.run(read_by(ReadBody(keeps := Keeps(), **options), keeps, pieces, is_complete))


class Keeps:
    body: bytes | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        assert not message["more_body"]
        self.body = message["body"]
        assert (await receive())["type"] == "http.disconnect", "what comes after the body is still received"


async def read_by(reader: ReadBody, keeps: Keeps, pieces: Any, is_complete: bool) -> tuple[bytes | None, Messages]:
    async def messages() -> AsyncIterator[dict[str, Any]]:
        for piece in pieces:
            if isinstance(piece, float):
                await asyncio.sleep(piece)
            else:
                yield {"type": "http.request", "body": piece, "more_body": True}
        if is_complete:
            yield {"type": "http.request", "body": b"", "more_body": False}
        yield {"type": "http.disconnect"}

    sent: Messages = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await reader({"type": "http"}, messages().__anext__, send)
    return keeps.body, sent


def refusal(sent: Messages) -> tuple[int, str, dict[str, str]]:
    headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], json.loads(sent[1]["body"])["detail"], headers


def test_application_gets_the_body_whole():
    assert read(b"in ", b"pieces") == (b"in pieces", [])
    assert read() == (b"", [])


def test_slow_body_is_refused_and_its_connection_closed_however_steadily_it_drips():
    body, sent = read(*[b"a", 0.03] * 20, timeout_s=0.1)
    status, reason, headers = refusal(sent)
    assert (body, status, headers["connection"]) == (None, 408, "close")
    assert reason == "the body did not arrive within 5 seconds"


def test_time_limit_is_that_of_the_body_and_not_of_the_answer():
    async def scenario() -> str:
        async def answers_late(scope: Any, receive: Any, send: Any) -> None:
            await asyncio.sleep(0.1)
            await send({"type": "an answer"})

        reader = ReadBody(answers_late, timeout_s=0.03)
        _, sent = await read_by(reader, Keeps(), [b"a"], True)
        return sent[0]["type"]

    assert asyncio.run(scenario()) == "an answer"


def test_large_body_is_refused_before_its_end():
    endless = [b"a" * 100_000] * 20
    body, sent = read(*endless, is_complete=False)
    assert body is None
    assert refusal(sent)[0] == 413
    assert read(b"a" * MAX_BODY_BYTES)[0] == b"a" * MAX_BODY_BYTES


def test_body_whose_sender_leaves_reaches_nobody():
    assert read(b"half a bo", is_complete=False) == (None, [])


@pytest.mark.parametrize(("limit", "statuses"), [(1500, [429]), (2500, [])])
def test_bodies_that_are_being_read_take_a_bounded_memory(limit, statuses):
    """One sender holds 1,000 bytes of an unfinished body while another one sends as much."""

    async def scenario() -> list[int]:
        keeps = Keeps()
        reader = ReadBody(keeps, max_unfinished_bytes=limit)
        slow = asyncio.create_task(read_by(reader, Keeps(), [b"a" * 1000, 0.1], True))
        await asyncio.sleep(0.01)
        _, sent = await read_by(reader, keeps, [b"b" * 1000], True)
        await slow
        _, again = await read_by(reader, keeps, [b"c" * 1000], True)
        assert again == [], "what was read is forgotten"
        return [message["status"] for message in sent[:1]]

    assert asyncio.run(scenario()) == statuses
