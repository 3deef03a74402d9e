"""The Ray Serve application: replicas that hold a Recommender each, answer in batches, swap models while they serve.

    serve run cluster/serve.yaml                  # or, with a whole run's config: cllm4rec serve --config FILE
    curl localhost:8000/v1/recommend -H 'content-type: application/json' -d '{"user_id": "A2IBPI20UZIR0U", "k": 10}'

Overload is shed: a replica works on two batches' worth of requests, `max_queued_requests` wait at each proxy, and
the rest get 429 with Retry-After. A model is swapped while requests go on. An application that was given an output_dir
answers with the promoted model and takes the next one by itself a few seconds after `cllm4rec promote`. One that was given
a model_dir and a prepared_dir keeps them until the deployment's `user_config` names others (see cluster/serve.yaml) and
is deployed with `serve deploy`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from typing import Any, Self

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from ray import serve as ray_serve
from ray.serve.config import BackpressureConfig

from cllm4rec.config import Positive, RulesConfig, ServeConfig
from cllm4rec.errors import Cllm4RecError, ConfigError
from cllm4rec.scoring.recommender import Recommender
from cllm4rec.scoring.rule_files import FILES
from cllm4rec.serving.batching import Batcher
from cllm4rec.serving.schemas import Ready, RecommendRequest, RecommendResponse
from cllm4rec.serving.web import API_KEYS_VARIABLE, api_keys_of, create_app
from cllm4rec.storage.artifacts import read_manifest
from cllm4rec.storage.files import absolute, join
from cllm4rec.storage.registry import current_model

# Serve's own logger: what it gets is in the replica's log file. Directories and versions only, never a request.
log = logging.getLogger("ray.serve")

WATCH_S = 2.0
"""How often a replica looks whether another model was promoted."""
_RETRY_S = 60.0
"""How long a promoted model that could not be loaded is left alone before it is tried again."""


class Places(BaseModel):
    """Where the model is: `output_dir` of a run, to follow its promotions, or two directories that stay."""

    output_dir: str | None = Field(None, description="answers with the current model of this run, whichever that is")
    model_dir: str | None = None
    prepared_dir: str | None = Field(None, description="histories; erased users are looked up beside it")

    @model_validator(mode="after")
    def _says_one_place(self) -> Self:
        given = (self.output_dir is not None, self.model_dir is not None, self.prepared_dir is not None)
        if given not in ((True, False, False), (False, True, True)):
            raise ValueError("give either output_dir, or model_dir and prepared_dir")
        return self

    def directories(self) -> tuple[str, str]:
        """Model and prepared directory as they are now. Raises ArtifactError where the run's pointer is damaged."""
        if self.output_dir is not None:
            return current_model(self.output_dir), join(self.output_dir, "prepared")
        assert self.model_dir is not None
        assert self.prepared_dir is not None
        return self.model_dir, self.prepared_dir


class UserConfig(Places):
    """The deployment's user_config: which model answers, from which histories, and what it may recommend."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    rules: RulesConfig = RulesConfig()

    def resolved(self) -> Self:
        """The same with two directories named. Raises as `directories`."""
        model_dir, prepared_dir = self.directories()
        return self.model_copy(update={"output_dir": None, "model_dir": model_dir, "prepared_dir": prepared_dir})

    def load(self) -> Recommender:
        return Recommender.load(*self.directories(), self.rules)


class ServeArgs(ServeConfig, Places):
    """What `build` takes: the artifacts, a run's `serve` section, and what a replica is given."""

    rules: RulesConfig = Field(RulesConfig(), description="a run's score.rules; availability is that of today (UTC)")
    cpus_per_replica: Positive = Field(1, description="also its torch threads")
    use_gpu: bool = False
    require_api_keys: bool = Field(False, description="refuse to start where CLLM4REC_API_KEYS is not set")


class RecommendReplica:
    """One replica: a Recommender, the batches it answers and the HTTP routes in front of it."""

    def __init__(self, max_batch_size: int, batch_wait_timeout_s: float, require_api_keys: bool) -> None:
        self._api_keys = api_keys_of(os.environ, required=require_api_keys)
        self._recommender: Recommender | None = None
        self._model_dir, self._tried, self._last_reason = "", ("", 0.0), ""
        self._swapping = asyncio.Lock()
        self._swap: asyncio.Task[None] | None = None
        self._following: asyncio.Task[None] | None = None
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
        wanted = UserConfig.model_validate(user_config)
        if self._following is not None:
            self._following.cancel()
        if self._recommender is None:
            await self._take(await asyncio.to_thread(wanted.resolved))
        else:
            self._swap = asyncio.create_task(self._swap_to(wanted))
        if wanted.output_dir is not None:
            self._following = asyncio.create_task(self._follow(wanted))

    def check_health(self) -> None:
        if self._recommender is None:
            raise RuntimeError("no model is loaded")

    async def _swap_to(self, user_config: UserConfig) -> None:
        async with self._swapping:  # first come, first served: the last one asked for stays
            self._last_reason = ""
            try:
                await self._take(await asyncio.to_thread(user_config.resolved))
            except Exception as error:
                self._keep_the_old(error)

    async def _follow(self, user_config: UserConfig) -> None:
        """Take every model that is promoted from now on, beside the requests."""
        while True:
            await asyncio.sleep(WATCH_S)
            async with self._swapping:
                try:
                    wanted = await asyncio.to_thread(user_config.resolved)
                    if self._is_news(wanted):
                        await self._take(wanted)
                except Exception as error:
                    self._keep_the_old(error)

    def _is_news(self, wanted: UserConfig) -> bool:
        tried, at = self._tried
        is_left_alone = wanted.model_dir == tried and time.monotonic() - at < _RETRY_S
        return wanted.model_dir != self._model_dir and not is_left_alone

    async def _take(self, user_config: UserConfig) -> None:
        """Load, then swap: between the two the old model answers."""
        self._tried = (user_config.model_dir or "", time.monotonic())
        recommender = await asyncio.to_thread(user_config.load)
        verb = "Serving" if self._recommender is None else "Swapped to"
        self._recommender, self._model_dir, self._last_reason = recommender, user_config.model_dir or "", ""
        log.info("%s model %s from %s", verb, recommender.model_version, user_config.model_dir)

    def _keep_the_old(self, error: Exception) -> None:
        """Raised to Serve, an error would stop the replica, and a good model with it. Said once, however often tried."""
        reason = str(error) if isinstance(error, Cllm4RecError) else repr(error)
        if reason != self._last_reason:
            log.error("Another model is not taken, the old one stays: %s", reason)
        self._last_reason = reason

    def _ready(self) -> Ready | None:
        return None if self._recommender is None else Ready(model_version=self._recommender.model_version)

    def _answer(self, requests: list[RecommendRequest]) -> list[RecommendResponse]:
        recommender = self._recommender  # one model for the whole batch, whatever is swapped in meanwhile
        assert recommender is not None
        return recommender.answer(requests)


def build(args: dict[str, Any]) -> Any:
    """The Serve Application for `serve run` and `cllm4rec serve`: where the model is, and any other field of ServeArgs.

    Raises ConfigError on an unknown or wrong setting, ArtifactError where a directory is not there, before any replica
    starts. `host`, `port` and `request_timeout_s` belong to Serve's proxies, not to an application: pass
    `http_options(...)` to `ray.serve.start`, or write `http_options` in the Serve YAML.
    """
    settings = _parse(args)
    model_dir, prepared_dir = settings.directories()
    read_manifest(model_dir, "model")
    read_manifest(prepared_dir, "prepared")
    deployment = ray_serve.deployment(
        ray_serve.ingress()(RecommendReplica),
        name="Recommend",
        ray_actor_options={"num_cpus": settings.cpus_per_replica, "num_gpus": int(settings.use_gpu)},
        # One batch being scored and one filling; fewer and batches never fill.
        max_ongoing_requests=2 * settings.max_batch_size,
        max_queued_requests=settings.max_queued_requests,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
        user_config=_user_config(settings),
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


def _user_config(settings: ServeArgs) -> dict[str, Any]:
    # Replicas run in another working directory, maybe on another machine.
    places = settings.model_dump(include=set(Places.model_fields), exclude_none=True)
    rules = settings.rules.model_dump(exclude_none=True)
    return {
        **{name: absolute(path) for name, path in places.items()},
        "rules": {**rules, **{name: absolute(rules[name]) for name in FILES if name in rules}},
    }


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
