"""The log file, the document limit and the failure records of workers, without a cluster."""

import json

import pytest
import ray.train
import torch
from pyarrow.fs import LocalFileSystem, SubTreeFileSystem
from support.parity import parity

from cllm4rec.data.memory_map import memory_mapped
from cllm4rec.errors import ResourceError
from cllm4rec.metrics.protocol import Validation
from cllm4rec.progress import FAILURES
from cllm4rec.storage.files import read_json, remove_directory
from cllm4rec.training.checkpoints import Checkpoint, Progress, newest_valid, write_checkpoint
from cllm4rec.training.job import METRICS, LogFile
from cllm4rec.training.ray_trainer import RecordFailures, beside, limit_size, or_empty

STEP = {"event": "step", "phase": "finetune", "loss": 2.0, "items": 1.0, "words": 0.5, "penalty": 0.5}


def test_tensorboard_files_stay_when_the_run_directory_of_a_finished_stage_is_removed(tmp_path):
    log = LogFile(str(tmp_path / "runs" / "finetune" / METRICS), is_first=True, tensorboard=True)
    log.resume(None, [])
    log(STEP)
    log.close()
    remove_directory(str(tmp_path / "runs" / "finetune"))
    (events,) = (tmp_path / "runs" / "tensorboard" / "finetune").iterdir()
    assert b"finetune/loss" in events.read_bytes()


def test_only_the_first_worker_writes(tmp_path):
    log = LogFile(str(tmp_path / "runs" / "finetune" / METRICS), is_first=False, tensorboard=True)
    log.resume(None, [])
    log(STEP)
    assert log.flush() == 0
    assert list(tmp_path.iterdir()) == []


def test_documents_above_the_configured_limit_are_an_error():
    documents = parity().documents
    blocks = [documents] * 3
    assert len(memory_mapped(limit_size(iter(blocks), max_gb=3.1 * documents.num_bytes / 1e9))) == 3 * len(documents)
    with pytest.raises(ResourceError, match=r"take more than cluster\.shard_disk_gb [\d.e-]+; add workers"):
        memory_mapped(limit_size(iter(blocks), max_gb=2.5 * documents.num_bytes / 1e9))


def test_a_worker_without_documents_has_an_empty_shard():
    assert len(memory_mapped(limit_size(iter(()), max_gb=1.0))) == 0


def test_a_worker_without_bucket_files_has_no_users():
    histories = memory_mapped(or_empty(iter(())))
    assert len(histories.user) == 0
    assert len(Validation(histories).users) == 0
    some = parity().world.histories
    assert memory_mapped(or_empty(iter([some, some]))).user.tolist() == [*some.user, *some.user]


@pytest.mark.parametrize("is_remote", [False, True])
def test_resumption_falls_back_to_the_checkpoint_before_also_on_an_object_store(tmp_path, is_remote):
    for number in range(2):
        folder = tmp_path / f"checkpoint_{number:06d}"
        folder.mkdir()
        write_checkpoint(folder, Checkpoint(Progress(epoch=number), {}, {"table": torch.ones(2)}), "mine")
    (tmp_path / "checkpoint_000001" / "progress.json").write_text("{}")
    (tmp_path / "checkpoint_manager_snapshot.json").write_text("{}")
    storage, root = LocalFileSystem(), str(tmp_path)
    if is_remote:
        storage, root = SubTreeFileSystem(str(tmp_path.parent), storage), tmp_path.name
    latest = ray.train.Checkpoint(f"{root}/checkpoint_000001", storage)
    checkpoint, warnings = newest_valid(beside(latest), "mine")
    assert checkpoint.progress.epoch == 0
    assert warnings == [
        "checkpoint checkpoint_000001 is damaged: the sha256 of progress.json differs; trying the previous one"
    ]


def failures(folder):
    return [json.loads(line) for line in (folder / FAILURES).read_text().splitlines()]


def test_each_failure_is_recorded_with_its_worker_and_its_innermost_cause(tmp_path):
    recorder = RecordFailures(str(tmp_path), max_failures=3)
    inner = ResourceError("the disk of this node is full; free some space")
    outer = RuntimeError("a worker group died\nTraceback ...")
    outer.__cause__ = inner
    recorder.after_exception(None, {1: outer, 0: ValueError("first line\nlast line")})
    recorder.after_exception(None, {1: outer})
    assert failures(tmp_path) == [
        {"worker": 0, "cause": "last line", "failure": 1, "max_failures": 3},
        {"worker": 1, "cause": "the disk of this node is full; free some space", "failure": 2, "max_failures": 3},
    ]
    assert not (tmp_path / "error.json").exists()


def test_repeated_failures_with_one_cause_end_the_run_with_that_cause(tmp_path):
    recorder = RecordFailures(str(tmp_path), max_failures=2)
    recorder.after_exception(None, {0: ValueError("no such column")})
    recorder.after_exception(None, {1: ValueError("another cause")})
    assert not (tmp_path / "error.json").exists()
    recorder.after_exception(None, {1: ValueError("no such column")})
    sentence = read_json(str(tmp_path / "error.json"))["sentence"]
    assert "workers failed 2 times with: no such column" in sentence
