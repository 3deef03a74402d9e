"""Routes, errors and API keys of the endpoint: plain FastAPI around two callables, so that it is tested without Ray.

GET  /, /docs           a page to try the endpoint, which loads nothing from the internet
POST /v1/recommend      RecommendRequest → RecommendResponse
POST /v1/recommend/many ManyRequest → ManyResponse
GET  /v1/items/{item_id}/similar    → SimilarResponse
GET  /healthz           the process answers
GET  /readyz            a model is loaded, and its version
GET  /openapi.json      the contract
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import pathlib
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Path, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

import cllm4rec
from cllm4rec.config import MAX_ID_CHARS
from cllm4rec.errors import ConfigError
from cllm4rec.scoring.recommender import MAX_K, Recommender
from cllm4rec.serving.batching import OverloadError
from cllm4rec.serving.bodies import ReadBody
from cllm4rec.serving.refusals import REFUSALS, refusal, refuse
from cllm4rec.serving.schemas import (
    Alive,
    FieldProblems,
    ManyRequest,
    ManyResponse,
    Problem,
    Ready,
    RecommendedItem,
    RecommendRequest,
    RecommendResponse,
    SimilarRequest,
    SimilarResponse,
)
from cllm4rec.serving.timing import TellTime

API_KEYS_VARIABLE = "CLLM4REC_API_KEYS"
OPEN_PATHS = ("/healthz", "/readyz", "/", "/docs", "/openapi.json")
"""Routes without a key: health, the page, and the contract, which are the same for every run."""

_AT_ONCE = 16
"""Requests of one caller that wait for a batch at the same time, so that other callers find places."""

Recommend = Callable[[RecommendRequest], Awaitable[RecommendResponse]]
Similar = Callable[[SimilarRequest], Awaitable[SimilarResponse | None]]
"""None: the model does not know the item."""

# The page fetches nothing from another origin, and a script in an item text could not either.
_PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"


def respond(recommender: Recommender, requests: Sequence[RecommendRequest]) -> list[RecommendResponse]:
    """The responses to one batch of requests."""
    answers = recommender.answer([request.to_query() for request in requests])
    return [RecommendResponse.from_answer(answer, recommender.model_version) for answer in answers]


def respond_similar(recommender: Recommender, requests: Sequence[SimilarRequest]) -> list[SimilarResponse | None]:
    """The responses to one batch of requests for similar items."""
    found = recommender.similar_many([request.item_id for request in requests], max(request.k for request in requests))
    return [
        None
        if items is None
        else SimilarResponse(
            items=[RecommendedItem.of(item) for item in items[: request.k]], model_version=recommender.model_version
        )
        for request, items in zip(requests, found, strict=True)
    ]


def create_app(
    recommend: Recommend, similar: Similar, ready: Callable[[], Ready | None], api_keys: Sequence[str] = ()
) -> FastAPI:
    """The application. `ready` returns None until a model is loaded. Without `api_keys` no key is required."""
    # FastAPI's own /docs loads scripts from a CDN; this one is page.html.
    app = FastAPI(
        title="CLLM4Rec",
        version=cllm4rec.__version__,
        docs_url=None,
        redoc_url=None,
        exception_handlers={
            RequestValidationError: _refuse_fields,
            OverloadError: _refuse,
            StarletteHTTPException: _refuse,
            Exception: _refuse,
        },
    )
    app.router.route_class = _JsonRoute
    app.add_middleware(ReadBody)
    if api_keys:
        app.add_middleware(RequireApiKey, keys=api_keys)
    app.add_middleware(TellTime)
    page = pathlib.Path(__file__).with_name("page.html").read_text(encoding="utf-8")

    @app.post("/v1/recommend", responses=_refusals(400, 401, 408, 413, 415, 422, 429, 500, 503))
    async def recommend_items(request: RecommendRequest) -> RecommendResponse:
        """The best items for a user, a history or both. Cold-start users get the popular items."""
        return await recommend(request)

    @app.post("/v1/recommend/many", responses=_refusals(400, 401, 408, 413, 415, 422, 429, 500, 503))
    async def recommend_many(request: ManyRequest) -> ManyResponse:
        """The answers to up to 256 requests. Each is the one that its request would get alone."""
        answers: list[RecommendResponse] = []
        for begin in range(0, len(request.requests), _AT_ONCE):
            answers += await asyncio.gather(*map(recommend, request.requests[begin : begin + _AT_ONCE]))
        return ManyResponse(answers=answers)

    @app.get("/v1/items/{item_id:path}/similar", responses=_refusals(401, 404, 408, 413, 422, 429, 500, 503))
    async def similar_items(
        item_id: Annotated[str, Path(max_length=MAX_ID_CHARS)], k: Annotated[int, Query(ge=1, le=MAX_K)] = 10
    ) -> SimilarResponse:
        """The items that are most similar to an item: those that the same users like."""
        answer = await similar(SimilarRequest(item_id, k))
        if answer is None:
            raise HTTPException(404)
        return answer

    @app.head("/healthz", include_in_schema=False)
    @app.get("/healthz")
    async def healthz() -> Alive:
        return Alive()

    @app.head("/readyz", include_in_schema=False)
    @app.get("/readyz", responses=_refusals(503))
    async def readyz() -> Ready:
        state = ready()
        if state is None:
            raise HTTPException(503)
        return state

    @app.get("/", include_in_schema=False)
    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": _PAGE_POLICY})

    return app


def api_keys_of(environment: Mapping[str, str], required: bool = False) -> list[str]:
    """The comma-separated keys of CLLM4REC_API_KEYS; none if it is not set, which means an open endpoint.

    Raises ConfigError if the variable is set but holds no key, or if it is not set although `required`: an operator who
    means to close the endpoint must not get an open one.
    """
    keys = [key.strip() for key in environment.get(API_KEYS_VARIABLE, "").split(",") if key.strip()]
    if not keys and (required or API_KEYS_VARIABLE in environment):
        raise ConfigError(
            f"{API_KEYS_VARIABLE} holds no key, but the endpoint must require one; "
            "set it in the environment of every node to keys separated by commas"
        )
    return keys


class RequireApiKey:
    """ASGI middleware: 401 without `Authorization: Bearer KEY` or `X-API-Key: KEY`, except for OPEN_PATHS.

    Keys are compared as digests, in constant time, and always with all keys, so that response times reveal nothing.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self.app = app
        self.digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS and not self._is_allowed(Request(scope)):
            return await refuse(send, 401)
        await self.app(scope, receive, send)

    def _is_allowed(self, request: Request) -> bool:
        scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
        offered = bearer.strip() if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")
        digest = hashlib.sha256(offered.encode()).digest()
        return sum(hmac.compare_digest(digest, known) for known in self.digests) > 0


async def _refuse_fields(request: Request, error: Exception) -> Response:
    """422 with the names of the fields. The wrong values are left out: they are the caller's data, and a value such as
    NaN or half a surrogate pair cannot be written as JSON, which would turn the 422 into a 500."""
    assert isinstance(error, RequestValidationError)
    if any(problem["type"] == "json_invalid" for problem in error.errors()):
        return _refusal(400)
    problems = [{"loc": list(p["loc"]), "msg": p["msg"], "type": p["type"]} for p in error.errors()]
    return Response(json.dumps({"detail": problems}), status_code=422, media_type="application/json")


async def _refuse(request: Request, error: Exception) -> Response:
    if isinstance(error, OverloadError):
        return _refusal(429)
    if isinstance(error, StarletteHTTPException):
        return _refusal(error.status_code, error.headers or {})
    return _refusal(500)


def _refusal(status: int, headers: Mapping[str, str] = MappingProxyType({})) -> Response:
    start, body = refusal(status)
    own = {name.decode(): value.decode() for name, value in start["headers"]}
    return Response(body["body"], status_code=status, headers={**own, **headers})


class _Utf8Request(Request):
    async def json(self) -> Any:
        # json.loads alone would also read UTF-16 and UTF-32, which RFC 8259 does not allow.
        try:
            return json.loads((await self.body()).decode("utf-8-sig"))
        except (UnicodeDecodeError, RecursionError):
            raise json.JSONDecodeError("not UTF-8, or too deep", "", 0) from None


class _JsonRoute(APIRoute):
    """A route whose body must say that it is JSON, and must be UTF-8."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        answer = super().get_route_handler()

        async def handle(request: Request) -> Response:
            media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if request.method == "POST" and media_type != "application/json":
                return _refusal(415)
            return await answer(_Utf8Request(request.scope, request.receive))

        return handle


def _refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {
        status: {"description": REFUSALS[status], "model": FieldProblems if status == 422 else Problem}
        for status in statuses
    }
