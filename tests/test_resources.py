"""What a stage asks of the cluster: bundles, threads, waiting, refusing, and a cluster that begins with no nodes."""

import json
import logging
import os
import subprocess
import sys
import time

import pytest
from ray._raylet import GcsClient
from ray.core.generated.gcs_pb2 import GcsNodeInfo
from support.clusters import WORKER_CPUS, autoscaled_cluster, cluster_of, wait_until
from support.directories import write_prepared, write_random_model
from support.nights import config_of, expected, published

from cllm4rec import resources
from cllm4rec.config import ClusterConfig, parse_config
from cllm4rec.errors import ResourceError
from cllm4rec.resources import Autoscaler, NodeType, wait_for_resources, watch_nodes

MINIMAL = {"output_dir": "runs/x", "data": {"interactions": {"path": "reviews.json"}}}
BRIEF = ClusterConfig(start_timeout_s=0.01)


def refused(bundles, config=BRIEF):
    with pytest.raises(ResourceError) as caught:
        wait_for_resources(bundles, config, "score", "lower score.num_actors")
    return str(caught.value)


def test_a_cluster_that_is_too_small_is_reported_with_requested_and_existing_resources(monkeypatch):
    held = cluster_of(monkeypatch, {"CPU": 2.0})
    assert refused([{"CPU": 4.0, "GPU": 1.0}, {"CPU": 5.0}]) == (
        "score needs 9 CPUs and 1 GPUs, but the cluster has 2 CPUs and 0 GPUs; lower score.num_actors"
    )
    assert not held, "the request is taken back"


def test_resources_that_others_use_are_not_free(monkeypatch):
    cluster_of(monkeypatch, {"CPU": 8.0}, free={"CPU": 1.0})
    assert refused([{"CPU": 2.0}]) == "score needs 2 CPUs, but of 8 CPUs only 1 CPUs are free; lower score.num_actors"


@pytest.mark.parametrize(("existing", "reason"), [(8.0, "only 1 CPUs are free"), (2.0, "the autoscaler cannot add it")])
def test_an_autoscaler_that_cannot_add_nodes_ends_waiting_unless_others_give_theirs_back(monkeypatch, existing, reason):
    cluster_of(monkeypatch, {"CPU": existing}, free={"CPU": 1.0})
    monkeypatch.setattr(resources, "find_autoscaler", Autoscaler)
    monkeypatch.setattr(Autoscaler, "refuses", lambda self, group: True)
    assert reason in refused([{"CPU": 2.0}] * 3, ClusterConfig(start_timeout_s=0.5))


def test_a_process_needs_its_resources_on_one_node(monkeypatch):
    cluster_of(monkeypatch, {"CPU": 2.0}, {"CPU": 2.0}, free={"CPU": 2.0})
    assert refused([{"CPU": 3.0}]).startswith("score needs 3 CPUs on one node, but no node of the cluster has that")


def test_a_cluster_that_grows_is_waited_for_and_each_minute_says_for_what(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "cllm4rec")
    clock, free = [0.0], {"CPU": 1.0}

    def ten_seconds_pass():
        clock[0] += 10
        free["CPU"] = 4.0 if clock[0] > 130 else 1.0

    held = cluster_of(monkeypatch, {"CPU": 1.0}, free=free, on_wait=ten_seconds_pass)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(resources, "find_autoscaler", Autoscaler)
    monkeypatch.setattr(Autoscaler, "refuses", lambda self, group: False)
    wait_for_resources([{"CPU": 4.0}], ClusterConfig(), "score", "")
    assert [record.getMessage() for record in caplog.records] == [
        *(
            f"score needs 4 CPUs, but the cluster has 1 CPUs; waiting for the autoscaler, {seconds} of 900 s"
            for seconds in (20, 60, 120)
        ),
        "score has its resources after 140 s",
    ]
    assert not held


@pytest.mark.parametrize(("has_autoscaler", "timeout_s"), [(False, 45), (True, 900)])
def test_a_cloud_gets_15_minutes_and_a_cluster_without_autoscaler_45_seconds(monkeypatch, has_autoscaler, timeout_s):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock.__setitem__(0, clock[0] + 1) or clock[0])
    cluster_of(monkeypatch, {"CPU": 1.0})
    monkeypatch.setattr(resources, "find_autoscaler", lambda: Autoscaler() if has_autoscaler else None)
    monkeypatch.setattr(Autoscaler, "refuses", lambda self, group: False)
    refused([{"CPU": 4.0}], ClusterConfig())
    assert timeout_s < clock[0] < 4 * timeout_s


TYPES = Autoscaler((NodeType("small", {"CPU": 4.0}, 8), NodeType("large", {"CPU": 16.0, "GPU": 1.0}, 2)), 8)


LARGEST = "on one node, but the largest node type of the autoscaler, large, has"
MOST = "but the autoscaler can give the cluster at most"


@pytest.mark.parametrize(
    ("bundles", "reason"),
    [
        ([{"CPU": 32.0}], f"needs 32 CPUs {LARGEST} 16 CPUs"),
        ([{"CPU": 1.0, "GPU": 2.0}], f"needs 1 CPUs and 2 GPUs {LARGEST} 16 CPUs and 1 GPUs"),
        ([{"CPU": 4.0}] * 20, f"needs 80 CPUs, {MOST} 56 CPUs"),
        ([{"CPU": 1.0, "GPU": 1.0}] * 3, f"needs 3 CPUs and 3 GPUs, {MOST} 56 CPUs and 2 GPUs"),
    ],
)
def test_what_no_autoscaler_can_give_is_refused_at_once(monkeypatch, bundles, reason):
    cluster_of(monkeypatch, {"CPU": 1.0})
    monkeypatch.setattr(resources, "find_autoscaler", lambda: TYPES)
    started = time.monotonic()
    assert refused(bundles, ClusterConfig()) == f"score {reason}; lower score.num_actors"
    assert time.monotonic() - started < 5


def test_a_lost_node_its_replacement_and_what_is_missing_between_are_lines(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "cllm4rec")
    first, second = {"CPU": 2.0}, {"CPU": 4.0}
    cluster_of(monkeypatch, first, second)
    with watch_nodes([{"CPU": 3.0}] * 2, "training"):
        time.sleep(0.5)
        cluster_of(monkeypatch, first)
        wait_until(lambda: "waiting for a node" in caplog.text, 10)
        cluster_of(monkeypatch, first, second)
        wait_until(lambda: "joined" in caplog.text, 10)
    assert [record.getMessage() for record in caplog.records] == [
        "training: lost the node 10.0.0.1 with 4 CPUs",
        "training needs 6 CPUs, but the cluster has 2 CPUs; waiting for a node",
        "training: the node 10.0.0.1 joined with 4 CPUs",
    ]


def test_the_demand_of_processes_includes_cpus_for_reading(monkeypatch):
    monkeypatch.setattr("ray.nodes", lambda: [{}])
    config = parse_config({**MINIMAL, "cluster": {"cpus_per_worker": 2}})
    actors = resources.processes(config.cluster, 3)
    assert actors.bundles() == [{"CPU": 2.0}] * 3
    assert actors.bundles(reading_cpus=1) == [{"CPU": 2.0}] * 3 + [{"CPU": 1.0}]
    gpus = resources.processes(config.cluster.model_copy(update={"use_gpu": True}), 3)
    assert gpus.bundles() == [{"CPU": 2.0, "GPU": 1.0}] * 3


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
    assert resources.processes(config.cluster, 2).threads == threads


FROM_ZERO = """
import sys
from cllm4rec.cluster import connect
from cllm4rec.commands.cli import show_log
from cllm4rec.config import load_config
from cllm4rec.errors import ResourceError
from cllm4rec.nightly.plan import plan_score
from cllm4rec.pipeline import run_score

config = load_config(sys.argv[1])
connect(config)
with show_log():
    try:
        run_score(plan_score(load_config(sys.argv[1], ["cluster.cpus_per_worker=4"])), force=False)
    except ResourceError as error:
        print("refused:", error)
    run_score(plan_score(config), force=False)
"""


@pytest.mark.ray
def test_a_cluster_of_no_nodes_scores_everybody_and_has_no_nodes_afterwards(tmp_path):
    config = config_of(tmp_path, "zero", num_actors=2)
    write_random_model(tmp_path, write_prepared(tmp_path / "prepared", 10), seed=0)
    (tmp_path / "run.yaml").write_text(json.dumps(config.model_dump(mode="json")))
    with autoscaled_cluster(tmp_path, max_workers=1) as address:
        command = [sys.executable, "-c", FROM_ZERO, str(tmp_path / "run.yaml")]
        environment = os.environ | {"RAY_ADDRESS": address, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": os.getcwd()}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert (
            "refused: score needs 4 CPUs on one node, but the largest node type of the autoscaler, worker, has "
            f"{WORKER_CPUS} CPUs; lower score.num_actors or cluster.cpus_per_worker, or add nodes"
        ) in done.stdout
        assert "score has its resources after" in done.stdout, "it did not begin without nodes"
        assert published(config) == expected(config)
        client = GcsClient(address=address)
        wait_until(lambda: len(alive_nodes(client)) == 1, 60)


def alive_nodes(client):
    return [node for node in client.get_all_node_info().values() if node.state == GcsNodeInfo.ALIVE]
