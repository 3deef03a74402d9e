"""Runs the training loop on a cluster: Ray Data gives each Ray Train worker the documents of its own users.

    weights = train_on_ray(job, run_dir)

This module fetches the data, reports to Ray and resumes. The training itself is in `cllm4rec.training.loop`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import signal
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.data
import ray.train
import ray.train.collective
import torch
from pyarrow.fs import FileSelector, FileType
from ray.data.expressions import col
from ray.train import UserCallback
from ray.train.torch import TorchTrainer
from torch import Tensor

from cllm4rec.arrays.histories import Histories
from cllm4rec.data.documents import Documents, Kind
from cllm4rec.data.memory_map import memory_mapped
from cllm4rec.data.prepared import bucket_paths, load_token_space, verify_buckets
from cllm4rec.errors import ArtifactError, Cllm4RecError, ResourceError, TrainingError, causes
from cllm4rec.metrics.protocol import Validation
from cllm4rec.progress import FAILURES, show_training
from cllm4rec.resources import RESTART_S, processes, wait_for_resources, watch_nodes
from cllm4rec.storage import files
from cllm4rec.storage.tensors import map_tensors
from cllm4rec.training.checkpoints import Checkpoint, newest_valid, read_checkpoint, write_checkpoint
from cllm4rec.training.job import METRICS, LogFile, TrainJob
from cllm4rec.training.loop import Shard, train
from cllm4rec.training.shares import Parts, Value, join_parts, whole

logger = logging.getLogger(__name__)

_ERROR = "error.json"
# The timeout of a barrier: ample for the validation and the checkpoint of the slowest worker.
_COLLECTIVE_TIMEOUT_S = 1800
# A report waits until Ray's controller has polled the previous one. With Ray's default of 2 s, an epoch would take at least
# 2 s.
_POLL_INTERVAL_S = 0.25


def train_on_ray(job: TrainJob, run_dir: str) -> dict[str, Tensor]:
    """Train on the connected cluster and return the weights of the best epochs.

    An interrupted run with the same fingerprint and `run_dir` resumes from its last checkpoint. A failed worker is restarted,
    and its cause is logged.
    Raises ResourceError if the cluster is too small or a worker's documents exceed `cluster.shard_disk_gb`; ArtifactError,
    without a restart, if a file that a worker reads is missing or damaged; TrainingError if the run cannot continue: after
    `cluster.max_failures` failures (at least 2) with the same cause, or after one more failure of any cause.
    """
    cluster = job.config.cluster
    trainers = processes(cluster, cluster.num_workers)
    remedy = "lower cluster.num_workers or cluster.cpus_per_worker, or add nodes"
    # Ray Data needs one CPU besides those of the workers.
    bundles = trainers.bundles(reading_cpus=1)
    wait_for_resources(bundles, cluster, "training", remedy)
    # A lost node may be replaced, by an autoscaler or by whoever runs the cluster.
    restart_timeout_s = cluster.start_timeout_s or RESTART_S
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(restart_timeout_s)
    os.environ["RAY_TRAIN_COLLECTIVE_TIMEOUT_S"] = str(_COLLECTIVE_TIMEOUT_S)
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = str(_POLL_INTERVAL_S)
    directory = files.absolute(run_dir)
    for name in (_ERROR, FAILURES):
        files.remove_file(files.join(directory, name))
    paths = {table: bucket_paths(job.prepared_dir, table) for table in ("documents", "histories")}
    if trainers.count > len(paths["documents"]):
        logger.warning(
            "%d of %d training workers have nothing to do, because %s has %d bucket files; lower cluster.num_workers",
            trainers.count - len(paths["documents"]), trainers.count, job.prepared_dir, len(paths["documents"]),
        )  # fmt: skip
    trainer = TorchTrainer(
        train_loop_per_worker,
        train_loop_config={"job": job, "run_dir": directory, "threads": trainers.threads},
        scaling_config=ray.train.ScalingConfig(
            num_workers=trainers.count,
            use_gpu=cluster.use_gpu,
            resources_per_worker={"CPU": trainers.cpus, **({"GPU": trainers.gpus} if trainers.gpus else {})},
        ),
        run_config=ray.train.RunConfig(
            # Ray resumes the checkpoint of an older run of the same name. The fingerprint makes names unique.
            name=f"run-{job.fingerprint[:16]}",
            storage_path=directory,
            failure_config=ray.train.FailureConfig(max_failures=cluster.max_failures, controller_failure_limit=1),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            callbacks=[RecordFailures(directory, cluster.max_failures)],
        ),
        datasets={table: _read_parquet(names) for table, names in paths.items()},
        dataset_config=WholeBuckets(paths, set().union(*(phase.kinds for phase in job.phases))),
    )
    with show_training(directory), watch_nodes(bundles, "training"), _own_interrupts():
        try:
            result = trainer.fit()
        except Exception as error:
            _raise_recorded(directory)
            if any(type(cause).__name__ == "WorkerGroupStartupTimeoutError" for cause in causes(error)):
                raise ResourceError(
                    f"training waited {restart_timeout_s:g} s to start its {trainers.count} workers again; {remedy}, or raise "
                    "cluster.start_timeout_s, and run the same command again to resume from the last checkpoint"
                ) from error
            raise TrainingError(
                f"training stopped: {_cause(error)}; run the same command again to resume from the last checkpoint"
            ) from error
    _raise_recorded(directory)
    with result.checkpoint.as_directory() as folder:
        return _whole_tensors(read_checkpoint(folder, job.fingerprint).best)


def _whole_tensors(best: dict[str, Value]) -> dict[str, Tensor]:
    """The trained tensors. Those that workers have divided are joined in a file and memory-mapped."""
    divided = {name: value for name, value in best.items() if isinstance(value, Parts)}
    tensors = {name: whole(value) for name, value in best.items() if name not in divided}
    if divided:
        with tempfile.TemporaryDirectory() as folder:
            joined = Path(folder) / "joined.safetensors"
            join_parts(divided, joined)
            tensors |= map_tensors(str(joined))
    return tensors


def train_loop_per_worker(config: dict[str, Any]) -> None:
    """Train in one worker, from loading its shard to its last report."""
    job: TrainJob = config["job"]
    directory: str = config["run_dir"]
    if files.exists(files.join(directory, _ERROR)):
        return  # the run has failed for good, and Ray is restarting it once more
    torch.set_num_threads(config["threads"])
    # For bit-identical resumption. A GPU kernel without a deterministic form runs with a warning.
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Saves a pass over memory: deterministic mode would otherwise fill every new tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    context = ray.train.get_context()
    is_first = context.get_world_rank() == 0
    log = LogFile(files.join(directory, METRICS), is_first, job.config.training.tensorboard)
    resumed, warnings = _resume(job)
    log.resume(resumed, job.phases)
    for sentence in warnings:
        log({"event": "warning", "message": sentence})

    def save(checkpoint: Checkpoint) -> None:
        checkpoint.progress.num_log_lines = log.flush()
        # All workers report, because a report is a barrier. The first one, or with ZeRO-3 each, provides the files, which Ray
        # copies in the call.
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(folder, checkpoint, job.fingerprint, context.get_world_rank(), context.get_world_size())
            metrics = {"phase": checkpoint.progress.phase, "epoch": checkpoint.progress.epoch}
            provided = ray.train.Checkpoint.from_directory(folder) if any(Path(folder).iterdir()) else None
            ray.train.report(metrics, checkpoint=provided)

    try:
        verify_buckets(job.prepared_dir, context.get_world_rank(), context.get_world_size())
        shard = _load_shard(job.config.cluster.shard_disk_gb)
        prompt_tokens, _ = load_token_space(job.prepared_dir)
        job.check_memory(ray.train.torch.get_device(), context.get_local_world_size())
        ray.train.collective.barrier()  # no worker loads its model before all have seen what is free
        make_model = functools.partial(job.make_model, ray.train.torch.get_device())
        train(make_model, prompt_tokens.prompts, job.phases, shard, job.config, log=log, save=save, resumed=resumed)
    except TrainingError as error:
        # All workers see the same sum and stop together. A restart would fail again, so Ray must not see an error.
        if is_first:
            _record_error(directory, error)
    except (ResourceError, ArtifactError) as error:
        # Only this worker fails, and the others wait for it. The error makes Ray stop the whole group. A restart would fail
        # again.
        _record_error(directory, error)
        raise
    finally:
        log.flush()


class WholeBuckets(ray.train.DataConfig):  # type: ignore[misc]
    """Worker r of W reads every W-th bucket file from the r-th on, whole and in order; none if there are fewer files.

    Ray's own split gives blocks to the first worker that asks and drops rows to make shards equal. This split depends only on
    rank and world size: a resumed run reads the same documents, and all documents of a user are on one worker.

    kinds: the kinds of documents to read. Most documents are texts, and finetuning needs none of them.
    """

    def __init__(self, paths: dict[str, list[str]], kinds: set[Kind]) -> None:
        super().__init__(datasets_to_split=[])
        self._paths, self._kinds = paths, sorted(int(kind) for kind in kinds)

    def configure(
        self, datasets: dict[str, Any], world_size: int, worker_handles: Any, worker_node_ids: Any, **_: Any
    ) -> list[dict[str, Any]]:
        return [
            {name: self._shard(name, rank, world_size).iterator() for name in datasets} for rank in range(world_size)
        ]

    def _shard(self, name: str, rank: int, world_size: int) -> Any:
        paths = self._paths[name][rank::world_size]
        if not paths:
            return _read_parquet(self._paths[name][:1]).limit(0)
        rows = _read_parquet(paths)
        return rows.filter(expr=col("kind").is_in(self._kinds)) if name == "documents" else rows


class RecordFailures(UserCallback):  # type: ignore[misc]
    """Records which worker failed and why, for the driver to show, and ends a run that fails repeatedly for one cause.

    Runs in the controller of Ray Train.
    """

    def __init__(self, run_dir: str, max_failures: int) -> None:
        self._run_dir, self._max_failures = run_dir, max_failures
        self._num_failures: Counter[str] = Counter()
        """The number of failures by cause."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        rank, error = min(worker_exceptions.items())
        cause = _cause(error)
        self._num_failures[cause] += 1
        total = self._num_failures.total()
        entry = {"worker": rank, "cause": cause, "failure": total, "max_failures": self._max_failures}
        files.append_bytes(files.join(self._run_dir, FAILURES), (json.dumps(entry) + "\n").encode())
        if self._max_failures and self._num_failures[cause] >= max(2, self._max_failures):
            sentence = f"training stopped: workers failed {self._num_failures[cause]} times with: {cause}"
            _record_error(self._run_dir, TrainingError(f"{sentence}; fix the cause and run the same command again"))


@contextlib.contextmanager
def _own_interrupts() -> Iterator[None]:
    """Put back the SIGINT handler that `fit` replaces, so that Ctrl-C in a later stage is a KeyboardInterrupt again."""
    before, is_main = signal.getsignal(signal.SIGINT), threading.current_thread() is threading.main_thread()
    try:
        yield
    finally:
        if is_main:  # elsewhere Ray replaces nothing
            signal.signal(signal.SIGINT, before)


def _record_error(directory: str, error: Cllm4RecError) -> None:
    """Write an error that ends the run to a file for the driver. Only the first error is kept."""
    if not files.exists(files.join(directory, _ERROR)):
        files.write_json(files.join(directory, _ERROR), {"kind": type(error).__name__, "sentence": str(error)})


def _raise_recorded(directory: str) -> None:
    """Raise the error that a worker or the controller recorded, if any."""
    if files.exists(files.join(directory, _ERROR)):
        recorded = files.read_json(files.join(directory, _ERROR))
        kinds = {kind.__name__: kind for kind in (ResourceError, ArtifactError, TrainingError)}
        raise kinds[recorded["kind"]](recorded["sentence"]) from None


def _read_parquet(paths: list[str]) -> Any:
    fs, _ = files.filesystem(paths[0])
    return ray.data.read_parquet([files.filesystem(path)[1] for path in paths], filesystem=fs)


def _load_shard(shard_disk_gb: float) -> Shard:
    """The documents of this worker, fetched once through Ray Data and kept on its disk for all epochs."""
    documents = memory_mapped(limit_size(map(Documents.from_arrow, _blocks("documents")), shard_disk_gb))
    histories = memory_mapped(or_empty(map(Histories.from_arrow, _blocks("histories"))))
    return Shard(documents, Validation(histories))


def or_empty(parts: Iterator[Histories]) -> Iterator[Histories]:
    """`parts`, or one empty part if there are none, as for a worker that has no bucket file."""
    histories = None
    for histories in parts:
        yield histories
    if histories is None:
        yield Histories.empty()


def limit_size(parts: Iterator[Documents], max_gb: float) -> Iterator[Documents]:
    """An empty part, then `parts`. Raises ResourceError once they exceed `max_gb` together."""
    yield Documents.empty()  # a worker whose users have no documents of the required kinds gets no block
    num_bytes = 0
    for documents in parts:
        num_bytes += documents.num_bytes
        if num_bytes > max_gb * 1e9:
            raise ResourceError(
                f"the documents of a worker take more than cluster.shard_disk_gb {max_gb}; add workers, raise the limit, or "
                "lower data.max_text_tokens"
            )
        yield documents


def _blocks(table: str) -> Iterator[pa.Table]:
    yield from ray.train.get_dataset_shard(table).iter_batches(batch_size=None, batch_format="pyarrow")


def _resume(job: TrainJob) -> tuple[Checkpoint | None, list[str]]:
    """The newest valid checkpoint, or None, and a warning for each newer one that was skipped."""
    latest = ray.train.get_checkpoint()
    return (None, []) if latest is None else newest_valid(beside(latest), job.fingerprint)


def beside(latest: Any) -> dict[str, contextlib.AbstractContextManager[str]]:
    """`latest` and the checkpoints before it, on a disk or an object store, oldest first: name → its local copy.

    A newer one is half-written: Ray names the latest checkpoint when all workers have reported it.
    """
    storage = latest.filesystem
    folder, _, newest = str(latest.path).rpartition("/")
    found = storage.get_file_info(FileSelector(folder))
    # Ray keeps a file with a similar name beside them, `checkpoint_manager_snapshot.json`.
    paths = {entry.base_name: entry.path for entry in found if entry.type == FileType.Directory}
    names = sorted(name for name in paths if name.startswith("checkpoint_") and name <= newest)
    return {name: ray.train.Checkpoint(paths[name], storage).as_directory() for name in names}


def _cause(error: BaseException) -> str:
    """One line for a failure: the innermost Cllm4RecError if there is one, else the last line of the innermost error."""
    chain = list(causes(error))
    own_errors = [cause for cause in chain if isinstance(cause, Cllm4RecError)]
    innermost = own_errors[-1] if own_errors else chain[-1]
    lines = [line.strip() for line in str(innermost).splitlines() if line.strip()]
    return (lines[-1] if lines else type(innermost).__name__)[:500]
