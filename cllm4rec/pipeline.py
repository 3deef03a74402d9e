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
from cllm4rec.nightly.plan import ScorePlan, is_published, plan_score
from cllm4rec.nightly.ray_job import forget_staged, score
from cllm4rec.progress import counted
from cllm4rec.storage.artifacts import Manifest, is_current
from cllm4rec.storage.files import join, remove_directory
from cllm4rec.training.fit import (
    Trainer,
    backbone_inputs,
    finetune,
    finetune_inputs,
    pretrain,
    pretrain_inputs,
    train_backbone,
)
from cllm4rec.training.ray_trainer import train_on_ray

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Stage:
    """`run` writes what `directory` names and returns counts; `is_done`: it would write the same again.

    report: a file below the directory that a person reads first.
    """

    name: str
    directory: str
    is_done: Callable[[Config], bool]
    run: Callable[[Config, bool], dict[str, Any]]
    report: str | None = None


def _artifact_stage(
    name: str,
    directory: str,
    inputs: Callable[[Config], dict[str, str]],
    make: Callable[[Config], Manifest],
    report: str | None = None,
) -> Stage:
    """A stage whose directory has a manifest."""

    def is_done(config: Config) -> bool:
        return is_current(config.run.directory(directory), directory, inputs(config))

    def run(config: Config, force: bool) -> dict[str, Any]:
        if force:
            remove_directory(config.run.unfinished(name))  # an interrupted run is not resumed
        return make(config).counts

    return Stage(name, directory, is_done, run, report)


def training_stages(trainer: Trainer) -> tuple[Stage, Stage, Stage]:
    """backbone, pretrain and finetune, whose loop `trainer` runs."""
    return (
        _artifact_stage("backbone", "backbone", backbone_inputs, lambda config: train_backbone(config, trainer)),
        _artifact_stage("pretrain", "pretrained", pretrain_inputs, lambda config: pretrain(config, trainer)),
        _artifact_stage("finetune", "model", finetune_inputs, lambda config: finetune(config, trainer)),
    )


def run_score(plan: ScorePlan, force: bool, accept_drift: bool = False) -> dict[str, Any]:
    """Wait for the actors' resources, then score; `force` drops what an interrupted run of this plan has staged."""
    config = plan.config
    if force:
        forget_staged(plan)
    # One CPU more than the actors hold, for Ray Data to read with.
    demand = processes(config.cluster, config.score.num_actors).demand(reading_cpus=1)
    remedy = "lower score.num_actors or cluster.cpus_per_worker, or add nodes"
    wait_for_resources(demand, config.cluster.start_timeout_s, "score", remedy)
    return score(plan, counted, accept_drift)


def _score(config: Config, force: bool) -> dict[str, Any]:
    return run_score(plan_score(config, force), force)


PREPARE = _artifact_stage("prepare", "prepared", prepare_inputs, prepare)
EVALUATE = _artifact_stage("evaluate", "evaluation", evaluate_inputs, evaluate, "report.md")
SCORE = Stage("score", "dump", is_published, _score)

PIPELINE = (PREPARE, *training_stages(train_on_ray), EVALUATE, SCORE)
STAGES = {stage.name: stage for stage in PIPELINE}


def run_stage(stage: Stage, config: Config, force: bool) -> dict[str, Any]:
    """Run a stage unless its output is up to date; returns what `run.json` keeps of it."""
    directory = config.run.directory(stage.directory)
    result = {"directory": directory, "report": join(directory, stage.report) if stage.report else None}
    if not force and stage.is_done(config):
        logger.info("%s: up to date, skipped (%s); --force runs it", stage.name, directory)
        return {**result, "skipped": True}
    logger.info("%s: writing %s", stage.name, directory)
    started = time.monotonic()
    counts = stage.run(config, force)
    seconds = round(time.monotonic() - started, 1)
    logger.info("%s: done in %g s", stage.name, seconds)
    return {**result, "skipped": False, "seconds": seconds, "counts": counts}
