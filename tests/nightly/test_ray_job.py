"""The nightly lists on a real Ray: every user once, after any crash, or nothing at all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray
from deltalake import DeltaTable
from support.directories import write_prepared, write_random_model
from support.nights import config_of, expected, published

from cllm4rec.errors import AuditError, ResourceError
from cllm4rec.nightly import ray_job as batch
from cllm4rec.nightly.plan import is_published, plan_score
from cllm4rec.nightly.ray_job import forget_staged, num_staged, score
from cllm4rec.scoring.scorer import Scorer
from cllm4rec.storage import files

ROOT = Path(__file__).parents[2]
NUM_USERS, NUM_BUCKETS = 40, 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`prepared/` in many files and `model/`."""
    folder = tmp_path_factory.mktemp("batch")
    write_random_model(folder, write_prepared(folder / "prepared", NUM_BUCKETS), seed=0)
    return folder


def test_a_staged_file_holds_some_batches_and_never_everything(folder):
    plan = plan_score(config_of(folder, "plans"))
    assert [batch.users_per_file(plan, num_users) for num_users in (40, 640, 10**8)] == [4, 40, 65_536]


# On Ray


@pytest.mark.ray
def test_every_user_is_published_once_or_nobody(ray_local, folder, tmp_path, monkeypatch):
    (tmp_path / "deny.txt").write_text("item-03\nitem-04\nghost\n")
    config = config_of(folder, "whole", k=1000, rules={"deny": str(tmp_path / "deny.txt")})
    report = score(plan_score(config))
    assert published(config) == expected(config)
    assert (report.users, report.short_lists, report.table_version) == (NUM_USERS, NUM_USERS, 1)
    assert len(report.sha256) >= NUM_USERS / 4
    frame = DeltaTable(config.run.dump).to_pandas()
    assert set(frame["run_date"]) == {"2026-11-20"}
    assert set(frame["model_version"]) == {Scorer.load(config.run.model).model_version}
    assert is_published(config)
    assert not files.exists(plan_score(config).checkpoint_dir)
    # Asked again, it writes nothing: readers use these files.
    again = score(plan_score(config))
    assert (again.table_version, again.sha256) == (1, report.sha256)

    # Lists that fail the audit are not published, and readers keep the old.
    other = config_of(folder, "whole", k=3)
    with monkeypatch.context() as patch:
        patch.setattr(batch, "write_lists", lose_a_user)
        with pytest.raises(AuditError, match="each of 1 users has no list"):
            score(plan_score(other))
    assert published(config) == expected(config)
    assert (DeltaTable(config.run.dump).version(), is_published(config), is_published(other)) == (
        1,
        True,
        False,
    )

    # The cause removed, --force scores everybody anew.
    plan = plan_score(other, force=True)
    forget_staged(plan)
    assert score(plan).table_version == 2
    assert published(other) == expected(other)
    assert published(config, version=1) == expected(config)
    # Once readers see other lists, those of before are no longer up to date.
    assert (is_published(config), is_published(other)) == (False, True)
    assert [plan_score(one).attempt for one in (config, other)] == [2, 1]
    assert plan_score(other, force=True).attempt == 2
    # Files that readers use are never dropped.
    forget_staged(plan_score(other))
    assert published(other) == expected(other)


write_lists = batch.write_lists


def lose_a_user(plan, histories, rules):
    write_lists(plan, histories, rules)
    file = files.join(plan.staging, files.list_files(plan.staging)[0])
    pq.write_table(pq.read_table(file).slice(1), file)


@pytest.mark.ray
def test_a_checkpoint_that_speaks_of_lost_files_gives_no_empty_table(ray_local, folder, monkeypatch):
    config = config_of(folder, "stale")
    plan = plan_score(config)
    with monkeypatch.context() as patch:
        patch.setattr(batch, "publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            score(plan)
    assert num_staged(plan) == NUM_USERS
    assert files.list_files(plan.checkpoint_dir)
    files.remove_directory(plan.staging)
    score(plan)
    assert published(config) == expected(config)


SLOW_DRIVER = """
import sys, time
import ray
from cllm4rec.config import load_config
from cllm4rec.nightly import ray_job as batch
from cllm4rec.nightly.plan import plan_score

class Slow(batch.ScoreUsers):
    def __call__(self, users):
        time.sleep(0.5)
        return super().__call__(users)

batch.ScoreUsers = Slow
ray.init(sys.argv[1], log_to_driver=False, logging_level="error")
batch.score(plan_score(load_config(sys.argv[2])))
"""


@pytest.mark.ray
def test_a_run_whose_driver_was_killed_at_a_third_goes_on_and_publishes_every_user_once(ray_local, folder):
    config = config_of(folder, "killed")
    (folder / "killed" / "run.yaml").write_text(json.dumps(config.model_dump(mode="json")))
    plan = plan_score(config)
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-c", SLOW_DRIVER, address, str(folder / "killed" / "run.yaml")]
    driver = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE)
    try:
        give_up = time.monotonic() + 120
        while num_staged(plan) < NUM_USERS // 3:
            assert driver.poll() is None, driver.stderr.read().decode()[-2000:]
            assert time.monotonic() < give_up
            time.sleep(0.05)
        with pytest.raises(ResourceError, match=rf"is at work on .*dump \(process {driver.pid} on"):
            score(plan)
    finally:
        driver.send_signal(signal.SIGKILL)
        _, printed = driver.communicate()
    assert b"constructor arguments in the object store" not in printed, "a line of Ray's core that means nothing here"
    time.sleep(3)  # Ray ends the workers of a driver that has died
    num_before = num_staged(plan)
    assert NUM_USERS // 3 <= num_before < NUM_USERS, "the kill did not land in the middle of the work"
    assert not is_published(config)
    names = files.list_files(plan.staging)
    before = {name: files.digest_of_file(files.join(plan.staging, name)) for name in names}

    report = score(plan_score(config))
    assert published(config) == expected(config)
    assert report.users == NUM_USERS
    kept = {name: digest for name, digest in report.sha256.items() if before.get(name) == digest}
    assert sum(pq.read_metadata(files.join(plan.staging, name)).num_rows for name in kept) == num_before
