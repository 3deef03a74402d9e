"""Erasures reach a running process, and a lost file brings no erased user back."""

from pathlib import Path

import pytest

from cllm4rec.storage.tombstones import TOMBSTONES, Tombstones, TombstoneWatcher


def erase(folder: Path, user_id: str) -> None:
    Tombstones.load(str(folder)).with_users([user_id]).save(str(folder))


def test_an_erasure_is_seen_by_the_next_check(tmp_path: Path) -> None:
    watcher = TombstoneWatcher(str(tmp_path), every_s=0.0)
    assert watcher.current().contains(["ann", "bob"]).tolist() == [False, False]
    erase(tmp_path, "ann")
    assert watcher.current().contains(["ann", "bob"]).tolist() == [True, False]
    erase(tmp_path, "bob")
    assert watcher.current().contains(["ann", "bob"]).tolist() == [True, True]


def test_the_file_is_not_checked_more_often_than_asked(tmp_path: Path) -> None:
    watcher = TombstoneWatcher(str(tmp_path), every_s=3600)
    erase(tmp_path, "ann")
    assert not watcher.current().contains(["ann"])[0]


@pytest.mark.parametrize("harm", ["damage", "remove"])
def test_a_lost_file_brings_no_erased_user_back_and_is_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, harm: str
) -> None:
    erase(tmp_path, "ann")
    watcher = TombstoneWatcher(str(tmp_path), every_s=0.0)
    (tmp_path / TOMBSTONES).unlink() if harm == "remove" else (tmp_path / TOMBSTONES).write_text("{")
    for _ in range(3):
        assert watcher.current().contains(["ann", "bob"]).tolist() == [True, False]
    assert len(caplog.records) == 1
    Tombstones().with_users(["ann", "bob"]).save(str(tmp_path))
    assert watcher.current().contains(["ann", "bob"]).tolist() == [True, True]
