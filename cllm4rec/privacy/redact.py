"""Single files without some users, and the search for ids that are left: what `cllm4rec.privacy.erasure` is made of.

Every function streams: parquet a row group at a time, other files a piece at a time. Layouts stay as they are: order of
rows, schemas, number of files and, in catalogs and embedding tables, the places of everyone else.

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
"""A shorter id stands in any file by chance; it is looked for as a whole value in columns of user ids only."""
_PIECE_BYTES = 1 << 20
_ITEM_COLUMNS = ("item_id", "item_ids")


def placeholder(user_index: int) -> str:
    """What stands in a catalog for an erased user. No real id is like it: `data.records` refuses NUL in any id."""
    return f"\0erased-{user_index}"


@dataclasses.dataclass(frozen=True)
class Gone:
    """Who goes: known by their tombstones where a file has ids, by `index` where it has rows of the user table."""

    tombstones: Tombstones
    index: IntArray

    def key(self, name: str, schema: pa.Schema) -> str | None:
        """The column that tells whose row it is; None in files that are about nobody."""
        if name.rpartition("/")[2] == USERS:
            return "id"
        if "user_id" in schema.names:
            return "user_id"
        return "user" if "user" in schema.names and pa.types.is_integer(schema.field("user").type) else None

    def of(self, column: pa.ChunkedArray) -> BoolArray:
        """For each value of a key column, whether its row goes."""
        values = column.to_numpy(zero_copy_only=False)
        return np.isin(values, self.index) if pa.types.is_integer(column.type) else self.tombstones.contains(values)


def erased_indices(uri: str, tombstones: Tombstones) -> IntArray:
    """Rows of the user table that belong to erased users, by the catalog file `uri`; those blanked before are none."""
    found = [np.empty(0, np.int64)]
    for table in _row_groups(uri, ["index", "id"]):
        ids, indices = table["id"].to_numpy(zero_copy_only=False), table["index"].to_numpy()
        found.append(indices[tombstones.contains(ids)])
    return np.concatenate(found)


def rows_of(uri: str, name: str, gone: Gone) -> int:
    """How many rows of a parquet file belong to somebody who goes. Raises ArtifactError where it cannot be read."""
    key = gone.key(name, _schema(uri))
    if key is None:
        return 0
    return sum(int(gone.of(table[key]).sum()) for table in _row_groups(uri, [key]))


def copy_without(source: str, target: str, name: str, gone: Gone) -> None:
    """Copy a parquet file, without the rows of those who go; from the catalog only their ids and texts go."""
    schema = _schema(source)
    key = gone.key(name, schema)
    assert key is not None
    (fs, path), kept = filesystem(target), 0
    fs.makedirs(fs._parent(path), exist_ok=True)
    with fs.open(path, "wb") as stream, pq.ParquetWriter(stream, schema) as writer:
        for table in _row_groups(source):
            is_gone = gone.of(table[key])
            table = _blanked(table, is_gone) if key == "id" else table.filter(pa.array(~is_gone))
            if len(table):
                writer.write_table(table)
                kept += len(table)
        if not kept:
            writer.write_table(schema.empty_table())


def copy_zeroed(source: str, target: str, index: IntArray) -> None:
    """Copy a safetensors file of embedding tables with these rows of both user tables zeroed."""
    (source_fs, source_path), (target_fs, target_path) = filesystem(source), filesystem(target)
    target_fs.makedirs(target_fs._parent(target_path), exist_ok=True)
    with source_fs.open(source_path, "rb") as reader, target_fs.open(target_path, "wb") as writer:
        spans = _spans(reader, source, index)
        for begin, end in [*spans, (source_fs.size(source_path),) * 2]:
            while place := begin - reader.tell():
                writer.write(reader.read(min(place, _PIECE_BYTES)))
            writer.write(bytes(end - begin))
            reader.seek(end)


def link_or_copy(source: str, target: str) -> None:
    """The same file below another name: a hard link where that is possible, else a copy."""
    (fs, path), (_, target_path) = filesystem(source), filesystem(target)
    if isinstance(fs, LocalFileSystem):
        fs.makedirs(fs._parent(target_path), exist_ok=True)
        with contextlib.suppress(OSError):
            os.link(path, target_path)
            return
    copy_file(source, target)


def replace_file(uri: str, draft: str) -> None:
    """Give a finished draft the name of the file it replaces: at once where it is local."""
    (fs, source), (_, target) = filesystem(draft), filesystem(uri)
    if isinstance(fs, LocalFileSystem):
        os.replace(source, target)
    else:
        fs.mv(source, target)


def find_remaining_ids(directory: str, user_ids: Sequence[str], item_ids: Iterable[str] = ()) -> list[str]:
    """Names of the files below a directory in which one of these ids still stands.

    Looked at are the bytes of every file, also unpacked where it ends in .gz, and every string of every parquet file,
    whole or between characters that are no ASCII letters or digits. Not looked for among bytes: ids that also name an
    item, and ids of fewer than MIN_SEARCHED_CHARS characters.
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
        """As text and as JSON writes it."""
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
        return  # a lease or a draft that was there a moment ago


def _pieces(uri: str, overlap: int) -> Iterator[bytes]:
    """The bytes of a file in pieces, each with the end of the one before; a .gz file's packed and unpacked."""
    fs, path = filesystem(uri)
    for unpack in (False, True) if path.endswith(".gz") else (False,):
        with fs.open(path, "rb") as stream, contextlib.suppress(EOFError, gzip.BadGzipFile):
            reader, tail = gzip.GzipFile(fileobj=stream) if unpack else stream, b""
            while piece := reader.read(_PIECE_BYTES):
                yield tail + piece
                tail = (tail + piece)[-overlap:]


def _strings_of(uri: str, name: str) -> Iterator[tuple[str, pa.Array]]:
    """Every string array of a parquet file and the column it is of, but for the ids of items."""
    try:
        for table in _row_groups(uri):
            for column in table.column_names:
                is_item = column in _ITEM_COLUMNS or (column == "id" and name.endswith("items.parquet"))
                if not is_item:
                    for chunk in table[column].chunks:
                        yield from zip(itertools.repeat(column), _strings_in(chunk))
    except ArtifactError:
        return  # no parquet inside: its bytes were looked at


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
        raise ArtifactError(f"{uri} is no whole parquet file; remove it or copy it again") from None


def _blanked(table: pa.Table, is_gone: BoolArray) -> pa.Table:
    gone = pa.array(is_gone)
    names = [placeholder(index) for index in table["index"].to_pylist()]
    for column, values in (("id", pa.array(names, pa.string())), ("text", pa.scalar("", pa.string()))):
        place, kind = table.schema.get_field_index(column), table.schema.field(column)
        chosen = pc.if_else(gone, values, table[column].combine_chunks().cast(pa.string())).cast(kind.type)
        table = table.set_column(place, kind, chosen)
    return table


def _spans(reader: Any, uri: str, index: IntArray) -> list[tuple[int, int]]:
    """First byte and last byte + 1 of these rows in both user tables, in order (the format of safetensors)."""
    size = int.from_bytes(reader.read(8), "little")
    try:
        header = json.loads(reader.read(size))
        entries = [header[name] for name in USER_TABLES]
    except (ValueError, KeyError):
        raise ArtifactError(f"{uri} holds no user tables; run the stage that writes it with --force") from None
    spans = []
    for entry in entries:
        first, last = entry["data_offsets"]
        row = (last - first) // entry["shape"][0]
        spans += [(8 + size + first + user * row, 8 + size + first + (user + 1) * row) for user in index.tolist()]
    reader.seek(0)
    return sorted(spans)
