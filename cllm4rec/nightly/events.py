"""New interactions since `prepare`: raw files → small files of known items, divided by the bucket of the user.

    layout = inspect_events(source, min_rating)
    counts = stage_events(layout, limits, min_rating, bucket_map, target, max_bad_fraction)  # <target>/bucket-00003/*.parquet

A user of `prepared/` belongs to the bucket of their history there; new users are spread over additional buckets by a hash
of the id. Only counts reach the driver.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cllm4rec.arrays.ids import IdMap, read_ids
from cllm4rec.config import Columns, Source
from cllm4rec.data.formats import Layout
from cllm4rec.data.ingest import by_column, map_records
from cllm4rec.data.prepared import bucket_of
from cllm4rec.data.ray_data import RayExecutor
from cllm4rec.data.records import DAMAGED, Limits, parse_records
from cllm4rec.data.sources import fingerprint, inspect, source_files
from cllm4rec.data.split import hash_ids
from cllm4rec.errors import ConfigError, DataError
from cllm4rec.storage.files import digest_of, filesystem, join, write_table
from cllm4rec.typing import IntArray

EVENTS = pa.schema(
    [("user_id", pa.string()), ("item", pa.int64()), ("time", pa.int64()), ("file", pa.int32()), ("line", pa.int64())]
)
"""A staged event: `item` is an index into the model's catalog, `time` unix seconds."""
_COUNTED = ("rows", "refused", "damaged", "below_threshold", "unknown_items", "kept")


@dataclasses.dataclass(frozen=True)
class BucketMap:
    """The bucket of each user. A bucket is a group of `files_per_bucket` of the `num_files` history files of `prepared/`;
    `num_new` more buckets hold the users who are not in `prepared/`.
    """

    prepared_dir: str
    model_dir: str
    num_users: int
    num_files: int
    files_per_bucket: int
    num_new: int

    def bucket_of(self, user_ids: pa.ChunkedArray | pa.Array) -> IntArray:
        index = _id_map(self.prepared_dir, "users")(user_ids)
        known = bucket_of(index, self.num_users, self.num_files) // self.files_per_bucket
        num_known = -(-self.num_files // self.files_per_bucket)
        spread = (hash_ids(user_ids.to_numpy(zero_copy_only=False)) % np.uint64(self.num_new)).astype(np.int64)
        return np.where(index >= 0, known, num_known + spread)

    def item_of(self, item_ids: pa.ChunkedArray | pa.Array) -> IntArray:
        """The index in the model's catalog, -1 for an unknown item."""
        return _id_map(self.model_dir, "items")(item_ids)


@functools.lru_cache(maxsize=4)
def _id_map(directory: str, name: str) -> IdMap:
    """Each worker process reads them once."""
    return IdMap(read_ids(directory, name))


def inspect_events(source: Source, min_rating: float | None) -> Layout:
    """Like `sources.inspect`, without texts; errors name nightly.events."""
    with _naming_events():
        layout = inspect(source, "interactions", min_rating)
    columns = Columns(**{**layout.columns.model_dump(), "text": None})
    return dataclasses.replace(layout, columns=columns)


def events_digest(source: Source | None, min_rating: float | None) -> str:
    """A digest of the files' state and of how they are read. Raises DataError if one is missing."""
    if source is None:
        return "none"
    with _naming_events():
        files = [fingerprint(file) for file in source_files(source, "interactions")]
    return digest_of([files, source.model_dump(exclude_none=True), min_rating])


def num_bytes(source: Source) -> int:
    """The size of all files."""
    with _naming_events():
        files = [filesystem(file) for file in source_files(source, "interactions")]
    return sum(int(fs.size(path)) for fs, path in files)


def stage_events(
    layout: Layout,
    limits: Limits,
    min_rating: float | None,
    bucket_map: BucketMap,
    target: str,
    max_bad_fraction: float,
) -> dict[str, int]:
    """Read, validate and divide every file; returns counts. Ray must be connected.

    Raises DataError if there are no rows, a file is truncated, or too many rows are invalid: lists from half of the events
    would look like any others.
    """
    divide = functools.partial(
        _divide_block, layout=layout, limits=limits, min_rating=min_rating, bucket_map=bucket_map, target=target
    )
    counts: Counter[str] = Counter(dict.fromkeys(_COUNTED, 0))
    with _naming_events():
        for block in map_records([layout], limits, divide, RayExecutor()):
            counts.update({name: pc.sum(block[name]).as_py() or 0 for name in _COUNTED})
    if not counts["rows"]:
        raise DataError(
            "nightly.events has no rows; check its path, or set nightly.events to null if there are no new interactions"
        )
    if counts["damaged"]:
        raise DataError(
            "a packed file of nightly.events is damaged or truncated; copy it again, then run cllm4rec nightly again"
        )
    if counts["refused"] > max_bad_fraction * counts["rows"]:
        raise DataError(
            f"{counts['refused']:,} of {counts['rows']:,} rows of nightly.events cannot be read, more than "
            f"data.max_bad_fraction {max_bad_fraction} allows; correct the files or nightly.events.columns"
        )
    return {name: count for name, count in counts.items() if name != "damaged"}


def _divide_block(
    records: pa.Table, layout: Layout, limits: Limits, min_rating: float | None, bucket_map: BucketMap, target: str
) -> Iterator[pa.Table]:
    """Ray Data task: writes the events of one block of records, one file per bucket; yields one row of counts."""
    for part in by_column([records], "file"):
        number = part["file"][0].as_py()
        rows = parse_records(part, layout, limits)
        good = rows.filter(pc.is_null(rows["reason"]))
        liked = good if min_rating is None else good.filter(pc.greater(good["rating"], min_rating))
        item = bucket_map.item_of(liked["item"])
        known = liked.filter(pa.array(item >= 0))
        _write_events(known, item[item >= 0], number, bucket_map, target)
        counted = {
            "rows": len(rows),
            "refused": len(rows) - len(good),
            "damaged": pc.sum(pc.equal(rows["reason"], DAMAGED)).as_py() or 0,
            "below_threshold": len(good) - len(liked),
            "unknown_items": len(liked) - len(known),
            "kept": len(known),
        }
        yield pa.table({name: [counted[name]] for name in _COUNTED})


def _write_events(rows: pa.Table, item: IntArray, number: int, bucket_map: BucketMap, target: str) -> None:
    if not len(rows):
        return
    events = pa.table(
        [rows["user"], pa.array(item), rows["time"], pa.array(np.full(len(rows), number, np.int32)), rows["line"]],
        schema=EVENTS,
    ).append_column("bucket", pa.array(bucket_map.bucket_of(rows["user"])))
    first_line = rows["line"][0].as_py()
    for part in by_column([events], "bucket"):
        bucket = part["bucket"][0].as_py()
        # Named after its first record: a repeated task writes the same file again.
        name = f"file-{number:06d}-line-{first_line:012d}.parquet"
        write_table(part.select(EVENTS.names), join(events_of(target, bucket), name))


def events_of(target: str, bucket: int) -> str:
    """The folder with the staged events of a bucket; it need not exist."""
    return join(target, f"bucket-{bucket:05d}")


@contextlib.contextmanager
def _naming_events() -> Iterator[None]:
    """Errors of the readers of interactions name data.interactions; here they name nightly.events."""
    try:
        yield
    except (DataError, ConfigError) as error:
        raise type(error)(str(error).replace("data.interactions", "nightly.events")) from None
