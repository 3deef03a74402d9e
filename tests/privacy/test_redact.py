"""Files without some users: what goes is gone, what stays is where it was, and the search finds what is left."""

from __future__ import annotations

import gzip
import json
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from cllm4rec.arrays.ids import Catalog
from cllm4rec.errors import ArtifactError
from cllm4rec.model.cllm4rec import TABLES
from cllm4rec.privacy import redact
from cllm4rec.privacy.redact import (
    ErasedUsers,
    copy_without,
    copy_zeroed,
    erased_indices,
    find_remaining_ids,
    placeholder,
    rows_of,
)
from cllm4rec.storage.tombstones import Tombstones

ERASED = Tombstones().with_users(["ben", "dora"])
ERASED_USERS = ErasedUsers(ERASED, np.array([1, 3]))


def written(path: Path, table: pa.Table, row_group_size: int | None = None) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=row_group_size)
    return str(path)


@pytest.mark.parametrize("row_group_size", [1, 2, 100])
def test_rows_go_by_id_or_by_index_and_the_others_keep_order_and_schema(tmp_path: Path, row_group_size: int) -> None:
    schema = pa.schema([pa.field("user_id", pa.string(), nullable=False), ("items", pa.large_list(pa.int64()))])
    rows = {"user_id": ["ben", "anna", "dora", "cleo", "anna"], "items": [[1], [], [2], [3, 4], [5]]}
    by_id = written(tmp_path / "by_id.parquet", pa.table(rows, schema=schema), row_group_size)
    by_index = written(
        tmp_path / "a" / "b.parquet", pa.table({"user": [1, 0, -1, 3, 2], "n": range(5)}), row_group_size
    )
    assert (rows_of(by_id, "by_id.parquet", ERASED_USERS), rows_of(by_index, "a/b.parquet", ERASED_USERS)) == (2, 2)
    target = str(tmp_path / "new" / "x.parquet")
    copy_without(by_id, target, "by_id.parquet", ERASED_USERS)
    left = pq.read_table(target)
    assert left.schema.equals(schema)
    assert left.to_pydict() == {"user_id": ["anna", "cleo", "anna"], "items": [[], [3, 4], [5]]}
    copy_without(by_index, target, "a/b.parquet", ERASED_USERS)
    assert pq.read_table(target).to_pydict() == {"user": [0, -1, 2], "n": [1, 2, 4]}


def test_a_file_of_which_nothing_is_left_keeps_its_columns(tmp_path: Path) -> None:
    source = written(tmp_path / "x.parquet", pa.table({"user_id": ["ben"], "scores": [[1.0]]}))
    copy_without(source, str(tmp_path / "y.parquet"), "x.parquet", ERASED_USERS)
    empty = pq.read_table(tmp_path / "y.parquet")
    assert (len(empty), empty.schema) == (0, pq.read_schema(source))
    assert pq.read_metadata(tmp_path / "y.parquet").num_row_groups == 1, "as prepare writes an empty bucket"


def test_files_about_nobody_are_told_apart(tmp_path: Path) -> None:
    items = written(
        tmp_path / "items.parquet", pa.table({"index": [0], "id": ["ben"], "text": ["x"], "num_train": [1]})
    )
    assert rows_of(items, "items.parquet", ERASED_USERS) == 0, "an item may be called like a user"


def test_a_catalog_keeps_every_place_and_forgets_id_and_text(tmp_path: Path) -> None:
    Catalog(["anna", "ben", "cleo", "dora"], ["i"], ["a", "b", "c", "d"]).save(str(tmp_path))
    source = str(tmp_path / "users.parquet")
    assert erased_indices(source, ERASED).tolist() == [1, 3]
    copy_without(source, str(tmp_path / "new.parquet"), "users.parquet", ERASED_USERS)
    (tmp_path / "new.parquet").replace(source)
    catalog = Catalog.load(str(tmp_path))
    assert catalog.user_ids.tolist() == ["anna", placeholder(1), "cleo", placeholder(3)]
    assert catalog.user_texts == ["a", "", "c", ""]
    assert erased_indices(source, ERASED).tolist() == []
    assert pq.read_schema(source).names == ["index", "id", "text"]


@given(st.sets(st.integers(0, 4)), st.integers(1, 3))
def test_rows_of_user_tables_become_zero_and_no_other_byte_changes(users: set[int], width: int) -> None:
    names = list(TABLES.values())
    # The wider type comes first in the file, whatever the names.
    types = {name: np.float64 if name == "content_users" else np.float32 for name in names}
    before = {name: np.arange(5 * width, dtype=types[name]).reshape(5, width) + 1 for name in names}
    with tempfile.TemporaryDirectory() as folder:
        source, target = f"{folder}/tables.safetensors", f"{folder}/new/tables.safetensors"
        save_file(before, source)
        copy_zeroed(source, target, np.array(sorted(users), np.int64))
        after = load_file(target)
        assert Path(source).stat().st_size == Path(target).stat().st_size
    for name in names:
        expected = before[name].copy()
        expected[sorted(users) if name in redact.USER_TABLES else []] = 0
        assert (after[name] == expected).all()


def test_the_user_tables_are_those_of_the_model(tmp_path: Path) -> None:
    assert sorted(redact.USER_TABLES) == sorted(name for name in TABLES.values() if name.endswith("_users"))
    save_file({"other": np.zeros((2, 2))}, tmp_path / "x.safetensors")
    with pytest.raises(ArtifactError, match="no user tables"):
        copy_zeroed(str(tmp_path / "x.safetensors"), str(tmp_path / "y"), np.array([1]))


def test_a_large_file_is_copied_and_searched_in_pieces(tmp_path: Path) -> None:
    before = {name: np.random.default_rng(0).normal(size=(9, redact.PIECE_BYTES // 24)) for name in TABLES.values()}
    save_file(before, tmp_path / "x.safetensors")
    copy_zeroed(str(tmp_path / "x.safetensors"), str(tmp_path / "y"), np.array([0, 8]))
    after = load_file(tmp_path / "y")
    assert all((after[name][1:8] == before[name][1:8]).all() for name in before)
    begin = redact.PIECE_BYTES - len("custom")  # the id begins in one piece and ends in the next
    (tmp_path / "text.json").write_text("long " * (begin // 5) + "." * (begin % 5) + "customer-4711")
    assert find_remaining_ids(str(tmp_path), ["customer-4711"]) == ["text.json"]


def test_the_search_finds_an_id_wherever_it_hides(tmp_path: Path) -> None:
    user_id = "käufer-4711"
    (tmp_path / "plain.txt").write_text(f"said {user_id}.")
    (tmp_path / "escaped.json").write_text(json.dumps([user_id]))
    (tmp_path / "packed.gz").write_bytes(gzip.compress(f"x {user_id}".encode() * 99))
    words = [f"w{number}" for number in range(999)]
    for name, column in {
        "compressed": pa.array([*words, user_id]),
        "text": pa.array([*words, f"thanks to {user_id}!"]),
        "lists": pa.array([words, [user_id]]),
        "dictionary": pa.array([*words, user_id]).dictionary_encode(),
        "struct": pa.array([{"add": {"path": user_id}}, None]),
        "map": pa.array([[(user_id, "x")]], pa.map_(pa.string(), pa.string())),
    }.items():
        pq.write_table(pa.table({"x": column}), tmp_path / f"{name}.parquet", compression="zstd", use_dictionary=False)
    (tmp_path / "other.txt").write_text("käufer-47110 and xkäufer-4711")
    (tmp_path / "broken.parquet").write_text("no parquet")
    found = find_remaining_ids(str(tmp_path), ["somebody-else", user_id])
    expected = {path.name for path in tmp_path.iterdir()} - {"other.txt", "broken.parquet"}
    assert set(found) == expected


def test_the_search_knows_what_only_looks_like_the_id(tmp_path: Path) -> None:
    written(tmp_path / "prepared" / "items.parquet", pa.table({"index": [0], "id": ["1234567"], "text": ["a thing"]}))
    written(tmp_path / "top100.parquet", pa.table({"user_id": ["7"], "item_ids": [["1234567", "42"]]}))
    (tmp_path / "manifest.json").write_text('{"sha256": "ab1234567ef"}')
    assert find_remaining_ids(str(tmp_path), ["1234567", "42"], ["1234567", "42"]) == []
    assert find_remaining_ids(str(tmp_path), ["7"]) == ["top100.parquet"], (
        "a short id is found where ids of users stand"
    )
    assert find_remaining_ids(str(tmp_path), []) == []
