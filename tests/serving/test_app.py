"""Batching (cllm4rec.serving.batching), replicas and the Serve application (cllm4rec.serving.app), without Ray."""

from __future__ import annotations

import asyncio
import threading
import time
import types
from pathlib import Path

import pytest
import torch
from fastapi.testclient import TestClient
from support.directories import write_prepared, write_random_model
from support.serving import FakeScorer, recommender

from cllm4rec.config import Config, parse_config
from cllm4rec.data.world import parity_world
from cllm4rec.errors import ArtifactError, ConfigError
from cllm4rec.scoring.recommender import Recommender
from cllm4rec.serving.app import RecommendReplica, ServeArgs, UserConfig, build, http_options
from cllm4rec.serving.batching import Batcher, OverloadError
from cllm4rec.serving.schemas import Ready, RecommendRequest
from cllm4rec.storage import files
from cllm4rec.storage.artifacts import read_manifest, verify_files, write_directory
from cllm4rec.storage.files import read_bytes, write_bytes
from cllm4rec.storage.registry import promote_directory, rollback
from cllm4rec.storage.tombstones import CHECK_EVERY_S, Tombstones

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


def test_batch_that_is_not_full_waits_for_more_and_a_full_one_does_not():
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


def test_question_of_a_caller_who_gave_up_is_left_out():
    asked: list[int] = []

    async def scenario() -> int:
        batcher = Batcher(lambda questions: asked.extend(questions) or questions, max_batch_size=8, wait_s=0.02)
        given_up = asyncio.create_task(batcher(1))
        await asyncio.sleep(0)
        given_up.cancel()
        return await batcher(2)

    assert asyncio.run(scenario()) == 2
    assert asked == [2]


class Model:
    """Answers on command; records its batches."""

    def __init__(self) -> None:
        self.batches, self._turns = [], threading.Semaphore(0)

    def __call__(self, questions: list[int]) -> list[int]:
        self.batches.append(questions)
        assert self._turns.acquire(timeout=10)
        return questions

    def finish_batch(self) -> None:
        self._turns.release()


async def until(is_so) -> None:
    for _ in range(1000):
        if is_so():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("waited in vain")


def test_what_waited_too_long_is_shed_and_the_newest_are_answered():
    async def scenario() -> list[object]:
        model = Model()
        batcher = Batcher(model, max_batch_size=2, wait_s=0.0, max_age_s=0.05)
        asked = [asyncio.create_task(batcher(number)) for number in range(6)]
        await until(lambda: model.batches == [[0, 1]])  # the others find no place
        await asyncio.sleep(0.06)
        late = [asyncio.create_task(batcher(number)) for number in (6, 7)]
        await asyncio.sleep(0)
        model.finish_batch()
        await until(lambda: len(model.batches) == 2)
        model.finish_batch()
        return await asyncio.gather(*asked, *late, return_exceptions=True)

    answers = asyncio.run(scenario())
    assert [type(answer) for answer in answers[2:6]] == [OverloadError] * 4
    assert answers[:2] + answers[6:] == [0, 1, 6, 7]


def test_question_may_wait_for_the_batch_that_runs_however_long_that_takes():
    """Otherwise a model whose batches take longer than the limit would answer nobody."""

    async def scenario() -> list[int]:
        model = Model()
        batcher = Batcher(model, max_batch_size=2, wait_s=0.0, max_age_s=0.01)
        first = asyncio.create_task(batcher(0))
        await until(lambda: model.batches == [[0]])
        second = asyncio.create_task(batcher(1))
        await asyncio.sleep(0.1)
        model.finish_batch()
        await until(lambda: model.batches == [[0], [1]])
        model.finish_batch()
        return [await first, await second]

    assert asyncio.run(scenario()) == [0, 1]


def test_questions_beyond_the_number_that_may_wait_are_shed_at_once():
    async def scenario() -> tuple[list[bool], list[object]]:
        model = Model()
        batcher = Batcher(model, max_batch_size=1, wait_s=0.0, max_waiting=2)
        asked = [asyncio.create_task(batcher(0))]
        await until(lambda: model.batches == [[0]])
        asked += [asyncio.create_task(batcher(number)) for number in (1, 2, 3)]
        await asyncio.sleep(0.01)
        done = [task.done() for task in asked]
        for _ in range(3):
            model.finish_batch()
        return done, await asyncio.gather(*asked, return_exceptions=True)

    done, answers = asyncio.run(scenario())
    assert done == [False, False, False, True]
    assert answers[:3] == [0, 1, 2]
    assert isinstance(answers[3], OverloadError)


# The application


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
    assert deployment.max_queued_requests == 3
    assert deployment.max_ongoing_requests > 10_000, "replicas shed by time; at a limit Serve's router would break in"
    assert deployment.backpressure_config.status_code == 429
    assert deployment.backpressure_config.retry_after_s > 0
    assert deployment.num_replicas == 1
    assert deployment.ray_actor_options["num_cpus"] == 2


def test_replicas_follow_the_load_between_their_bounds(paths):
    given = {
        "min_replicas": 2, "max_replicas": 6, "target_ongoing_requests": 4, "upscale_delay_s": 3, "downscale_delay_s": 7,
    }  # fmt: skip
    scaling = deployment_of(paths | given)._deployment_config.autoscaling_config
    assert {name: getattr(scaling, name) for name in given} == given


def test_replicas_elsewhere_get_paths_they_can_use(paths, monkeypatch):
    monkeypatch.chdir(Path(paths["model_dir"]).parent)
    relative = {"model_dir": "model", "prepared_dir": "prepared", "rules": {"deny": "memory:///bucket/denied.txt"}}
    assert deployment_of(relative).user_config["rules"]["deny"] == "memory:///bucket/denied.txt"
    assert deployment_of(relative).user_config == {**paths, "rules": deployment_of(relative).user_config["rules"]}
    followed = deployment_of({"output_dir": "."}).user_config
    assert {**followed, "rules": {}} == {"output_dir": str(Path(paths["model_dir"]).parent), "rules": {}}


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
    for half in ({"prepared_dir": paths["prepared_dir"]}, {}, {**paths, "output_dir": "run"}):
        with pytest.raises(ConfigError, match="give either output_dir, or model_dir and prepared_dir"):
            build(half)
    with pytest.raises(ArtifactError, match="nowhere/model is not a finished model directory"):
        build({"output_dir": "nowhere"})
    with pytest.raises(ArtifactError, match="nowhere is not a finished model directory"):
        build({**paths, "model_dir": "nowhere"})


def test_keys_of_the_submitter_must_exist_on_the_replica(paths, monkeypatch):
    monkeypatch.setenv("CLLM4REC_API_KEYS", "key")
    handed_over = build(paths)._bound_deployment.init_args
    monkeypatch.delenv("CLLM4REC_API_KEYS")
    with pytest.raises(ConfigError, match="CLLM4REC_API_KEYS"):
        RecommendReplica(*handed_over)


@pytest.mark.parametrize(("keys", "required"), [("", False), (" , ", False), (None, True)])
def test_endpoint_without_a_key_that_it_must_have_is_refused_before_a_replica_starts(
    paths, monkeypatch, keys, required
):
    monkeypatch.delenv("CLLM4REC_API_KEYS", raising=False)
    if keys is not None:
        monkeypatch.setenv("CLLM4REC_API_KEYS", keys)
    with pytest.raises(ConfigError, match="CLLM4REC_API_KEYS holds no key"):
        build({**paths, "require_api_keys": required})


def test_replica_computes_with_the_threads_it_is_given(paths, one_thread):
    handed_over = build({**paths, "threads_per_replica": 3})._bound_deployment.init_args
    RecommendReplica(*handed_over)
    assert asyncio.run(asyncio.to_thread(torch.get_num_threads)) == 3, "batches are answered on another thread"
    RecommendReplica(*build(paths)._bound_deployment.init_args)
    assert torch.get_num_threads() == 3, "null leaves what Ray has set"


def test_proxies_get_their_address_and_time_limit():
    assert http_options(ServeArgs(model_dir="m", prepared_dir="p", host="::1", port=81, request_timeout_s=3)) == {
        "host": "::1",
        "port": 81,
        "request_timeout_s": 3,
    }


def models(monkeypatch, load) -> None:
    monkeypatch.setattr(UserConfig, "load", load)


async def settled(replica: RecommendReplica) -> None:
    if replica._swap is not None:
        await replica._swap


def user_config(name: str) -> dict[str, str]:
    return {"model_dir": name, "prepared_dir": "prepared"}


def test_first_model_is_waited_for_and_a_wrong_one_stops_the_start(monkeypatch):
    def load(user_config):
        if user_config.model_dir == "damaged":
            raise ArtifactError("damaged")
        return recommender(FakeScorer(user_config.model_dir))

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

    def load(user_config):
        if user_config.model_dir == "slow":
            asyncio.run_coroutine_threadsafe(release.event.wait(), release.loop).result(timeout=10)
        if user_config.model_dir == "damaged":
            raise ArtifactError("tables.safetensors is damaged")
        if user_config.model_dir == "unreachable":
            raise OSError("the store does not answer")
        return recommender(FakeScorer(user_config.model_dir))

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
    def load(user_config):
        time.sleep(0.1 if user_config.model_dir == "second, slower" else 0)
        return recommender(FakeScorer(user_config.model_dir))

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
    models(monkeypatch, lambda user_config: recommender())
    with pytest.raises(ValueError, match="model_directory"):
        asyncio.run(RecommendReplica(4, 0.0, False).reconfigure({**user_config("m"), "model_directory": "m"}))


# Promotions


@pytest.fixture
def run(tmp_path, monkeypatch) -> Config:
    """A run whose candidates are written by `train` and whose replicas look for another model all the time."""
    monkeypatch.setattr("cllm4rec.serving.app.WATCH_S", 0.01)
    return parse_config({"output_dir": str(tmp_path), "data": {"interactions": {"path": "none"}}})


def train(run: Config, text: str) -> str:
    """A candidate that answers with this version; returns its digest."""
    with write_directory(run.run.model, kind="model", inputs={}, config={}) as draft:
        write_bytes(draft.path("version"), text.encode())
    return read_manifest(run.run.model, "model").digest


def load_versions(user_config: UserConfig) -> Recommender:
    """As the real one refuses a damaged model; the prepared directory is not looked at."""
    verify_files(user_config.model_dir, read_manifest(user_config.model_dir, "model"))
    return recommender(FakeScorer(read_bytes(f"{user_config.model_dir}/version").decode()))


def follow(run: Config, monkeypatch, steps) -> list[str]:
    """Run `steps`, with a replica that follows the run and answers without a pause; the versions that answered."""
    answered: list[str] = []

    async def scenario() -> None:
        replica = RecommendReplica(4, 0.0, False)
        await replica.reconfigure({"output_dir": run.output_dir})

        async def keep_asking() -> None:
            while True:
                answered.append((await replica._recommend(RecommendRequest(user_id="user0"))).model_version)

        asking = asyncio.create_task(keep_asking())

        async def until(version: str) -> None:
            for _ in range(1000):
                await asyncio.sleep(0.005)
                if asking.done() or answered[-1:] == [version]:
                    return
            raise AssertionError(f"{version} never answered")

        await steps(replica, until)
        assert not asking.done()
        asking.cancel()

    models(monkeypatch, load_versions)
    asyncio.run(scenario())
    return [version for place, version in enumerate(answered) if answered[place - 1 : place] != [version]]


def test_promotions_and_rollbacks_reach_a_running_replica_and_no_request_fails(run, monkeypatch):
    train(run, "candidate")

    async def steps(replica, until) -> None:
        await until("candidate")
        promote_directory(run.output_dir, train(run, "first"), "a test", keep=run.promote.keep)
        await until("first")
        promote_directory(run.output_dir, train(run, "second"), "a test", keep=run.promote.keep)
        await until("second")
        rollback(run.output_dir)
        await until("first")

    assert follow(run, monkeypatch, steps) == ["candidate", "first", "second", "first"]


def test_training_alone_does_not_reach_a_running_replica(run, monkeypatch):
    train(run, "candidate")

    async def steps(replica, until) -> None:
        await until("candidate")
        train(run, "retrained")
        await asyncio.sleep(0.1)

    assert follow(run, monkeypatch, steps) == ["candidate"]


@pytest.mark.parametrize("harm", ["model", "pointer"])
def test_bad_promotion_is_not_taken_is_logged_once_and_the_next_good_one_is_taken(run, monkeypatch, caplog, harm):
    train(run, "candidate")
    monkeypatch.setattr("cllm4rec.serving.app.RETRY_S", 0.02)

    async def steps(replica, until) -> None:
        await until("candidate")
        name = promote_directory(run.output_dir, train(run, "first"), "a test", keep=run.promote.keep).current
        await until("first")
        monkeypatch.setattr("cllm4rec.serving.app.WATCH_S", 0.05)
        if harm == "model":
            pointer = promote_directory(run.output_dir, train(run, "second"), "a test", keep=run.promote.keep)
            write_bytes(f"{run.run.models}/{pointer.current}/version", b"secomd")
        else:
            content = read_bytes(f"{run.run.models}/current.json")
            write_bytes(f"{run.run.models}/current.json", b"{")
        await asyncio.sleep(0.4)
        assert replica._model_dir.endswith(name)
        if harm == "pointer":
            write_bytes(f"{run.run.models}/current.json", content)
        promote_directory(run.output_dir, train(run, "third"), "a test", keep=run.promote.keep)
        await until("third")

    assert follow(run, monkeypatch, steps) == ["candidate", "first", "third"]
    assert sum("cannot be loaded; an old one answers" in record.getMessage() for record in caplog.records) == 1


def damage(run: Config, name: str) -> None:
    write_bytes(f"{run.run.models}/{name}/version", b"DAMAGED")


def test_replica_that_starts_on_a_damaged_model_serves_the_newest_whole_one_and_says_so(run, monkeypatch, caplog):
    names = [
        promote_directory(run.output_dir, train(run, version), "a test", keep=4).current
        for version in ("first", "second", "third", "fourth")
    ]
    damage(run, names[3])
    files.remove_directory(f"{run.run.models}/{names[2]}")
    monkeypatch.setattr("cllm4rec.serving.app.RETRY_S", 0.02)
    with write_directory(run.run.prepared, kind="prepared", inputs={}, config={}):
        pass
    build({"output_dir": run.output_dir})  # a restart of the cluster gets through it as well

    async def steps(replica, until) -> None:
        await until("second")
        assert replica._ready() == Ready(model_version="second", is_wanted_model=False)
        write_bytes(f"{run.run.models}/{names[3]}/version", b"fourth")
        await until("fourth")
        assert replica._ready() == Ready(model_version="fourth", is_wanted_model=True)

    assert follow(run, monkeypatch, steps) == ["second", "fourth"]
    assert sum("an old one answers, second from" in record.getMessage() for record in caplog.records) == 1


def test_rollback_from_a_damaged_model_to_the_one_that_answers_ends_the_alarm(run, monkeypatch):
    for version in ("first", "second"):
        pointer = promote_directory(run.output_dir, train(run, version), "a test", keep=2)
    damage(run, pointer.current)

    async def steps(replica, until) -> None:
        await until("first")
        assert not replica._ready().is_wanted_model
        rollback(run.output_dir)
        for _ in range(100):
            await asyncio.sleep(0.01)
            if replica._ready().is_wanted_model:
                return
        raise AssertionError("the alarm stays")

    assert follow(run, monkeypatch, steps) == ["first"]


def test_replica_does_not_start_if_every_model_is_damaged_and_names_the_current_one(run, monkeypatch):
    names = [promote_directory(run.output_dir, train(run, version), "a test", keep=2).current for version in "ab"]
    for name in names:
        damage(run, name)
    models(monkeypatch, load_versions)
    with pytest.raises(ArtifactError, match=names[1]):
        asyncio.run(RecommendReplica(4, 0.0, False).reconfigure({"output_dir": run.output_dir}))


def test_replica_that_is_given_directories_follows_no_longer(run, monkeypatch, tmp_path):
    train(run, "candidate")
    train(parse_config({**run.model_dump(), "output_dir": str(tmp_path / "other")}), "other")

    async def steps(replica, until) -> None:
        await until("candidate")
        await replica.reconfigure({"model_dir": str(tmp_path / "other" / "model"), "prepared_dir": "prepared"})
        await until("other")
        promote_directory(run.output_dir, train(run, "first"), "a test", keep=run.promote.keep)
        await asyncio.sleep(0.2)
        assert replica._ready().model_version == "other"
        await replica.reconfigure({"output_dir": run.output_dir})
        await until("first")

    assert follow(run, monkeypatch, steps) == ["candidate", "other", "first"]


def test_erased_user_is_unknown_over_http_within_a_second(tmp_path):
    prepared_dir = write_prepared(tmp_path / "prepared")
    write_random_model(tmp_path, prepared_dir, seed=0)
    replica = RecommendReplica(4, 0.0, False)
    asyncio.run(replica.reconfigure({"output_dir": str(tmp_path)}))
    user_id = parity_world().catalog.user_ids[0]
    with TestClient(replica.__serve_build_asgi_app__()) as client:

        def ask(asked: str) -> dict:
            return client.post("/v1/recommend", json={"user_id": asked}).raise_for_status().json()

        known, stranger = ask(user_id), ask("a stranger")
        assert known != stranger
        Tombstones.load(str(tmp_path)).with_users([user_id]).save(str(tmp_path))
        time.sleep(CHECK_EVERY_S)
        assert ask(user_id) == stranger
