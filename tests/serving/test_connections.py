"""Connections of Serve's proxies (cllm4rec.serving.connections): uvicorn with our protocol, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
import uvloop
from starlette.responses import PlainTextResponse

from cllm4rec.serving.connections import QuickServer, limited_protocol

REQUEST = b"POST /v1/recommend HTTP/1.1\r\nhost: there\r\ncontent-length: 4\r\n\r\nbody"
HEALTH = b"GET /healthz?deep=1 HTTP/1.1\r\nhost: there\r\n\r\n"


class Connection:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        head, *lines = (await self.reader.readuntil(b"\r\n\r\n")).decode().splitlines()
        headers = dict(line.split(": ", 1) for line in lines if line)
        return int(head.split()[1]), headers, await self.reader.readexactly(int(headers["content-length"]))

    async def ask(self, request: bytes) -> int:
        self.writer.write(request)
        return (await self.answer())[0]


def with_server(
    scenario: Callable[[Callable[[], Awaitable[Connection]], Any], Awaitable[None]], **options: Any
) -> None:
    """Run a scenario with a function that connects and the server's state: whether it `is_full`, and the paths it got."""
    state = SimpleNamespace(is_full=False, paths=[])

    async def app(scope: Any, receive: Any, send: Any) -> None:
        state.paths.append(scope["path"])
        while (await receive())["more_body"]:
            pass
        await PlainTextResponse("the answer")(scope, receive, send)

    async def run() -> None:
        protocol = limited_protocol(lambda: state.is_full, **options)
        listening = socket.create_server(("127.0.0.1", 0))
        server = QuickServer(uvicorn.Config(app, http=protocol, lifespan="off", log_config=None))
        running = asyncio.create_task(server.serve(sockets=[listening]))
        while not server.started:
            await asyncio.sleep(0.01)
        port = listening.getsockname()[1]
        writers = []

        async def connect() -> Connection:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writers.append(writer)
            return Connection(reader, writer)

        try:
            await scenario(connect, state)
        finally:
            for writer in writers:
                writer.close()
            server.should_exit = True
            await running

    asyncio.Runner(loop_factory=uvloop.new_event_loop).run(run())


def test_refusal_is_complete_and_leaves_the_connection_usable():
    async def scenario(connect, state) -> None:
        connection = await connect()
        assert await connection.ask(REQUEST) == 200
        state.is_full = True
        for _ in range(2):
            connection.writer.write(REQUEST)
            status, headers, body = await connection.answer()
            assert (status, headers["retry-after"]) == (429, "1")
            assert body == b'{"detail": "too many requests wait; try again after Retry-After seconds"}'
        assert state.paths == ["/v1/recommend"], "what is refused reaches nobody"
        assert await connection.ask(HEALTH) == 200
        state.is_full = False
        assert await connection.ask(REQUEST) == 200

    with_server(scenario)


def test_body_that_comes_after_its_refusal_is_not_taken_for_a_request():
    async def scenario(connect, state) -> None:
        state.is_full = True
        connection = await connect()
        head, body = REQUEST[:-4], REQUEST[-4:]
        assert await connection.ask(head) == 429
        connection.writer.write(body)
        await asyncio.sleep(0.02)
        state.is_full = False
        assert await connection.ask(REQUEST) == 200

    with_server(scenario)


def test_answers_keep_the_order_of_requests_that_are_sent_at_once():
    async def scenario(connect, state) -> None:
        connection = await connect()
        connection.writer.write(REQUEST[:-4])
        await asyncio.sleep(0.02)
        state.is_full = True
        connection.writer.write(REQUEST[-4:] + REQUEST)
        assert [(await connection.answer())[0] for _ in range(2)] in ([200, 200], [200, 429])

    with_server(scenario)


def test_refusal_closes_a_connection_that_is_to_be_closed():
    async def scenario(connect, state) -> None:
        state.is_full = True
        connection = await connect()
        assert await connection.ask(REQUEST.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n")) == 429
        assert await connection.reader.read() == b""

    with_server(scenario)


@pytest.mark.parametrize("requests_before", [0, 1])
@pytest.mark.parametrize("is_full", [False, True])
def test_headers_that_drip_end_with_their_connection(requests_before, is_full):
    async def scenario(connect, state) -> None:
        state.is_full = is_full
        connection = await connect()
        for _ in range(requests_before):
            await connection.ask(REQUEST)
        began = time.monotonic()
        connection.writer.write(b"POST /v1/recommend HTTP/1.1\r\n")
        with contextlib.suppress(ConnectionError):  # what is written to a closed connection may be answered by a reset
            while not connection.reader.at_eof():
                connection.writer.write(b"x-header: more\r\n")
                await asyncio.sleep(0.05)
                assert time.monotonic() < began + 5
            assert await connection.reader.read() == b""

    with_server(scenario, header_timeout_s=0.2)


def test_time_limit_of_headers_is_not_one_of_answers():
    async def scenario(connect, state) -> None:
        connection = await connect()
        connection.writer.write(REQUEST[:-4])
        await asyncio.sleep(0.3)
        assert await connection.ask(REQUEST[-4:]) == 200

    with_server(scenario, header_timeout_s=0.1)


def test_callers_who_connect_at_once_do_not_wait_for_a_turn_of_the_busy_loop_each():
    async def scenario(connect, state) -> None:
        turns, address = 0, (await connect()).writer.get_extra_info("peername")
        callers = [socket.create_connection(address) for _ in range(64)]
        for caller in callers:
            caller.sendall(REQUEST)
        while len(state.paths) < len(callers) and turns < 1000:
            turns += 1
            await asyncio.sleep(0)
        for caller in callers:
            caller.close()
        assert turns < len(callers)

    with_server(scenario)
