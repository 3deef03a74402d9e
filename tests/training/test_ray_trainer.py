"""What a worker keeps and writes down, without a cluster."""

import pytest
from support.parity import parity

from cllm4rec.data.memory_map import memory_mapped
from cllm4rec.errors import ResourceError
from cllm4rec.storage.files import remove_directory
from cllm4rec.training import ray_trainer as loop
from cllm4rec.training.ray_trainer import METRICS, _documents, _LogFile

STEP = {"event": "step", "phase": "finetune", "loss": 2.0, "items": 1.0, "words": 0.5, "penalty": 0.5}


def test_tensorboard_files_stay_when_the_run_directory_of_a_finished_stage_goes(tmp_path):
    log = _LogFile(str(tmp_path / "runs" / "finetune" / METRICS), is_first=True, tensorboard=True)
    log.keep(0)
    log(STEP)
    log.flush()
    log._writer.close()
    remove_directory(str(tmp_path / "runs" / "finetune"))
    (events,) = (tmp_path / "runs" / "tensorboard" / "finetune").iterdir()
    assert b"finetune/loss" in events.read_bytes()


def test_only_the_first_worker_writes(tmp_path):
    log = _LogFile(str(tmp_path / "runs" / "finetune" / METRICS), is_first=False, tensorboard=True)
    log.keep(0)
    log(STEP)
    assert log.flush() == 0
    assert list(tmp_path.iterdir()) == []


def test_documents_are_kept_up_to_what_the_config_allows(monkeypatch):
    documents = parity().documents
    blocks = [documents.to_arrow()] * 3
    monkeypatch.setattr(loop, "_blocks", lambda table: iter(blocks))
    assert len(memory_mapped(_documents(most_gb=3.1 * documents.num_bytes / 1e9))) == 3 * len(documents)
    with pytest.raises(ResourceError, match=r"take more than cluster\.shard_disk_gb [\d.e-]+; add workers"):
        memory_mapped(_documents(most_gb=2.5 * documents.num_bytes / 1e9))


def test_a_worker_without_a_document_has_none(monkeypatch):
    monkeypatch.setattr(loop, "_blocks", lambda table: iter(()))
    assert len(memory_mapped(_documents(most_gb=1.0))) == 0
