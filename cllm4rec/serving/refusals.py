"""The statuses of all answers but 200: one table for the gate, the application, the contract and the documentation."""

from __future__ import annotations

import json

from starlette.types import Message, Send

MAX_BODY_BYTES = 1_000_000
BODY_TIMEOUT_S = 5.0
"""Seconds within which a body must arrive."""

REFUSALS = {
    400: "the body is not JSON in UTF-8",
    401: "send a key as Authorization: Bearer KEY or X-API-Key: KEY",
    404: "no such route, or the model knows no item with this id",
    405: "the route has another method",
    408: f"the body did not arrive within {BODY_TIMEOUT_S:g} seconds",
    413: f"the body is larger than {MAX_BODY_BYTES:,} bytes",
    415: "send the body with content-type: application/json",
    422: "the body is empty or not an object, or a field is missing, unknown or out of its bounds",
    429: "too many requests wait; try again after Retry-After seconds",
    500: "the answer failed; the replica's log says why",
    503: "no replica answers, or no model is loaded yet; try again after Retry-After seconds",
}
"""The `detail` of each. Only that of 422 is a list instead, of the wrong fields."""

_HEADERS = {
    401: [(b"www-authenticate", b"Bearer")],
    408: [(b"connection", b"close")],  # the rest of the body is not read
    413: [(b"connection", b"close")],
    429: [(b"retry-after", b"1")],
    503: [(b"retry-after", b"1")],
}


def refusal(status: int) -> tuple[Message, Message]:
    """The ASGI messages of a refusal."""
    content = json.dumps({"detail": REFUSALS[status]}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(content))]
    return (
        {"type": "http.response.start", "status": status, "headers": headers + _HEADERS.get(status, [])},
        {"type": "http.response.body", "body": content},
    )


async def refuse(send: Send, status: int) -> None:
    for message in refusal(status):
        await send(message)
