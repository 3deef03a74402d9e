"""Raw bytes → records → validated rows, as plain functions. `cllm4rec.data.ingest` runs them as tasks.

    for records in read_records(file, layout, limits):         # streams one file in bounded memory
        rows = parse_records(records, layout, limits)          # valid rows, and refused ones with a reason

Of a refused record only file, line and reason are kept. Each record becomes one valid or one refused row.
"""

from __future__ import annotations

import ast
import codecs
import csv
import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from cllm4rec.config import DataConfig
from cllm4rec.data.formats import FORMATS, Layout, named_columns, short_name
from cllm4rec.data.raw_files import is_damage, open_file, open_parquet, partitions
from cllm4rec.data.times import NO_TIME, of_arrow
from cllm4rec.data.values import (
    BAD_RATING,
    LONG_ITEM,
    LONG_USER,
    NO_ITEM,
    NO_USER,
    NOT_UTF8,
    NUL,
    Refused,
    as_id,
    as_number,
    as_text,
    clean,
)
from cllm4rec.errors import DataError

CHUNK_BYTES = 1 << 20
PARQUET_ROWS = 1024

TOO_LONG = "line is longer than data.max_line_bytes"
NOT_JSON = "not a JSON object"
COLUMN_COUNT = "number of columns differs from the header's"
NOT_CSV = "quotes are not those of a CSV file"
OTHER_ENCODING = "not in the encoding that the source names"
UNREADABLE = "a value cannot be read"
DAMAGED = "the packed file is damaged or cut short from here on"

RECORDS = pa.schema([("line", pa.int64()), ("record", pa.large_binary()), ("reason", pa.string())])
"""What `read_records` yields: the bytes of a record, or null and the reason why it was refused."""

ROWS = pa.schema(
    [
        ("line", pa.int64()),
        ("user", pa.string()),
        ("item", pa.string()),
        ("rating", pa.float64()),
        ("time", pa.int64()),
        ("text", pa.string()),
        ("reason", pa.string()),
    ]
)
"""What `parse_records` returns. `time` is in Unix seconds. A refused row has only `line` and `reason`."""


@dataclasses.dataclass(frozen=True)
class Limits:
    max_line_bytes: int
    max_id_chars: int

    @classmethod
    def of(cls, data: DataConfig) -> Limits:
        return cls(data.max_line_bytes, data.max_id_chars)


def require(names: Iterable[str], found: Sequence[str], layout: Layout) -> None:
    """Raise DataError for the first of `names` that is not in `found`."""
    missing = [name for name in names if name not in found]
    if missing:
        advice = ", or set data.min_rating to null" if missing[0] == layout.columns.rating else ""
        other = next((mark for mark in ";\t|," if mark in found[0]), None) if len(found) == 1 else None
        if other and FORMATS[layout.format].delimiter and other != layout.delimiter:
            advice = f", or set data.{layout.role}.delimiter to {other!r}"
        raise DataError(
            f"column '{missing[0]}' not found in {layout.file_labels[0]}; it has: {', '.join(found)}; "
            f"correct data.{layout.role}.columns or data.{layout.role}.format{advice}"
        )


def require_once(names: Iterable[str], found: Sequence[str], layout: Layout) -> None:
    """Raise DataError for the first of `names` that `found` holds twice: either column could be meant."""
    for name in names:
        if found.count(name) > 1:
            raise DataError(
                f"column '{name}' stands {found.count(name)} times in {layout.file_labels[0]} (data.{layout.role}); rename or "
                "remove all but one"
            )


def header_of(line: bytes, layout: Layout) -> tuple[str, ...]:
    try:
        fields = _split(decoded(line, layout), layout)
    except Refused:
        raise DataError(
            f"the header of {layout.file_labels[0]} cannot be read; check data.{layout.role}.format"
        ) from None
    if layout.format != "recbole":
        return tuple(fields)
    if not all(":" in field for field in fields):
        raise DataError(
            f"{layout.file_labels[0]} is not of format recbole: its header is not typed, as in user_id:token; "
            f"correct data.{layout.role}.format"
        )
    return tuple(field.partition(":")[0] for field in fields)


def read_records(file: str, layout: Layout, limits: Limits) -> Iterator[pa.Table]:
    """The records of one file as tables of schema RECORDS, about CHUNK_BYTES each.

    Lines are counted from 1 and include the header. The records of a Parquet file are blocks of rows, and its lines are row
    numbers. A line above the limit is dropped while it is read, so neither it nor a gzip bomb is ever in memory as a whole.
    """
    if layout.shape == "parquet":
        yield from _parquet_records(file, layout)
        return
    with open_file(file, layout) as stream:
        lines = numbered_lines(stream, limits.max_line_bytes)
        if layout.shape == "csv":
            lines = _quoted_records(lines, limits.max_line_bytes, layout.delimiter)
        if layout.has_header:
            lines = _without_headers(lines, file, layout)
        yield from _tables(lines)


def _lines(stream: Any, max_bytes: int) -> Iterator[bytes | str]:
    """Each line without its end as bytes. A `str` is the reason why a line is refused."""
    rest, skipping = b"", False
    # Small steps: at the end of a truncated file, `read` would lose everything it has unpacked so far.
    read = getattr(stream, "read1", stream.read)
    while True:
        try:
            piece = read(CHUNK_BYTES)
        except Exception as error:
            if not is_damage(error):
                raise
            yield DAMAGED
            return
        if not piece:
            break
        *whole, rest = (rest + piece).split(b"\n")
        for line in whole:
            yield TOO_LONG if skipping or len(line) > max_bytes else line
            skipping = False
        if len(rest) > max_bytes:
            rest, skipping = b"", True
    if rest or skipping:
        yield TOO_LONG if skipping else rest


def numbered_lines(stream: Any, max_bytes: int) -> Iterator[tuple[int, bytes | str]]:
    """Lines and their numbers from 1. Blank lines, carriage returns and a byte order mark are removed."""
    for number, line in enumerate(_lines(stream, max_bytes), start=1):
        if isinstance(line, bytes):
            line = line.rstrip(b"\r")
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if line:
            yield number, line


def _quoted_records(
    lines: Iterator[tuple[int, bytes | str]], max_bytes: int, delimiter: str
) -> Iterator[tuple[int, bytes | str]]:
    """Join the lines of each quoted field that spans several lines.

    A record that exceeds the limit or never ends is refused line by line, so that each line is counted.
    """
    held: list[tuple[int, bytes]] = []
    size = 0
    for number, line in lines:
        if isinstance(line, str) or (not held and not _leaves_quote_open(line, delimiter)):
            yield number, line
            continue
        closes = bool(held) and line.count(b'"') % 2 == 1
        held.append((number, line))
        size += len(line)
        if closes:
            yield held[0][0], b"\n".join(part for _, part in held)
        elif size > max_bytes:
            yield from ((number, NOT_CSV) for number, _ in held)
        if closes or size > max_bytes:
            held, size = [], 0
    yield from ((number, NOT_CSV) for number, _ in held)


def _leaves_quote_open(line: bytes, delimiter: str) -> bool:
    if b'"' not in line:
        return False
    try:
        next(csv.reader([line.decode("latin-1")], strict=True, delimiter=delimiter))
    except csv.Error as error:
        return "unexpected end" in str(error)
    return False


def _without_headers(
    lines: Iterator[tuple[int, bytes | str]], file: str, layout: Layout
) -> Iterator[tuple[int, bytes | str]]:
    """The lines without the header, which files that were written one after another into one have several times.

    Raises DataError if the header is not that of the first file. An empty file has none.
    """
    header = None
    for number, line in lines:
        if header is None:
            header = line
            names = header_of(line, layout) if isinstance(line, bytes) else ()
            if names != layout.names:
                raise DataError(
                    f"{short_name(file)} has the columns {', '.join(names)}, but {layout.file_labels[0]} has "
                    f"{', '.join(layout.names)}; give all files of data.{layout.role} the same header"
                )
        elif line != header:
            yield number, line


def _tables(lines: Iterator[tuple[int, bytes | str]]) -> Iterator[pa.Table]:
    numbers: list[int] = []
    records: list[bytes | None] = []
    reasons: list[str | None] = []
    size = 0
    for number, line in lines:
        refused = isinstance(line, str)
        numbers.append(number)
        records.append(None if refused else line)  # type: ignore[arg-type]
        reasons.append(line if refused else None)  # type: ignore[arg-type]
        size += len(line)
        if size >= CHUNK_BYTES:
            yield pa.table([numbers, records, reasons], schema=RECORDS)
            numbers, records, reasons, size = [], [], [], 0
    if numbers:
        yield pa.table([numbers, records, reasons], schema=RECORDS)


def _parquet_records(file: str, layout: Layout) -> Iterator[pa.Table]:
    """Blocks of rows as Arrow IPC streams, which fit in the same column as lines of text."""
    parquet, in_folders = open_parquet(file, layout), partitions(file)
    stored = parquet.schema_arrow.names
    names, here = named_columns(layout.columns), dataclasses.replace(layout, files=(file,))
    require(names, [*stored, *in_folders], here)
    require_once(names, stored, here)
    row = 1
    for batch in parquet.iter_batches(batch_size=PARQUET_ROWS, columns=[name for name in names if name in stored]):
        for name in names:
            if name not in stored:
                batch = batch.append_column(name, pa.repeat(pa.scalar(in_folders[name], pa.string()), len(batch)))
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_batch(batch)
        yield pa.table([[row], [sink.getvalue().to_pybytes()], [None]], schema=RECORDS)
        row += len(batch)


def parse_records(records: pa.Table, layout: Layout, limits: Limits) -> pa.Table:
    """Validate records (schema RECORDS) of one source. Returns a table of schema ROWS with one row per record.

    A record of a Parquet file holds several rows, and gives as many.
    """
    csv.field_size_limit(max(limits.max_line_bytes, 1))
    columns: list[list[Any]] = [[] for _ in ROWS]
    for line, fields in _fields_of(records, layout):
        row: tuple[Any, ...]
        try:
            row = (line, *_validated(fields, layout, limits), None)
        except Refused as refusal:
            row = (line, None, None, None, None, None, str(refusal))
        for column, value in zip(columns, row, strict=True):
            column.append(value)
    return pa.table(columns, schema=ROWS)


def _fields_of(records: pa.Table, layout: Layout) -> Iterator[tuple[int, Mapping[str, Any] | Refused]]:
    rows = zip(records["line"].to_pylist(), records["record"].to_pylist(), records["reason"].to_pylist(), strict=True)
    for line, record, reason in rows:
        if reason is not None:
            yield line, Refused(reason)
        elif layout.shape == "parquet":
            table = pa.ipc.open_stream(record).read_all()
            columns = [_cells(table[name], name == layout.columns.timestamp) for name in table.column_names]
            for row, cells in enumerate(zip(*columns, strict=True), start=line):
                yield row, _row(table.column_names, cells)
        else:
            yield line, _text_fields(record, layout)


def _cells(column: pa.ChunkedArray, is_time: bool) -> list[Any]:
    """The values of a Parquet column; `Refused` in place of each that Python cannot hold."""
    times = of_arrow(column) if is_time else None
    if times is not None:
        return times
    try:
        return list(column.to_pylist())
    except (ValueError, OverflowError):
        return [_cell(scalar) for scalar in column]


def _cell(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return Refused(NOT_UTF8)
    except (ValueError, OverflowError):
        return Refused(UNREADABLE)


def _row(names: list[str], cells: tuple[Any, ...]) -> Mapping[str, Any] | Refused:
    refused = next((cell for cell in cells if isinstance(cell, Refused)), None)
    return refused or dict(zip(names, cells, strict=True))


def _text_fields(record: bytes, layout: Layout) -> Mapping[str, Any] | Refused:
    try:
        text = decoded(record, layout)
        return json_fields(text, layout) if layout.shape == "json" else _named_fields(text, layout)
    except Refused as refusal:
        return refusal


def decoded(record: bytes, layout: Layout) -> str:
    if b"\0" in record:
        raise Refused(NUL)
    try:
        return record.decode(layout.encoding or "utf-8")
    except UnicodeDecodeError:
        if layout.format == "movielens":  # GroupLens wrote its files in Latin-1
            return record.decode("latin-1")
        raise Refused(OTHER_ENCODING if layout.encoding else NOT_UTF8) from None


def json_fields(text: str, layout: Layout) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        fields = _python_literal(text) if layout.format == "amazon2014" else None
    if not isinstance(fields, dict):
        raise Refused(NOT_JSON)
    return fields


def _python_literal(text: str) -> Any:
    """The metadata files of Amazon 2014 hold Python dictionaries, with single quotes."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def _split(text: str, layout: Layout) -> list[str]:
    if layout.shape != "csv":
        return text.split(layout.delimiter)
    try:
        return next(csv.reader([text], strict=True, delimiter=layout.delimiter), [])
    except csv.Error:
        raise Refused(NOT_CSV) from None


def _named_fields(text: str, layout: Layout) -> dict[str, Any]:
    fields = _split(text, layout)
    if len(fields) != len(layout.names):
        raise Refused(COLUMN_COUNT)
    return dict(zip(layout.names, fields, strict=True))


def _validated(
    fields: Mapping[str, Any] | Refused, layout: Layout, limits: Limits
) -> tuple[str | None, str | None, float | None, int, str]:
    """User, item, rating, time and text of one row. Raises Refused."""
    if isinstance(fields, Refused):
        raise fields
    columns = layout.columns
    longest = limits.max_id_chars
    user = as_id(fields.get(columns.user), NO_USER, LONG_USER, longest) if columns.user else None
    item = as_id(fields.get(columns.item), NO_ITEM, LONG_ITEM, longest) if columns.item else None
    rating = as_number(fields.get(columns.rating), BAD_RATING, layout.decimal) if columns.rating else None
    time = layout.clock.seconds(fields.get(columns.timestamp)) if columns.timestamp else NO_TIME
    parts = (as_text(fields.get(name)) for name in layout.text_columns)
    text = clean(" ".join(part for part in parts if part))
    if len(text) > limits.max_line_bytes:
        raise Refused(TOO_LONG)
    return user, item, rating, time, text
