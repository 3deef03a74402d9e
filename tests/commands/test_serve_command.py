"""`cllm4rec serve`: errors before anything starts, what replicas are given, and --check."""

import argparse
import contextlib
import json
import os
import signal
import socket
import threading
from types import SimpleNamespace

import httpx
import pytest
from support.clusters import cluster_of
from support.directories import write_prepared, write_random_model
from support.ports import free_port

from cllm4rec.commands import serve
from cllm4rec.config import parse_config
from cllm4rec.data.world import parity_world
from cllm4rec.errors import ArtifactError, ResourceError
from cllm4rec.storage import files

MINIMAL = {"output_dir": "runs/x", "data": {"interactions": {"path": "reviews.json"}}}


def fails(error):
    def job(*_, **__):
        raise error

    return job


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A config whose model and prepared data are there, on a free port; Serve itself is never started."""
    prepared_dir = write_prepared(tmp_path / "prepared")
    write_random_model(tmp_path, prepared_dir, seed=0)
    monkeypatch.setattr("ray.serve.status", lambda: SimpleNamespace(applications={}))
    monkeypatch.setattr("ray.serve.start", fails(AssertionError("started")))
    return {
        **MINIMAL,
        "output_dir": str(tmp_path),
        "serve": {"port": free_port()},
        "cluster": {"start_timeout_s": 0.01},
    }


def refused_endpoint(settings):
    with pytest.raises((ArtifactError, ResourceError)) as caught, serve.serving(parse_config(settings)):
        pass
    return str(caught.value)


def test_a_damaged_model_is_refused_before_anything_starts(served, tmp_path):
    content = bytearray((tmp_path / "model" / "tables.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "model" / "tables.safetensors").write_bytes(bytes(content))
    assert "model/tables.safetensors is damaged (sha256 differs)" in refused_endpoint(served)


def test_a_missing_model_is_refused_before_anything_starts(served, tmp_path):
    files.remove_directory(str(tmp_path / "model"))
    assert "model is not a finished model directory" in refused_endpoint(served)


def test_a_taken_port_is_named(served):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", served["serve"]["port"]))
        taken.listen()
        assert refused_endpoint(served) == (
            f"port {served['serve']['port']} of 127.0.0.1 cannot be used (Address already in use); "
            "set serve.port to a free one"
        )


def test_an_endpoint_that_runs_on_the_cluster_is_left_alone(served, monkeypatch):
    monkeypatch.setattr("ray.serve.status", lambda: SimpleNamespace(applications={"shop": "RUNNING"}))
    assert "Ray Serve already runs shop on this cluster" in refused_endpoint(served)


def test_more_replicas_than_the_cluster_holds_are_refused(served, monkeypatch):
    cluster_of(monkeypatch, {"CPU": 2.0})
    served["serve"] |= {"min_replicas": 3, "max_replicas": 3}
    assert refused_endpoint(served) == (
        "serve needs 3 CPUs, but the cluster has 2 CPUs; lower serve.min_replicas or "
        "cluster.cpus_per_worker, or add nodes"
    )


def test_the_reason_of_a_failed_replica_is_the_sentence_of_our_error():
    messages = (
        "Deploying application cllm4rec failed: The deployment failed to start 3 times in a row. Error:\n"
        "ray::ServeReplica:cllm4rec:Recommend.initialize_and_get_metadata()\n  File x, line 3\n"
        "cllm4rec.errors.ArtifactError: model was not trained on prepared; serve a model with its directory\n"
        "The above exception was the direct cause of the following exception:\nRuntimeError: Traceback\n"
    )
    assert serve.reason_of(messages) == "model was not trained on prepared; serve a model with its directory"
    assert serve.reason_of("first line\nlast line\n") == "last line"


@pytest.mark.parametrize(("threads_per_worker", "threads"), [(None, 4), (3, 3)])
def test_replicas_get_their_threads_by_the_rule_of_trainers_and_actors(
    served, monkeypatch, threads_per_worker, threads
):
    cluster_of(monkeypatch, {"CPU": 0.0})
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    built = []
    monkeypatch.setattr("cllm4rec.serving.app.build", built.append)
    served["cluster"] |= {"threads_per_worker": threads_per_worker}
    served["serve"] |= {"max_replicas": 2}
    refused_endpoint(served)
    assert [args["threads_per_replica"] for args in built] == [threads]


@pytest.mark.parametrize(
    ("host", "proxies", "url", "asked_from"),
    [
        ("127.0.0.1", {"head": "HEALTHY", "here": "HEALTHY"}, "http://127.0.0.1:8000", None),
        ("127.0.0.1", {"head": "HEALTHY"}, "http://127.0.0.1:8000", "head"),
        ("127.0.0.1", {"here": "STARTING", "head": "HEALTHY"}, "http://127.0.0.1:8000", "head"),
        ("0.0.0.0", {"head": "HEALTHY"}, "http://10.0.0.1:8000", None),
        ("0.0.0.0", {"head": "HEALTHY", "here": "HEALTHY"}, "http://10.0.0.2:8000", None),
    ],
)
def test_the_endpoint_is_on_a_node_that_has_a_proxy(monkeypatch, host, proxies, url, asked_from):
    """A driver's own node has none if it is neither the head nor has a replica."""
    nodes = [{"NodeID": "head", "NodeManagerAddress": "10.0.0.1"}, {"NodeID": "here", "NodeManagerAddress": "10.0.0.2"}]
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "here"))
    monkeypatch.setattr("ray.serve.status", lambda: SimpleNamespace(proxies=proxies))
    endpoint = serve.find_endpoint(parse_config({**MINIMAL, "serve": {"host": host, "port": 8000}}))
    assert (endpoint.url, endpoint.node_id) == (url, asked_from)
    assert ("on the node head only; serve.host=0.0.0.0" in endpoint.place) == (asked_from is not None)


def test_check_prints_request_and_answer_and_returns_no_user_id(served, monkeypatch, capsys):
    user_id = parity_world().catalog.user_ids[0]
    items = [{"item_id": "item-03", "score": 1.5, "text": "a book"}, {"item_id": "item-05", "score": 0.5, "text": ""}]
    answer = {"items": items, "model_version": "abc", "cold_start": False, "ignored_items": []}

    def post(url, json, **_):
        assert (url, json["user_id"]) == ("http://there/v1/recommend", user_id)
        return httpx.Response(200, json=answer, request=httpx.Request("POST", url))

    monkeypatch.setattr(serve, "serving", lambda config: contextlib.nullcontext(serve.Endpoint("http://there")))
    monkeypatch.setattr(httpx, "post", post)
    result = serve.run(parse_config(served), argparse.Namespace(check=True))
    assert result == {"serve": {"url": "http://there/v1/recommend", "model_version": "abc", "items": 2}}
    assert user_id not in json.dumps(result)
    shown = capsys.readouterr().out
    assert f'POST http://there/v1/recommend {{"user_id": "{user_id}", "k": 5}}' in shown
    assert "1.500  item-03      a book" in shown


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_endpoint_which_then_ends_like_any_other_command(served, monkeypatch, number):
    stopped = []

    @contextlib.contextmanager
    def serving(config):
        threading.Timer(0.2, os.kill, (os.getpid(), number)).start()
        yield serve.Endpoint("http://there")
        stopped.append("in order")

    monkeypatch.setattr(serve, "serving", serving)
    before = signal.getsignal(number)
    result = serve.run(parse_config(served), argparse.Namespace(check=False))
    assert result == {"serve": {"url": "http://there", "stopped": True}}
    assert stopped == ["in order"]
    assert signal.getsignal(number) is before
