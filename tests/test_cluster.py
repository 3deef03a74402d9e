"""The cluster: CPUs of a local Ray, resources of each process, and waiting for resources."""

import os
import socket
import time

import pytest

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


def cluster_of(monkeypatch, **existing):
    monkeypatch.setattr("ray.cluster_resources", lambda: existing)


def test_a_cluster_that_is_too_small_is_reported_with_requested_and_existing_resources(monkeypatch):
    cluster_of(monkeypatch, CPU=2.0)
    started = time.monotonic()
    with pytest.raises(ResourceError) as caught:
        cluster.wait_for_resources({"CPU": 9, "GPU": 1}, 0.2, "score", "lower score.num_actors")
    assert str(caught.value) == (
        "score needs 9 CPUs and 1 GPUs, but the cluster has 2 CPUs and 0 GPUs; lower score.num_actors"
    )
    assert time.monotonic() - started < 5


def test_a_cluster_that_grows_is_waited_for(monkeypatch):
    sizes = iter([1.0, 1.0, 4.0])
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": next(sizes)})
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    cluster.wait_for_resources({"CPU": 4}, 10.0, "score", "")


def test_the_demand_of_processes_includes_cpus_for_reading(monkeypatch):
    monkeypatch.setattr("ray.nodes", lambda: [{}])
    config = parse_config({**MINIMAL, "score": {"num_actors": 3}, "cluster": {"cpus_per_worker": 2}})
    actors = cluster.processes(config.cluster, config.score.num_actors)
    assert actors.demand() == {"CPU": 6.0}
    assert actors.demand(reading_cpus=1) == {"CPU": 7.0}
    gpus = cluster.processes(config.cluster.model_copy(update={"use_gpu": True}), 3)
    assert gpus.demand() == {"CPU": 6.0, "GPU": 3.0}


@pytest.mark.parametrize(
    ("settings", "num_nodes", "threads"),
    [
        ({}, 1, 4),  # a local machine: cores / processes
        ({"cpus_per_worker": 3}, 2, 3),  # a cluster: the reserved CPUs
        ({"cpus_per_worker": 3, "use_gpu": True}, 1, 3),
        ({"threads_per_worker": 5}, 1, 5),
    ],
)
def test_threads_of_trainers_actors_and_replicas_follow_one_rule(monkeypatch, settings, num_nodes, threads):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr("ray.nodes", lambda: [{}] * num_nodes)
    config = parse_config({**MINIMAL, "cluster": settings})
    assert cluster.processes(config.cluster, 2).threads == threads
