"""Connecting: the CPUs of a local Ray, and a cluster that does not answer."""

import json
import os
import socket
import time

import pytest
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray.runtime_env import RuntimeEnv
from ray.runtime_env.runtime_env import _merge_runtime_env

from cllm4rec import cluster
from cllm4rec.config import parse_config
from cllm4rec.errors import ResourceError

MINIMAL = {"output_dir": "runs/x", "data": {"interactions": {"path": "reviews.json"}}}
CONFIG = parse_config(MINIMAL)


def test_a_local_ray_has_the_cpus_of_the_machine_and_cpus_for_reading(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    for num_workers, cpus in ((1, 4), (2, 4), (3, 5), (4, 6), (64, 6)):
        config = parse_config({**MINIMAL, "cluster": {"num_workers": num_workers}})
        assert cluster.local_cpus(config) == cpus


@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "http://127.0.0.1:{port}"])
def test_a_cluster_that_does_not_answer_is_reported_immediately(monkeypatch, address):
    """Ray itself would retry for minutes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("RAY_ADDRESS", address.format(port=probe.getsockname()[1]))
    started = time.monotonic()
    with pytest.raises(ResourceError, match=r"no Ray cluster answers at .*; correct RAY_ADDRESS or unset it"):
        cluster.connect(CONFIG)
    assert time.monotonic() - started < 30


def started_with(monkeypatch, **environment):
    """The variables that `connect` gives to the workers of a cluster."""
    given = {}
    monkeypatch.setattr("ray.init", lambda **options: given.update(options))
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.cluster_resources", dict)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    cluster.connect(CONFIG)
    return given["runtime_env"]


def test_the_variables_of_a_submitter_win_over_ours_and_are_no_conflict(monkeypatch):
    ours = started_with(monkeypatch)
    submitted = RuntimeEnv(env_vars=dict.fromkeys(ours["env_vars"], "theirs") | {"MINE": "1"})
    job = json.dumps({"runtime_env": submitted, "metadata": {}})
    merged = _merge_runtime_env(submitted, started_with(monkeypatch, **{RAY_JOB_CONFIG_JSON_ENV_VAR: job}))
    assert merged is not None, "Ray would refuse to connect"
    assert merged["env_vars"] == submitted["env_vars"]
    assert len(ours["env_vars"]) > 5


def test_a_local_ray_that_does_not_start_is_one_sentence(monkeypatch):
    def init(**_):
        raise Exception("The current node timed out during startup.\nThis could happen because ...")

    monkeypatch.setattr("ray.init", init)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ResourceError) as caught:
        cluster.connect(CONFIG)
    assert str(caught.value).startswith(
        "Ray does not start on this machine (The current node timed out during startup.); if"
    )
    assert "\n" not in str(caught.value)
