"""Who was erased is recognized by everybody who asks, and can be read off by nobody."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm4rec.errors import ArtifactError
from cllm4rec.storage.tombstones import TOMBSTONES, Tombstones

IDS = st.lists(st.text(st.characters(exclude_categories=["Cs"])))


@given(IDS, IDS)
def test_exactly_the_erased_are_recognized(erased: list[str], others: list[str]) -> None:
    tombstones = Tombstones().with_users(erased)
    assert tombstones.contains(erased).all()
    assert tombstones.contains(others).tolist() == [one in erased for one in others]
    assert tombstones.contains(np.array(others, object)).dtype == bool


def test_what_was_saved_is_found_again(tmp_path: Path) -> None:
    assert len(Tombstones.load(str(tmp_path))) == 0
    first = Tombstones().with_users(["anna"])
    first.save(str(tmp_path / "new"))
    both = Tombstones.load(str(tmp_path / "new")).with_users(["ben"])
    both.save(str(tmp_path / "new"))
    found = Tombstones.load(str(tmp_path / "new"))
    assert (found, len(found)) == (both, 2)
    assert found.contains(["anna", "ben", "cleo", ""]).tolist() == [True, True, False, False]


def test_the_file_holds_no_id_and_differs_from_one_place_to_another(tmp_path: Path) -> None:
    for folder in ("here", "there"):
        Tombstones().with_users(["customer-4711"]).save(str(tmp_path / folder))
        assert "4711" not in (tmp_path / folder / TOMBSTONES).read_text()
    assert not Tombstones.load(str(tmp_path / "here")).digests & Tombstones.load(str(tmp_path / "there")).digests


def test_the_digest_tells_sets_apart_and_empty_sets_not() -> None:
    one = Tombstones().with_users(["anna"])
    assert Tombstones().digest == Tombstones().with_users([]).digest
    assert len({Tombstones().digest, one.digest, one.with_users(["ben"]).digest}) == 3
    assert one.with_users(["anna"]) == one
    assert one.with_users(["ben", "cleo"]).digest == one.with_users(["cleo"]).with_users(["ben"]).digest


def test_a_crash_while_saving_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = Tombstones().with_users(["anna"])
    before.save(str(tmp_path))

    def crash(*_: object) -> None:
        raise OSError("power is gone")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="power is gone"):
        before.with_users(["ben"]).save(str(tmp_path))
    assert Tombstones.load(str(tmp_path)) == before


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"schema_version": 2, "salt": "s", "digests": []}', '{"schema_version": 1, "salt": "s"}'],
)
def test_a_damaged_file_lets_nobody_pass(tmp_path: Path, content: str) -> None:
    (tmp_path / TOMBSTONES).write_text(content)
    with pytest.raises(ArtifactError, match="damaged"):
        Tombstones.load(str(tmp_path))
