"""Copies of single files without some users, and the search for remaining ids: the parts of `privacy.erasure`.

All functions stream: Parquet one row group at a time, other files in pieces. Layouts are kept: the order of rows, schemas,
the number of files and, in catalogs and embedding tables, the row of every other user.

Lengths: B rows of a table.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from cllm4rec.errors import ArtifactError
from cllm4rec.storage.files import copy_file, filesystem, join, list_files
from cllm4rec.storage.tombstones import Tombstones
from cllm4rec.typing import BoolArray, IntArray

USERS = "users.parquet"
TABLES = "tables.safetensors"
USER_TABLES = ("collaborative_users", "content_users")
MIN_SEARCHED_CHARS = 6
"""A shorter id occurs in files by chance; it is searched as a whole value in columns of user ids only."""
PIECE_BYTES = 1 << 20
_ITEM_COLUMNS = ("item_id", "item_ids")


def placeholder(user_index: int) -> str:
    """The id of an erased user in a catalog. It differs from every real id: `data.records` refuses ids with NUL."""
    return f"\0erased-{user_index}"


@dataclasses.dataclass(frozen=True)
class ErasedUsers:
    """The users to remove: by tombstone in files with ids, by `index` in files with rows of the user table."""

    tombstones: Tombstones
    index: IntArray

    def key(self, name: str, schema: pa.Schema) -> str | None:
        """The column that identifies the user of a row; None if the file has none."""
        if name.rpartition("/")[2] == USERS:
            return "id"
        if "user_id" in schema.names:
            return "user_id"
        return "user" if "user" in schema.names and pa.types.is_integer(schema.field("user").type) else None

    def of(self, column: pa.ChunkedArray) -> BoolArray:
        """For each value of a key column, whether its user is erased."""
        values = column.to_numpy(zero_copy_only=False)
        return np.isin(values, self.index) if pa.types.is_integer(column.type) else self.tombstones.contains(values)


def erased_indices(uri: str, tombstones: Tombstones) -> IntArray:
    """The rows of erased users in the catalog file `uri`, without those whose ids were removed earlier."""
    found = [np.empty(0, np.int64)]
    for table in _row_groups(uri, ["index", "id"]):
        ids, indices = table["id"].to_numpy(zero_copy_only=False), table["index"].to_numpy()
        found.append(indices[tombstones.contains(ids)])
    return np.concatenate(found)


def rows_of(uri: str, name: str, erased: ErasedUsers) -> int:
    """The number of rows of erased users in a Parquet file. Raises ArtifactError if it cannot be read."""
    key = erased.key(name, _schema(uri))
    if key is None:
        return 0
    return sum(int(erased.of(table[key]).sum()) for table in _row_groups(uri, [key]))


def copy_without(source: str, target: str, name: str, erased: ErasedUsers) -> None:
    """Copy a Parquet file without the rows of erased users. In a catalog their rows stay, with a placeholder as id."""
    schema = _schema(source)
    key = erased.key(name, schema)
    assert key is not None
    (fs, path), kept = filesystem(target), 0
    fs.makedirs(fs._parent(path), exist_ok=True)
    with fs.open(path, "wb") as stream, pq.ParquetWriter(stream, schema) as writer:
        for table in _row_groups(source):
            is_erased = erased.of(table[key])
            table = _blanked(table, is_erased) if key == "id" else table.filter(pa.array(~is_erased))
            if len(table):
                writer.write_table(table)
                kept += len(table)
        if not kept:
            writer.write_table(schema.empty_table())


def copy_zeroed(source: str, target: str, index: IntArray) -> None:
    """Copy a safetensors file of embedding tables with these rows of both user tables set to zero."""
    (source_fs, source_path), (target_fs, target_path) = filesystem(source), filesystem(target)
    target_fs.makedirs(target_fs._parent(target_path), exist_ok=True)
    with source_fs.open(source_path, "rb") as reader, target_fs.open(target_path, "wb") as writer:
        spans = _spans(reader, source, index)
        for begin, end in [*spans, (source_fs.size(source_path),) * 2]:
            while remaining := begin - reader.tell():
                writer.write(reader.read(min(remaining, PIECE_BYTES)))
            writer.write(bytes(end - begin))
            reader.seek(end)


def link_or_copy(source: str, target: str) -> None:
    """The same file under another name: a hard link if possible, otherwise a copy."""
    (fs, path), (_, target_path) = filesystem(source), filesystem(target)
    if isinstance(fs, LocalFileSystem):
        fs.makedirs(fs._parent(target_path), exist_ok=True)
        with contextlib.suppress(OSError):
            os.link(path, target_path)
            return
    copy_file(source, target)


def replace_file(uri: str, draft: str) -> None:
    """Move a finished draft to the name of the file it replaces; atomic on a local disk."""
    (fs, source), (_, target) = filesystem(draft), filesystem(uri)
    if isinstance(fs, LocalFileSystem):
        os.replace(source, target)
    else:
        fs.mv(source, target)


def find_remaining_ids(directory: str, user_ids: Sequence[str], item_ids: Iterable[str] = ()) -> list[str]:
    """The names of the files below a directory that still contain one of these ids.

    The search reads the bytes of every file, also decompressed if its name ends in .gz, and every string of every Parquet
    file. An id counts if no ASCII letter or digit is next to it. Not searched among bytes: ids that are also item ids,
    and ids of fewer than MIN_SEARCHED_CHARS characters.
    """
    items = set(item_ids)
    needles = [_Needle(user_id, user_id in items) for user_id in user_ids]
    return [name for name in list_files(directory) if any(_is_in(join(directory, name), name, needles))]


@dataclasses.dataclass(frozen=True)
class _Needle:
    user_id: str
    names_an_item: bool

    @property
    def is_long(self) -> bool:
        return len(self.user_id) >= MIN_SEARCHED_CHARS

    @property
    def spellings(self) -> set[bytes]:
        """The id as plain text and as JSON text."""
        return {self.user_id.encode(), json.dumps(self.user_id)[1:-1].encode()}

    def is_in_bytes(self, piece: bytes) -> bool:
        if not self.is_long or self.names_an_item:
            return False
        words = [spelling for spelling in self.spellings if spelling in piece]
        return any(re.search(rb"(?<![0-9A-Za-z])" + re.escape(word) + rb"(?![0-9A-Za-z])", piece) for word in words)

    def is_in_strings(self, strings: pa.Array, column: str) -> bool:
        if bool(pc.any(pc.equal(strings, self.user_id)).as_py()):
            return self.is_long or column in ("user_id", "id")
        word = f"(^|[^0-9A-Za-z]){re.escape(self.user_id)}($|[^0-9A-Za-z])"
        return self.is_long and bool(pc.any(pc.match_substring_regex(strings, word)).as_py())


def _is_in(uri: str, name: str, needles: list[_Needle]) -> Iterator[bool]:
    overlap = max((len(spelling) for needle in needles for spelling in needle.spellings), default=0) + 1
    try:
        for piece in _pieces(uri, overlap):
            yield any(needle.is_in_bytes(piece) for needle in needles)
        if name.endswith(".parquet"):
            for column, strings in _strings_of(uri, name):
                yield any(needle.is_in_strings(strings, column) for needle in needles)
    except FileNotFoundError:
        return  # a lease or a draft that was removed meanwhile


def _pieces(uri: str, overlap: int) -> Iterator[bytes]:
    """The bytes of a file in pieces, each with the end of the previous one; for .gz also the decompressed bytes."""
    fs, path = filesystem(uri)
    for decompress in (False, True) if path.endswith(".gz") else (False,):
        with fs.open(path, "rb") as stream, contextlib.suppress(EOFError, gzip.BadGzipFile):
            reader, tail = gzip.GzipFile(fileobj=stream) if decompress else stream, b""
            while piece := reader.read(PIECE_BYTES):
                yield tail + piece
                tail = (tail + piece)[-overlap:]


def _strings_of(uri: str, name: str) -> Iterator[tuple[str, pa.Array]]:
    """Every string array of a Parquet file with its column, except item ids."""
    try:
        for table in _row_groups(uri):
            for column in table.column_names:
                is_item = column in _ITEM_COLUMNS or (column == "id" and name.endswith("items.parquet"))
                if not is_item:
                    for chunk in table[column].chunks:
                        yield from zip(itertools.repeat(column), _strings_in(chunk))
    except ArtifactError:
        return  # not a Parquet file; its bytes were searched


def _strings_in(array: pa.Array) -> Iterator[pa.Array]:
    kind = array.type
    if pa.types.is_dictionary(kind):
        yield from _strings_in(array.dictionary)
    elif pa.types.is_map(kind):
        yield from itertools.chain(_strings_in(array.keys), _strings_in(array.items))
    elif pa.types.is_nested(kind):
        for child in array.flatten() if pa.types.is_struct(kind) else [array.flatten()]:
            yield from _strings_in(child)
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
        yield array


def _schema(uri: str) -> pa.Schema:
    with _parquet(uri) as file:
        return file.schema_arrow


def _row_groups(uri: str, columns: list[str] | None = None) -> Iterator[pa.Table]:
    with _parquet(uri) as file:
        for group in range(file.num_row_groups):
            yield file.read_row_group(group, columns=columns)


@contextlib.contextmanager
def _parquet(uri: str) -> Iterator[pq.ParquetFile]:
    fs, path = filesystem(uri)
    try:
        with fs.open(path, "rb") as stream, pq.ParquetFile(stream) as file:
            yield file
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise ArtifactError(f"{uri} is not a complete Parquet file; remove it or copy it again") from None


def _blanked(table: pa.Table, is_erased: BoolArray) -> pa.Table:
    mask = pa.array(is_erased)
    names = [placeholder(index) for index in table["index"].to_pylist()]
    for column, values in (("id", pa.array(names, pa.string())), ("text", pa.scalar("", pa.string()))):
        position, field = table.schema.get_field_index(column), table.schema.field(column)
        chosen = pc.if_else(mask, values, table[column].combine_chunks().cast(pa.string())).cast(field.type)
        table = table.set_column(position, field, chosen)
    return table


def _spans(reader: Any, uri: str, index: IntArray) -> list[tuple[int, int]]:
    """First byte and last byte + 1 of these rows in both user tables, ascending (the safetensors format)."""
    size = int.from_bytes(reader.read(8), "little")
    try:
        header = json.loads(reader.read(size))
        entries = [header[name] for name in USER_TABLES]
    except (ValueError, KeyError):
        raise ArtifactError(f"{uri} has no user tables; run the stage that writes it with --force") from None
    spans = []
    for entry in entries:
        first, last = entry["data_offsets"]
        row = (last - first) // entry["shape"][0]
        spans += [(8 + size + first + user * row, 8 + size + first + (user + 1) * row) for user in index.tolist()]
    reader.seek(0)
    return sorted(spans)
