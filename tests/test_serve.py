"""The endpoint without Ray: answers (serve.recommend), HTTP (serve.web) and what is handed to Serve (serve.app)."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import types
from pathlib import Path

import directories
import numpy as np
import pytest
import schemathesis
from directories import write_prepared, write_random_model
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parity import parity, scorer

from cllm4rec.artifacts import write_directory
from cllm4rec.catalog import Catalog
from cllm4rec.data.ragged import Ragged
from cllm4rec.data.world import parity_world
from cllm4rec.errors import ArtifactError, ConfigError
from cllm4rec.scoring.scorer import Scorer
from serve.app import Artefacts, RecommendReplica, ServeArgs, build, http_options
from serve.batching import Batcher
from serve.recommend import Recommender, _by_user, _check_same_catalog
from serve.schemas import MAX_BODY_BYTES, MAX_TEXT_CHARS, Ready, RecommendRequest, RecommendResponse
from serve.web import api_keys_of, create_app

NUM_USERS, NUM_ITEMS = 5, 30


class FakeScorer:
    """The Scorer's interface, a slow row at a time; scores differ with the user and with the history's order."""

    def __init__(self, model_version: str = "fake-1") -> None:
        users, items = [f"user{i}" for i in range(NUM_USERS)], [f"item{j:02d}" for j in range(NUM_ITEMS)]
        texts = [f"The text of item {j}. " * 100 for j in range(NUM_ITEMS)]
        self.catalog = Catalog(
            users, items, item_texts=texts, item_counts=[(j * 7) % NUM_ITEMS for j in range(NUM_ITEMS)]
        )
        self.model_version = model_version
        self.num_calls = 0

    def top_k(self, users, histories, k, rules=None, exclude=None):
        self.num_calls += 1
        item_BK, score_BK = np.full((len(users), k), -1, np.int64), np.full((len(users), k), -np.inf, np.float32)
        for row, user in enumerate(users):
            history = histories[row].tolist()
            seen = set(history) | set(exclude[row].tolist())
            scores = self.scores(int(user), history)
            best = sorted((j for j in range(NUM_ITEMS) if j not in seen), key=lambda j: (-scores[j], j))[:k]
            item_BK[row, : len(best)], score_BK[row, : len(best)] = best, scores[best]
        return item_BK, score_BK

    def scores(self, user: int, history: list[int]) -> np.ndarray:
        if user < 0 and not history:
            return self.catalog.item_counts / self.catalog.item_counts.sum()
        place = sum(3 ** (position % 5) * (item + 1) for position, item in enumerate(history))
        return np.array([((user + 2) * 101 + place * 17 + j * j * 29) % 97 for j in range(NUM_ITEMS)], np.float64)


KNOWN = [[0, 1, 2], [3, 4], [5, 6, 7, 8], [9], [10, 11]]


def recommender(scorer: FakeScorer | None = None) -> Recommender:
    return Recommender(scorer or FakeScorer(), Ragged.from_lists(KNOWN))


def ask(asked: Recommender | None = None, **request) -> RecommendResponse:
    return (asked or recommender()).answer([RecommendRequest(**request)])[0]


def item_ids(answer: RecommendResponse) -> list[str]:
    return [item.item_id for item in answer.items]


def expected(user: int, history: list[int], k: int, exclude: tuple[int, ...] = ()) -> list[str]:
    items, _ = FakeScorer().top_k(
        np.array([user]), Ragged.from_lists([history]), k, exclude=Ragged.from_lists([exclude])
    )
    return [f"item{j:02d}" for j in items[0] if j >= 0]


# Answers


def test_known_user_is_answered_from_the_known_history_best_first():
    answer = ask(user_id="user2", k=7)
    assert item_ids(answer) == expected(2, KNOWN[2], 7)
    assert [item.score for item in answer.items] == sorted((item.score for item in answer.items), reverse=True)
    assert answer.model_version == "fake-1"
    assert not answer.cold_start


def test_history_of_a_known_user_is_appended_to_what_is_known():
    assert item_ids(ask(user_id="user1", history=["item20", "item12"])) == expected(1, [3, 4, 20, 12], 10)


def test_items_given_twice_or_already_known_count_once():
    assert item_ids(ask(user_id="user1", history=["item12", "item04", "item12"])) == expected(1, [3, 4, 12], 10)


@pytest.mark.parametrize("nobody", [{}, {"user_id": "a stranger"}])
def test_stranger_with_a_history_is_answered_from_it(nobody):
    answer = ask(history=["item07", "item03"], **nobody)
    assert item_ids(answer) == expected(-1, [7, 3], 10)
    assert not answer.cold_start


@pytest.mark.parametrize(
    "nothing_known",
    [{"user_id": "a stranger"}, {"history": []}, {"user_id": "a stranger", "history": ["no such item"]}],
)
def test_stranger_without_a_known_history_gets_the_popular_items(nothing_known):
    answer = ask(k=3, **nothing_known)
    counts = FakeScorer().catalog.item_counts
    assert item_ids(answer) == [f"item{j:02d}" for j in np.argsort(-counts)[:3]]
    assert answer.items[0].score == pytest.approx(counts.max() / counts.sum())
    assert answer.cold_start


def test_unknown_items_are_ignored_and_listed_once_each_in_the_order_given():
    answer = ask(history=["ghost", "item07", "spectre", "ghost"], exclude=["wraith", "item01", "spectre"])
    assert answer.ignored_items == ["ghost", "spectre", "wraith"]
    assert item_ids(answer) == expected(-1, [7], 10, exclude=(1,))


def test_excluded_items_are_not_recommended_and_do_not_count_as_history():
    plain = item_ids(ask(user_id="user0", k=5))
    left = item_ids(ask(user_id="user0", k=5, exclude=plain[:2]))
    assert left[:3] == plain[2:]
    assert not set(left) & set(plain[:2])


def test_fewer_items_come_back_where_fewer_remain():
    answer = ask(user_id="user2", k=1000)
    assert len(answer.items) == NUM_ITEMS - len(KNOWN[2])
    assert all(np.isfinite(item.score) for item in answer.items)


def test_texts_belong_to_their_items_and_are_cut():
    for item in ask(user_id="user0").items:
        assert item.text.startswith(f"The text of item {int(item.item_id[4:])}. ")
        assert len(item.text) == MAX_TEXT_CHARS


ITEM = st.integers(0, NUM_ITEMS + 2).map(lambda j: f"item{j:02d}")
REQUEST = st.builds(
    RecommendRequest,
    user_id=st.none() | st.sampled_from(["user0", "user3", "a stranger"]),
    history=st.lists(ITEM, max_size=5),
    exclude=st.lists(ITEM, max_size=5),
    k=st.integers(1, NUM_ITEMS + 5),
)


@given(st.lists(REQUEST, min_size=1, max_size=6))
@settings(max_examples=40, deadline=None)
def test_answer_in_a_batch_equals_the_answer_alone_and_a_batch_is_one_pass(requests):
    fake = FakeScorer()
    together = recommender(fake).answer(requests)
    assert fake.num_calls == 1
    assert together == [recommender().answer([request])[0] for request in requests]


def test_histories_are_laid_out_by_user_index_whatever_their_order():
    rows = _by_user(np.array([3, 0]), Ragged.from_lists([[30, 31], [1]]), num_users=5)
    assert rows.tolist() == [[1], [], [], [30, 31], []]


def test_model_of_another_catalogue_is_refused():
    mine = Catalog(["u"], ["a", "b"])
    _check_same_catalog(mine, Catalog(["u"], ["a", "b"]), "model", "prepared")
    for other in (Catalog(["u"], ["b", "c"]), Catalog(["v"], ["a", "b"])):
        with pytest.raises(ArtifactError, match="serve a model with the directory it was trained on"):
            _check_same_catalog(mine, other, "model", "prepared")


# The real Scorer


def test_trained_model_recommends_what_a_user_hides_and_reads_the_history_of_a_stranger():
    world = parity().world
    known = world.histories.together("train", "validation")
    asked = Recommender(scorer(), known)
    users = asked.answer([RecommendRequest(user_id=user_id, k=1) for user_id in world.catalog.user_ids])
    assert [item_ids(answer) for answer in users] == [[world.catalog.item_ids[j]] for j in world.histories.test.values]
    strangers = [RecommendRequest(history=world.catalog.item_ids[known[user]].tolist(), k=1) for user in range(10)]
    numbers = [int(item_ids(answer)[0].removeprefix("item-")) for answer in asked.answer(strangers)]
    assert [number % 2 for number in numbers] == [user % 2 for user in range(10)]


def test_directories_are_loaded_with_all_that_is_known_and_what_is_denied(tmp_path):
    prepared_dir = write_prepared(tmp_path / "prepared")
    model_dir = write_random_model(tmp_path / "run", prepared_dir, seed=0)
    catalog, histories = parity_world().catalog, parity_world().histories
    (tmp_path / "denied.txt").write_text(f"{catalog.item_ids[1]}\nno such item\n")

    plain = Recommender.load(model_dir, prepared_dir)
    denying = Recommender.load(model_dir, prepared_dir, str(tmp_path / "denied.txt"))
    everything = RecommendRequest(user_id=catalog.user_ids[0], k=1000)
    seen = {catalog.item_ids[j] for split in (histories.train, histories.validation, histories.test) for j in split[0]}
    assert set(item_ids(plain.answer([everything])[0])) == set(catalog.item_ids) - seen
    assert set(item_ids(denying.answer([everything])[0])) == set(catalog.item_ids) - seen - {catalog.item_ids[1]}
    assert plain.model_version == Scorer.load(model_dir).model_version


def test_model_and_prepared_directory_that_do_not_belong_together_are_refused(tmp_path, monkeypatch):
    prepared_dir = write_prepared(tmp_path / "prepared")
    model_dir = write_random_model(tmp_path / "run", prepared_dir, seed=0)
    monkeypatch.setattr(directories, "parity_world", lambda: parity_world(num_users=40, num_items=22))
    with pytest.raises(ArtifactError, match="was not trained on"):
        Recommender.load(model_dir, write_prepared(tmp_path / "others"))


# Batches


def test_requests_that_come_during_a_batch_are_the_next_one():
    """The model is never given one request at a time while others wait, and never two batches at once."""
    batches: list[list[int]] = []
    model = threading.Lock()

    def slowly(questions: list[int]) -> list[int]:
        assert model.acquire(blocking=False), "two batches at once"
        batches.append(questions)
        time.sleep(0.05)
        model.release()
        return [question * 10 for question in questions]

    async def scenario() -> list[int]:
        batcher = Batcher(slowly, max_batch_size=4, wait_s=0.0)
        first = asyncio.create_task(batcher(0))
        await asyncio.sleep(0.02)  # the batch of the first is at work
        return await asyncio.gather(first, *(batcher(number) for number in range(1, 8)))

    assert asyncio.run(scenario()) == [number * 10 for number in range(8)]
    assert batches == [[0], [1, 2, 3, 4], [5, 6, 7]]


def test_batch_with_room_waits_for_company_and_a_full_one_does_not():
    sizes: list[int] = []

    async def scenario() -> float:
        batcher = Batcher(lambda questions: sizes.append(len(questions)) or questions, max_batch_size=2, wait_s=0.3)
        start = time.monotonic()
        await asyncio.gather(batcher(1), batcher(2))
        full_s = time.monotonic() - start
        late = asyncio.create_task(batcher(3))
        await asyncio.sleep(0.01)
        await asyncio.gather(late, batcher(4))
        return full_s

    assert asyncio.run(scenario()) < 0.3
    assert sizes == [2, 2]


def test_error_reaches_everyone_in_its_batch_and_the_next_batch_is_answered():
    def fails_on_zero(questions: list[int]) -> list[int]:
        if 0 in questions:
            raise RuntimeError("broken")
        return questions

    async def scenario() -> list[object]:
        batcher = Batcher(fails_on_zero, max_batch_size=8, wait_s=0.0)
        return [
            *await asyncio.gather(batcher(0), batcher(1), return_exceptions=True),
            await batcher(2),
        ]

    broken, other, later = asyncio.run(scenario())
    assert isinstance(broken, RuntimeError)
    assert isinstance(other, RuntimeError)
    assert later == 2


def test_caller_who_gave_up_is_not_asked_for():
    asked: list[int] = []

    async def scenario() -> int:
        batcher = Batcher(lambda questions: asked.extend(questions) or questions, max_batch_size=8, wait_s=0.02)
        gone = asyncio.create_task(batcher(1))
        await asyncio.sleep(0)
        gone.cancel()
        return await batcher(2)

    assert asyncio.run(scenario()) == 2
    assert asked == [2]


# HTTP


def client(api_keys: tuple[str, ...] = (), *, loaded: bool = True, answer=None) -> TestClient:
    async def recommend(request: RecommendRequest) -> RecommendResponse:
        return (answer or recommender().answer)([request])[0]

    app = create_app(recommend, lambda: Ready(model_version="fake-1") if loaded else None, api_keys)
    return TestClient(app, raise_server_exceptions=False)


def post(body: bytes, to: TestClient | None = None, **headers: str):
    return (to or client()).post("/v1/recommend", content=body, headers={"content-type": "application/json", **headers})


def test_answer_over_http_is_the_recommenders_answer():
    response = client().post(
        "/v1/recommend", json={"user_id": "user4", "history": ["item20"], "exclude": ["item00"], "k": 4}
    )
    assert response.status_code == 200
    assert response.json() == ask(user_id="user4", history=["item20"], exclude=["item00"], k=4).model_dump()


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b"{}", "history"),
        (b'{"user_id": null}', "history"),
        (b'{"user_id": 12}', "user_id"),
        (b'{"user_id": ""}', "user_id"),
        (b'{"user_id": "%s"}' % (b"u" * 257), "user_id"),
        (b'{"user_id": "\\ud800"}', "user_id"),
        (b'{"user_id": "u", "k": 0}', "k"),
        (b'{"user_id": "u", "k": 1000000000}', "k"),
        (b'{"user_id": "u", "k": "10"}', "k"),
        (b'{"user_id": "u", "k": true}', "k"),
        (b'{"user_id": "u", "k": 2.5}', "k"),
        (b'{"user_id": "u", "k": NaN}', "k"),
        (b'{"user_id": "u", "k": 1e999}', "k"),
        (b'{"user_id": "u", "K": 3}', "K"),
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
        (b"{", 422),
        (b"", 422),
        (b"[]", 422),
        (b'{"user_id": "\xff"}', 400),
        (b'{"user_id": "u", "\\ud800": 1}', 422),
        (b"[" * 100_000, 400),
    ],
)
def test_body_that_is_no_json_object_is_refused_and_never_breaks_the_server(body, status):
    assert post(body).status_code == status


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


def test_health_tells_alive_from_ready():
    waiting, serving = client(loaded=False), client()
    assert (waiting.get("/healthz").status_code, waiting.get("/readyz").status_code) == (200, 503)
    assert serving.get("/readyz").json() == {"status": "ready", "model_version": "fake-1"}


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_page_needs_nothing_from_the_internet(path):
    page = client().get(path)
    assert page.headers["content-type"].startswith("text/html")
    assert "http://" not in page.text
    assert "https://" not in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]


CLOSED = ["/", "/docs", "/openapi.json", "/v1/recommend", "/no-such-route", "/healthz/../docs", "/v1/readyz"]


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
def test_every_route_but_health_asks_for_a_key(path, headers):
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


def test_health_is_open_where_keys_are_asked_for():
    assert [client(("key",)).get(path).status_code for path in ("/healthz", "/readyz")] == [200, 200]


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

    def fails(requests):
        raise RuntimeError("the scorer broke")

    body = b'{"user_id": "canary-user", "history": ["canary-item"], "k": %d}'
    for k, answer in [(10, None), (10**9, None), (10, fails)]:
        post(body % k, client(("canary-key",), answer=answer), **{"x-api-key": "canary-key"})
        post(body % k, client(("canary-key",)), **{"x-api-key": "canary-wrong"})
    assert "canary" not in caplog.text


schema = schemathesis.openapi.from_asgi("/openapi.json", client().app)


@schema.parametrize()
@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_any_request_gets_an_answer_the_contract_describes(case):
    case.call_and_validate()


# What is handed to Serve


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> dict[str, str]:
    """Finished directories, as far as `build` looks."""
    folder = tmp_path_factory.mktemp("run")
    for kind in ("model", "prepared"):
        with write_directory(str(folder / kind), kind=kind, inputs={}, config={}):
            pass
    return {"model_dir": str(folder / "model"), "prepared_dir": str(folder / "prepared")}


def deployment_of(args: dict):
    return build(args)._bound_deployment


def test_settings_reach_the_deployment(paths):
    deployment = deployment_of({**paths, "max_batch_size": 8, "max_queued_requests": 3, "cpus_per_replica": 2})
    assert deployment.max_ongoing_requests >= 2 * 8
    assert deployment.max_queued_requests == 3
    assert deployment.backpressure_config.status_code == 429
    assert deployment.backpressure_config.retry_after_s > 0
    assert deployment.num_replicas == 1
    assert deployment.ray_actor_options["num_cpus"] == 2


def test_replicas_follow_the_load_between_their_bounds(paths):
    deployment = deployment_of({**paths, "min_replicas": 2, "max_replicas": 6, "target_ongoing_requests": 4})
    scaling = deployment._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (2, 6, 4)


def test_replicas_elsewhere_get_paths_they_can_use(paths, monkeypatch):
    monkeypatch.chdir(Path(paths["model_dir"]).parent)
    relative = {"model_dir": "model", "prepared_dir": "prepared", "deny_items": "memory:///bucket/denied.txt"}
    assert deployment_of(relative).user_config == {**paths, "deny_items": "memory:///bucket/denied.txt"}


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"num_replica": 2}, "num_replica"),
        ({"max_batch_size": 0}, "max_batch_size"),
        ({"min_replicas": 3}, "max_replicas"),
    ],
)
def test_unknown_or_wrong_argument_is_refused_by_name(paths, wrong, named):
    with pytest.raises(ConfigError, match=named):
        build({**paths, **wrong})


def test_missing_model_is_refused_before_a_replica_starts(paths):
    with pytest.raises(ConfigError, match="model_dir"):
        build({"prepared_dir": paths["prepared_dir"]})
    with pytest.raises(ArtifactError, match="nowhere is not a finished model directory"):
        build({**paths, "model_dir": "nowhere"})


def test_keys_of_the_submitter_must_exist_on_the_replica(paths, monkeypatch):
    monkeypatch.setenv("CLLM4REC_API_KEYS", "key")
    handed_over = build(paths)._bound_deployment.init_args
    monkeypatch.delenv("CLLM4REC_API_KEYS")
    with pytest.raises(ConfigError, match="CLLM4REC_API_KEYS"):
        RecommendReplica(*handed_over)


def test_proxies_get_their_address_and_time_limit():
    assert http_options(ServeArgs(model_dir="m", prepared_dir="p", host="::1", port=81, request_timeout_s=3)) == {
        "host": "::1",
        "port": 81,
        "request_timeout_s": 3,
    }


def models(monkeypatch, load) -> None:
    monkeypatch.setattr(Artefacts, "load", load)


async def settled(replica: RecommendReplica) -> None:
    if replica._swap is not None:
        await replica._swap


def user_config(name: str) -> dict[str, str]:
    return {"model_dir": name, "prepared_dir": "prepared"}


def test_first_model_is_waited_for_and_a_wrong_one_stops_the_start(monkeypatch):
    def load(artefacts):
        if artefacts.model_dir == "damaged":
            raise ArtifactError("damaged")
        return recommender(FakeScorer(artefacts.model_dir))

    models(monkeypatch, load)
    replica = RecommendReplica(4, 0.0, False)
    with pytest.raises(RuntimeError, match="no model"):
        replica.check_health()
    with pytest.raises(ArtifactError):
        asyncio.run(replica.reconfigure(user_config("damaged")))
    asyncio.run(replica.reconfigure(user_config("good")))
    replica.check_health()
    assert replica._ready() == Ready(model_version="good")


def test_model_is_swapped_while_the_old_one_answers_and_a_damaged_one_is_not_taken(monkeypatch):
    release = types.SimpleNamespace(event=None)

    def load(artefacts):
        if artefacts.model_dir == "slow":
            asyncio.run_coroutine_threadsafe(release.event.wait(), release.loop).result(timeout=10)
        if artefacts.model_dir == "damaged":
            raise ArtifactError("tables.safetensors is damaged")
        if artefacts.model_dir == "unreachable":
            raise OSError("the store does not answer")
        return recommender(FakeScorer(artefacts.model_dir))

    async def scenario() -> list[str]:
        release.event, release.loop = asyncio.Event(), asyncio.get_running_loop()
        replica = RecommendReplica(4, 0.0, False)
        await replica.reconfigure(user_config("first"))
        versions = []

        async def version() -> None:
            versions.append((await replica._recommend(RecommendRequest(user_id="user0"))).model_version)

        await replica.reconfigure(user_config("slow"))
        await version()  # the new one is still being loaded
        release.event.set()
        await settled(replica)
        await version()
        for not_taken in ("damaged", "unreachable"):
            await replica.reconfigure(user_config(not_taken))
            await settled(replica)
            await version()
        return versions

    models(monkeypatch, load)
    assert asyncio.run(scenario()) == ["first", "slow", "slow", "slow"]


def test_of_two_swaps_in_a_row_the_last_one_stays(monkeypatch):
    def load(artefacts):
        time.sleep(0.1 if artefacts.model_dir == "second, slower" else 0)
        return recommender(FakeScorer(artefacts.model_dir))

    async def scenario() -> str:
        replica = RecommendReplica(4, 0.0, False)
        for name in ("first", "second, slower", "third"):
            await replica.reconfigure(user_config(name))
        await settled(replica)
        await asyncio.sleep(0.2)
        return replica._ready().model_version

    models(monkeypatch, load)

    assert asyncio.run(scenario()) == "third"


def test_unknown_key_in_user_config_is_refused(monkeypatch):
    models(monkeypatch, lambda artefacts: recommender())
    with pytest.raises(ValueError, match="model_directory"):
        asyncio.run(RecommendReplica(4, 0.0, False).reconfigure({**user_config("m"), "model_directory": "m"}))
