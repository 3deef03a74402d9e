"""The Ray Serve application: each replica holds a Recommender, answers in batches, and swaps models while it serves.

    serve run cluster/serve.yaml                  # or, with the config of a run: cllm4rec serve --config FILE
    curl localhost:8000/v1/recommend -H 'content-type: application/json' -d '{"user_id": "A2IBPI20UZIR0U", "k": 10}'

Overload: a replica sheds requests that waited for `max_wait_s`, with 429 and Retry-After. The proxies learn from it how many
requests to let through, and refuse the others at once (see gate.py).
Models: with an output_dir, replicas serve the current model of that run and load the next one a few seconds after
`cllm4rec promote`. With a model_dir and a prepared_dir, they keep these until `serve deploy` deploys a `user_config` that
names others (see cluster/serve.yaml). Requests are answered during a swap.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import logging.handlers
import math
import os
import time
from typing import Any, Self

import torch
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from ray import serve as ray_serve
from ray.serve import metrics
from ray.serve.config import BackpressureConfig

from cllm4rec.config import Positive, RulesConfig, ServeConfig
from cllm4rec.errors import ArtifactError, Cllm4RecError, ConfigError
from cllm4rec.run import Run
from cllm4rec.scoring.recommender import Recommender
from cllm4rec.scoring.rule_files import FILES
from cllm4rec.serving.batching import Batcher
from cllm4rec.serving.schemas import Ready, RecommendRequest, RecommendResponse, SimilarRequest, SimilarResponse
from cllm4rec.serving.web import API_KEYS_VARIABLE, api_keys_of, create_app, respond, respond_similar
from cllm4rec.storage.artifacts import read_manifest
from cllm4rec.storage.files import absolute
from cllm4rec.storage.registry import serving_order

# Serve's own logger, which writes to the replica's log file. Log directories and versions only, never a request.
log = logging.getLogger("ray.serve")

WATCH_S = 2.0
"""How often a replica checks whether another model was promoted."""
RETRY_S = 60.0
"""How long a replica waits before it tries again to load a promoted model that it could not load."""


_NO_LIMIT = 100_000
"""Requests that Serve may send to a replica, which sheds by itself. At a limit that is reached, Serve's router asks replicas
again and again while their batches starve, and fewer requests are answered the more arrive."""


class ModelLocation(BaseModel):
    """Where the model is: the `output_dir` of a run, to follow its promotions, or two fixed directories."""

    output_dir: str | None = Field(None, description="serve the current model of this run and follow its promotions")
    model_dir: str | None = None
    prepared_dir: str | None = Field(
        None, description="stored histories; erased users are read from the directory that contains it"
    )

    @model_validator(mode="after")
    def _names_one_location(self) -> Self:
        given = (self.output_dir is not None, self.model_dir is not None, self.prepared_dir is not None)
        if given not in ((True, False, False), (False, True, True)):
            raise ValueError("give either output_dir, or model_dir and prepared_dir")
        return self

    def directories(self) -> tuple[list[str], str]:
        """Model directories, the wanted one first and then those to fall back to, and the prepared directory.

        Raises ArtifactError if the run's pointer is damaged.
        """
        if self.output_dir is not None:
            return serving_order(self.output_dir), Run(self.output_dir).prepared
        assert self.model_dir is not None
        assert self.prepared_dir is not None
        return [self.model_dir], self.prepared_dir


class UserConfig(ModelLocation):
    """The deployment's user_config: the model, the stored histories, and the rules for what may be recommended."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    rules: RulesConfig = RulesConfig()

    def resolved(self) -> list[Self]:
        """The same with two directories in place of an output_dir, for each of `directories`. Raises like it."""
        model_dirs, prepared_dir = self.directories()
        fixed = {"output_dir": None, "prepared_dir": prepared_dir}
        return [self.model_copy(update={**fixed, "model_dir": model_dir}) for model_dir in model_dirs]

    def load(self) -> Recommender:
        assert self.model_dir is not None
        return Recommender.from_pretrained(self.model_dir, self.prepared_dir, rules=self.rules)


class ServeArgs(ServeConfig, ModelLocation):
    """Arguments of `build`: the location of the model, a run's `serve` section, and the resources of a replica."""

    rules: RulesConfig = Field(RulesConfig(), description="a run's score.rules; availability is that of today (UTC)")
    cpus_per_replica: Positive = 1
    threads_per_replica: Positive | None = Field(
        None, description="torch threads of a replica; null: Ray's default, one per CPU of the replica"
    )
    use_gpu: bool = False
    require_api_keys: bool = Field(False, description="refuse to start if CLLM4REC_API_KEYS is not set")


class RecommendReplica:
    """One replica: a Recommender, the batches it answers, and the HTTP routes."""

    def __init__(
        self,
        max_batch_size: int,
        batch_wait_timeout_s: float,
        require_api_keys: bool,
        num_threads: int | None = None,
        max_wait_s: float = math.inf,
        max_queued_requests: float = math.inf,
    ) -> None:
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        _log_library_warnings()
        self._api_keys = api_keys_of(os.environ, required=require_api_keys)
        self._recommender: Recommender | None = None
        self._model_dir, self._tried, self._last_reason = "", ("", 0.0), ""
        self._serves_wanted_model = metrics.Gauge(
            "cllm4rec_serves_wanted_model", "1; 0 while the wanted model cannot be loaded and an older one answers"
        )
        self._swapping = asyncio.Lock()
        self._swap: asyncio.Task[None] | None = None
        self._following: asyncio.Task[None] | None = None
        bounds = (max_batch_size, batch_wait_timeout_s, max_wait_s, max_queued_requests)
        self._recommend = Batcher(self._answer, *bounds)
        self._similar = Batcher(self._answer_similar, *bounds)
        log.info("Keys are required: %s", "yes" if self._api_keys else f"no ({API_KEYS_VARIABLE} is not set)")

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self._recommend, self._similar, self._ready, self._api_keys)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Called by Serve before the first request and whenever user_config changes.

        The first model is loaded before this method returns: without it the replica does not start. A later one is
        loaded in the background, and the old model answers meanwhile. Serve sends no request to a replica that is inside
        this method, so it must not wait for the load.
        """
        wanted = UserConfig.model_validate(user_config)
        if self._following is not None:
            self._following.cancel()
        if self._recommender is None:
            await self._take_the_first_that_loads(await asyncio.to_thread(wanted.resolved))
        else:
            self._swap = asyncio.create_task(self._swap_to(wanted))
        if wanted.output_dir is not None:
            self._following = asyncio.create_task(self._follow(wanted))

    def check_health(self) -> None:
        if self._recommender is None:
            raise RuntimeError("no model is loaded")

    async def _swap_to(self, user_config: UserConfig) -> None:
        async with self._swapping:  # in the order of the calls, so the last one requested stays
            self._last_reason = ""
            try:
                await self._take((await asyncio.to_thread(user_config.resolved))[0])
            except Exception as error:
                self._keep_old_model(error)

    async def _follow(self, user_config: UserConfig) -> None:
        """Load every model that is promoted from now on, while requests are answered."""
        while True:
            await asyncio.sleep(WATCH_S)
            async with self._swapping:
                try:
                    wanted, *_ = await asyncio.to_thread(user_config.resolved)
                    if wanted.model_dir == self._model_dir:
                        self._last_reason = ""
                        self._serves_wanted_model.set(1)
                    elif self._is_due(wanted):
                        await self._take(wanted)
                except Exception as error:
                    self._keep_old_model(error)

    def _is_due(self, wanted: UserConfig) -> bool:
        tried, at = self._tried
        return wanted.model_dir != tried or time.monotonic() - at >= RETRY_S

    async def _take_the_first_that_loads(self, candidates: list[UserConfig]) -> None:
        """Start with the wanted model or, if it is damaged, with the newest whole one that was promoted before it.

        Raises the error of the wanted one if none loads.
        """
        wanted, *older = candidates
        try:
            return await self._take(wanted)
        except ArtifactError as error:
            reason = error
        for candidate in older:
            with contextlib.suppress(ArtifactError):
                await self._take(candidate)
                self._tried = (wanted.model_dir or "", time.monotonic())
                return self._keep_old_model(reason)
        raise reason

    async def _take(self, user_config: UserConfig) -> None:
        """Load the model, then swap. Until then the old model answers."""
        self._tried = (user_config.model_dir or "", time.monotonic())
        recommender = await asyncio.to_thread(user_config.load)
        verb = "Serving" if self._recommender is None else "Swapped to"
        self._recommender, self._model_dir, self._last_reason = recommender, user_config.model_dir or "", ""
        self._serves_wanted_model.set(1)
        log.info("%s model %s from %s", verb, recommender.model_version, user_config.model_dir)

    def _keep_old_model(self, error: Exception) -> None:
        """Log the error once, however often the load is tried. Raised to Serve, it would stop a replica that works."""
        reason = str(error) if isinstance(error, Cllm4RecError) else repr(error)
        if reason != self._last_reason:
            log.error(
                "The new model cannot be loaded; an old one answers, %s from %s: %s",
                self._recommender and self._recommender.model_version, self._model_dir, reason,
            )  # fmt: skip
        self._last_reason = reason
        self._serves_wanted_model.set(0)

    def _ready(self) -> Ready | None:
        if self._recommender is None:
            return None
        return Ready(model_version=self._recommender.model_version, is_wanted_model=not self._last_reason)

    def _answer(self, requests: list[RecommendRequest]) -> list[RecommendResponse]:
        recommender = self._recommender  # one model for the whole batch, even if a swap happens meanwhile
        assert recommender is not None
        return respond(recommender, requests)

    def _answer_similar(self, requests: list[SimilarRequest]) -> list[SimilarResponse | None]:
        recommender = self._recommender
        assert recommender is not None
        return respond_similar(recommender, requests)


def build(args: dict[str, Any]) -> Any:
    """The Serve Application for `serve run` and `cllm4rec serve`. args: the fields of ServeArgs.

    Raises ConfigError for an unknown or wrong setting or for missing keys, and ArtifactError for a missing directory, before
    any replica starts. `host`, `port` and `request_timeout_s` belong to Serve's proxies, not to an application: pass
    `http_options(...)` to `ray.serve.start`, or write `http_options` in the Serve YAML.
    """
    settings = _parse(args)
    # Keys that are set here and missing on a replica's node would silently open the endpoint.
    needs_keys = bool(api_keys_of(os.environ, required=settings.require_api_keys))
    _check_that_a_model_is_there(*settings.directories())
    deployment = ray_serve.deployment(
        ray_serve.ingress()(RecommendReplica),
        name="Recommend",
        ray_actor_options={"num_cpus": settings.cpus_per_replica, "num_gpus": int(settings.use_gpu)},
        max_ongoing_requests=_NO_LIMIT,
        max_queued_requests=settings.max_queued_requests,  # while no replica is there
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
        user_config=_user_config(settings),
        # When replicas are replaced, the old ones answer until the new ones are ready.
        max_surge_percent=100,
        graceful_shutdown_timeout_s=settings.request_timeout_s + 10,
        **_replicas(settings),
    )
    return deployment.bind(
        settings.max_batch_size,
        settings.batch_wait_timeout_s,
        needs_keys,
        settings.threads_per_replica,
        settings.max_wait_s,
        settings.max_queued_requests,
    )


def _check_that_a_model_is_there(model_dirs: list[str], prepared_dir: str) -> None:
    if not any(_is_finished(model_dir) for model_dir in model_dirs):
        read_manifest(model_dirs[0], "model")
    read_manifest(prepared_dir, "prepared")


def _is_finished(model_dir: str) -> bool:
    with contextlib.suppress(ArtifactError):
        return bool(read_manifest(model_dir, "model"))
    return False


def http_options(settings: ServeConfig) -> dict[str, Any]:
    """Options of the proxies: `ray.serve.start(http_options=http_options(config.serve))`, before `ray.serve.run`."""
    return {"host": settings.host, "port": settings.port, "request_timeout_s": settings.request_timeout_s}


def _parse(args: dict[str, Any]) -> ServeArgs:
    try:
        return ServeArgs.model_validate(args)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, p['loc']))}: {p['msg'].removeprefix('Value error, ')}" for p in error.errors()
        )
        raise ConfigError(f"the arguments of the Serve application are wrong: {problems}") from None


def _user_config(settings: ServeArgs) -> dict[str, Any]:
    # Replicas run in another working directory, and possibly on another machine.
    location = settings.model_dump(include=set(ModelLocation.model_fields), exclude_none=True)
    rules = settings.rules.model_dump(exclude_none=True)
    return {
        **{name: absolute(path) for name, path in location.items()},
        "rules": {**rules, **{name: absolute(rules[name]) for name in FILES if name in rules}},
    }


def _log_library_warnings() -> None:
    """Write the library's warnings and errors to the replica's log file, for which Serve has a buffered handler."""
    for handler in log.handlers:
        if isinstance(handler, logging.handlers.MemoryHandler):
            logging.getLogger("cllm4rec").addHandler(handler)


def _replicas(settings: ServeArgs) -> dict[str, Any]:
    if settings.min_replicas == settings.max_replicas:
        return {"num_replicas": settings.min_replicas}
    return {
        "autoscaling_config": {
            "min_replicas": settings.min_replicas,
            "max_replicas": settings.max_replicas,
            "target_ongoing_requests": settings.target_ongoing_requests,
            "upscale_delay_s": settings.upscale_delay_s,
            "downscale_delay_s": settings.downscale_delay_s,
        }
    }
