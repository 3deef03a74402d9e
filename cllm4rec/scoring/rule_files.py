"""The files of the rules: Parquet (.parquet), CSV (.csv, comma, with a header) or YAML (.yaml, .yml).

    setting         columns
    deny, allow     item_id
    categories      item_id, category
    availability    item_id, first_date, last_date    YYYY-MM-DD; empty: no bound
    boost           item_id, boost                    a finite number

A YAML file is a list of mappings with these keys. Files of items only may also be a YAML list of ids, or a text file (.txt)
with one id per line. Other columns are ignored. Files are UTF-8, at a path or any fsspec URI, and are read completely. A wrong
file raises a DataError of one sentence that names the setting, the file and the line.
"""

from __future__ import annotations

import csv
import dataclasses
import datetime
import io
import math
import posixpath
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from cllm4rec.errors import ArtifactError, DataError
from cllm4rec.storage import files

FILES = {
    "deny": ("item_id",),
    "allow": ("item_id",),
    "categories": ("item_id", "category"),
    "availability": ("item_id", "first_date", "last_date"),
    "boost": ("item_id", "boost"),
}
"""Settings of `score.rules` that name a file → the columns that are read."""

_MAY_BE_EMPTY = ("first_date", "last_date")
# libyaml, if PyYAML was built with it, is ten times as fast.
_YAML_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclasses.dataclass(frozen=True)
class RuleFile:
    """The columns of a file as text, whatever its format. `lines` holds the line of each row (Parquet: its row number)."""

    setting: str
    uri: str
    columns: dict[str, list[str]]
    lines: list[int]

    @property
    def item_ids(self) -> list[str]:
        return self.columns["item_id"]

    def refuse(self, row: int, problem: str) -> NoReturn:
        raise _refusal(self.setting, self.uri, f"{self._position(row)} {problem}")

    def refuse_repeats(self) -> None:
        """Raises DataError if an item occurs twice."""
        first: dict[str, int] = {}
        for row, item_id in enumerate(self.item_ids):
            if first.setdefault(item_id, row) != row:
                self.refuse(row, f"repeats the item {item_id!r} of {self._position(first[item_id])}; keep one")

    def numbers(self, column: str) -> npt.NDArray[np.float32]:
        """A column of numbers, each finite in float32. Raises DataError."""
        with np.errstate(over="ignore"):
            numbers = np.array([_number(text) for text in self.columns[column]]).astype(np.float32)
        for row in np.flatnonzero(~np.isfinite(numbers))[:1].tolist():
            self.refuse(row, f"has the {column} {self.columns[column][row]!r}; write a finite number")
        return numbers

    def days(self, column: str, empty: datetime.date) -> npt.NDArray[np.int64]:
        """A column of dates as ordinals (day 1 is January 1 of year 1); `empty` stands for an empty one. Raises DataError."""
        return np.array([self._day(row, column, empty) for row in range(len(self.lines))], np.int64)

    def _position(self, row: int) -> str:
        unit = "row" if self.uri.endswith(".parquet") else "line"
        return f"{unit} {self.lines[row]}"

    def _day(self, row: int, column: str, empty: datetime.date) -> int:
        text = self.columns[column][row]
        try:
            return (datetime.date.fromisoformat(text) if text else empty).toordinal()
        except ValueError:
            self.refuse(row, f"has the {column} {text!r}; write a date as YYYY-MM-DD or leave it empty")


def read_content(setting: str, uri: str) -> bytes:
    """The bytes of a rule's file. Raises DataError if it does not exist or cannot be read."""
    try:
        return files.read_bytes(uri)
    except ArtifactError:
        problem = "which does not exist; correct the path or set it to null"
    except (OSError, ValueError, ImportError) as error:
        problem = f"which cannot be read ({error}); correct the path or the permissions"
    raise DataError(f"score.rules.{setting} names {uri}, {problem}")


def read_rule_file(setting: str, uri: str) -> RuleFile:
    """Read one of FILES by the extension of its name and check that every row is complete. Raises DataError."""
    wanted = FILES[setting]
    readers = {".parquet": _read_parquet, ".csv": _read_csv, ".yaml": _read_yaml, ".yml": _read_yaml}
    if wanted == ("item_id",):
        readers[".txt"] = _read_text
    suffix = posixpath.splitext(uri)[1]
    if suffix not in readers:
        raise DataError(
            f"score.rules.{setting} names {uri}, but the name must end in one of {', '.join(readers)}; rename it"
        )
    file = readers[suffix](setting, uri, read_content(setting, uri))
    for column in wanted:
        if column not in _MAY_BE_EMPTY and "" in file.columns[column]:
            file.refuse(file.columns[column].index(""), f"has no {column}; add one or remove the row")
    return file


def _read_parquet(setting: str, uri: str, content: bytes) -> RuleFile:
    try:
        table = pq.read_table(pa.BufferReader(content))
    except (pa.ArrowInvalid, OSError):
        raise _refusal(setting, uri, "it is not Parquet or is damaged; write it again") from None
    _refuse_missing(setting, uri, table.column_names)
    columns = {name: _as_text(setting, uri, name, table[name]) for name in FILES[setting]}
    return RuleFile(setting, uri, columns, list(range(1, len(table) + 1)))


def _as_text(setting: str, uri: str, name: str, column: pa.ChunkedArray) -> list[str]:
    """A Parquet column as the text that CSV would hold, so that ids, numbers and dates are read in one way."""
    if pa.types.is_floating(column.type) and name != "boost":
        # 7.0 is not the id "7", and pandas turns an integer column with missing values into floats.
        raise _refusal(setting, uri, f"its column {name} holds floating-point numbers; write it as text")
    try:
        text = column.cast(pa.string())
        text.validate(full=True)
    except pa.ArrowNotImplementedError:
        raise _refusal(setting, uri, f"its column {name} holds {column.type}; write it as text") from None
    except pa.ArrowInvalid:
        raise _refusal(setting, uri, f"its column {name} holds text that is not UTF-8; correct it") from None
    if pa.types.is_timestamp(column.type):  # how pandas writes days; another time of day is not a date
        text = pc.replace_substring_regex(text, r" 00:00:00(\.0+)?$", "")
    return ["" if value is None else value for value in text.to_pylist()]


def _read_csv(setting: str, uri: str, content: bytes) -> RuleFile:
    # Python's reader, not Arrow's, because it knows the line of each row.
    reader = csv.reader(io.StringIO(_text(setting, uri, content), newline=""), strict=True)
    rows, lines = [], []
    try:
        for row in reader:
            if row:
                rows.append(row)
                lines.append(reader.line_num)
    except csv.Error as error:
        raise _refusal(setting, uri, f"line {reader.line_num} is not CSV ({error}); correct it") from None
    header = rows[0] if rows else []
    _refuse_missing(setting, uri, header)
    for row, line in zip(rows, lines, strict=True):
        if len(row) != len(header):
            problem = f"line {line} has {len(row)} values for {len(header)} columns; correct it"
            raise _refusal(setting, uri, problem)
    columns = {name: [row[header.index(name)] for row in rows[1:]] for name in FILES[setting]}
    return RuleFile(setting, uri, columns, lines[1:])


def _read_text(setting: str, uri: str, content: bytes) -> RuleFile:
    _text(setting, uri, content)
    ids = [(line.decode("utf-8-sig").strip(), number) for number, line in enumerate(content.splitlines(), 1)]
    given = [(item_id, number) for item_id, number in ids if item_id]
    return RuleFile(setting, uri, {"item_id": [item_id for item_id, _ in given]}, [number for _, number in given])


def _read_yaml(setting: str, uri: str, content: bytes) -> RuleFile:
    # Nodes, not values: an id such as 007 or a date stays the text of the file, and its line is known.
    try:
        root = yaml.compose(_text(setting, uri, content), Loader=_YAML_LOADER)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "it" if mark is None else f"line {mark.line + 1}"
        raise _refusal(setting, uri, f"{where} is not YAML; correct it") from None
    if not isinstance(root, yaml.SequenceNode):
        raise _refusal(setting, uri, "it is not a YAML list; write one entry per row, or [] for none")
    entries = [_yaml_entry(setting, uri, node) for node in root.value]
    columns = {name: [entry[name] for entry in entries] for name in FILES[setting]}
    return RuleFile(setting, uri, columns, [node.start_mark.line + 1 for node in root.value])


def _yaml_entry(setting: str, uri: str, node: yaml.Node) -> dict[str, str]:
    wanted = FILES[setting]
    if isinstance(node, yaml.ScalarNode) and wanted == ("item_id",):
        return {"item_id": _yaml_text(node)}
    entry = {}
    if isinstance(node, yaml.MappingNode):
        entry = {key.value: _yaml_text(value) for key, value in node.value if isinstance(value, yaml.ScalarNode)}
    missing = [name for name in wanted if name not in entry]
    if missing:
        line = node.start_mark.line + 1
        raise _refusal(
            setting, uri, f"the entry of line {line} has no {' and no '.join(missing)}; it needs {_needs(setting)}"
        )
    return entry


def _yaml_text(node: yaml.ScalarNode) -> str:
    return "" if node.tag == "tag:yaml.org,2002:null" else str(node.value)


def _refuse_missing(setting: str, uri: str, found: list[str]) -> None:
    for name in FILES[setting]:
        if found.count(name) != 1:
            times = "no column" if name not in found else "more than one column"
            columns = ", ".join(map(repr, found)) or "none"
            raise _refusal(setting, uri, f"it has {times} {name} (its columns: {columns}); it needs {_needs(setting)}")


def _needs(setting: str) -> str:
    return ", ".join(FILES[setting])


def _text(setting: str, uri: str, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise _refusal(setting, uri, f"line {line} is not UTF-8; write the file in that encoding") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _refusal(setting: str, uri: str, problem: str) -> DataError:
    return DataError(f"score.rules.{setting}: in {uri}, {problem}")
