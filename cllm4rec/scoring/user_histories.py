"""What was prepared, in the terms of a model that may be older: users and items are matched by id.

A promoted model has its own catalog. Data prepared since may lack some of its users and items and hold others; the
indices of one read as those of the other would be other people and other things, and nothing would tell.
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
class Known:
    """Histories in a model's item indices: a row for each of its users, then one for each user prepared since.

    `new_users` gives those rows by user id: the model has no embedding for them, but they have a history.
    """

    items: Ragged
    new_users: Mapping[str, int] = dataclasses.field(default_factory=dict)


def histories_of(prepared_dir: str, catalog: Catalog) -> Known:
    """All that is known of everyone in `prepared/`, train, validation and test alike, for a model with this catalog.

    A user of the model who is not in `prepared/` has an empty row; items the model does not know are left out. Raises
    ArtifactError where the two have no user or no item in common: then they are of different data.
    """
    prepared, histories = Catalog.load(prepared_dir), load_histories(prepared_dir)
    user_of = index_map(prepared.user_ids, catalog.user_ids)
    item_of = index_map(prepared.item_ids, catalog.item_ids)
    if not (user_of >= 0).any() or not (item_of >= 0).any():
        raise ArtifactError(
            f"{prepared_dir} ({prepared.num_users} users, {prepared.num_items} items) has no user or no item in common "
            f"with the model ({catalog.num_users} users, {catalog.num_items} items); use a model of the same data"
        )
    rows = user_of[histories.user]
    is_new = rows < 0
    rows[is_new] = catalog.num_users + np.arange(is_new.sum())
    items = remap_items(histories.together(*SPLITS), item_of)
    new_ids = prepared.user_ids[histories.user[is_new]]
    new_users = {str(user_id): catalog.num_users + row for row, user_id in enumerate(new_ids)}
    return Known(_by_row(rows, items, catalog.num_users + len(new_users)), new_users)


def index_map(source_ids: npt.NDArray[np.object_], target_ids: npt.NDArray[np.object_]) -> IntArray:
    """For each id of `source_ids`, its place in `target_ids`, -1 where it is not there."""
    if np.array_equal(source_ids, target_ids):
        return np.arange(len(source_ids))
    found = pc.index_in(pa.array(source_ids, pa.string()), value_set=pa.array(target_ids, pa.string()))
    return np.asarray(found.fill_null(-1).to_numpy(zero_copy_only=False), np.int64)


def remap_items(items: Ragged, item_of: IntArray) -> Ragged:
    """The rows in other indices, without the items that have none there; `item_of` is an `index_map`."""
    values = item_of[items.values]
    return Ragged(values, items.offsets).where(values >= 0)


def _by_row(row: IntArray, rows: Ragged, num_rows: int) -> Ragged:
    """The same rows, each in its place; a place without a row gets an empty one."""
    places = np.full(num_rows, len(rows))
    places[row] = np.arange(len(rows))
    with_empty = Ragged(rows.values, np.append(rows.offsets, rows.offsets[-1]))
    return with_empty.take(places)
