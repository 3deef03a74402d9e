"""A stage of a run: how it decides whether it is up to date, and how it runs. Importing this does not import Ray."""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections.abc import Callable
from typing import Any

from cllm4rec.config import Config
from cllm4rec.storage.artifacts import Manifest, is_current
from cllm4rec.storage.files import join
from cllm4rec.training.fit import (
    Trainer,
    backbone_inputs,
    finetune,
    finetune_inputs,
    pretrain,
    pretrain_inputs,
    train_backbone,
)

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Stage:
    """A step of the pipeline that writes one directory.

    directory: its name below the output_dir.
    is_done: whether the directory is up to date with the config.
    run: writes the directory; returns its manifest or counts. Its second argument is `force`: do not resume an
    interrupted run.
    report: a file in the directory for people to read.
    reason_to_skip: why the config asks for no such directory, or None if it does.
    """

    name: str
    directory: str
    is_done: Callable[[Config], bool]
    run: Callable[[Config, bool], Manifest | dict[str, Any]]
    report: str | None = None
    reason_to_skip: Callable[[Config], str | None] = lambda config: None


def artifact_stage(
    name: str,
    directory: str,
    inputs: Callable[[Config], dict[str, str]],
    run: Callable[[Config, bool], Manifest],
    report: str | None = None,
    reason_to_skip: Callable[[Config], str | None] = lambda config: None,
) -> Stage:
    """A stage whose directory has a manifest, by which `is_done` compares the digests of its inputs."""

    def is_done(config: Config) -> bool:
        return is_current(config.run.directory(directory), directory, inputs(config))

    return Stage(name, directory, is_done, run, report, reason_to_skip)


def training_stages(trainer: Trainer) -> tuple[Stage, Stage, Stage]:
    """The stages backbone, pretrain and finetune. `trainer` runs their training loop."""
    partial = functools.partial
    return (
        artifact_stage("backbone", "backbone", backbone_inputs, partial(train_backbone, trainer=trainer)),
        artifact_stage("pretrain", "pretrained", pretrain_inputs, partial(pretrain, trainer=trainer)),
        artifact_stage("finetune", "model", finetune_inputs, partial(finetune, trainer=trainer)),
    )


def run_stage(stage: Stage, config: Config, force: bool) -> dict[str, Any]:
    """Run a stage unless its output is up to date. Returns its entry in `run.json`."""
    directory = config.run.directory(stage.directory)
    reason = stage.reason_to_skip(config)
    if reason is not None:
        logger.warning("%s: skipped: %s", stage.name, reason)
        return {"directory": directory, "report": None, "skipped": True, "reason": reason}
    result = {"directory": directory, "report": join(directory, stage.report) if stage.report else None}
    if not force and stage.is_done(config):
        logger.info("%s: up to date, skipped (%s); use --force to run it", stage.name, directory)
        return {**result, "skipped": True}
    logger.info("%s: writing %s", stage.name, directory)
    started = time.monotonic()
    written = stage.run(config, force)
    counts = written.counts if isinstance(written, Manifest) else written
    seconds = round(time.monotonic() - started, 1)
    logger.info("%s: done in %g s", stage.name, seconds)
    return {**result, "skipped": False, "seconds": seconds, "counts": counts}
