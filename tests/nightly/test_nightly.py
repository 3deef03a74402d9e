"""Nights on a real Ray, good and bad: the table is the last good one or the new one whole, every user once."""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import ray
from deltalake import DeltaTable
from support.directories import write_prepared, write_random_model
from support.nights import config_of, expected, published

from cllm4rec.arrays.ids import Catalog
from cllm4rec.arrays.ragged import Ragged
from cllm4rec.commands import nightly
from cllm4rec.data.prepared import bucket_paths
from cllm4rec.data.world import parity_world
from cllm4rec.errors import ArtifactError, AuditError, DataError, ResourceError, is_full_disk
from cllm4rec.nightly import plan
from cllm4rec.nightly import ray_job as batch
from cllm4rec.nightly.audit import hashed
from cllm4rec.nightly.plan import is_published, plan_score
from cllm4rec.nightly.ray_job import num_staged, score
from cllm4rec.scoring.scorer import Scorer
from cllm4rec.storage import artifacts, files
from cllm4rec.storage.files import read_tables, write_table
from cllm4rec.storage.lease import hold
from cllm4rec.storage.registry import current_model
from cllm4rec.storage.tombstones import Tombstones

ROOT = Path(__file__).parents[2]
NUM_USERS, NUM_BUCKETS = 40, 10
COLUMNS = {"user": "reader", "item": "book", "rating": "stars", "timestamp": "when"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nights")
    write_random_model(folder, write_prepared(folder / "prepared", NUM_BUCKETS), seed=0)
    return folder


def events_of(path: Path, *rows: tuple[str, str, float, int]) -> dict[str, object]:
    lines = [json.dumps(dict(zip(("reader", "book", "stars", "when"), row, strict=True))) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines))
    return {"path": str(path), "format": "jsonl", "columns": COLUMNS}


def report_of(one: plan.ScorePlan) -> dict[str, object]:
    return files.read_json(files.join(one.report_dir, "report.json"))


# Good nights


@pytest.mark.ray
def test_a_night_scores_everybody_by_what_they_have_done_by_now(ray_local, folder, tmp_path):
    events = events_of(
        tmp_path / "events.jsonl",
        ("user-00", "item-01", 5, 200), ("user-00", "item-03", 5, 100), ("user-00", "item-05", 1, 300),
        ("stranger", "item-07", 4, 100), ("stranger", "item-02", 4, 50), ("user-01", "ghost", 5, 100),
    )  # fmt: skip
    before, night = config_of(folder, "good"), config_of(folder, "good", nightly={"events": events})
    score(plan_score(before))
    first = published(before)
    planned = plan_score(night, nightly=True)
    report = score(planned)
    assert report.histories["events"] == {
        "rows": 6, "refused": 0, "below_threshold": 1, "unknown_items": 1, "kept": 4
    }  # fmt: skip
    assert (report.histories["new_users"], report.histories["new_interactions"], report.users) == (1, 4, 41)

    second = published(night)
    scorer = Scorer.load(night.run.model)
    assert second.keys() - first.keys() == {"stranger"}
    items, scores = scorer.top_k([-1], Ragged.from_lists([[2, 7]]), 5)
    assert second["stranger"] == ([scorer.catalog.item_ids[item] for item in items[0]], scores[0].tolist())
    assert not {"item-01", "item-03"} & set(second["user-00"][0])
    assert all(second[user] == first[user] for user in first if user != "user-00")

    # What it says of itself, and to whom.
    written = report_of(planned)
    assert (written["status"], written["table_version"], written["users"]) == ("published", 2, 41)
    assert written["drift"]["users_added"] == pytest.approx(1 / 41)
    assert written["sha256"].keys() == set(files.list_files(planned.staging))
    text = files.read_bytes(files.join(planned.report_dir, "report.md")).decode()
    assert "Published as version 2" in text
    assert "stranger" not in text + json.dumps(written)
    assert is_published(night, nightly=True)
    assert not is_published(before)
    args = argparse.Namespace(force=False, accept_drift=False)
    assert nightly.run(night, args)["nightly"]["skipped"]
    assert DeltaTable(night.run.dump).version() == 2
    commit = DeltaTable(night.run.dump).history()[0]
    assert (commit["run_id"], commit["schema_version"]) == (planned.run_id, "1")


@pytest.mark.ray
def test_a_promoted_model_of_older_data_is_matched_by_ids(ray_local, folder, tmp_path):
    """Item indices mean other items there: it knew 10 of the 40 users and 12 of the 20 items, from index 4 on."""
    config = config_of(folder, "promoted")
    new, size = parity_world(), (10, 12)
    catalog = Catalog(new.catalog.user_ids[: size[0]], new.catalog.item_ids[4 : 4 + size[1]])
    old = dataclasses.replace(parity_world(*size), catalog=catalog)
    older = tmp_path / "older"
    write_random_model(older, write_prepared(older / "prepared", world=old), seed=3, world=old)
    name = f"20261101T000000Z-{artifacts.read_manifest(str(older / 'model'), 'model').digest[:12]}"
    shutil.copytree(older / "model", folder / "promoted" / "models" / name)
    pointer = {"current": name, "previous": [], "promoted_at": "then", "why": "a test"}
    (folder / "promoted" / "models" / "current.json").write_text(json.dumps(pointer))

    report = score(plan_score(config))
    assert report.model_dir == files.absolute(current_model(config.output_dir))
    scorer, lists = Scorer.load(current_model(config.output_dir)), published(config)
    known = new.histories.together("train", "validation", "test")
    assert len(lists) == NUM_USERS
    for user, user_id in enumerate(new.catalog.user_ids):
        history = [catalog.item_index(new.catalog.item_ids[item]) for item in known[user]]
        items, _ = scorer.top_k([catalog.user_index(user_id)], Ragged.from_lists([[i for i in history if i >= 0]]), 5)
        assert lists[user_id][0] == [catalog.item_ids[item] for item in items[0] if item >= 0]


# Bad nights


@pytest.mark.ray
def test_half_the_users_gone_stops_the_night_and_accepting_it_publishes(ray_local, folder):
    config = config_of(folder, "halved")
    score(plan_score(config, nightly=True))
    first = published(config)
    (folder / "halved" / "prepared").unlink()
    shutil.copytree(folder / "prepared", folder / "halved" / "prepared")
    for path in bucket_paths(config.run.prepared, "histories"):
        table = read_tables([path])
        write_table(table.slice(0, len(table) // 2), path)
    manifest = json.loads((folder / "halved" / "prepared" / "manifest.json").read_text())
    (folder / "halved" / "prepared" / "manifest.json").write_text(json.dumps(manifest | {"digest": "another"}))
    (folder / "halved" / "model").unlink()
    shutil.copytree(folder / "model", folder / "halved" / "model")
    model = json.loads((folder / "halved" / "model" / "manifest.json").read_text())
    model["inputs"]["prepared"] = "another"
    (folder / "halved" / "model" / "manifest.json").write_text(json.dumps(model))
    planned = plan_score(config, nightly=True)
    with pytest.raises(AuditError, match=r"50\.00% of the last table's users .* nightly\.drift\.max_users_gone"):
        score(planned)
    assert published(config) == first
    refused = report_of(planned)
    assert (refused["status"], len(refused["users_gone_such_as"])) == ("refused", 3)
    assert set(refused["users_gone_such_as"]) <= {hashed(user) for user in first}
    assert num_staged(planned) == NUM_USERS // 2
    report = score(planned, accept_drift=True)
    assert (report.status, report.table_version, len(published(config))) == ("published", 2, NUM_USERS // 2)


@pytest.mark.ray
@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.jsonl", b"", r"nightly\.events\) holds no rows"),
        ("cut.jsonl.gz", None, "damaged or truncated"),
        (
            "wrong.jsonl",
            b'{"reader": "u", "book": "i", "stars": "many", "when": 1}\n',
            "more than data.max_bad_fraction",
        ),
        ("missing.jsonl", b"", "nightly.events.path .* does not exist"),
    ],
)
def test_events_that_are_not_whole_stop_the_night(ray_local, folder, tmp_path, name, content, reason):
    if content is None:
        line = json.dumps({"reader": "user-00", "book": "item-01", "stars": 5, "when": 1}).encode() + b"\n"
        noise = b"".join(line.replace(b"user-00", os.urandom(8).hex().encode()) for _ in range(200_000))
        content = gzip.compress(noise)[:-2000]
    if name != "missing.jsonl":
        (tmp_path / name).write_bytes(content)
    source = {"path": str(tmp_path / name), "format": "jsonl", "columns": COLUMNS}
    config = config_of(folder, "events", nightly={"events": source})
    with pytest.raises(DataError, match=reason):
        score(plan_score(config, nightly=True))
    assert not files.exists(config.run.dump)
    assert not files.exists(config.run.nightly + "/histories")


@pytest.mark.ray
def test_a_damaged_model_stops_the_night_before_anything_is_staged(ray_local, folder):
    config = config_of(folder, "damaged")
    (folder / "damaged" / "model").unlink()
    shutil.copytree(folder / "model", folder / "damaged" / "model")
    path = folder / "damaged" / "model" / "tables.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    planned = plan_score(config, nightly=True)
    with pytest.raises(ArtifactError, match=r"tables\.safetensors is damaged"):
        score(planned)
    assert not files.exists(planned.staging)
    assert not files.exists(planned.report_dir)


@pytest.mark.ray
def test_a_second_night_beside_a_running_one_is_refused(ray_local, folder):
    config = config_of(folder, "twice")
    planned = plan_score(config, nightly=True)
    with (
        hold(planned.dump_dir, "the scoring run of the first"),
        pytest.raises(ResourceError, match=r"the scoring run of the first is at work on .*dump"),
    ):
        score(planned)
    assert not files.exists(planned.staging)


@pytest.mark.ray
def test_a_scoring_process_that_dies_as_if_out_of_memory_costs_nobody_their_list(ray_local, folder, monkeypatch):
    """The kernel ends a process that takes too much memory by SIGKILL."""
    config = config_of(folder, "memory")

    class SlowScoreUsers(batch.ScoreUsers):  # local, so that it is sent to the actors by value
        def __call__(self, users):
            time.sleep(0.5)
            return super().__call__(users)

    monkeypatch.setattr(batch, "ScoreUsers", SlowScoreUsers)
    planned = plan_score(config, nightly=True)
    killed: list[int] = []
    killer = threading.Thread(target=kill_an_actor, args=(planned, killed), daemon=True)
    killer.start()
    score(planned)
    killer.join(timeout=5)
    assert len(killed) == 1
    assert 0 < killed[0] < NUM_USERS, "the kill did not land in the middle of the work"
    assert published(config) == expected(config)


def kill_an_actor(planned, killed):
    while not 0 < num_staged(planned) < NUM_USERS // 2:
        time.sleep(0.02)
    actors = [
        process for process in psutil.Process().children(recursive=True)
        if "ScoreUsers" in " ".join(process.cmdline())
    ]  # fmt: skip
    if actors:
        num_before = num_staged(planned)
        os.kill(actors[0].pid, signal.SIGKILL)
        killed.append(num_before)


@pytest.mark.ray
def test_a_night_that_goes_on_past_midnight_keeps_its_date(ray_local, folder, monkeypatch):
    class Clock(plan.datetime.datetime):
        day = 20

        @classmethod
        def now(cls, tz=None):
            return cls(2026, 11, cls.day, 23, 59, tzinfo=tz)

    monkeypatch.setattr(plan.datetime, "datetime", Clock)
    config = config_of(folder, "midnight", run_date=None)
    planned = plan_score(config, nightly=True)

    def write_and_wait(*args):
        write_lists(*args)
        Clock.day = 21

    write_lists = batch.write_lists
    monkeypatch.setattr(batch, "write_lists", write_and_wait)
    report = score(planned)
    assert (Clock.day, report.run_date) == (21, "2026-11-20")
    assert set(DeltaTable(config.run.dump).to_pandas()["run_date"]) == {"2026-11-20"}
    assert not is_published(config, nightly=True)  # the next day is another night


@pytest.mark.ray
def test_users_erased_while_a_night_is_at_work_are_not_published(ray_local, folder, monkeypatch):
    config = config_of(folder, "erased")
    planned = plan_score(config, nightly=True)

    def write_and_erase(*args):
        write_lists(*args)
        Tombstones.load(config.output_dir).with_users(["user-07"]).save(config.output_dir)

    write_lists = batch.write_lists
    with monkeypatch.context() as patch:
        patch.setattr(batch, "write_lists", write_and_erase)
        with pytest.raises(ArtifactError, match="users were erased while this run was at work"):
            score(planned)
    assert not is_published(config, nightly=True)
    assert score(plan_score(config, nightly=True)).histories["erased_users"] == 1
    lists = expected(config)
    del lists["user-07"]
    assert published(config) == lists


@pytest.mark.ray
def test_a_full_disk_in_staging_publishes_nothing_and_the_next_start_goes_on(ray_local, folder, tmp_path):
    config = config_of(folder, "full", k=20)
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs more rights than this user has")
    try:
        (folder / "full" / "dump").symlink_to(small)
        filler = small / "filler"
        filler.write_bytes(os.urandom(232 << 10))
        planned = plan_score(config, nightly=True)
        with pytest.raises((OSError, ray.exceptions.RayError)) as caught:
            score(planned)
        assert is_full_disk(caught.value)
        assert 0 < num_staged(planned) < NUM_USERS, "the disk was not full in the middle of the work"
        assert not is_published(config, nightly=True)
        filler.unlink()
        score(plan_score(config, nightly=True))
        assert published(config) == expected(config)
    finally:
        subprocess.run(["umount", str(small)], check=True)


TWO_NODES = """
import json, os, signal, sys, threading, time
import numpy as np
import ray
from ray.cluster_utils import Cluster
from cllm4rec.config import load_config
from cllm4rec.nightly import ray_job as batch
from cllm4rec.commands.cli import show_log
from cllm4rec.nightly.ray_job import num_staged
from cllm4rec.nightly.plan import plan_score
from cllm4rec.pipeline import run_score

class Slow(batch.ScoreUsers):
    def __call__(self, users):
        time.sleep(1.0)
        return super().__call__(users)

batch.ScoreUsers = Slow
small = {"object_store_memory": 100 << 20}
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **small})
nodes = [cluster.add_node(num_cpus=2, **small) for _ in range(2)]
ray.init(cluster.address, log_to_driver=False, logging_level="error")
planned = plan_score(load_config(sys.argv[1]), nightly=True)
killed = []

def kill():
    while num_staged(planned) < 13:
        time.sleep(0.02)
    pid = nodes[1].all_processes["raylet"][0].process.pid
    killed.append(num_staged(planned))
    os.kill(pid, signal.SIGKILL)

threading.Thread(target=kill, daemon=True).start()
with show_log():
    report = run_score(planned, force=False)
print(json.dumps({"killed": killed, "users": report.users, "nodes": sum(node["Alive"] for node in ray.nodes())}))
sys.stdout.flush()
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.ray
def test_a_node_that_dies_in_mid_work_costs_nobody_their_list(folder):
    config = config_of(folder, "node", num_actors=2, batch_users=2)
    (folder / "node" / "run.yaml").write_text(json.dumps(config.model_dump(mode="json")))
    health = {
        f"RAY_health_check_{name}": value
        for name, value in {
            "initial_delay_ms": "500", "period_ms": "500", "timeout_ms": "500", "failure_threshold": "2"
        }.items()
    }  # fmt: skip
    ended = subprocess.run(
        [sys.executable, "-c", TWO_NODES, str(folder / "node" / "run.yaml")],
        cwd=ROOT,
        env={**os.environ, **health, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    told = json.loads(next(line for line in ended.stdout.splitlines() if line.startswith("{")))
    assert 13 <= told["killed"][0] < NUM_USERS, "the kill did not land in the middle of the work"
    assert (told["users"], told["nodes"]) == (NUM_USERS, 2)
    assert "score: lost the node" in ended.stdout
    assert published(config) == expected(config)
