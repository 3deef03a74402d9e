"""An erasure that a crash, another run or a backup undid in part is finished by the next one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from deltalake import DeltaTable
from support.erasures import CANARY, CANARY_TEXT, USER_IDS, assert_whole, copy_of, files_with, receipts, state

from cllm4rec.config import Config
from cllm4rec.errors import ResourceError
from cllm4rec.nightly.audit import hashed
from cllm4rec.privacy import erasure
from cllm4rec.privacy.erasure import erase
from cllm4rec.storage.lease import hold
from cllm4rec.storage.tombstones import Tombstones


class CrashError(Exception):
    pass


@pytest.fixture
def config(erasure_template: Path, tmp_path: Path) -> Config:
    return copy_of(erasure_template, tmp_path)


def crash_after(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, calls: int) -> None:
    """Let a function work so many times, then fail."""
    real: Callable[..., Any] = getattr(owner, name)
    done: list[str] = []

    def wrapped(*args: Any, **options: Any) -> Any:
        if len(done) >= calls:
            raise CrashError
        done.append(name)
        return real(*args, **options)

    monkeypatch.setattr(owner, name, wrapped)


@pytest.mark.parametrize(
    ("owner", "name", "calls"),
    [
        (erasure.Erasure, "run", 0),  # only the tombstone is written
        (erasure, "copy_without", 5),  # in the middle of a directory
        (os, "rename", 1),  # prepared/ is set aside and the new one has no name yet
        (erasure, "copy_zeroed", 1),  # pretrained/ is done and model/ is not
        (os, "rename", 5),  # model/ is set aside
        (erasure, "replace_file", 0),
        (DeltaTable, "create_write_transaction", 0),  # new files of the table exist, but no commit names them
        (erasure, "vacuum", 1),  # the commit is done, old versions still exist
        (erasure.Erasure, "write_receipt", 0),
    ],
)
def test_an_interrupted_erasure_leaves_whole_directories_and_is_finished_by_the_same_command(
    config: Config, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, calls: int
) -> None:
    before = state(config)
    with monkeypatch.context() as patch:
        crash_after(patch, owner, name, calls)
        with pytest.raises(CrashError):
            erase(config, [CANARY])
    assert Tombstones.load(config.output_dir).contains([CANARY]).all()
    is_left = bool(files_with(Path(config.output_dir), CANARY))
    assert is_left is (name != "write_receipt"), "the crash came in mid-work"
    erase(config, [CANARY])
    assert files_with(Path(config.output_dir), CANARY, CANARY_TEXT, hashed(CANARY)) == []
    assert_whole(config)
    assert state(config) == before
    (receipt,) = receipts(config)
    assert {"prepared", "pretrained", "model", "evaluation", "dump"} <= {entry["path"] for entry in receipt["touched"]}
    assert all(entry["before"] != entry["after"] for entry in receipt["touched"] if "rows" in entry)


def test_what_another_erasure_did_not_finish_is_finished_too(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        crash_after(patch, erasure, "copy_without", 0)
        with pytest.raises(CrashError):
            erase(config, [CANARY])
    erase(config, [USER_IDS[3]])
    assert files_with(Path(config.output_dir), CANARY, USER_IDS[3]) == []
    assert len(receipts(config)[0]["tombstones"]) == 2
    assert_whole(config)


def test_while_a_scoring_run_holds_the_table_the_tombstone_is_written_and_the_rest_waits(config: Config) -> None:
    with hold(config.run.dump, "a night"), pytest.raises(ResourceError, match="a night is at work"):
        erase(config, [CANARY])
    assert Tombstones.load(config.output_dir).contains([CANARY]).all()
    assert files_with(Path(config.run.model), CANARY)
    erase(config)
    assert files_with(Path(config.output_dir), CANARY, CANARY_TEXT) == [], "also without the id"


def test_a_directory_brought_back_from_a_backup_is_cleaned_again(config: Config, tmp_path: Path) -> None:
    shutil.copytree(config.run.evaluation, tmp_path / "backup")
    erase(config, [CANARY])
    shutil.rmtree(config.run.evaluation)
    shutil.copytree(tmp_path / "backup", config.run.evaluation)
    result = erase(config)
    assert files_with(Path(config.output_dir), CANARY) == []
    assert (result["new_tombstones"], result["touched"]) == (0, 1)
    assert_whole(config)
