"""Clusters for tests: a fake whose resources are given, and a real one that starts nodes when they are asked for."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil

WORKER_CPUS = 3


def cluster_of(
    monkeypatch: Any, *nodes: dict[str, float], free: dict[str, float] | None = None, on_wait: Any = None
) -> list[Any]:
    """Make Ray say that it has these nodes, without a head. Returns the placement groups that are not removed.

    free: what is not in use, by default everything. on_wait: called whenever a placement group is waited for.
    """
    held: list[Any] = []
    alive = [
        {"Alive": True, "NodeID": str(number), "NodeManagerAddress": f"10.0.0.{number}", "Resources": resources}
        for number, resources in enumerate(nodes)
    ]
    total = {name: sum(node.get(name, 0.0) for node in nodes) for name in {name for node in nodes for name in node}}

    def placement_group(bundles: list[dict[str, float]]) -> Any:
        def wait(seconds: float) -> bool:
            if on_wait is not None:
                on_wait()
            now = total if free is None else free
            names = {name for bundle in bundles for name in bundle}
            return all(sum(bundle.get(name, 0.0) for bundle in bundles) <= now.get(name, 0.0) for name in names)

        held.append(SimpleNamespace(bundles=bundles, wait=wait))
        return held[-1]

    monkeypatch.setattr("ray.nodes", lambda: alive)
    monkeypatch.setattr("ray.cluster_resources", lambda: total)
    monkeypatch.setattr("ray.available_resources", lambda: total if free is None else free)
    monkeypatch.setattr("ray.util.placement_group", placement_group)
    monkeypatch.setattr("ray.util.remove_placement_group", held.remove)
    return held


_HEAD = """
import json, os, socket, sys

head_id = "f" * 51 + "00000"
os.environ |= {
    "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1", "RAY_OVERRIDE_NODE_ID_FOR_TESTING": head_id,
    "RAY_enable_autoscaler_v2": "1", "RAY_CLOUD_INSTANCE_ID": head_id,
}
from ray._private import node, parameter, services

with socket.socket() as probe:
    probe.bind(("", 0))
    port = probe.getsockname()[1]
config = json.loads(sys.argv[2])
config["provider"] |= {"gcs_address": f"{services.get_node_ip_address()}:{port}", "head_node_id": head_id}
with open(sys.argv[1], "w") as stream:
    json.dump(config, stream)
head = node.Node(
    parameter.RayParams(
        num_cpus=0, num_gpus=0, object_store_memory=100_000_000, gcs_server_port=port, min_worker_port=0, max_worker_port=0,
        include_dashboard=False, autoscaling_config=sys.argv[1],
        env_vars={"RAY_OVERRIDE_NODE_ID_FOR_TESTING": head_id},
    ),
    head=True, shutdown_at_exit=True, spawn_reaper=True,
)
print(head.gcs_address, flush=True)
sys.stdin.read()
"""
_LISTS = (
    "setup_commands", "head_setup_commands", "worker_setup_commands", "initialization_commands", "head_start_ray_commands",
    "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude", "rsync_filter",
)  # fmt: skip
_NOTHING: dict[str, Any] = {name: [] for name in _LISTS} | {name: {} for name in ("file_mounts", "auth", "docker")}
"""What the configuration of a cluster must have and a machine of one's own does not need."""


@contextlib.contextmanager
def autoscaled_cluster(folder: Path, max_workers: int) -> Iterator[str]:
    """The address of a head without CPUs whose autoscaler (v2) starts and ends nodes of WORKER_CPUS CPUs on this machine."""
    worker = {"resources": {"CPU": WORKER_CPUS, "object_store_memory": 100_000_000}, "node_config": {}}
    config = _NOTHING | {
        "cluster_name": "from-zero",
        "max_workers": max_workers,
        "idle_timeout_minutes": 0.1,
        "upscaling_speed": 10,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "launch_multiple": True,
        },
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {**worker, "min_workers": 0, "max_workers": max_workers},
        },
    }
    head = subprocess.Popen(
        [sys.executable, "-c", _HEAD, str(folder / "autoscaling.json"), json.dumps(config)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"RAY_AUTH_MODE": "disabled"},
    )
    assert head.stdin is not None
    assert head.stdout is not None
    try:
        yield head.stdout.readline().strip()
    finally:
        started = psutil.Process(head.pid).children(recursive=True)  # nodes outlive the autoscaler that started them
        head.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            head.wait(timeout=15)
        for process in (head, *started):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def wait_until(is_true: Any, timeout_s: float) -> None:
    give_up = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < give_up, "it did not happen in time"
        time.sleep(0.1)
