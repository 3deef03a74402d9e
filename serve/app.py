"""The Ray Serve application: replicas that hold a Recommender each, answer in batches, swap models while they serve.

    serve run serve/config.yaml                  # or, with a whole run's config: python -m jobs.serve --config FILE
    curl localhost:8000/v1/recommend -H 'content-type: application/json' -d '{"user_id": "A2IBPI20UZIR0U", "k": 10}'

Overload is shed: a replica works on two batches' worth of requests, `max_queued_requests` wait at each proxy, and
the rest get 429 with Retry-After. To swap the model of a running application without a restart, give the
deployment's `user_config` another model_dir and prepared_dir (see serve/config.yaml) and `serve deploy` it.
"""

from __future__ import annotations

import asyncio
import logging
import os
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ray import serve as ray_serve
from ray.serve.config import BackpressureConfig

from cllm4rec.artifacts import absolute, read_manifest
from cllm4rec.config import Positive, ServeConfig
from cllm4rec.errors import Cllm4RecError, ConfigError
from serve.batching import Batcher
from serve.recommend import Recommender
from serve.schemas import Ready, RecommendRequest, RecommendResponse
from serve.web import API_KEYS_VARIABLE, api_keys_of, create_app

# Serve's own logger: what it gets is in the replica's log file. Directories and versions only, never a request.
log = logging.getLogger("ray.serve")


class Artefacts(BaseModel):
    """The deployment's user_config: which model answers, and the prepared directory it was trained on."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model_dir: str
    prepared_dir: str
    deny_items: str | None = None

    def load(self) -> Recommender:
        return Recommender.load(self.model_dir, self.prepared_dir, self.deny_items)


class ServeArgs(ServeConfig):
    """What `build` takes: the artefacts, a run's `serve` section, and what a replica is given."""

    model_dir: str
    prepared_dir: str
    deny_items: str | None = Field(None, description="a text file with one item id a line that nobody is recommended")
    cpus_per_replica: Positive = Field(1, description="also its torch threads")
    use_gpu: bool = False
    require_api_keys: bool = Field(False, description="refuse to start where CLLM4REC_API_KEYS is not set")


class RecommendReplica:
    """One replica: a Recommender, the batches it answers and the HTTP routes in front of it."""

    def __init__(self, max_batch_size: int, batch_wait_timeout_s: float, require_api_keys: bool) -> None:
        self._api_keys = api_keys_of(os.environ, required=require_api_keys)
        self._recommender: Recommender | None = None
        self._swapping = asyncio.Lock()
        self._swap: asyncio.Task[None] | None = None
        self._recommend = Batcher(self._answer, max_batch_size, batch_wait_timeout_s)
        log.info("The endpoint asks for keys: %s", "yes" if self._api_keys else f"no ({API_KEYS_VARIABLE} is not set)")

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self._recommend, self._ready, self._api_keys)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Called by Serve before the first request and whenever user_config changes.

        The first model is waited for: without it the replica does not start. A later one is loaded beside the old,
        which goes on answering. Serve routes nothing to a replica that is inside of this method, so it returns before
        the load is done.
        """
        artefacts = Artefacts.model_validate(user_config)
        if self._recommender is None:
            self._recommender = await asyncio.to_thread(artefacts.load)
            log.info("Serving model %s from %s", self._recommender.model_version, artefacts.model_dir)
        else:
            self._swap = asyncio.create_task(self._swap_to(artefacts))

    def check_health(self) -> None:
        if self._recommender is None:
            raise RuntimeError("no model is loaded")

    async def _swap_to(self, artefacts: Artefacts) -> None:
        async with self._swapping:  # first come, first served: the last one asked for stays
            try:
                recommender = await asyncio.to_thread(artefacts.load)
            except Exception as error:
                # Raised to Serve, this would stop the replica, and a good model with it.
                reason = str(error) if isinstance(error, Cllm4RecError) else repr(error)
                log.error("The model at %s is not taken, the old one stays: %s", artefacts.model_dir, reason)
                return
            self._recommender = recommender
            log.info("Swapped to model %s from %s", recommender.model_version, artefacts.model_dir)

    def _ready(self) -> Ready | None:
        return None if self._recommender is None else Ready(model_version=self._recommender.model_version)

    def _answer(self, requests: list[RecommendRequest]) -> list[RecommendResponse]:
        recommender = self._recommender  # one model for the whole batch, whatever is swapped in meanwhile
        assert recommender is not None
        return recommender.answer(requests)


def build(args: dict[str, Any]) -> Any:
    """The Serve Application for `serve run` and `jobs.serve`: `model_dir`, `prepared_dir` and any field of ServeArgs.

    Raises ConfigError on an unknown or wrong setting, ArtifactError where a directory is not there, before any replica
    starts. `host`, `port` and `request_timeout_s` belong to Serve's proxies, not to an application: pass
    `http_options(...)` to `ray.serve.start`, or write `http_options` in the Serve YAML.
    """
    settings = _parse(args)
    read_manifest(settings.model_dir, "model")
    read_manifest(settings.prepared_dir, "prepared")
    deployment = ray_serve.deployment(
        ray_serve.ingress()(RecommendReplica),
        name="Recommend",
        ray_actor_options={"num_cpus": settings.cpus_per_replica, "num_gpus": int(settings.use_gpu)},
        # One batch being scored and one filling; fewer and batches never fill.
        max_ongoing_requests=2 * settings.max_batch_size,
        max_queued_requests=settings.max_queued_requests,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
        user_config=_artefacts(settings),
        # When replicas are replaced, the old ones answer until the new ones can.
        max_surge_percent=100,
        graceful_shutdown_timeout_s=settings.request_timeout_s + 10,
        **_replicas(settings),
    )
    return deployment.bind(
        settings.max_batch_size,
        settings.batch_wait_timeout_s,
        # Keys seen here and missing on a replica's node would open the endpoint without a word.
        settings.require_api_keys or API_KEYS_VARIABLE in os.environ,
    )


def http_options(settings: ServeConfig) -> dict[str, Any]:
    """Options for the proxies: `ray.serve.start(http_options=http_options(config.serve))`, before `ray.serve.run`."""
    return {"host": settings.host, "port": settings.port, "request_timeout_s": settings.request_timeout_s}


def _parse(args: dict[str, Any]) -> ServeArgs:
    try:
        return ServeArgs.model_validate(args)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, p['loc']))}: {p['msg'].removeprefix('Value error, ')}" for p in error.errors()
        )
        raise ConfigError(f"the arguments of the Serve application are refused: {problems}") from None


def _artefacts(settings: ServeArgs) -> dict[str, str | None]:
    # Replicas run in another working directory, maybe on another machine.
    paths = {"model_dir": settings.model_dir, "prepared_dir": settings.prepared_dir, "deny_items": settings.deny_items}
    return {name: None if path is None else absolute(path) for name, path in paths.items()}


def _replicas(settings: ServeArgs) -> dict[str, Any]:
    if settings.min_replicas == settings.max_replicas:
        return {"num_replicas": settings.min_replicas}
    return {
        "autoscaling_config": {
            "min_replicas": settings.min_replicas,
            "max_replicas": settings.max_replicas,
            "target_ongoing_requests": settings.target_ongoing_requests,
        }
    }
