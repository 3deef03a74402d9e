"""Stored histories in the indices of a model that may be older than the prepared data: users and items are matched by id.

A model directory has its own catalog. Data that was prepared later may lack some of its users and items and hold others.
Reading the indices of one catalog as those of the other would silently give users the histories of other users.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from cllm4rec.arrays.histories import SPLITS
from cllm4rec.arrays.ids import Catalog, remap_items
from cllm4rec.arrays.ragged import Ragged
from cllm4rec.data.prepared import load_histories
from cllm4rec.errors import ArtifactError


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
        user_of, item_of = catalog.user_map(prepared.user_ids), catalog.item_map(prepared.item_ids)
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
        return cls(items.scatter(rows, catalog.num_users + len(new_users)), new_users)
