"""Inspect a source of the config: list its files and find its columns in them.

layout = inspect(source, "interactions", min_rating=3.0)
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import tarfile
import zipfile
from typing import Any

from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

from cllm4rec.config import Columns, Source
from cllm4rec.data.formats import FORMATS, MOVIELENS_NAMES, Layout, Role, named_columns, short_name
from cllm4rec.data.raw_files import open_file, open_parquet, partitions
from cllm4rec.data.records import (
    CHUNK_BYTES,
    decoded,
    header_of,
    json_fields,
    numbered_lines,
    require,
    require_once,
)
from cllm4rec.data.times import Clock
from cllm4rec.data.values import Refused
from cllm4rec.errors import ConfigError, DataError
from cllm4rec.storage.files import absolute, digest_of_file, filesystem, join
from cllm4rec.storage.table import delta_files

MAX_DIGESTED_BYTES = 1 << 30
"""Larger input files are identified by size and modification time instead of sha256, which would take minutes."""
LOOK_AT_LINES = 1000
"""How many records of the first file are read to find the columns of a JSON source."""


def inspect(source: Source, role: Role, min_rating: float | None) -> Layout:
    """List the files of a source, and check that the first one has the columns that are needed.

    Ratings are not read if `min_rating` is None. Text and timestamp of a built-in format may be absent; columns that the
    config names must exist. Raises ConfigError if needed columns are not named, and DataError for files that do not fit.
    """
    wanted = _wanted_columns(source, role, min_rating)
    files = tuple(source_files(source, role))
    own = FORMATS[source.format]
    clock = Clock(source.time_unit or own.time_unit, source.time_format)
    found, layout = _columns_found(
        Layout(
            role,
            files,
            source.format,
            wanted,
            source.delimiter or own.delimiter,
            clock=clock,
            encoding=source.encoding,
            decimal=source.decimal or ".",
        )
    )
    optional = _optional(source, role, wanted)
    require([name for name in named_columns(wanted) if name not in optional], found, layout)
    require_once(named_columns(wanted), found, layout)
    text = [name for name in layout.text_columns if name in found]
    if role != "interactions" and not text:
        require(layout.text_columns, found, layout)
    timestamp = wanted.timestamp if wanted.timestamp in found else None
    return dataclasses.replace(layout, columns=wanted.model_copy(update={"text": text or None, "timestamp": timestamp}))


def source_files(source: Source, role: Role) -> list[str]:
    """The files of a source as absolute paths or URIs, globs expanded and sorted. Raises DataError if one is missing."""
    patterns = [source.path] if isinstance(source.path, str) else source.path
    expand = {"delta": _files_of_table, "parquet": _files_of_folder}.get(source.format, _expand)
    files = [file for pattern in patterns for file in expand(pattern, role)]
    if not files:
        raise ConfigError(f"data.{role}.path is an empty list; name at least one file")
    return list(dict.fromkeys(files))


def fingerprint(file: str) -> tuple[str, int, str]:
    """Name, size and sha256 of an input file, to recognize that it changed."""
    fs, path = filesystem(file)
    size = int(fs.size(path))
    content = digest_of_file(file) if size <= MAX_DIGESTED_BYTES else str(fs.modified(path))
    return short_name(file), size, content


def _files_of_table(uri: str, role: Role) -> list[str]:
    try:
        table = DeltaTable(absolute(uri))
        files = [join(absolute(uri), name) for name in delta_files(table)]
    except DeltaError as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"data.{role}.path {uri} cannot be read as a Delta table ({reason}); check the path, or write the table again "
            "without the unsupported feature"
        ) from None
    for column in table.metadata().partition_columns:
        if not all(column in partitions(file) for file in files):
            raise DataError(
                f"data.{role}.path {uri} is partitioned by {column}, and the folders of its files do not name it; write the "
                "table again without column mapping"
            )
    if not files:
        raise DataError(f"data.{role}.path {uri} is a Delta table without rows; check the path")
    return files


def _files_of_folder(path: str, role: Role) -> list[str]:
    """The files of a folder as Spark and Hive write it, without those whose names begin with _ or a dot; or of a pattern."""
    fs, folder = _opened(path, role)
    if not fs.isdir(folder):
        return _expand(path, role)
    names = [str(file)[len(folder.rstrip("/")) + 1 :] for file in fs.find(folder)]
    files = [join(absolute(path), name) for name in sorted(names) if not _is_hidden(name)]
    if not files:
        raise DataError(f"data.{role}.path {path} is a folder without files; check the path")
    return files


def _is_hidden(name: str) -> bool:
    return any(part.startswith(("_", ".")) and "=" not in part for part in name.split("/"))


def _expand(pattern: str, role: Role) -> list[str]:
    fs, path = _opened(pattern, role)
    # A name may hold such a character too, as URLs with a query do.
    if any(character in pattern for character in "*?[") and not fs.exists(path):
        files = sorted(str(file) for file in fs.glob(path) if fs.isfile(file))
        if not files:
            raise DataError(f"data.{role}.path {pattern} matches no file; check the pattern")
        return [absolute(_uri_of_match(pattern, fs, file)) for file in files]
    if fs.isdir(path):
        raise DataError(f"data.{role}.path {pattern} is a folder; name its files, for example {pattern.rstrip('/')}/*")
    if not fs.exists(path):
        raise DataError(
            f"data.{role}.path {pattern} does not exist; correct it in the config, or add data.{role}.path=FILE to the command"
        )
    return [absolute(pattern)]


def _opened(uri: str, role: Role) -> tuple[Any, str]:
    """The file system of a URI and the path on it. Raises DataError if it cannot be opened."""
    try:
        return filesystem(uri)
    except (OSError, ValueError, ImportError, zipfile.BadZipFile, tarfile.TarError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"data.{role}.path {uri} cannot be opened ({reason}); correct the path") from None


def _uri_of_match(pattern: str, fs: Any, file: str) -> str:
    """The URI of a file that a pattern matches. Of a chain such as zip://*.csv::all.zip the first link with a path is it."""
    first, chained, rest = pattern.partition("::")
    if not chained:
        return str(fs.unstrip_protocol(file))
    if "://" in first:
        return f"{first.partition('://')[0]}://{file}::{rest}"
    return f"{first}::{_uri_of_match(rest, filesystem(rest)[0], file)}"


def _wanted_columns(source: Source, role: Role, min_rating: float | None) -> Columns:
    """The columns that the role reads: those of the format, replaced by those the config names."""
    own: Columns = getattr(FORMATS[source.format], role)
    merged = own.model_copy(update=source.columns.model_dump(exclude_none=True))
    if role == "interactions":
        needed = ["user", "item"] if min_rating is None else ["user", "item", "rating"]
        merged = merged if min_rating is not None else merged.model_copy(update={"rating": None})
    else:
        needed = ["item" if role == "items" else "user", "text"]
        merged = Columns(**merged.model_dump(include=set(needed)))
    missing = [name for name in needed if getattr(merged, name) is None]
    if missing:
        advice = " (or set data.min_rating to null if there are no ratings)" if missing == ["rating"] else ""
        raise ConfigError(
            f"format {source.format} does not say which column of data.{role} is the {' and the '.join(missing)}; "
            f"add it to data.{role}.columns{advice}"
        )
    return merged


def _optional(source: Source, role: Role, wanted: Columns) -> set[str]:
    """Columns that may be absent: text and timestamp of a built-in format, unless the config names them."""
    own: Columns = getattr(FORMATS[source.format], role)
    maybe = named_columns(Columns(text=own.text, timestamp=own.timestamp))
    return set(maybe) - set(named_columns(source.columns)) - {wanted.user, wanted.item, wanted.rating}


def _columns_found(layout: Layout) -> tuple[list[str], Layout]:
    """The columns of the first file, and the layout with what is known only from that file."""
    if layout.shape == "parquet":
        file = layout.files[0]
        return [*dict.fromkeys(partitions(file)), *open_parquet(file, layout).schema_arrow.names], layout
    head = _head(layout)
    if layout.shape == "json":
        return _json_columns(head, layout), layout
    if layout.format == "movielens":
        layout = _movielens_layout(head[0], layout)
    else:
        layout = dataclasses.replace(layout, names=header_of(head[0], layout))
    return list(layout.names), layout


def _head(layout: Layout) -> list[bytes]:
    """The first lines of the first file that has any: of the files that a cluster writes, some are empty."""
    for file in layout.files:
        with open_file(file, layout) as stream:
            lines = (line for _, line in numbered_lines(stream, CHUNK_BYTES) if isinstance(line, bytes))
            head = list(itertools.islice(lines, LOOK_AT_LINES))
        # Of several files the first may hold a header alone.
        if len(head) > (layout.has_header and len(layout.files) == 1):
            return head
    label, what = layout.file_labels[0], "a header and no rows" if head else "no rows"
    if len(layout.files) > 1:
        label = f"{label} and the other {len(layout.files) - 1} files"
    raise DataError(f"{label} (data.{layout.role}) holds {what}; check the path, or write the file again")


def _json_columns(head: list[bytes], layout: Layout) -> list[str]:
    names: dict[str, None] = {}
    for line in head:
        with contextlib.suppress(Refused):
            names.update(dict.fromkeys(json_fields(decoded(line, layout), layout)))
    if not names:
        raise DataError(
            f"{layout.file_labels[0]} is not of format {layout.format}: its first lines are not JSON objects; "
            f"correct data.{layout.role}.format"
        )
    return list(names)


def _movielens_layout(line: bytes, layout: Layout) -> Layout:
    for (role, delimiter), names in MOVIELENS_NAMES.items():
        if role == layout.role and line.count(delimiter.encode()) == len(names) - 1:
            return dataclasses.replace(layout, delimiter=delimiter, names=names)
    raise DataError(
        f"{layout.file_labels[0]} is not of format movielens (u.data, u.item, u.user, or the .dat files with '::'); "
        f"correct data.{layout.role}.format"
    )
