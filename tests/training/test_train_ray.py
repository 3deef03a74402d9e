"""Training on a real Ray: a killed worker does not change the result, and a cluster that is too small is an error."""

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest
import torch
from support.directories import NUM_WORDS, write_prepared
from support.parity import parity, settings

from cllm4rec.config import BackboneSize, ClusterConfig, parse_config
from cllm4rec.data.documents import Documents, Kind
from cllm4rec.data.prepared import bucket_name, bucket_of, bucket_paths, load_histories, load_token_space
from cllm4rec.data.world import parity_world
from cllm4rec.errors import ArtifactError, ResourceError
from cllm4rec.progress import FAILURES
from cllm4rec.storage.files import write_table
from cllm4rec.training.job import METRICS, TrainJob
from cllm4rec.training.phases import COLLABORATIVE, Phase
from cllm4rec.training.ray_trainer import WholeBuckets, train_on_ray

pytestmark = pytest.mark.ray
EPOCHS, KILL_AFTER = 12, 2


def job(prepared_dir: str, name: str, **cluster: object) -> TrainJob:
    phase = Phase(
        "finetune", COLLABORATIVE, ("recommendations",), EPOCHS, 1e-2, validate="recommendation", patience=EPOCHS
    )
    config = settings(engine="deepspeed", zero_stage=3)  # each worker writes its own files of a checkpoint
    size = BackboneSize(layers=1, width=32, heads=2, vocab_size=NUM_WORDS)
    config = config.model_copy(
        update={
            "model": config.model.model_copy(update={"backbone": size}),
            "cluster": ClusterConfig(**{"num_workers": 2, "threads_per_worker": 1, "max_failures": 2} | cluster),
        }
    )
    config = parse_config(
        config.model_dump() | {"training": config.training.model_dump() | {"global_batch_tokens": None}}
    )
    return TrainJob(config, [phase], prepared_dir, backbone_dir=None, start=None, fingerprint=name * 16)


def write_documents(prepared_dir: str) -> None:
    """Write interaction documents in two buckets, one per worker."""
    world = parity_world()
    prompt_tokens, token_space = load_token_space(prepared_dir)
    documents: Documents = prompt_tokens.prompts.interactions(token_space, world.histories.user, world.histories.train)
    rows, bucket_D = documents.to_arrow(), bucket_of(documents.user, world.num_users, 2)
    for bucket in range(2):
        write_table(
            rows.filter(pa.array(np.equal(bucket_D, bucket))), f"{prepared_dir}/documents/{bucket_name(bucket)}"
        )


def num_epochs(metrics: Path) -> int:
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return sum(json.loads(line)["event"] == "epoch" for line in lines)


def has_registered_checkpoint(run_dir: Path) -> bool:
    """Whether Ray would resume from a checkpoint. A checkpoint directory alone is not registered yet."""
    return any('"checkpoint_' in path.read_text() for path in run_dir.glob("run-*/checkpoint_manager_snapshot.json"))


def kill_a_worker(run_dir: Path, killed: dict[str, int]) -> None:
    """SIGKILL one training worker of this process's own Ray once some epochs are done and a checkpoint is registered."""
    while num_epochs(run_dir / METRICS) < KILL_AFTER or not has_registered_checkpoint(run_dir):
        time.sleep(0.02)
    workers = [
        process for process in psutil.Process().children(recursive=True)
        if "RayTrainWorker" in " ".join(process.cmdline())
    ]  # fmt: skip
    os.kill(workers[-1].pid, signal.SIGKILL)
    killed |= {"workers": len(workers), "epochs": num_epochs(run_dir / METRICS)}


@pytest.fixture(scope="module")
def prepared_dir(tmp_path_factory) -> str:
    directory = write_prepared(tmp_path_factory.mktemp("world") / "prepared", num_buckets=2)
    write_documents(directory)
    assert len(load_histories(directory).user) == 40
    return directory


@pytest.mark.usefixtures("ray_local")
def test_a_run_whose_worker_was_killed_ends_with_the_same_bits(prepared_dir, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", logger="cllm4rec")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    on_interrupt = signal.getsignal(signal.SIGINT)
    whole = train_on_ray(job(prepared_dir, "a"), str(tmp_path / "whole"))
    assert signal.getsignal(signal.SIGINT) is on_interrupt, "Ray leaves its own, which ends in sys.exit"
    killed: dict[str, int] = {}
    killer = threading.Thread(target=kill_a_worker, args=(tmp_path / "hurt", killed), daemon=True)
    killer.start()
    hurt = train_on_ray(job(prepared_dir, "b"), str(tmp_path / "hurt"))
    killer.join(timeout=1)
    assert killed["workers"] == 2
    assert KILL_AFTER <= killed["epochs"] < EPOCHS
    assert '"resumed"' in (tmp_path / "hurt" / METRICS).read_text()
    assert '"warning"' not in (tmp_path / "hurt" / METRICS).read_text(), "every checkpoint can be read"
    (failure,) = [json.loads(line) for line in (tmp_path / "hurt" / FAILURES).read_text().splitlines()]
    assert (failure["failure"], failure["max_failures"]) == (1, 2)
    assert f"worker {failure['worker']} failed (failure 1, cluster.max_failures 2): " in caplog.text
    assert "resuming from the checkpoint after finetune epoch" in caplog.text
    assert num_epochs(tmp_path / "hurt" / METRICS) == EPOCHS
    assert set(whole) == set(hurt) == set(COLLABORATIVE)
    assert all(torch.equal(whole[name], hurt[name]) for name in whole)


@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize("kinds", [{Kind.INTERACTIONS}, {Kind.REVIEW, Kind.USER_TEXT}])
def test_workers_read_whole_buckets_and_only_the_required_kinds(tmp_path, kinds):
    documents = parity().documents
    bucket_D = np.arange(len(documents)) % 3
    for bucket in range(3):
        table = documents.take(np.flatnonzero(bucket_D == bucket)).to_arrow()
        write_table(table, str(tmp_path / "documents" / bucket_name(bucket)))
    buckets = WholeBuckets({"documents": bucket_paths(str(tmp_path), "documents")}, kinds)
    shards = [
        pa.concat_tables(parts["documents"].iter_batches(batch_size=None, batch_format="pyarrow"))
        for parts in buckets.configure({"documents": None}, 2, None, None)
    ]
    wanted_D = np.isin(documents.kind, list(kinds))
    for table, own_D in zip(shards, (bucket_D != 1, bucket_D == 1), strict=True):
        expected = documents.take(np.flatnonzero(own_D & wanted_D))
        assert 0 < len(expected) < own_D.sum()
        assert Documents.from_arrow(table).in_order().to_arrow().equals(expected.in_order().to_arrow())


@pytest.mark.usefixtures("ray_local")
def test_workers_without_a_bucket_file_read_nothing(prepared_dir):
    """Three workers and two files."""
    paths = {table: bucket_paths(prepared_dir, table) for table in ("documents", "histories")}
    shards = WholeBuckets(paths, {Kind.INTERACTIONS}).configure(dict.fromkeys(paths), 3, None, None)
    for table in paths:
        num_rows = [
            sum(map(len, shard[table].iter_batches(batch_size=None, batch_format="pyarrow"))) for shard in shards
        ]
        assert num_rows == [20, 20, 0]


@pytest.mark.usefixtures("ray_local")
def test_a_cluster_that_is_too_small_is_an_error_with_the_requested_and_existing_cpus(prepared_dir, tmp_path):
    started = time.monotonic()
    with pytest.raises(ResourceError, match=r"training needs 65 CPUs, but the cluster has 4 CPUs;"):
        train_on_ray(job(prepared_dir, "c", num_workers=64, start_timeout_s=1), str(tmp_path))
    assert time.monotonic() - started < 5


@pytest.mark.usefixtures("ray_local")
def test_a_damaged_file_stops_the_run_at_once_with_its_name_and_its_stage(prepared_dir, tmp_path, monkeypatch, caplog):
    """Ray itself would restart the workers, and finally report only its wrapper."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    broken = tmp_path / "prepared"
    shutil.copytree(prepared_dir, broken)
    damaged = broken / "histories" / bucket_name(1)
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(bytes(content))
    reason = rf"{damaged} is damaged \(sha256 differs\); copy it again or run cllm4rec prepare with --force"
    with pytest.raises(ArtifactError, match=reason):
        train_on_ray(job(str(broken), "d", max_failures=3), str(tmp_path / "run"))
    assert caplog.text.count("is damaged") == 1, "errors of data are not retried"
