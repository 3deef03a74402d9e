"""The Delta table: a run appears whole or not at all, once, and old versions stay readable."""

import multiprocessing
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pyarrow.dataset
import pytest
from deltalake import DeltaTable
from support.publications import FACTS, seen, stage

from cllm4rec.errors import ArtifactError
from cllm4rec.storage.table import SCHEMA, current_files, current_run, publish, published_attempt


@pytest.fixture
def dump(tmp_path):
    return str(tmp_path / "dump")


def test_staged_files_are_invisible_until_they_are_published(dump):
    stage(dump, "early", ["a", "b"])
    assert (published_attempt(dump, "early"), current_run(dump)) == (0, None)
    publish(dump, stage(dump, "first", ["a", "b", "c"]), "first", 1, FACTS)
    stage(dump, "late", ["a"])
    assert seen(dump) == {"a": "first", "b": "first", "c": "first"}


def test_a_run_is_published_in_one_commit_and_only_once(dump):
    staged = stage(dump, "first", ["a", "b", "c"])
    version = publish(dump, staged, "first", 1, FACTS)
    assert publish(dump, staged, "first", 1, FACTS) == version
    assert DeltaTable(dump).version() == version
    (commit,) = [commit for commit in DeltaTable(dump).history() if "run_id" in commit]
    assert (commit["run_id"], commit["run_date"], commit["model_version"]) == ("first", "2026-11-20", "m")
    assert (published_attempt(dump, "first"), current_run(dump)) == (1, "first")


def test_the_next_run_replaces_the_lists_and_the_old_version_stays_readable(dump):
    first = publish(dump, stage(dump, "first", ["a", "b"]), "first", 1, FACTS)
    second = publish(dump, stage(dump, "second", ["a", "c"], parts=3), "second", 1, FACTS)
    assert second == first + 1
    assert seen(dump) == {"a": "second", "c": "second"}
    assert seen(dump, first) == {"a": "first", "b": "first"}
    assert current_run(dump) == "second"
    # Asked again, a run that others have replaced is not put back, and its own version is told.
    assert publish(dump, [], "first", 1, FACTS) == first
    assert seen(dump) == {"a": "second", "c": "second"}
    # As another attempt it is.
    publish(dump, ["run=first/part-0.parquet", "run=first/part-1.parquet"], "first", 2, FACTS)
    assert (seen(dump), current_run(dump)) == ({"a": "first", "b": "first"}, "first")


def test_an_old_version_can_be_restored(dump):
    first = publish(dump, stage(dump, "first", ["a"]), "first", 1, FACTS)
    publish(dump, stage(dump, "second", ["a"]), "second", 1, FACTS)
    DeltaTable(dump).restore(first)
    assert seen(dump) == {"a": "first"}
    publish(dump, stage(dump, "third", ["a"]), "third", 1, FACTS)
    assert seen(dump) == {"a": "third"}


def race(dump: str, run_id: str, start) -> int:
    start.wait()
    return publish(dump, [f"run={run_id}/part-0.parquet", f"run={run_id}/part-1.parquet"], run_id, 1, {})


@pytest.mark.parametrize("is_new", [True, False])
def test_of_three_publishers_of_a_run_one_publishes_and_nobody_fails(dump, is_new):
    users = ["a", "b", "c"]
    if not is_new:
        publish(dump, stage(dump, "before", users), "before", 1, FACTS)
    stage(dump, "first", users)
    with (
        multiprocessing.get_context("spawn").Manager() as manager,
        multiprocessing.get_context("spawn").Pool(3) as pool,
    ):
        versions = pool.starmap(race, [(dump, "first", manager.Barrier(3))] * 3, chunksize=1)
    assert len(set(versions)) == 1
    assert seen(dump) == dict.fromkeys(users, "first")
    assert sum(commit.get("run_id") == "first" for commit in DeltaTable(dump).history()) == 1


@pytest.mark.parametrize("is_new", [True, False])
def test_three_runs_published_at_once_leave_the_lists_of_one(dump, is_new):
    """Delta alone lets two overwrites of an empty table both pass: every user would be in it twice."""
    import threading

    users, runs = ["a", "b", "c"], ["first", "second", "third"]
    if not is_new:
        publish(dump, stage(dump, "before", users), "before", 1, FACTS)
    for run in runs:
        stage(dump, run, users)
    start = threading.Barrier(3)
    with ThreadPoolExecutor(3) as threads:
        versions = list(threads.map(race, [dump] * 3, runs, [start] * 3))
    assert len(set(versions)) == 3
    last = runs[versions.index(max(versions))]
    assert (seen(dump), current_run(dump)) == (dict.fromkeys(users, last), last)
    for run, version in zip(runs, versions, strict=True):
        assert seen(dump, version) == dict.fromkeys(users, run)


def test_the_table_reads_with_pandas_and_pyarrow_as_the_contract_says(dump):
    publish(dump, stage(dump, "first", ["a", "b", "c"]), "first", 1, FACTS)
    table = DeltaTable(dump)
    frame = table.to_pandas()
    assert list(frame.columns) == [field.name for field in SCHEMA]
    assert isinstance(frame, pd.DataFrame)
    row = frame[frame["user_id"] == "b"].iloc[0]
    assert (list(row["item_ids"]), list(row["scores"]), row["run_date"]) == (["first", "x"], [1.0, 0.5], "d")
    assert table.to_pyarrow_dataset().to_table(filter=pyarrow.dataset.field("user_id") == "c").num_rows == 1
    assert not any(field.nullable for field in table.schema().fields)


def test_a_table_that_cannot_be_read_is_told_in_a_sentence(dump):
    publish(dump, stage(dump, "first", ["a"]), "first", 1, FACTS)
    for commit in (Path(dump) / "_delta_log").glob("*.json"):
        commit.write_text("not JSON")
    with pytest.raises(ArtifactError, match=r"dump cannot be read \(.*\); restore it from a backup, or move it away"):
        published_attempt(dump, "first")


def test_the_current_files_are_those_that_readers_see(tmp_path):
    dump = str(tmp_path / "my runs" / "dump")  # a space, as people have them
    staged = stage(dump, "first", ["a", "b"])
    assert current_files(dump) == []
    publish(dump, staged, "first", 1, FACTS)
    assert published_attempt(dump, "second") == 0
    publish(dump, stage(dump, "second", ["a"], parts=1), "second", 1, FACTS)
    assert current_files(dump) == [f"{dump}/run=second/part-0.parquet"]
    publish(dump, staged, "first", 2, FACTS)
    assert current_files(dump) == [f"{dump}/{name}" for name in staged]


def test_an_attempt_whose_commit_is_cleaned_up_is_told_by_the_oldest_version_that_is_kept(dump):
    for run in ("first", "second", "third"):
        publish(dump, stage(dump, run, ["a"]), run, 1, FACTS)
    DeltaTable(dump, version=2).create_checkpoint()
    for version in (0, 1):
        (Path(dump) / "_delta_log" / f"{version:020d}.json").unlink()
    assert publish(dump, [], "first", 1, FACTS) == 2
    assert seen(dump) == {"a": "third"}
