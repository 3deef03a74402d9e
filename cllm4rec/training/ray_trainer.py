"""The training loop on a cluster: Ray Data hands each Ray Train worker the documents of its own users.

    weights = fit(job, cluster, run_dir=..., name=...)

Everything a worker does with its documents is `cllm4rec.training.loop`; this file fetches, reports and resumes.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.data
import ray.train
import torch
from ray.data.expressions import col
from ray.train.torch import TorchTrainer
from torch import Tensor

from cllm4rec.arrays.histories import Histories
from cllm4rec.cluster import processes, wait_for_resources
from cllm4rec.config import ClusterConfig, ModelConfig
from cllm4rec.data.documents import Documents, Kind
from cllm4rec.data.memory_map import memory_mapped
from cllm4rec.data.prepared import bucket_paths, load_token_space
from cllm4rec.errors import ResourceError, TrainingError
from cllm4rec.model.backbone import load_backbone, new_backbone
from cllm4rec.model.cllm4rec import CLLM4Rec, new_model
from cllm4rec.model.saved_model import load_tables
from cllm4rec.storage import files
from cllm4rec.training.checkpoints import Checkpoint, newest_valid, read_checkpoint, write_checkpoint
from cllm4rec.training.loop import RunSettings, Shard, Validation, load_parameters, run
from cllm4rec.training.phases import Phase

METRICS = "metrics.jsonl"
_ERROR = "error.txt"
# What a barrier may take: the slowest worker's validation and checkpoint, with much to spare.
_COLLECTIVE_TIMEOUT_S = 1800
# A report waits until Ray's controller has taken the one before: at Ray's 2 s no epoch could be shorter than that.
_POLL_INTERVAL_S = 0.25


@dataclasses.dataclass(frozen=True)
class Start:
    """Tables to begin from, in a finished directory of a kind."""

    directory: str
    kind: str

    def tables(self) -> dict[str, Tensor]:
        return load_tables(self.directory, self.kind)


@dataclasses.dataclass(frozen=True)
class Job:
    """All a worker needs to know; paths are absolute.

    `backbone_dir` None means the backbone is the one the config describes, before any training.
    """

    prepared_dir: str
    backbone_dir: str | None
    start: Start | None
    model: ModelConfig
    phases: list[Phase]
    settings: RunSettings
    make_validation: Callable[[Histories], Validation]
    fingerprint: str
    tensorboard: bool = False


def fit(job: Job, cluster: ClusterConfig, run_dir: str) -> dict[str, Tensor]:
    """Train on the connected cluster and return the weights of the best epochs.

    An interrupted run with the same fingerprint and `run_dir` goes on where it stopped. Raises ResourceError where the
    cluster is too small, TrainingError where the run cannot go on.
    """
    trainers = processes(cluster, cluster.num_workers)
    remedy = "lower cluster.num_workers or cluster.cpus_per_worker, or add nodes"
    # One CPU more than the workers hold, or Ray Data could not read for them.
    wait_for_resources(trainers.demand(reading_cpus=1), cluster.start_timeout_s, "training", remedy)
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(cluster.start_timeout_s)
    os.environ["RAY_TRAIN_COLLECTIVE_TIMEOUT_S"] = str(_COLLECTIVE_TIMEOUT_S)
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = str(_POLL_INTERVAL_S)
    directory = files.absolute(run_dir)
    files.remove_file(files.join(directory, _ERROR))
    paths = {table: bucket_paths(job.prepared_dir, table) for table in ("documents", "histories")}
    buckets = WholeBuckets(paths, set().union(*(phase.kinds for phase in job.phases)))
    trainer = TorchTrainer(
        _work,
        train_loop_config={"job": job, "run_dir": directory, "threads": trainers.threads, "cluster": cluster},
        scaling_config=ray.train.ScalingConfig(
            num_workers=cluster.num_workers,
            use_gpu=cluster.use_gpu,
            resources_per_worker={"CPU": cluster.cpus_per_worker, **({"GPU": 1} if cluster.use_gpu else {})},
        ),
        run_config=ray.train.RunConfig(
            # A name used again silently inherits the old run's checkpoint: the fingerprint keeps runs apart.
            name=f"run-{job.fingerprint[:16]}",
            storage_path=directory,
            failure_config=ray.train.FailureConfig(max_failures=cluster.max_failures, controller_failure_limit=1),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
        ),
        datasets={table: _read(names) for table, names in paths.items()},
        dataset_config=buckets,
    )
    error_file = files.join(directory, _ERROR)
    try:
        result = trainer.fit()
    except Exception as error:
        if files.exists(error_file):
            raise ResourceError(files.read_bytes(error_file).decode()) from None
        raise TrainingError(
            f"training stopped: {_cause(error)}; run the same command again to go on from the last checkpoint"
        ) from error
    if files.exists(error_file):
        raise TrainingError(files.read_bytes(error_file).decode())
    with result.checkpoint.as_directory() as folder:
        return read_checkpoint(folder, job.fingerprint).best


class WholeBuckets(ray.train.DataConfig):  # type: ignore[misc]
    """Worker r of W reads every W-th bucket file, whole and in order.

    Ray's own split hands blocks to whoever asks first and drops rows to make shards equal; this one is a function of
    (rank, world size), so a resumed run sees the same documents, and all documents of a user stay on one worker.

    kinds: of the documents that are read at all: texts are most of them, and finetuning needs none.
    """

    def __init__(self, files: dict[str, list[str]], kinds: set[Kind]) -> None:
        super().__init__(datasets_to_split=[])
        self._files, self._kinds = files, sorted(int(kind) for kind in kinds)

    def configure(
        self, datasets: dict[str, Any], world_size: int, worker_handles: Any, worker_node_ids: Any, **_: Any
    ) -> list[dict[str, Any]]:
        return [
            {name: self._part(name, rank, world_size).iterator() for name in datasets} for rank in range(world_size)
        ]

    def _part(self, name: str, rank: int, world_size: int) -> Any:
        rows = _read(self._files[name][rank::world_size])
        return rows.filter(expr=col("kind").is_in(self._kinds)) if name == "documents" else rows


def _read(paths: list[str]) -> Any:
    fs, _ = files.filesystem(paths[0])
    return ray.data.read_parquet([files.filesystem(path)[1] for path in paths], filesystem=fs)


def _work(config: dict[str, Any]) -> None:
    """One worker, from its shard to its last report."""
    job: Job = config["job"]
    error_file = files.join(config["run_dir"], _ERROR)
    if files.exists(error_file):
        return  # Ray tries once more what cannot succeed
    torch.set_num_threads(config["threads"])
    # Bit-for-bit resumption; a GPU kernel without a deterministic form warns and runs.
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Deterministic torch fills every new tensor, so that reading one before it is written shows.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    context = ray.train.get_context()
    is_first = context.get_world_rank() == 0
    log = _LogFile(files.join(config["run_dir"], METRICS), is_first, job.tensorboard)
    resumed, warnings = _resume(job)
    log.keep(resumed.progress.num_log_lines if resumed else 0)
    for sentence in warnings:
        log({"event": "warning", "message": sentence})

    def save(checkpoint: Checkpoint) -> None:
        checkpoint.progress.num_log_lines = log.flush()
        # Every rank reports (it is a barrier) and one of them brings the files; the directory outlives the call.
        with tempfile.TemporaryDirectory() as folder:
            if is_first:
                write_checkpoint(folder, checkpoint, job.fingerprint)
            metrics = {"phase": checkpoint.progress.phase, "epoch": checkpoint.progress.epoch}
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))

    try:
        shard = _shard(job, config["cluster"])
        prompt_tokens, _ = load_token_space(job.prepared_dir)
        make_model = functools.partial(_model, job)
        run(make_model, prompt_tokens.prompts, job.phases, shard, job.settings, log=log, save=save, resumed=resumed)
    except TrainingError as error:
        # All workers see the same sum and stop together; the same data and settings would fail again, so Ray is not told.
        if is_first:
            files.write_bytes(error_file, str(error).encode())
    except ResourceError as error:
        # One worker's affair: the others are waiting for it, so the group has to be brought down.
        files.write_bytes(error_file, str(error).encode())
        raise
    finally:
        log.flush()


def _model(job: Job) -> CLLM4Rec:
    prompt_tokens, token_space = load_token_space(job.prepared_dir)
    if job.backbone_dir is None:
        backbone = new_backbone(job.model, prompt_tokens.num_words, job.settings.seed)
    else:
        backbone = load_backbone(job.backbone_dir, job.settings.max_tokens)
    model = new_model(job.model, backbone, token_space, job.settings.seed)
    if job.start is not None:
        load_parameters(model, job.start.tables())
    return model.to(ray.train.torch.get_device())


def _shard(job: Job, cluster: ClusterConfig) -> Shard:
    """This worker's documents, fetched once through Ray Data and kept on its disk: an epoch then costs no fetching."""
    documents = memory_mapped(_documents(cluster.shard_disk_gb))
    histories = memory_mapped(map(Histories.from_arrow, _blocks("histories")))
    return Shard(documents, job.make_validation(histories))


def _documents(most_gb: float) -> Iterator[Documents]:
    yield Documents.empty()  # a worker whose users have no document of the stage's kinds gets no block
    num_bytes = 0
    for documents in map(Documents.from_arrow, _blocks("documents")):
        num_bytes += documents.num_bytes
        if num_bytes > most_gb * 1e9:
            raise ResourceError(
                f"a worker's documents take more than cluster.shard_disk_gb {most_gb}; add workers, raise it, or lower "
                "data.max_text_tokens"
            )
        yield documents


def _blocks(table: str) -> Iterator[pa.Table]:
    yield from ray.train.get_dataset_shard(table).iter_batches(batch_size=None, batch_format="pyarrow")


def _resume(job: Job) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that can be trusted, the one before it where that is damaged, and what was passed over."""
    latest = ray.train.get_checkpoint()
    if latest is None:
        return None, []
    if not Path(latest.path).is_dir():
        with latest.as_directory() as folder:
            return read_checkpoint(folder, job.fingerprint), []
    return newest_valid(sorted(Path(latest.path).parent.glob("checkpoint_*")), job.fingerprint)


class _LogFile:
    """`metrics.jsonl`: a line for every step and epoch, written by the first worker at the end of each epoch."""

    def __init__(self, uri: str, is_first: bool, tensorboard: bool) -> None:
        self._uri, self._is_first = uri, is_first
        self._unwritten: list[str] = []
        self._num_written = self._step = 0
        self._writer: Any = None
        if is_first and tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # Beside the run directories, which go when their stages are done.
            runs, phase, _ = files.absolute(uri).rsplit("/", 2)
            self._writer = SummaryWriter(files.join(runs, "tensorboard", phase))

    def keep(self, num_lines: int) -> None:
        """Start with the first lines of what an interrupted run left; what came after its checkpoint is run again."""
        if not self._is_first:
            return
        old = files.read_bytes(self._uri).splitlines() if num_lines and files.exists(self._uri) else []
        kept = old[:num_lines]
        files.write_bytes(self._uri, b"".join(line + b"\n" for line in kept))
        self._num_written = len(kept)
        if kept:
            self({"event": "resumed"})

    def __call__(self, entry: dict[str, Any]) -> None:
        if not self._is_first:
            return
        self._unwritten.append(json.dumps(entry) + "\n")
        if self._writer is not None and entry["event"] == "step":
            self._step += 1
            for name in ("loss", "items", "words", "penalty"):
                self._writer.add_scalar(f"{entry['phase']}/{name}", entry[name], self._step)
        if entry["event"] != "step":
            self.flush()

    def flush(self) -> int:
        """Write what is new and return the number of lines so far."""
        if self._unwritten:
            files.append_bytes(self._uri, "".join(self._unwritten).encode())
            self._num_written += len(self._unwritten)
            self._unwritten = []
        return self._num_written


def _cause(error: BaseException) -> str:
    """The innermost message, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:500]
