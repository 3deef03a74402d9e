"""Is this what was promised? Every staged list is looked at before anyone may read it.

    audit = Audit(catalog, histories, rules, k); for table in tables: audit.add(table); audit.finish()

Lengths: B users of a table, E entries of their lists.
"""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from cllm4rec.catalog import Catalog
from cllm4rec.data.ragged import Ragged
from cllm4rec.errors import AuditError
from cllm4rec.scoring.rules import Rules

BoolArray = npt.NDArray[np.bool_]


@dataclasses.dataclass
class Audit:
    """Checks tables of user_id, item_ids, scores one after the other, then the whole.

    `seen` holds the item indices no user may be recommended, a row a user index. A list may be shorter than `k` only
    where fewer items remain for its user. Raises AuditError naming the check, how many users it caught and three of
    them by hash.
    """

    catalog: Catalog
    seen: Ragged
    rules: Rules
    k: int

    def __post_init__(self) -> None:
        self._user_index = pd.Index(self.catalog.user_ids)
        self._item_index = pd.Index(self.catalog.item_ids)
        self._times = np.zeros(self.catalog.num_users, np.int64)
        self.num_short = 0
        self.num_rows = 0

    def add(self, table: pa.Table) -> None:
        """Check B rows."""
        user_ids = table["user_id"].to_numpy(zero_copy_only=False)
        users = self._user_index.get_indexer(user_ids)
        self._refuse(users < 0, user_ids, "is not a user of the catalogue")
        np.add.at(self._times, users, 1)
        self.num_rows += len(users)

        lists, scores = _ragged(table["item_ids"]), Ragged.from_arrow(table["scores"])
        self._refuse(lists.lengths != scores.lengths, user_ids, "has lists of items and scores of different lengths")
        items = self._item_index.get_indexer(np.asarray(lists.values))
        self._refuse_entries(items < 0, lists, user_ids, "is recommended an item outside the catalogue")
        entries = Ragged(items.astype(np.int64), lists.offsets)
        self._check_items(entries, users, user_ids)
        self._check_scores(scores, user_ids)
        self._check_lengths(entries, users, user_ids)

    def finish(self) -> dict[str, int]:
        """After the last table: every expected user once. Returns what was counted."""
        self._refuse(self._times == 0, self.catalog.user_ids, "has no list")
        self._refuse(self._times > 1, self.catalog.user_ids, "has more than one list")
        return {"users": self.num_rows, "short_lists": self.num_short}

    def _check_items(self, entries: Ragged, users: npt.NDArray[np.int64], user_ids: npt.NDArray[np.object_]) -> None:
        num_items = self.catalog.num_items
        keys = entries.rows * num_items + entries.values
        order = np.argsort(keys, kind="stable")
        repeated = np.zeros(len(keys), bool)
        repeated[order[1:]] = keys[order[1:]] == keys[order[:-1]]
        self._refuse_entries(repeated, entries, user_ids, "is recommended an item twice")
        seen = self.seen.take(users)
        is_seen = np.isin(keys, seen.rows * num_items + seen.values)
        self._refuse_entries(is_seen, entries, user_ids, "is recommended an item of their history")
        self._refuse_entries(
            np.isin(entries.values, self.rules.deny), entries, user_ids, "is recommended a denied item"
        )

    def _check_scores(self, scores: Ragged, user_ids: npt.NDArray[np.object_]) -> None:
        self._refuse_entries(~np.isfinite(scores.values), scores, user_ids, "has a score that is not finite")
        rises = np.zeros(len(scores.values), bool)
        rises[1:] = (scores.values[1:] > scores.values[:-1]) & (scores.rows[1:] == scores.rows[:-1])
        self._refuse_entries(rises, scores, user_ids, "has scores that rise")

    def _check_lengths(self, entries: Ragged, users: npt.NDArray[np.int64], user_ids: npt.NDArray[np.object_]) -> None:
        blocked = merged_lengths(self.seen.take(users), self.rules, self.catalog.num_items)
        expected = np.minimum(self.k, self.catalog.num_items - blocked)
        self._refuse(
            entries.lengths != expected, user_ids, f"has a list of another length than min({self.k}, what remains)"
        )
        self.num_short += int((expected < self.k).sum())

    def _refuse_entries(self, is_bad: BoolArray, lists: Ragged, user_ids: npt.NDArray[np.object_], what: str) -> None:
        caught = np.zeros(len(lists), bool)
        caught[lists.rows[is_bad]] = True
        self._refuse(caught, user_ids, what)

    def _refuse(self, caught: BoolArray, user_ids: npt.NDArray[np.object_], what: str) -> None:
        if caught.any():
            examples = ", ".join(hashed(user_id) for user_id in user_ids[np.flatnonzero(caught)[:3]])
            raise AuditError(
                f"the audit refuses the lists: {int(caught.sum())} users of whom each {what} (such as {examples}); "
                "nothing was published: correct the cause and run the same command with --force"
            )


def merged_lengths(seen: Ragged, rules: Rules, num_items: int) -> npt.NDArray[np.int64]:
    """How many distinct items are out of the question for each user."""
    together = Ragged.interleave(seen, rules.denied(len(seen)))
    keys = np.unique(together.rows * num_items + together.values)
    return np.bincount(keys // num_items, minlength=len(seen))


def hashed(user_id: object) -> str:
    """What a report calls a user: enough to find one again, not to read an id off."""
    return hashlib.sha256(str(user_id).encode()).hexdigest()[:12]


def _ragged(column: pa.ChunkedArray) -> Ragged:
    array = column.combine_chunks()
    values = array.values.to_numpy(zero_copy_only=False)
    offsets = np.asarray(array.offsets, np.int64)
    return Ragged(values[offsets[0] : offsets[-1]], offsets - offsets[0])
