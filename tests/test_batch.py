"""The nightly lists on a real Ray: every user once, after any crash, or nothing at all."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import torch
from deltalake import DeltaTable
from directories import write_prepared, write_random_model

from cllm4rec import artifacts
from cllm4rec.config import Config, parse_config
from cllm4rec.data.prepared import Histories
from cllm4rec.errors import ArtifactError, AuditError
from cllm4rec.scoring import batch
from cllm4rec.scoring.batch import audit_staged, forget_staged, is_published, num_staged, plan_score, score
from cllm4rec.scoring.rules import Rules, read_rules
from cllm4rec.scoring.scorer import Scorer

ROOT = Path(__file__).parents[1]
NUM_USERS, NUM_BUCKETS = 40, 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`prepared/` in many files and `model/`."""
    folder = tmp_path_factory.mktemp("batch")
    write_random_model(folder, write_prepared(folder / "prepared", NUM_BUCKETS), seed=0)
    return folder


def config_of(folder: Path, name: str, run_date: str = "2026-11-20", **settings: Any) -> Config:
    """A run with a dump and runs/ of its own, on the shared directories."""
    (folder / name).mkdir(exist_ok=True)
    for directory in ("prepared", "model"):
        if not (folder / name / directory).exists():
            (folder / name / directory).symlink_to(folder / directory)
    return parse_config(
        {
            "output_dir": str(folder / name),
            "data": {"interactions": {"path": "unread"}},
            "run_date": run_date,
            "score": {"k": 5, "batch_users": 4, **settings},
        }
    )


def published(config: Config, version: int | None = None) -> dict[str, tuple[list[str], list[float]]]:
    """user_id → items and scores as readers see them; fails where a user is there twice."""
    frame = DeltaTable(config.directory("dump"), version=version).to_pandas()
    assert frame["user_id"].is_unique
    return {row.user_id: (list(row.item_ids), list(row.scores)) for row in frame.itertuples()}


def expected(config: Config) -> dict[str, tuple[list[str], list[float]]]:
    """What the Scorer answers, one user at a time."""
    torch.set_num_threads(1)
    scorer = Scorer.load(config.directory("model"))
    histories = Histories.load(config.directory("prepared"))
    known = histories.together("train", "validation", "test")
    rules, _ = read_rules(config.score.rules.deny, scorer.catalog)
    lists = {}
    for user in histories.user:
        items, scores = scorer.top_k([user], known.take(np.array([user])), config.score.k, rules)
        found = items[0] >= 0
        lists[scorer.catalog.user_ids[user]] = (
            scorer.catalog.item_ids[items[0][found]].tolist(),
            list(scores[0][found]),
        )
    return lists


# Plans, without Ray


def test_a_run_is_named_after_all_its_inputs(folder, tmp_path):
    config = config_of(folder, "plans")
    plan = plan_score(config)
    assert (plan.attempt, plan.num_users, is_published(config)) == (1, NUM_USERS, False)
    assert plan_score(config) == plan
    (tmp_path / "deny.txt").write_text("item-03\n")
    others = [
        config_of(folder, "plans", k=6),
        config_of(folder, "plans", run_date="2026-11-21"),
        config_of(folder, "plans", rules={"deny": str(tmp_path / "deny.txt")}),
    ]
    plans = [plan, *map(plan_score, others)]
    assert len({one.run_id for one in plans}) == len({one.checkpoint_dir for one in plans}) == 4
    assert plan_score(config_of(folder, "plans", num_actors=3, batch_users=1)).run_id == plan.run_id


def test_a_model_of_other_data_is_refused(folder, tmp_path):
    write_random_model(tmp_path, write_prepared(tmp_path / "prepared"), seed=1)
    config = config_of(folder, "foreign")
    (folder / "foreign" / "model").unlink()
    (folder / "foreign" / "model").symlink_to(tmp_path / "model")
    with pytest.raises(ArtifactError, match="was trained on other data than"):
        plan_score(config)


# On Ray


def test_a_staged_file_holds_some_batches_and_never_everything(folder):
    plan = plan_score(config_of(folder, "plans"))
    assert batch._users_per_file(plan) == 4
    for num_users, users_per_file in ((640, 40), (10**8, 65_536)):
        assert batch._users_per_file(dataclasses.replace(plan, num_users=num_users)) == users_per_file


def test_nothing_staged_is_never_what_was_promised(folder):
    """As after a resumed run whose checkpoint speaks of files that are gone."""
    plan = plan_score(config_of(folder, "plans"))
    with pytest.raises(AuditError, match="40 users of whom each has no list"):
        audit_staged(plan, [], Rules())


# On Ray


@pytest.mark.ray
def test_every_user_is_published_once_or_nobody(ray_local, folder, tmp_path, monkeypatch):
    (tmp_path / "deny.txt").write_text("item-03\nitem-04\nghost\n")
    config = config_of(folder, "whole", k=1000, rules={"deny": str(tmp_path / "deny.txt")})
    report = score(plan_score(config))
    assert published(config) == expected(config)
    assert (report["users"], report["short_lists"], report["denied_items"]) == (NUM_USERS, NUM_USERS, 2)
    assert (report["unknown_denied_items"], report["table_version"], len(report["sha256"])) == (1, 1, NUM_USERS / 4)
    frame = DeltaTable(config.directory("dump")).to_pandas()
    assert set(frame["run_date"]) == {"2026-11-20"}
    assert set(frame["model_version"]) == {Scorer.load(config.directory("model")).model_version}
    assert is_published(config)
    assert not artifacts.exists(plan_score(config).checkpoint_dir)
    # Asked again, it writes nothing: readers use these files.
    again = score(plan_score(config))
    assert (again["table_version"], again["sha256"]) == (1, report["sha256"])

    # Lists that fail the audit are not published, and readers keep the old.
    other = config_of(folder, "whole", k=3)
    with monkeypatch.context() as patch:
        patch.setattr(batch, "_write_lists", lose_a_user)
        with pytest.raises(AuditError, match="1 users of whom each has no list"):
            score(plan_score(other))
    assert published(config) == expected(config)
    assert (DeltaTable(config.directory("dump")).version(), is_published(config), is_published(other)) == (
        1,
        True,
        False,
    )

    # The cause removed, --force scores everybody anew.
    plan = plan_score(other, force=True)
    forget_staged(plan)
    assert score(plan)["table_version"] == 2
    assert published(other) == expected(other)
    assert published(config, version=1) == expected(config)
    # Once readers see other lists, those of before are no longer up to date.
    assert (is_published(config), is_published(other)) == (False, True)
    assert [plan_score(one).attempt for one in (config, other)] == [2, 1]
    assert plan_score(other, force=True).attempt == 2
    # Files that readers use are never dropped.
    forget_staged(plan_score(other))
    assert published(other) == expected(other)


write_lists = batch._write_lists


def lose_a_user(plan, rules):
    write_lists(plan, rules)
    file = artifacts.join(plan.staging, artifacts.list_files(plan.staging)[0])
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
    assert artifacts.list_files(plan.checkpoint_dir)
    artifacts.remove_directory(plan.staging)
    score(plan)
    assert published(config) == expected(config)


SLOW_DRIVER = """
import sys, time
import ray
from cllm4rec.config import load_config
from cllm4rec.scoring import batch

class Slow(batch.ScoreUsers):
    def __call__(self, users):
        time.sleep(0.5)
        return super().__call__(users)

batch.ScoreUsers = Slow
ray.init(sys.argv[1], log_to_driver=False, logging_level="error")
batch.score(batch.plan_score(load_config(sys.argv[2])))
"""


@pytest.mark.ray
def test_a_run_whose_driver_was_killed_goes_on_and_publishes_every_user_once(ray_local, folder):
    config = config_of(folder, "killed")
    (folder / "killed" / "run.yaml").write_text(json.dumps(config.model_dump()))
    plan = plan_score(config)
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-c", SLOW_DRIVER, address, str(folder / "killed" / "run.yaml")]
    driver = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE)
    try:
        give_up = time.monotonic() + 120
        while num_staged(plan) < 8:
            assert driver.poll() is None, driver.stderr.read().decode()[-2000:]
            assert time.monotonic() < give_up
            time.sleep(0.05)
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        driver.stderr.close()
    time.sleep(3)  # Ray ends the workers of a driver that is gone
    num_before = num_staged(plan)
    assert 8 <= num_before < NUM_USERS, "the kill did not land in the middle of the work"
    assert not is_published(config)
    names = artifacts.list_files(plan.staging)
    before = {name: artifacts.digest_of_file(artifacts.join(plan.staging, name)) for name in names}

    report = score(plan_score(config))
    assert published(config) == expected(config)
    assert report["users"] == NUM_USERS
    kept = {name: digest for name, digest in report["sha256"].items() if before.get(name) == digest}
    assert sum(pq.read_metadata(artifacts.join(plan.staging, name)).num_rows for name in kept) == num_before
