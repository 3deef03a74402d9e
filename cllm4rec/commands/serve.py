"""Serve the current model over HTTP with Ray Serve, autoscaled, until interrupted.

    cllm4rec serve --config demo serve.port=8000
    curl localhost:8000/v1/recommend -H 'content-type: application/json' -d '{"user_id": "A000000000", "k": 5}'

Users of the catalog get the lists of the published table; other users are served from a history in the request. `model/`
is served until a model is promoted; a promoted model is served a few seconds after cllm4rec promote. With --check the
command sends itself one request over HTTP, prints the answer and stops.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx

from cllm4rec.arrays.ids import read_ids
from cllm4rec.commands.cli import Command
from cllm4rec.commands.console import say
from cllm4rec.config import Config
from cllm4rec.errors import ResourceError
from cllm4rec.resources import processes, wait_for_resources
from cllm4rec.storage.artifacts import read_manifest, verify_files
from cllm4rec.storage.registry import current_model

_APPLICATION = "cllm4rec"
_ALL_INTERFACES = ("0.0.0.0", "::")
_PROXY_TIMEOUT_S = 60.0
_POLL_S = 0.2


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--check", action="store_true", help="answer one request, print the answer and stop")


def run(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    if args.check:
        checked = check(config)
        checked.show()
        return {"serve": checked.summary}
    with serving(config) as endpoint:
        say(f"serve: {endpoint.url}/v1/recommend{endpoint.place} (a page to try it: {endpoint.url}/); Ctrl-C stops")
        _wait_for_a_signal()
    return {"serve": {"url": endpoint.url, "stopped": True}}


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """Where a proxy of Serve listens.

    node_id: the node that must ask, if the proxy is on another node than this process and listens to its own node only.
    """

    url: str
    node_id: str | None = None

    @property
    def place(self) -> str:
        """Where the URL may be used, if not here."""
        if self.node_id is None:
            return ""
        return f" on the node {self.node_id[:8]} only; serve.host=0.0.0.0 lets other machines ask"

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request for recommendations."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        if self.node_id is None:
            return _post(f"{self.url}/v1/recommend", request, _key_header())
        there = NodeAffinitySchedulingStrategy(self.node_id, soft=False)
        post = ray.remote(num_cpus=0, scheduling_strategy=there)(_post)
        answer: dict[str, Any] = ray.get(post.remote(f"{self.url}/v1/recommend", request, _key_header()))
        return answer


def _post(url: str, request: dict[str, Any], headers: dict[str, str]) -> dict[str, Any]:
    response = httpx.post(url, json=request, timeout=60, headers=headers)
    response.raise_for_status()
    answer: dict[str, Any] = response.json()
    return answer


def find_endpoint(config: Config) -> Endpoint:
    """A node that has a proxy, preferably this one: a cluster has proxies on the head and on nodes with a replica only.

    Raises ResourceError if no proxy becomes healthy.
    """
    import ray
    from ray import serve as ray_serve

    here, host, port = ray.get_runtime_context().get_node_id(), config.serve.host, config.serve.port
    give_up = time.monotonic() + _PROXY_TIMEOUT_S
    while True:
        proxies = ray_serve.status().proxies
        healthy = [node_id for node_id, status in proxies.items() if status == "HEALTHY"]
        if healthy:
            break
        if time.monotonic() > give_up:
            raise ResourceError("no proxy of Ray Serve is healthy; see the logs of Ray on the head node")
        time.sleep(_POLL_S)
    node_id = here if here in healthy else sorted(healthy)[0]
    address = next(node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] == node_id)
    if host in _ALL_INTERFACES:
        # A URL that other machines can use; of a local Ray, one that always works here.
        return Endpoint(f"http://{address if os.environ.get('RAY_ADDRESS') else '127.0.0.1'}:{port}")
    return Endpoint(f"http://{host}:{port}", None if node_id == here else node_id)


def _wait_for_a_signal() -> None:
    """Return after SIGINT or SIGTERM. A second one interrupts what comes then."""
    stopped = threading.Event()
    before = {number: signal.signal(number, lambda *_: stopped.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        stopped.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def serving(config: Config) -> Iterator[Endpoint]:
    """Run the endpoint for the duration of the block; yields where it is.

    Raises ArtifactError if the model is missing or damaged; ResourceError if the port is taken, if the cluster is too
    small or already serves something, or if the replicas do not start.
    """
    from ray import serve as ray_serve

    from cllm4rec.serving.app import build, http_options

    _refuse_a_taken_port(config)
    _refuse_a_running_serve()
    model_dir = current_model(config.output_dir)
    verify_files(model_dir, read_manifest(model_dir, "model"))
    application = build(_arguments(config))
    _wait_for_replicas(config)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # in this process; replicas log to their own files
    ray_serve.start(http_options=http_options(config.serve))
    try:
        try:
            ray_serve.run(application, name=_APPLICATION, route_prefix="/")
        except RuntimeError as error:
            applications = ray_serve.status().applications.values()
            messages = [deployment.message for app in applications for deployment in app.deployments.values()]
            reason = reason_of("\n".join([str(error), *messages]))
            raise ResourceError(f"the endpoint does not start: {reason}") from error
        yield find_endpoint(config)
    finally:
        ray_serve.shutdown()


@dataclasses.dataclass(frozen=True)
class Check:
    """One request that the endpoint answered: request and response as JSON objects."""

    url: str
    request: dict[str, Any]
    response: dict[str, Any]

    @property
    def summary(self) -> dict[str, Any]:
        """What may be stored: no user id, because an erasure must find every file that holds one."""
        items = len(self.response["items"])
        return {"url": self.url, "model_version": self.response["model_version"], "items": items}

    def show(self) -> None:
        """Print request and response."""
        say(f"POST {self.url} {json.dumps(self.request)}")
        say(f"model {self.response['model_version']}, cold_start {json.dumps(self.response['cold_start'])}")
        for item in self.response["items"]:
            say(f"  {item['score']:8.3f}  {item['item_id']:<12} {item['text'][:90]}")


def check(config: Config) -> Check:
    """Start the endpoint, request recommendations for the first user of the catalog over HTTP, and stop it."""
    user_id = str(read_ids(current_model(config.output_dir), "users")[0])
    request = {"user_id": user_id, "k": 5}
    with serving(config) as endpoint:
        return Check(f"{endpoint.url}/v1/recommend", request, endpoint.ask(request))


def _check_model(config: Config) -> None:
    read_manifest(current_model(config.output_dir), "model")


def _arguments(config: Config) -> dict[str, Any]:
    return {
        **config.serve.model_dump(),
        "output_dir": config.output_dir,
        "rules": config.score.rules.model_dump(),
        "cpus_per_replica": config.cluster.cpus_per_worker,
        "threads_per_replica": processes(config.cluster, config.serve.max_replicas).threads,
        "use_gpu": config.cluster.use_gpu,
    }


def _wait_for_replicas(config: Config) -> None:
    replicas = processes(config.cluster, config.serve.min_replicas)
    remedy = "lower serve.min_replicas or cluster.cpus_per_worker, or add nodes"
    wait_for_resources(replicas.bundles(), config.cluster, "serve", remedy)


def _refuse_a_running_serve() -> None:
    """A cluster has one Serve, and this command stops it at the end, which must not stop another endpoint."""
    from ray import serve as ray_serve

    running = ", ".join(ray_serve.status().applications)
    if running:
        raise ResourceError(
            f"Ray Serve already runs {running} on this cluster; deploy the new model there with `serve deploy` (see "
            "cluster/serve.yaml), or stop it first with `serve shutdown`"
        )


def reason_of(messages: str) -> str:
    """Why a replica failed, from Serve's messages and tracebacks: the sentence of our own error if there is one."""
    ours = re.findall(r"cllm4rec\.errors\.\w+: (.+)", messages)
    return str(ours[-1] if ours else messages.strip().splitlines()[-1])


def _key_header() -> dict[str, str]:
    keys = os.environ.get("CLLM4REC_API_KEYS", "").split(",")
    return {"X-API-Key": keys[0].strip()} if keys[0].strip() else {}


def _refuse_a_taken_port(config: Config) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.serve.host, config.serve.port))
        except OSError as error:
            raise ResourceError(
                f"port {config.serve.port} of {config.serve.host} cannot be used ({error.strerror}); "
                "set serve.port to a free one"
            ) from None


COMMAND = Command(run, __doc__ or "", add_flags=add_flags, writes=False, check=_check_model, has_force=False)
