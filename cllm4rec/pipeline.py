"""The stages of a run, in order: how each decides whether it is up to date, and how it runs."""

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
from cllm4rec.nightly.report import NightReport
from cllm4rec.progress import show_count
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
    """A step of the pipeline that writes one directory.

    directory: its name below the output_dir.
    is_done: whether the directory is up to date with the config.
    run: writes the directory and returns counts. Its second argument is `force`: do not resume an interrupted run.
    report: a file in the directory for people to read.
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
    write: Callable[[Config], Manifest],
    report: str | None = None,
) -> Stage:
    """A stage whose directory has a manifest, by which `is_done` compares the digests of its inputs."""

    def is_done(config: Config) -> bool:
        return is_current(config.run.directory(directory), directory, inputs(config))

    def run(config: Config, force: bool) -> dict[str, Any]:
        if force:
            remove_directory(config.run.unfinished(name))  # an interrupted run is not resumed
        return write(config).counts

    return Stage(name, directory, is_done, run, report)


def training_stages(trainer: Trainer) -> tuple[Stage, Stage, Stage]:
    """The stages backbone, pretrain and finetune. `trainer` runs their training loop."""
    return (
        _artifact_stage("backbone", "backbone", backbone_inputs, lambda config: train_backbone(config, trainer)),
        _artifact_stage("pretrain", "pretrained", pretrain_inputs, lambda config: pretrain(config, trainer)),
        _artifact_stage("finetune", "model", finetune_inputs, lambda config: finetune(config, trainer)),
    )


def run_score(plan: ScorePlan, force: bool, accept_drift: bool = False) -> NightReport:
    """Wait for the resources of the actors, then score. force: delete the staged lists of an interrupted run of this plan."""
    config = plan.config
    if force:
        forget_staged(plan)
    # Ray Data needs one CPU besides those of the actors.
    demand = processes(config.cluster, config.score.num_actors).demand(reading_cpus=1)
    remedy = "lower score.num_actors or cluster.cpus_per_worker, or add nodes"
    wait_for_resources(demand, config.cluster.start_timeout_s, "score", remedy)
    return score(plan, show_count, accept_drift)


def _score(config: Config, force: bool) -> dict[str, Any]:
    return run_score(plan_score(config, force), force).to_json()


PREPARE = _artifact_stage("prepare", "prepared", prepare_inputs, prepare)
EVALUATE = _artifact_stage("evaluate", "evaluation", evaluate_inputs, evaluate, "report.md")
SCORE = Stage("score", "dump", is_published, _score)

PIPELINE = (PREPARE, *training_stages(train_on_ray), EVALUATE, SCORE)
STAGES = {stage.name: stage for stage in PIPELINE}


def run_stage(stage: Stage, config: Config, force: bool) -> dict[str, Any]:
    """Run a stage unless its output is up to date. Returns its entry in `run.json`."""
    directory = config.run.directory(stage.directory)
    result = {"directory": directory, "report": join(directory, stage.report) if stage.report else None}
    if not force and stage.is_done(config):
        logger.info("%s: up to date, skipped (%s); use --force to run it", stage.name, directory)
        return {**result, "skipped": True}
    logger.info("%s: writing %s", stage.name, directory)
    started = time.monotonic()
    counts = stage.run(config, force)
    seconds = round(time.monotonic() - started, 1)
    logger.info("%s: done in %g s", stage.name, seconds)
    return {**result, "skipped": False, "seconds": seconds, "counts": counts}
