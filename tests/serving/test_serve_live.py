"""The endpoint as it runs: `serve run` with the shipped config, real HTTP, `serve deploy` to swap the model."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from support import load
from support.directories import write_prepared, write_random_model
from support.ports import free_port

from cllm4rec.cluster import ENVIRONMENT
from cllm4rec.scoring.recommender import Recommender
from cllm4rec.serving.schemas import RecommendRequest
from cllm4rec.serving.web import respond

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]
SERVE = [sys.executable, "-m", "ray.serve.scripts"]
KEY = "canary-key-5f2c"
STRANGER = "canary-stranger-91d7"


def write_config(path: Path, port: int, user_config: dict[str, str], swap_to: str | None = None) -> Path:
    """The shipped file with this test's port and directories."""
    config = yaml.safe_load((ROOT / "cluster/serve.yaml").read_text())
    config["http_options"]["port"] = port
    (application,) = config["applications"]
    application["args"] |= user_config | {"require_api_keys": True}
    if swap_to:
        application["deployments"] = [{"name": "Recommend", "user_config": user_config | {"model_dir": swap_to}}]
    path.write_text(yaml.safe_dump(config))
    return path


class Endpoint:
    """`serve run` in a process of its own, with a Ray of its own whose logs can be read afterwards."""

    def __init__(self, folder: Path, ray_folder: Path) -> None:
        self.folder, self.ray_folder, self.output = folder, ray_folder, folder / "output.log"
        self.user_config = {"prepared_dir": write_prepared(folder / "prepared")}
        self.models = [
            write_random_model(folder / f"run{seed}", self.user_config["prepared_dir"], seed) for seed in (0, 1)
        ]
        self.user_config["model_dir"] = self.models[0]
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        # HOME: a local Ray may write an authentication token there.
        self.environment = (
            ENVIRONMENT
            | os.environ
            | {
                "RAY_AUTH_MODE": "disabled",
                "RAY_TMPDIR": str(ray_folder),
                "HOME": str(folder),
            }
        )
        self.environment["CLLM4REC_API_KEYS"] = KEY
        self.environment.pop("RAY_ADDRESS", None)

    def start(self) -> None:
        config = write_config(self.folder / "config.yaml", self.port, self.user_config)
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                [*SERVE, "run", str(config)],
                cwd=ROOT,
                env=self.environment,
                stdout=output,
                stderr=output,
                # A shell's background job ignores SIGINT, and so would all that it starts.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
        self.wait_until(self.is_ready)

    def swap_to(self, model_dir: str) -> None:
        (dashboard,) = set(re.findall(r"dashboard at \S*?(http://[\d.:]+)", self.output.read_text()))
        config = write_config(self.folder / "swap.yaml", self.port, self.user_config, swap_to=model_dir)
        subprocess.run([*SERVE, "deploy", "-a", dashboard, str(config)], cwd=ROOT, env=self.environment, check=True)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)
        self.process.wait(timeout=180)

    def is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/readyz").status_code == 200
        except httpx.TransportError:
            return False

    def wait_until(self, is_so: Callable[[], bool], timeout_s: float = 120) -> None:
        give_up = time.monotonic() + timeout_s
        while not is_so():
            if time.monotonic() > give_up or self.process.poll() is not None:
                pytest.fail(f"waited in vain for {is_so.__qualname__}: {self.output.read_text()[-4000:]}")
            time.sleep(0.2)

    def post(self, client: Any, **request: Any) -> Any:
        return client.post(f"{self.url}/v1/recommend", json=request, headers={"x-api-key": KEY}, timeout=60)

    def recommender(self, model_dir: str) -> Recommender:
        return Recommender.from_pretrained(model_dir, self.user_config["prepared_dir"])


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    # Ray's sockets live below its folder, and a socket's path may have 107 characters: not below pytest's folder.
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as ray_folder:
        running = Endpoint(tmp_path_factory.mktemp("serve"), Path(ray_folder))
        try:
            running.start()
            yield running
        finally:
            if running.process.poll() is None:
                running.stop()


def test_answers_over_http_equal_those_in_process_for_every_user_and_stranger(endpoint: Endpoint) -> None:
    recommender = endpoint.recommender(endpoint.models[0])
    users, items = recommender.scorer.catalog.user_ids.tolist(), recommender.scorer.catalog.item_ids.tolist()
    asked = [{"user_id": user_id, "k": 1 + row % 12} for row, user_id in enumerate(users)]
    asked += [{"user_id": user_id, "history": [items[3], "ghost"], "exclude": items[:2]} for user_id in users[::4]]
    asked += [{"history": items[row : row + 3], "k": 5} for row in range(6)]
    asked += [{"user_id": STRANGER}, {"user_id": STRANGER, "history": [items[0]]}]

    async def ask() -> list[Any]:
        async with httpx.AsyncClient() as client:
            turns = asyncio.Semaphore(16)

            async def in_turn(request: dict[str, Any]) -> Any:
                async with turns:
                    return (await endpoint.post(client, **request)).json()

            return await asyncio.gather(*map(in_turn, asked))

    expected = [respond(recommender, [RecommendRequest(**request)])[0].model_dump() for request in asked]
    assert asyncio.run(ask()) == expected
    assert len({json.dumps(answer["items"]) for answer in expected[: len(users)]}) > len(users) / 2


def test_refusals_over_http(endpoint: Endpoint) -> None:
    too_many = endpoint.post(httpx, user_id="u", k=10**9)
    assert (too_many.status_code, too_many.json()["detail"][0]["loc"]) == (422, ["body", "k"])
    assert httpx.post(f"{endpoint.url}/v1/recommend", json={"user_id": STRANGER}).status_code == 401
    assert httpx.get(f"{endpoint.url}/no-such-route").status_code == 401
    assert httpx.get(f"{endpoint.url}/docs").status_code == 200


def test_overload_slows_no_answer_and_is_refused_with_429(endpoint: Endpoint) -> None:
    """The bounds are generous: the processors that answer also send the load and run other tests."""
    target = f"{endpoint.url}/v1/recommend"
    question, key = {"user_id": "user-00"}, {"x-api-key": KEY}
    load.take_turns(target, question, callers=64, seconds=1, **key)
    capacity = load.take_turns(target, question, callers=64, seconds=2, **key).rate
    for times in (3, 10):
        outcomes = load.offer(target, question, rate=times * capacity, seconds=3, **key)
        assert set(outcomes.statuses) == {200, 429}
        assert all(outcome.retry_after for outcome in outcomes.all if outcome.status == 429)
        assert outcomes.rate > 0.4 * capacity
        assert outcomes.ages()[len(outcomes.ages()) // 2] < 3
        time.sleep(1)
        assert set(load.offer(target, question, rate=5, seconds=1, **key).statuses) == {200}


def test_model_is_swapped_while_no_request_fails(endpoint: Endpoint) -> None:
    first, second = (endpoint.recommender(model_dir) for model_dir in endpoint.models)
    request = {"user_id": "user-07", "k": 4}
    expected = [respond(model, [RecommendRequest(**request)])[0].model_dump() for model in (first, second)]
    seen: list[tuple[int, Any]] = []
    enough = threading.Event()

    def keep_asking() -> None:
        with httpx.Client() as client:
            while not enough.is_set():
                response = endpoint.post(client, **request)
                seen.append((response.status_code, response.json()))

    def is_swapped() -> bool:
        return seen[-1:] == [(200, expected[1])]

    asking = threading.Thread(target=keep_asking)
    asking.start()
    try:
        endpoint.swap_to(endpoint.models[1])
        endpoint.wait_until(is_swapped)
    finally:
        enough.set()
        asking.join()
    turn = seen.index((200, expected[1]))
    assert turn > 0
    assert seen == [(200, expected[0])] * turn + [(200, expected[1])] * (len(seen) - turn)


def test_after_the_death_of_the_only_replica_callers_are_told_when_to_come_again(endpoint: Endpoint) -> None:
    (replica,) = (
        process
        for process in psutil.Process(endpoint.process.pid).children(recursive=True)
        if "ServeReplica:cllm4rec" in " ".join(process.cmdline())
    )
    threading.Timer(0.5, replica.kill).start()
    outcomes = load.take_turns(
        f"{endpoint.url}/v1/recommend", {"user_id": "user-00"}, callers=4, seconds=3, **{"x-api-key": KEY}
    )
    assert not replica.is_running()
    assert {200, 503} <= set(outcomes.statuses) <= {200, 429, 503}
    assert all(outcome.retry_after for outcome in outcomes.all if outcome.status != 200)
    assert max(outcome.took for outcome in outcomes.all) < 9
    endpoint.wait_until(endpoint.is_ready)
    assert endpoint.post(httpx, user_id="user-00").status_code == 200


def test_interrupted_endpoint_goes_away_and_its_logs_name_neither_keys_nor_users(endpoint: Endpoint) -> None:
    endpoint.stop()
    assert not endpoint.is_ready()
    logs = [path for path in endpoint.ray_folder.rglob("*") if path.is_file() and "logs" in path.parts]
    text = "".join(path.read_text(errors="replace") for path in [*logs, endpoint.output])
    assert "/v1/recommend 200" in text, "the access log was not among what was read"
    assert "Swapped to model" in text
    for private in (KEY, STRANGER, "user-07", "ghost"):
        assert private not in text
