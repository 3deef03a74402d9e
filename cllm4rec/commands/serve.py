"""The live endpoint around the current model: Ray Serve, autoscaled, until interrupted.

    cllm4rec serve --config demo serve.port=8000
    curl localhost:8000/v1/recommend -H 'content-type: application/json' -d '{"user_id": "u00001", "k": 5}'

Answers what the nightly table holds, for users of the catalog and for anyone with a history; `model/` answers until a
model is promoted, and what cllm4rec promote makes current answers a few seconds later. With --check it asks itself one
question over HTTP, prints the answer and stops.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import re
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx

from cllm4rec.arrays.ids import Catalog
from cllm4rec.cluster import processes, wait_for_resources
from cllm4rec.commands.cli import Command
from cllm4rec.commands.console import say
from cllm4rec.config import Config
from cllm4rec.errors import ResourceError
from cllm4rec.storage.artifacts import read_manifest, verify_files
from cllm4rec.storage.registry import current_model

_APPLICATION = "cllm4rec"


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--check", action="store_true", help="answer one request, print it and stop")


def run(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    if args.check:
        return {"serve": check(config)}
    with serving(config) as url:
        say(f"serve: answering at {url}/v1/recommend, try it at {url}/, documented at {url}/docs; Ctrl-C stops")
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                time.sleep(3600)
    return {"serve": {"url": url, "stopped": True}}


@contextlib.contextmanager
def serving(config: Config) -> Iterator[str]:
    """The endpoint is up within the block; gives its URL.

    Raises ArtifactError where the model is missing or damaged; ResourceError where the port is taken, the cluster too
    small or already serving something, or the replicas do not start.
    """
    from ray import serve as ray_serve

    from cllm4rec.serving.app import build, http_options

    _refuse_a_taken_port(config)
    _refuse_a_running_serve()
    model_dir = current_model(config.output_dir)
    verify_files(model_dir, read_manifest(model_dir, "model"))
    application = build(_arguments(config))
    _wait_for_replicas(config)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # this process's; replicas write theirs to their own files
    ray_serve.start(http_options=http_options(config.serve))
    try:
        try:
            ray_serve.run(application, name=_APPLICATION, route_prefix="/")
        except RuntimeError as error:
            deployments = [one for app in ray_serve.status().applications.values() for one in app.deployments.values()]
            told = "\n".join([str(error), *(deployment.message for deployment in deployments)])
            raise ResourceError(f"the endpoint does not start: {_why(told)}") from error
        yield f"http://{config.serve.host}:{config.serve.port}"
    finally:
        ray_serve.shutdown()


def check(config: Config) -> dict[str, Any]:
    """Start, ask for the first user of the catalog over HTTP, stop; returns question and answer."""
    question = {"user_id": str(Catalog.load(current_model(config.output_dir)).user_ids[0]), "k": 5}
    with serving(config) as url:
        answer = httpx.post(f"{url}/v1/recommend", json=question, timeout=60, headers=_key_header())
        answer.raise_for_status()
        return {"url": f"{url}/v1/recommend", "question": question, "answer": answer.json()}


def _arguments(config: Config) -> dict[str, Any]:
    return {
        **config.serve.model_dump(),
        "output_dir": config.output_dir,
        "rules": config.score.rules.model_dump(),
        "cpus_per_replica": config.cluster.cpus_per_worker,
        "use_gpu": config.cluster.use_gpu,
    }


def _wait_for_replicas(config: Config) -> None:
    replicas = processes(config.cluster, config.serve.min_replicas)
    remedy = "lower serve.min_replicas or cluster.cpus_per_worker, or add nodes"
    wait_for_resources(replicas.demand(), config.cluster.start_timeout_s, "serve", remedy)


def _refuse_a_running_serve() -> None:
    """A cluster has one Serve, and ours stops it in the end: that must not take somebody's endpoint away."""
    from ray import serve as ray_serve

    running = ", ".join(ray_serve.status().applications)
    if running:
        raise ResourceError(
            f"Ray Serve already runs {running} on this cluster; give it the new model with `serve deploy` (see "
            "cluster/serve.yaml), or end it first with `serve shutdown`"
        )


def _why(told: str) -> str:
    """What a replica failed by, out of Serve's words and its traceback: our own error's sentence where there is one."""
    ours = re.findall(r"cllm4rec\.errors\.\w+: (.+)", told)
    return str(ours[-1] if ours else told.strip().splitlines()[-1])


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


COMMAND = Command(run, __doc__ or "", add_flags=add_flags)
