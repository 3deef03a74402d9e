"""The users of a scoring run and their histories: those of `prepared/` and the new events.

    histories/
      bucket-00000.parquet      bucket, user (row of the model's user table, -1 for users unknown to the model), user_id,
                                items (indices in the model's catalog, oldest first, each once)

`nightly.events.BucketMap` decides the bucket of a user. Erased users are left out.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pyarrow as pa

from cllm4rec.arrays.histories import SPLITS
from cllm4rec.arrays.ids import IdMap, read_ids, remap_items
from cllm4rec.arrays.ragged import Ragged
from cllm4rec.data.prepared import bucket_name
from cllm4rec.nightly.events import EVENTS
from cllm4rec.storage.files import exists, join, list_files, read_tables, write_table
from cllm4rec.storage.tombstones import Tombstones

HISTORIES = pa.schema(
    [("bucket", pa.int32()), ("user", pa.int64()), ("user_id", pa.string()), ("items", pa.large_list(pa.int64()))]
)
USERS_PER_BUCKET = 32_768
_LEAST_BUCKETS = 8


@dataclasses.dataclass(frozen=True)
class Bucket:
    """The sources of one bucket: files of `prepared/histories`, and the folder of its staged events."""

    number: int
    files: tuple[str, ...]
    events: str


def files_per_bucket(num_files: int, num_users: int) -> int:
    """The number of files of `prepared/histories` in a bucket of about USERS_PER_BUCKET users.

    Buckets of a small run are smaller, so that several workers share it.
    """
    users_per_file = max(1, num_users // max(1, num_files))
    return max(1, min(USERS_PER_BUCKET // users_per_file, num_files // _LEAST_BUCKETS))


def write_bucket(
    bucket: Bucket, prepared_dir: str, model_dir: str, tombstones: Tombstones, target: str
) -> dict[str, int]:
    """Write the histories of one bucket below `target`; returns counts."""
    merged, counts = merge_bucket(bucket, prepared_dir, model_dir, tombstones)
    write_table(merged, join(target, bucket_name(bucket.number)))
    return {"users": len(merged), **counts}


def merge_bucket(
    bucket: Bucket, prepared_dir: str, model_dir: str, tombstones: Tombstones
) -> tuple[pa.Table, dict[str, int]]:
    """The histories of one bucket (schema HISTORIES, in the order of its files, new users last) and counts of what is new.

    Memory: one bucket, and the ids of the catalogs.
    """
    known = _known(bucket, prepared_dir, model_dir)
    events = _events(bucket)
    merged, counts = with_events(known, events)
    # Otherwise a user of another bucket would be scored twice, and the audit of no bucket would notice.
    assert not (bucket.files and counts["new_users"]), "an event is in a bucket that is not its user's"
    is_erased = tombstones.contains(merged["user_id"].to_pylist()) if len(tombstones) else np.zeros(len(merged), bool)
    counts["erased_users"] = int(is_erased.sum())
    kept = merged.filter(pa.array(~is_erased))
    return kept.add_column(0, "bucket", pa.array(np.full(len(kept), bucket.number, np.int32))).cast(HISTORIES), counts


def with_events(known: pa.Table, events: pa.Table) -> tuple[pa.Table, dict[str, int]]:
    """Append events (user_id, item, time, file, line) to histories (user, user_id, items), ordered by time, file and line.

    An item that a history contains already keeps its position. Users with events alone come last, sorted by id.
    """
    user_of_event = IdMap(known["user_id"])(events["user_id"])
    is_new = user_of_event < 0
    new_ids, number = np.unique(events["user_id"].to_numpy(zero_copy_only=False)[is_new], return_inverse=True)
    user_of_event[is_new] = len(known) + number
    order = np.lexsort([events[name].to_numpy() for name in ("line", "file", "time")])
    old = Ragged.from_arrow(known["items"])
    row_E = np.concatenate([old.rows, user_of_event[order]])
    item_E = np.concatenate([old.values.astype(np.int64), events["item"].to_numpy()[order]])
    is_event = np.arange(len(row_E)) >= len(old.values)
    by_row = np.argsort(row_E, kind="stable")
    is_first = ~pd.DataFrame({"row": row_E[by_row], "item": item_E[by_row]}).duplicated().to_numpy()
    kept = by_row[is_first]
    items = Ragged.from_rows(item_E[kept], row_E[kept], len(known) + len(new_ids))
    added = np.unique(row_E[kept][is_event[kept]])
    counts = {
        "new_users": len(new_ids),
        "users_with_news": int((added < len(known)).sum()),
        "new_interactions": int(is_event[kept].sum()),
    }
    user = np.concatenate([known["user"].to_numpy(), np.full(len(new_ids), -1)])
    ids = pa.chunked_array([*known["user_id"].cast(pa.string()).chunks, pa.array(new_ids, pa.string())])
    return pa.table({"user": pa.array(user, pa.int64()), "user_id": ids, "items": items.to_arrow()}), counts


def _known(bucket: Bucket, prepared_dir: str, model_dir: str) -> pa.Table:
    """user, user_id and items of the bucket's files, as indices of the model."""
    if not bucket.files:
        return HISTORIES.empty_table().drop(["bucket"])
    rows = read_tables(list(bucket.files), ["user", "user_id", *SPLITS])
    items = Ragged.interleave(*(Ragged.from_arrow(rows[split]) for split in SPLITS))
    items = remap_items(items, IdMap(read_ids(model_dir, "items"))(read_ids(prepared_dir, "items")))
    user = IdMap(read_ids(model_dir, "users"))(rows["user_id"])
    return pa.table({"user": user, "user_id": rows["user_id"].cast(pa.string()), "items": items.to_arrow()})


def _events(bucket: Bucket) -> pa.Table:
    if not exists(bucket.events):
        return EVENTS.empty_table()
    return read_tables([join(bucket.events, name) for name in list_files(bucket.events)])
