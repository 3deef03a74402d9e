"""Connecting: the CPUs of a local Ray, and a cluster that does not answer."""

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
