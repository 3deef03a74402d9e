"""The audit of the lists: every staged list is checked before readers can see it, bucket by bucket.

    counts = audit_bucket(expected, staged_tables, items, rules, k)

Pure functions on tables; `cllm4rec.nightly.ray_job` runs one task per bucket, so no process holds all users.
Lengths: B users of a table, E entries of their lists.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cllm4rec.arrays.ids import Catalog, IdMap
from cllm4rec.arrays.ragged import Ragged, offsets_of
from cllm4rec.errors import AuditError
from cllm4rec.scoring.rules import Rules
from cllm4rec.storage.files import join, read_bytes, read_tables
from cllm4rec.storage.table import SCHEMA
from cllm4rec.typing import BoolArray, ObjectArray


def audit_bucket(expected: pa.Table, staged: Iterable[pa.Table], items: IdMap, rules: Rules, k: int) -> dict[str, int]:
    """Check the lists of one bucket: every user has one list of k distinct, allowed, unseen items with finite, descending
    scores.

    expected: user_id and items (indices of the items that each user has seen). staged: tables of user_id, item_ids,
    scores. items: the items of the catalog by id. A list may be shorter than `k` only if the rules allow no further
    item; such lists are counted, as are lists with a full category. Raises AuditError with the failed check, the number
    of users concerned, and three of them by hash.
    """
    audit = _Audit(
        expected["user_id"],
        Ragged.from_arrow(expected["items"]),
        items,
        rules,
        min(k, len(items)),
    )
    for table in staged:
        audit.add(table)
    return audit.finish()


def audit_files(
    bucket: tuple[str, list[str]], histories_dir: str, staging: str, model_dir: str, rules: Rules, k: int
) -> tuple[dict[str, int], dict[str, str]]:
    """Audit the lists of one bucket (the file of its histories, its files in staging).

    Returns the counts, and the sha256 of each file. Raises AuditError like `audit_bucket`, and for a file that is damaged
    or has another schema than the table.
    """
    file, names = bucket
    sha256: dict[str, str] = {}

    def tables() -> Iterator[pa.Table]:
        for name in names:
            content = read_bytes(join(staging, name))
            sha256[name] = hashlib.sha256(content).hexdigest()
            yield _read_staged(content, join(staging, name))

    expected = read_tables([join(histories_dir, file)], ["user_id", "items"])
    return audit_bucket(expected, tables(), Catalog.load_items(model_dir).item_map, rules, k), sha256


def _read_staged(content: bytes, uri: str) -> pa.Table:
    try:
        table = pq.read_table(io.BytesIO(content))
    except (OSError, pa.ArrowInvalid):
        raise AuditError(f"{uri} is damaged; nothing was published, run the same command with --force") from None
    if not table.schema.equals(SCHEMA):
        raise AuditError(f"{uri} has other columns than the table; run the same command with --force")
    return table


@dataclasses.dataclass
class _Audit:
    user_ids: pa.ChunkedArray
    seen: Ragged
    items: IdMap
    rules: Rules
    k: int

    def __post_init__(self) -> None:
        self._users = IdMap(self.user_ids)
        self._times = np.zeros(len(self.user_ids), np.int64)
        self._num_short = self._num_capped = 0

    def add(self, table: pa.Table) -> None:
        """Check the B lists of a table."""
        user_ids = table["user_id"].to_numpy(zero_copy_only=False)
        users = self._users(table["user_id"])
        _refuse(users < 0, user_ids, "is not a user of this run or of this bucket")
        np.add.at(self._times, users, 1)

        lists, scores = _entries(table["item_ids"], self.items), Ragged.from_arrow(table["scores"])
        _refuse(lists.lengths != scores.lengths, user_ids, "has different numbers of items and scores")
        _refuse_entries(lists.values < 0, lists, user_ids, "is recommended an item outside the catalog")
        seen = self.seen.take(users)
        self._check_items(lists, seen, user_ids)
        _check_scores(scores, user_ids)
        self._check_lengths(lists, seen, user_ids)

    def finish(self) -> dict[str, int]:
        """After the last table, check that every expected user has one list; returns the counts."""
        user_ids = self.user_ids.to_numpy(zero_copy_only=False)
        _refuse(self._times == 0, user_ids, "has no list")
        _refuse(self._times > 1, user_ids, "has more than one list")
        return {"users": len(user_ids), "short_lists": self._num_short, "capped_lists": self._num_capped}

    def _check_items(self, entries: Ragged, seen: Ragged, user_ids: ObjectArray) -> None:
        keys = entries.keys(len(self.items))
        order = np.argsort(keys, kind="stable")
        repeated = np.zeros(len(keys), bool)
        repeated[order[1:]] = keys[order[1:]] == keys[order[:-1]]
        _refuse_entries(repeated, entries, user_ids, "is recommended an item twice")
        _refuse_entries(entries.isin(seen), entries, user_ids, "is recommended an item of their history")
        for breach, caught in self.rules.violations(entries).items():
            _refuse_entries(caught, entries, user_ids, f"is recommended {breach}")
        self._num_capped += int((self.rules.full_categories(entries).lengths > 0).sum())

    def _check_lengths(self, entries: Ragged, seen: Ragged, user_ids: ObjectArray) -> None:
        lengths = entries.lengths
        _refuse(lengths > self.k, user_ids, f"has a list longer than {self.k}")
        short = np.flatnonzero(lengths < self.k)
        num_allowed = np.zeros(len(lengths), np.int64)
        if len(short):
            num_allowed[short] = self.rules.num_allowed(entries.take(short), seen.take(short), len(self.items))
        _refuse(num_allowed > 0, user_ids, f"has a list shorter than {self.k} although more items are allowed")
        self._num_short += len(short)


def _check_scores(scores: Ragged, user_ids: ObjectArray) -> None:
    _refuse_entries(~np.isfinite(scores.values), scores, user_ids, "has a score that is not finite")
    rises = np.zeros(len(scores.values), bool)
    rises[1:] = (scores.values[1:] > scores.values[:-1]) & (scores.rows[1:] == scores.rows[:-1])
    _refuse_entries(rises, scores, user_ids, "has scores that are not descending")


def _refuse_entries(is_bad: BoolArray, lists: Ragged, user_ids: ObjectArray, what: str) -> None:
    caught = np.zeros(len(lists), bool)
    caught[lists.rows[is_bad]] = True
    _refuse(caught, user_ids, what)


def _refuse(caught: BoolArray, user_ids: ObjectArray, what: str) -> None:
    if caught.any():
        examples = ", ".join(hashed(user_id) for user_id in user_ids[np.flatnonzero(caught)[:3]])
        raise AuditError(
            f"the audit refuses the lists: each of {int(caught.sum())} users {what} (hashed ids: {examples}); "
            "nothing was published, correct the cause and run the same command with --force"
        )


def hashed(user_id: object) -> str:
    """The name of a user in reports: an id can be compared with it, but not read from it."""
    return hashlib.sha256(str(user_id).encode()).hexdigest()[:12]


def _entries(column: pa.ChunkedArray, items: IdMap) -> Ragged:
    """Lists of item ids as lists of item indices, -1 for an id outside the catalog."""
    return Ragged(items(pc.list_flatten(column)), offsets_of(pc.list_value_length(column).fill_null(0).to_numpy()))
