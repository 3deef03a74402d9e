"""The stages of a run, in order: what decides whether one is up to date, and what runs it."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from typing import Any

from cllm4rec.cluster import processes, wait_for_resources
from cllm4rec.config import Config
from cllm4rec.data.prepare import prepare, prepare_inputs
from cllm4rec.evaluation.stage import evaluate, evaluate_inputs
from cllm4rec.metrics.protocol import Validation
from cllm4rec.nightly.plan import ScorePlan, is_published, plan_score
from cllm4rec.nightly.ray_job import forget_staged, score
from cllm4rec.nightly.report import NightReport
from cllm4rec.progress import counted, watched
from cllm4rec.storage.artifacts import Manifest, is_current
from cllm4rec.training.fit import (
    backbone_inputs,
    finetune_inputs,
    fit_backbone,
    fit_finetuned,
    fit_pretrained,
    pretrain_inputs,
)

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Stage:
    """`run` writes what `directory` names and returns what to tell; `is_done`: it would write the same again."""

    name: str
    directory: str
    is_done: Callable[[Config], bool]
    run: Callable[[Config, bool], dict[str, Any]]


def _artifact(
    name: str, directory: str, inputs: Callable[[Config], dict[str, str]], make: Callable[[Config, bool], Manifest]
) -> Stage:
    """A stage whose directory carries a manifest."""

    def is_done(config: Config) -> bool:
        return is_current(config.run.directory(directory), directory, inputs(config))

    def run(config: Config, force: bool) -> dict[str, Any]:
        return make(config, force).counts

    return Stage(name, directory, is_done, run)


def _training(
    name: str, directory: str, inputs: Callable[[Config], dict[str, str]], fit: Callable[..., Manifest]
) -> Stage:
    """A stage whose epochs are shown while it runs."""

    def make(config: Config, force: bool) -> Manifest:
        with watched(config.run.unfinished(name), config.run.directory(directory), forget=force):
            return fit(config, Validation)

    return _artifact(name, directory, inputs, make)


def _score(config: Config, force: bool) -> dict[str, Any]:
    return run_score(plan_score(config, force), force).to_json()


def run_score(plan: ScorePlan, force: bool, accept_drift: bool = False) -> NightReport:
    """Wait for the actors' resources, then score; `force` drops what an interrupted run of this plan has staged."""
    config = plan.config
    if force:
        forget_staged(plan)
    # One CPU more than the actors hold, for Ray Data to read with.
    demand = processes(config.cluster, config.score.num_actors).demand(reading_cpus=1)
    remedy = "lower score.num_actors or cluster.cpus_per_worker, or add nodes"
    wait_for_resources(demand, config.cluster.start_timeout_s, "score", remedy)
    return score(plan, counted, accept_drift)


PREPARE = _artifact("prepare", "prepared", prepare_inputs, lambda config, _: prepare(config))
BACKBONE = _training("backbone", "backbone", backbone_inputs, fit_backbone)
PRETRAIN = _training("pretrain", "pretrained", pretrain_inputs, fit_pretrained)
FINETUNE = _training("finetune", "model", finetune_inputs, fit_finetuned)
EVALUATE = _artifact("evaluate", "evaluation", evaluate_inputs, lambda config, _: evaluate(config))
SCORE = Stage("score", "dump", is_published, _score)

PIPELINE = (PREPARE, BACKBONE, PRETRAIN, FINETUNE, EVALUATE, SCORE)
STAGES = {stage.name: stage for stage in PIPELINE}


def run_stage(stage: Stage, config: Config, force: bool) -> dict[str, Any]:
    """Run a stage unless its output is up to date; what is returned ends up in the last line of JSON."""
    directory = config.run.directory(stage.directory)
    if not force and stage.is_done(config):
        logger.info(f"{stage.name}: up to date, skipped ({directory}); --force runs it")
        return {"directory": directory, "skipped": True}
    logger.info(f"{stage.name}: writing {directory}")
    started = time.monotonic()
    told = stage.run(config, force)
    seconds = round(time.monotonic() - started, 1)
    logger.info(f"{stage.name}: done in {seconds:g} s")
    return {"directory": directory, "skipped": False, "seconds": seconds, "counts": told}
