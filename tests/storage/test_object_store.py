"""Directories, leases, checkpoints and tables of a run on an object store that speaks S3."""

import contextlib
import socket
import subprocess
import sys

import fsspec
import pyarrow as pa
import pytest
import ray.train
import torch
from deltalake import DeltaTable
from pyarrow.fs import FileSystem
from support.clusters import wait_until
from support.ports import free_port

from cllm4rec.errors import ArtifactError, ResourceError
from cllm4rec.storage import files
from cllm4rec.storage.artifacts import is_current, read_manifest, verify_files, write_directory
from cllm4rec.storage.lease import hold
from cllm4rec.storage.table import SCHEMA, current_run, publish
from cllm4rec.training.checkpoints import Checkpoint, Progress, newest_valid, write_checkpoint
from cllm4rec.training.ray_trainer import beside


@pytest.fixture(scope="module")
def bucket():
    """The URI of an empty bucket on a server in another process: delta-rs holds the GIL while it waits for an answer."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: is_listening(port), 60)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {
                "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
                "AWS_ACCESS_KEY_ID": "testing",
                "AWS_SECRET_ACCESS_KEY": "testing",
                "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_ALLOW_HTTP": "true",
                "AWS_EC2_METADATA_DISABLED": "true",
            }.items():
                patch.setenv(name, value)
            fsspec.filesystem("s3").mkdir("shop")
            yield "s3://shop"
    finally:
        server.kill()
        server.wait()


def is_listening(port):
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def test_a_directory_is_complete_or_absent_and_a_damaged_file_is_named(bucket):
    uri = f"{bucket}/run/prepared"
    for content in (1, 2):
        with write_directory(uri, kind="prepared", inputs={"raw": str(content)}, config={}) as draft:
            files.write_table(pa.table({"user": [content]}), draft.path("histories", "bucket-00000.parquet"))
    with contextlib.suppress(KeyError), write_directory(uri, kind="prepared", inputs={}, config={}) as draft:
        files.write_json(draft.path("half.json"), {})
        raise KeyError
    assert is_current(uri, "prepared", {"raw": "2"})
    assert files.list_files(f"{bucket}/run") == ["prepared/histories/bucket-00000.parquet", "prepared/manifest.json"]
    verify_files(uri, read_manifest(uri, "prepared"))
    files.write_bytes(f"{uri}/histories/bucket-00000.parquet", b"PAR1")
    with pytest.raises(ArtifactError, match=r"bucket-00000\.parquet is damaged .* run cllm4rec prepare with --force"):
        verify_files(uri, read_manifest(uri, "prepared"))
    with pytest.raises(ArtifactError, match=r"bucket-00000\.parquet is damaged"):
        files.read_tables([f"{uri}/histories/bucket-00000.parquet"])


def test_markers_of_folders_which_arrow_writes_are_no_files(bucket):
    storage, root = FileSystem.from_uri(f"{bucket}/marked")
    storage.create_dir(f"{root}/folder")
    files.write_json(f"{bucket}/marked/folder/file.json", {})
    assert files.list_files(f"{bucket}/marked") == ["folder/file.json"]


def test_one_run_at_a_time_writes_a_table(bucket):
    second = hold(f"{bucket}/run/dump", "the second run")
    with hold(f"{bucket}/run/dump", "the first run"), pytest.raises(ResourceError, match="the first run is at work"):
        second.__enter__()
    with hold(f"{bucket}/run/dump", "the third run"):
        pass


def test_a_table_is_published_once_and_readers_see_its_last_version(bucket):
    dump = f"{bucket}/run/dump"
    for attempt, user_id in enumerate(("u1", "u2"), 1):
        row = {
            "user_id": [user_id],
            "item_ids": [["i"]],
            "scores": [[1.0]],
            "run_date": ["2026-11-20"],
            "model_version": ["m"],
        }
        files.write_table(pa.table(row, schema=SCHEMA), f"{dump}/run-{attempt}/lists.parquet")
        for _ in range(2):  # the second time after a crash
            version = publish(dump, [f"run-{attempt}/lists.parquet"], "a-run", attempt, {})
            assert version == attempt
    assert DeltaTable(dump).to_pandas()["user_id"].tolist() == ["u2"]
    assert current_run(dump) == "a-run"


def test_resumption_falls_back_to_the_checkpoint_before(bucket, tmp_path):
    storage, root = FileSystem.from_uri(f"{bucket}/run/finetune.run/run-1")
    files.write_bytes(f"s3://{root}/checkpoint_000002/state.safetensors", b"a worker died while it wrote this")
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        write_checkpoint(folder, Checkpoint(Progress(epoch=number), {}, {"table": torch.ones(2)}), "mine")
        for path in folder.iterdir():
            files.copy_file(str(path), f"s3://{root}/checkpoint_{number:06d}/{path.name}")
    files.write_json(f"s3://{root}/checkpoint_manager_snapshot.json", {})
    files.write_bytes(f"s3://{root}/checkpoint_000001/best.safetensors", b"")
    latest = ray.train.Checkpoint(f"{root}/checkpoint_000001", storage)
    checkpoint, warnings = newest_valid(beside(latest), "mine")
    assert checkpoint is not None
    assert checkpoint.progress.epoch == 0
    assert len(warnings) == 1
    assert "checkpoint_000001 is damaged: the sha256 of best.safetensors differs" in warnings[0]
