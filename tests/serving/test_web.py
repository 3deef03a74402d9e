"""The HTTP interface: routes, errors and keys (cllm4rec.serving.web, cllm4rec.serving.schemas)."""

from __future__ import annotations

import asyncio
import logging
import re
from pathlib import Path

import httpx
import pytest
import schemathesis
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, settings
from support.serving import FakeScorer, ask, client, post, recommender

from cllm4rec.config import MAX_ID_CHARS, parse_config
from cllm4rec.errors import ConfigError
from cllm4rec.serving.batching import OverloadError
from cllm4rec.serving.bodies import ReadBody
from cllm4rec.serving.gate import Gate, Window
from cllm4rec.serving.refusals import MAX_BODY_BYTES, REFUSALS
from cllm4rec.serving.schemas import MAX_TEXT_CHARS
from cllm4rec.serving.web import api_keys_of, create_app


def test_answer_over_http_is_the_recommenders_answer_with_texts_cut():
    request = {"user_id": "user4", "history": ["item20", "ghost"], "exclude": ["item00"], "k": 4}
    response = client().post("/v1/recommend", json=request)
    assert response.status_code == 200
    answer = ask(**request)
    items = [item._asdict() | {"text": item.text[:MAX_TEXT_CHARS]} for item in answer.items]
    assert len(answer.items[0].text) > MAX_TEXT_CHARS
    assert response.json() == {
        "items": items, "model_version": "fake-1", "cold_start": False, "ignored_items": ["ghost"],
    }  # fmt: skip


def test_blanks_around_an_id_mean_nothing_as_in_prepare():
    asked = {"user_id": "user4", "history": ["item20"], "exclude": ["item00"], "k": 4}
    blank = {"user_id": " user4\n", "history": ["\titem20"], "exclude": ["item00 "], "k": 4}
    first, second = (client().post("/v1/recommend", json=request) for request in (asked, blank))
    assert first.status_code == second.status_code == 200
    assert first.json() == second.json()


def test_every_id_that_prepare_may_keep_can_be_asked_for():
    assert post(b'{"user_id": "%s"}' % (b"u" * MAX_ID_CHARS)).status_code == 200
    data = {"interactions": {"path": "a.jsonl"}, "max_id_chars": MAX_ID_CHARS + 1}
    with pytest.raises(ConfigError, match=f"max_id_chars is {MAX_ID_CHARS + 1} and should be at most {MAX_ID_CHARS}"):
        parse_config({"output_dir": "out", "data": data})


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b"{}", "history"),
        (b'{"user_id": null}', "history"),
        (b'{"user_id": 12}', "user_id"),
        (b'{"user_id": ""}', "user_id"),
        (b'{"user_id": "  "}', "user_id"),
        (b'{"user_id": "%s"}' % (b"u" * (MAX_ID_CHARS + 1)), "user_id"),
        (b'{"user_id": "\\ud800"}', "user_id"),
        (b'{"user_id": "u", "k": 0}', "k"),
        (b'{"user_id": "u", "k": 1000000000}', "k"),
        (b'{"user_id": "u", "k": "10"}', "k"),
        (b'{"user_id": "u", "k": true}', "k"),
        (b'{"user_id": "u", "k": 2.5}', "k"),
        (b'{"user_id": "u", "k": NaN}', "k"),
        (b'{"user_id": "u", "k": 1e999}', "k"),
        (b'{"history": "item01"}', "history"),
        (b'{"history": ["item01", 2]}', "history"),
        (b'{"history": [%s]}' % b",".join([b'"i"'] * 10_001), "history"),
        (b'{"user_id": "u", "exclude": [%s]}' % b",".join([b'"i"'] * 10_001), "exclude"),
    ],
)
def test_bad_request_is_refused_with_the_field_named(body, field):
    response = post(body)
    assert response.status_code == 422
    problems = response.json()["detail"]
    assert [problem["loc"][:2] for problem in problems] == [["body", field]]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b'{"user_id": "u"} and more', 400),
        (b"", 422),
        (b"[]", 422),
        (b'{"user_id": "\xff"}', 400),
        (b'{"user_id": "u", "\\ud800": 1}', 422),
        (b"[" * 100_000, 400),
    ],
)
def test_body_that_is_no_json_object_is_refused_and_never_breaks_the_server(body, status):
    assert post(body).status_code == status


@pytest.mark.parametrize(
    "body",
    [
        b'{"user_id": "u", "K": 3}',
        b'{"history": [%s]}' % b",".join([b"1"] * 10_000),
        b'{"user_id": "u", "exclude": [%s]}' % b",".join([b'""'] * 10_000),
        b"{%s}" % b",".join(b'"canary%d": 1' % number for number in range(50_000)),
        b'{"user_id": 1, "k": "1", "history": [2, 3], "exclude": [4, 5]}',
    ],
)
def test_a_refusal_stays_small_however_much_is_wrong(body):
    response = post(body)
    assert response.status_code == 422
    assert len(response.json()["detail"]) <= 4
    assert len(response.content) < 1000
    assert "canary" not in response.text


def test_an_unknown_field_is_refused_with_the_fields_that_exist():
    assert "the fields are user_id, history, exclude, k" in post(b'{"user_id": "u", "K": 3}').text


def statuses() -> dict[int, str]:
    """The table of the documentation."""
    text = (Path(__file__).parents[2] / "docs/serving.md").read_text()
    return {int(status): detail for status, detail in re.findall(r"^\| (\d{3}) \| (.+) \|$", text, re.MULTILINE)}


def sheds(request):
    raise OverloadError


def breaks(request):
    raise RuntimeError


def answered(status: int) -> httpx.Response:
    """An answer with this status, as a caller gets it."""
    good, json_type = b'{"user_id": "u"}', {"content-type": "application/json"}
    if status in (408, 503):
        return asyncio.run(answered_by_the_gate(status))
    if status in (429, 500):
        app = create_app(*[sheds if status == 429 else breaks] * 2, lambda: None)
        return post(good, TestClient(app, raise_server_exceptions=False))
    method, path, body, headers = {
        400: ("POST", "/v1/recommend", good.decode().encode("utf-16"), json_type),
        401: ("POST", "/v1/recommend", good, json_type),
        404: ("GET", "/nowhere", b"", {}),
        405: ("GET", "/v1/recommend", b"", {}),
        413: ("POST", "/v1/recommend", b" " * (MAX_BODY_BYTES + 1), json_type),
        415: ("POST", "/v1/recommend", good, {}),
        422: ("POST", "/v1/recommend", b"{}", json_type),
    }[status]
    return client(("key",) if status == 401 else ()).request(method, path, content=body, headers=headers)


async def answered_by_the_gate(status: int) -> httpx.Response:
    async def dies(scope, receive, send):
        pass

    async def drips():
        await asyncio.sleep(1)
        yield b"{"

    app = ReadBody(Gate(dies, Window()), timeout_s=0.01)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://there") as caller:
        return await caller.post("/v1/recommend", content=drips() if status == 408 else b"")


@pytest.mark.parametrize("status", statuses())
def test_every_status_of_the_documentation_occurs_with_its_detail(status):
    response = answered(status)
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    detail = response.json()["detail"]
    assert isinstance(detail, list) if status == 422 else detail == statuses()[status]
    assert ("retry-after" in response.headers) == (status in (429, 503))


def test_documentation_and_contract_know_every_status():
    assert statuses() == REFUSALS
    contract = client().get("/openapi.json").json()["paths"]["/v1/recommend"]["post"]["responses"]
    described = {int(status): response["description"] for status, response in contract.items() if status != "200"}
    assert described.items() <= REFUSALS.items()
    assert REFUSALS.keys() - described.keys() == {404, 405}


@pytest.mark.parametrize("content_type", ["", "text/plain", "application/x-www-form-urlencoded", "application/jsonp"])
def test_body_that_is_not_said_to_be_json_is_refused_by_that_and_not_by_its_fields(content_type):
    headers = {"content-type": content_type} if content_type else {}
    response = client().post("/v1/recommend", content=b'{"user_id": "u"}', headers=headers)
    assert response.status_code == 415
    assert post(b'{"user_id": "u"}', **{"content-type": "Application/JSON; charset=utf-8"}).status_code == 200


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
def test_json_in_another_encoding_than_utf_8_is_refused(encoding):
    assert post('{"user_id": "u"}'.encode(encoding)).status_code == 400


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_probes_may_use_head(path):
    assert client().head(path).status_code == 200


def ask_many(*requests: object) -> httpx.Response:
    return client().post("/v1/recommend/many", json={"requests": requests})


def test_many_requests_get_the_answers_that_each_gets_alone():
    requests = [
        {"user_id": f"user{row % 7}", "history": [f"item{row % 30:02d}"], "k": 1 + row % 9} for row in range(50)
    ]
    response = ask_many(*requests)
    assert response.status_code == 200
    assert response.json()["answers"] == [client().post("/v1/recommend", json=one).json() for one in requests]


def test_wrong_one_of_many_requests_is_named_and_the_refusal_stays_small():
    response = ask_many({"user_id": "u"}, *[{"user_id": "canary", "k": 0, "canary": 1}] * 200)
    assert response.status_code == 422
    assert [problem["loc"][:3] for problem in response.json()["detail"]] == [["body", "requests", 1]]
    assert "canary" not in response.text
    assert len(response.content) < 1000


@pytest.mark.parametrize("count", [0, 257])
def test_number_of_requests_at_once_is_bounded(count):
    assert ask_many(*[{"user_id": "u"}] * count).status_code == 422
    assert ask_many(*[{"user_id": "u"}] * 256).status_code == 200


def test_similar_items_are_those_of_the_recommender():
    asked = client().get("/v1/items/item07/similar", params={"k": 3})
    assert asked.status_code == 200
    assert asked.json()["model_version"] == "fake-1"
    assert [item["item_id"] for item in asked.json()["items"]] == ["item06", "item08", "item05"]
    assert len(client().get("/v1/items/item07/similar").json()["items"]) == 10


@pytest.mark.parametrize(
    ("path", "status"),
    [("ghost/similar", 404), ("a/b/similar", 404), ("item07/similar?k=0", 422), ("item07/similar?k=1001", 422)],
)
def test_similar_items_of_a_wrong_request_are_refused(path, status):
    response = client().get(f"/v1/items/{path}")
    assert response.status_code == status
    assert "ghost" not in response.text


def test_refusal_does_not_repeat_what_was_sent():
    response = post(b'{"user_id": ["canary-user"], "k": "canary-k"}')
    assert response.status_code == 422
    assert "canary" not in response.text


def test_body_over_the_limit_is_refused_with_or_without_a_declared_length():
    too_long = b'{"user_id": "u"%s}' % (b" " * MAX_BODY_BYTES)
    assert post(too_long).status_code == 413
    pieces = (too_long[start : start + 10_000] for start in range(0, len(too_long), 10_000))
    assert post(pieces).status_code == 413  # chunked: no Content-Length to believe
    assert post(b'{"user_id": "u"%s}' % (b" " * (MAX_BODY_BYTES // 2))).status_code == 200


def test_overload_is_refused_with_the_time_to_come_again():
    async def sheds(request):
        raise OverloadError

    app = create_app(sheds, sheds, lambda: None)
    response = post(b'{"user_id": "u"}', TestClient(app, raise_server_exceptions=False))
    assert (response.status_code, response.headers["retry-after"]) == (429, "1")
    assert response.json() == {"detail": "too many requests wait; try again after Retry-After seconds"}


def test_health_tells_alive_from_ready():
    waiting, serving = client(loaded=False), client()
    assert (waiting.get("/healthz").status_code, waiting.get("/readyz").status_code) == (200, 503)
    assert serving.get("/readyz").json() == {"status": "ready", "model_version": "fake-1", "is_wanted_model": True}


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_page_needs_nothing_from_the_internet(path):
    page = client().get(path)
    assert page.headers["content-type"].startswith("text/html")
    assert "http://" not in page.text
    assert "https://" not in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]


CLOSED = [
    "/v1/recommend",
    "/v1/items/item07/similar",
    "/no-such-route",
    "/healthz/",
    "/docs/x",
    "/openapi.json/",
    "/v1/readyz",
]


@pytest.mark.parametrize("path", CLOSED)
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"x-api-key": "wrong"},
        {"x-api-key": ""},
        {"authorization": "Bearer"},
        {"authorization": "Basic key-one"},
        {"authorization": "key-one"},
    ],
)
def test_every_route_that_is_not_open_asks_for_a_key(path, headers):
    response = client(("key-one", "key-two")).get(path, headers=headers)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "headers", [{"x-api-key": "key-one"}, {"authorization": "Bearer key-two"}, {"authorization": "bearer  key-one"}]
)
def test_each_key_opens_in_either_header(headers):
    closed = client(("key-one", "key-two"))
    assert post(b'{"user_id": "user1"}', closed, **headers).status_code == 200
    assert closed.get("/openapi.json", headers=headers).status_code == 200


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/", "/docs", "/openapi.json"])
def test_health_page_and_contract_are_open_where_keys_are_asked_for(path):
    assert client(("key",)).get(path).status_code == 200


def test_page_sends_the_key_that_is_typed_into_it_and_stores_it_nowhere():
    page = client().get("/").text
    assert '<input name="api_key" type="password" autocomplete="off">' in page
    assert 'headers["x-api-key"] = field.get("api_key")' in page
    for store in ("localStorage", "sessionStorage", "cookie", "indexedDB"):
        assert store not in page


def test_keys_are_read_from_the_environment_and_a_closed_endpoint_never_opens_by_mistake():
    assert api_keys_of({}) == []
    assert api_keys_of({"CLLM4REC_API_KEYS": " one, two,"}) == ["one", "two"]
    for environment, required in [
        ({}, True),
        ({"CLLM4REC_API_KEYS": ""}, False),
        ({"CLLM4REC_API_KEYS": " , "}, False),
    ]:
        with pytest.raises(ConfigError, match="CLLM4REC_API_KEYS holds no key"):
            api_keys_of(environment, required=required)


def test_neither_keys_nor_users_nor_items_reach_the_logs(caplog):
    caplog.set_level(logging.DEBUG)

    class BrokenScorer(FakeScorer):
        def top_k(self, *_, **__):
            raise RuntimeError("the scorer broke")

    body = b'{"user_id": "canary-user", "history": ["canary-item"], "k": %d}'
    for k, scorer in [(10, FakeScorer()), (10**9, FakeScorer()), (10, BrokenScorer())]:
        post(body % k, client(("canary-key",), asked=recommender(scorer)), **{"x-api-key": "canary-key"})
        post(body % k, client(("canary-key",)), **{"x-api-key": "canary-wrong"})
    assert "canary" not in caplog.text


schema = schemathesis.openapi.from_asgi("/openapi.json", client().app)


@schema.parametrize()
@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_any_request_gets_an_answer_the_contract_describes(case):
    response = case.call()
    if (
        response.status_code != 413
    ):  # a body too large is refused unread, and schemathesis expects no 413 of a wrong one
        case.validate_response(response)
