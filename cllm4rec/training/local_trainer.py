"""Runs the training loop in this process with plain torch: for a notebook, a script, or a machine without Ray.

    weights = train_locally(job, run_dir)

The tables are bit-identical to those of a run with one Ray worker on the same machine.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import shutil
from pathlib import Path

import torch
from fsspec.implementations.local import LocalFileSystem
from torch import Tensor

from cllm4rec.config import Config
from cllm4rec.data.prepared import load_documents, load_histories, load_token_space, verify_buckets
from cllm4rec.metrics.protocol import Validation
from cllm4rec.progress import show_training
from cllm4rec.storage import files
from cllm4rec.training.checkpoints import Checkpoint, newest_valid, write_checkpoint
from cllm4rec.training.job import METRICS, LogFile, TrainJob
from cllm4rec.training.loop import Shard, train
from cllm4rec.training.shares import whole

logger = logging.getLogger(__name__)

_NUM_KEPT = 2


def train_locally(job: TrainJob, run_dir: str) -> dict[str, Tensor]:
    """Train in this process and return the weights of the best epochs.

    An interrupted run with the same fingerprint and a local `run_dir` resumes from its last checkpoint.
    Raises TrainingError at the first loss that is not finite, and ArtifactError if a file of `prepared/` is damaged.
    """
    device = torch.device("cuda" if job.config.cluster.use_gpu else "cpu")
    checkpoints = _Checkpoints(run_dir, job.fingerprint)
    resumed = checkpoints.newest()
    log = LogFile(files.join(run_dir, METRICS), is_first=True, tensorboard=job.config.training.tensorboard)
    log.resume(resumed, job.phases)
    prompt_tokens, _ = load_token_space(job.prepared_dir)
    kinds = sorted(set().union(*(phase.kinds for phase in job.phases)))
    verify_buckets(job.prepared_dir)
    documents = load_documents(job.prepared_dir).of_kinds(kinds)
    shard = Shard(documents, Validation(load_histories(job.prepared_dir)))

    def save(checkpoint: Checkpoint) -> None:
        checkpoint.progress.num_log_lines = log.flush()
        checkpoints.write(checkpoint)

    job.check_memory(device)
    make_model = functools.partial(job.make_model, device)
    with show_training(run_dir):
        try:
            weights = train(
                make_model,
                prompt_tokens.prompts,
                job.phases,
                shard,
                single_process(job.config),
                log=log,
                save=save,
                resumed=resumed,
            )
            return {name: whole(value) for name, value in weights.items()}
        finally:
            log.close()


def single_process(config: Config) -> Config:
    """The config for one process and plain torch, with other workers and engines overridden."""
    training = config.training.model_copy(update={"engine": "torch", "zero_stage": 0})
    cluster = config.cluster.model_copy(update={"num_workers": 1})
    return config.model_copy(update={"training": training, "cluster": cluster})


class _Checkpoints:
    """The last checkpoints of a run in a local directory. A run in a remote directory has none."""

    def __init__(self, run_dir: str, fingerprint: str) -> None:
        fs, path = files.filesystem(run_dir)
        self._folder = Path(path) / "local" if isinstance(fs, LocalFileSystem) else None
        self._fingerprint = fingerprint

    def newest(self) -> Checkpoint | None:
        existing = {path.name: contextlib.nullcontext(path) for path in self._existing()}
        checkpoint, warnings = newest_valid(existing, self._fingerprint)
        for warning in warnings:
            logger.warning(warning)
        return checkpoint

    def write(self, checkpoint: Checkpoint) -> None:
        if self._folder is None:
            return
        existing = self._existing()
        number = 1 + int(existing[-1].name.rpartition("_")[2]) if existing else 0
        target = self._folder / f"checkpoint_{number:06d}"
        target.mkdir(parents=True)
        write_checkpoint(target, checkpoint, self._fingerprint)
        for old in self._existing()[:-_NUM_KEPT]:
            shutil.rmtree(old)

    def _existing(self) -> list[Path]:
        """The directories of all checkpoints, oldest first."""
        return [] if self._folder is None else sorted(self._folder.glob("checkpoint_*"))
