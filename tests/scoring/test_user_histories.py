"""Histories in the indices of a model: users and items are matched by id, never by position."""

import pyarrow as pa

from cllm4rec.arrays.ids import Catalog
from cllm4rec.arrays.ragged import Ragged
from cllm4rec.data.prepared import bucket_name
from cllm4rec.scoring.user_histories import UserHistories
from cllm4rec.storage.files import write_table


def test_rows_and_ids_are_matched_where_users_were_erased_and_catalogs_are_as_long_as_each_other(tmp_path):
    """bob was erased: he keeps his index and no longer has a history."""
    Catalog(["ann", "bob", "cyd", "dan"], ["a", "b", "c"]).save(str(tmp_path))
    splits = {"train": [[0], [1, 2], [2]], "validation": [[], [0], []], "test": [[1], [], [0]]}
    rows = {"user": [0, 2, 3], **{name: Ragged.from_lists(lists).to_arrow() for name, lists in splits.items()}}
    write_table(pa.table(rows), str(tmp_path / "histories" / bucket_name(0)))
    histories = UserHistories.load(str(tmp_path), Catalog(["dan", "bob", "ann", "eve"], ["c", "x", "a"]))
    assert histories.new_users == {"cyd": 4}
    assert histories.items.tolist() == [[0, 2], [], [2], [], [0, 2]]
