"""Stored histories in the indices of a model that may be older than the prepared data: users and items are matched by id.

A model directory has its own catalog. Data that was prepared later may lack some of its users and items and hold others.
Reading the indices of one catalog as those of the other would silently give users the histories of other users.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cllm4rec.arrays.histories import SPLITS
from cllm4rec.arrays.ids import Catalog
from cllm4rec.arrays.ragged import Ragged
from cllm4rec.data.prepared import load_histories
from cllm4rec.errors import ArtifactError

IntArray = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class UserHistories:
    """Item indices of a model: one row for each of its users, then one row for each user that was prepared since.

    `new_users` maps the ids of the latter to their rows: the model has no embedding for them, but they have a history.
    """

    items: Ragged
    new_users: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @classmethod
    def load(cls, prepared_dir: str, catalog: Catalog) -> UserHistories:
        """All histories of `prepared/` (train, validation and test) for a model with this catalog.

        A user of the model who is not in `prepared/` has an empty row. Items that the model does not know are left out.
        Raises ArtifactError if the two have no user or no item in common: they belong to different data.
        """
        prepared, histories = Catalog.load(prepared_dir), load_histories(prepared_dir)
        user_of = index_map(prepared.user_ids, catalog.user_ids)
        item_of = index_map(prepared.item_ids, catalog.item_ids)
        if not (user_of >= 0).any() or not (item_of >= 0).any():
            raise ArtifactError(
                f"{prepared_dir} ({prepared.num_users} users, {prepared.num_items} items) has no user or no item in "
                f"common with the model ({catalog.num_users} users, {catalog.num_items} items); use a model of the same "
                "data"
            )
        rows = user_of[histories.user]
        is_new = rows < 0
        rows[is_new] = catalog.num_users + np.arange(is_new.sum())
        items = remap_items(histories.together(*SPLITS), item_of)
        new_ids = prepared.user_ids[histories.user[is_new]]
        new_users = {str(user_id): catalog.num_users + row for row, user_id in enumerate(new_ids)}
        return cls(_by_row(rows, items, catalog.num_users + len(new_users)), new_users)


def index_map(source_ids: npt.NDArray[np.object_], target_ids: npt.NDArray[np.object_]) -> IntArray:
    """For each id of `source_ids`, its position in `target_ids`, or -1."""
    if np.array_equal(source_ids, target_ids):
        return np.arange(len(source_ids))
    found = pc.index_in(pa.array(source_ids, pa.string()), value_set=pa.array(target_ids, pa.string()))
    return np.asarray(found.fill_null(-1).to_numpy(zero_copy_only=False), np.int64)


def remap_items(items: Ragged, item_of: IntArray) -> Ragged:
    """The rows in other indices, without the items that have no such index; `item_of` is an `index_map`."""
    values = item_of[items.values]
    return Ragged(values, items.offsets).where(values >= 0)


def _by_row(row: IntArray, rows: Ragged, num_rows: int) -> Ragged:
    """`num_rows` rows, of which number `row[i]` is row i of `rows`; the others are empty."""
    source = np.full(num_rows, len(rows))
    source[row] = np.arange(len(rows))
    with_empty = Ragged(rows.values, np.append(rows.offsets, rows.offsets[-1]))
    return with_empty.take(source)
