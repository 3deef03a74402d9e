"""The first pass of prepare: every raw file through Ray Data, read and validated, texts set down in staging.

A file is read by one task and its records are validated by many. Texts stay behind in staging files; the driver gets
integers and reasons only, and one dictionary of the distinct ids.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data

from cllm4rec.data.formats import Layout
from cllm4rec.data.records import Limits, parse_records, read_records
from cllm4rec.errors import Cllm4RecError
from cllm4rec.storage.files import join, write_table
from cllm4rec.typing import Array

BLOCK_BYTES = 8 << 20
"""Raw bytes that one task validates: small enough that a single file keeps many cores busy."""
_REFUSED = pa.schema([("source", pa.int8()), ("file", pa.int32()), ("line", pa.int64()), ("reason", pa.string())])
_TYPES: dict[str, Any] = {"rating": np.float64, "time": np.int64}
"""Of columns of `Rows` that are more than int32."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """The good rows of one source in the order of files and lines; ids as codes into `Staged.user_ids`, `item_ids`."""

    user: Array
    item: Array
    rating: Array
    time: Array
    fragment: Array
    place: Array
    """A row's text is row `place` of staging file `Staged.fragments[fragment]`."""

    def __len__(self) -> int:
        return len(self.user)

    def take(self, rows: Array) -> Rows:
        return Rows(*(getattr(self, field.name)[rows] for field in dataclasses.fields(self)))


@dataclasses.dataclass(frozen=True)
class Staged:
    """What the first pass leaves with the driver: the rows of each source (as `layouts`), and what was refused."""

    rows: list[Rows]
    user_ids: Array
    item_ids: Array
    fragments: list[str]
    refused: pa.Table
    """source, file, line, reason: sorted, and never the text."""
    rows_in: list[int]


class IdEncoder(dict[str, int]):
    """Strings → numbers in order of appearance; a missing string is -1."""

    def __missing__(self, value: str) -> int:
        self[value] = len(self)
        return self[value]

    def of(self, column: pa.ChunkedArray) -> Array:
        encoded = column.combine_chunks().dictionary_encode(null_encoding="encode")
        codes = [-1 if value is None else self[value] for value in encoded.dictionary.to_pylist()]
        coded: Array = np.asarray(codes, np.int32)[np.asarray(encoded.indices)]
        return coded

    def strings(self) -> Array:
        return np.array(list(self), object)


def stage(layouts: Sequence[Layout], limits: Limits, staging: str) -> Staged:
    """Read and validate every file of every source. Ray must be connected; `staging` is a folder all nodes can reach.

    Raises DataError for a file that is not what its layout says. What one row has wrong is refused, not raised.
    """
    validate = functools.partial(_stage_block, layouts=layouts, limits=limits, staging=staging)
    rows = records_of(layouts, limits).map_batches(validate, batch_size=None, batch_format="pyarrow")
    return _collect(run_dataset(rows), layouts)


def records_of(layouts: Sequence[Layout], limits: Limits) -> Any:
    """A Ray Dataset of the records of every file, with `source` (index into layouts) and `file` (of its files)."""
    files = [
        {"source": source, "number": number, "file": file}
        for source, layout in enumerate(layouts)
        for number, file in enumerate(layout.files)
    ]
    num_readers = min(len(files), int(ray.cluster_resources().get("CPU", 1)) or 1)
    read = functools.partial(_read_files, layouts=layouts, limits=limits)
    # Readers wait for storage and gzip: they ask for no core, so that validating always finds one, and because Ray Data
    # fuses two steps that ask for the same, which would leave a file to one core.
    return ray.data.from_items(files, override_num_blocks=len(files)).map_batches(
        read, batch_size=1, num_cpus=0, compute=ray.data.TaskPoolStrategy(size=num_readers)
    )


def run_dataset(dataset: Any) -> Iterator[pa.Table]:
    """The blocks of a Ray Data pipeline as they come. Raises a task's own error where it is ours or the disk's."""
    with _own_errors():
        yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow")


def each(inputs: Iterable[Any], task: Callable[[Any], Any]) -> Iterator[Any]:
    """What `task` returns for every input, run on the cluster, as it comes. Raises as `run_dataset`.

    About as many run at once as there are CPUs, so the driver never holds more results than that.
    """
    most = 1 + int(ray.cluster_resources().get("CPU", 1))
    shared, waiting = ray.put(task), iter(inputs)
    running: list[Any] = []
    with _own_errors():
        while True:
            running += [_call.remote(shared, one) for one in itertools.islice(waiting, most - len(running))]
            if not running:
                return
            ready, running = ray.wait(running)
            yield ray.get(ready[0])


@ray.remote(num_cpus=1)  # type: ignore[untyped-decorator]
def _call(task: Callable[[Any], Any], one: Any) -> Any:
    return task(one)


@contextlib.contextmanager
def _own_errors() -> Iterator[None]:
    try:
        yield
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, Cllm4RecError):  # Ray adds lines of advice that do not fit
            raise type(cause)(str(cause).partition("\n")[0]) from None
        if isinstance(cause, OSError):
            raise cause from error
        raise


@contextlib.contextmanager
def quiet_data_context() -> Iterator[None]:
    """Ray Data without bars and notes, with blocks of BLOCK_BYTES; what was set before comes back afterwards."""
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = BLOCK_BYTES
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # a task's error is raised, once is enough
    try:
        with ray.data.DataContext.current(context):
            yield
    finally:
        logger.setLevel(level)


def _read_files(batch: dict[str, Array], layouts: Sequence[Layout], limits: Limits) -> Iterator[pa.Table]:
    """Ray Data task: the records of one file."""
    for source, number, file in zip(batch["source"], batch["number"], batch["file"], strict=True):
        for records in read_records(str(file), layouts[source], limits):
            yield records.append_column("source", _constant(source, len(records), pa.int8())).append_column(
                "file", _constant(number, len(records), pa.int32())
            )


def _stage_block(records: pa.Table, layouts: Sequence[Layout], limits: Limits, staging: str) -> Iterator[pa.Table]:
    """Ray Data task: validate records, set their texts down in staging, hand on the rest."""
    for part in by_column(by_column([records], "source"), "file"):
        source, number, line = (part[name][0].as_py() for name in ("source", "file", "line"))
        rows = parse_records(part, layouts[source], limits)
        # Named after its first record: a task that is run again writes the same file again.
        fragment = f"source-{source}-file-{number:06d}-line-{line:012d}.parquet"
        if layouts[source].text_columns:
            write_table(rows.select(["text"]), join(staging, fragment))
        columns = {name: rows[name] for name in ("line", "user", "item", "rating", "time", "reason")}
        columns["source"] = _constant(source, len(rows), pa.int8())
        columns["file"] = _constant(number, len(rows), pa.int32())
        columns["fragment"] = _constant(fragment, len(rows), pa.string())
        columns["place"] = pa.array(np.arange(len(rows)), pa.int32())
        yield pa.table(columns)


def by_column(tables: Iterable[pa.Table], name: str) -> Iterator[pa.Table]:
    """Each table once for every value of an integer column, in the order of the values."""
    for table in tables:
        values = table[name].to_numpy()
        order = np.argsort(values, kind="stable")
        bounds = np.flatnonzero(np.diff(values[order], prepend=-1, append=-1)).tolist() if len(values) else [0]
        for low, high in itertools.pairwise(bounds):
            yield table.take(order[low:high])


def _constant(value: Any, num_rows: int, kind: Any) -> Any:
    return pa.repeat(pa.scalar(value, kind), num_rows)


def _collect(blocks: Iterable[pa.Table], layouts: Sequence[Layout]) -> Staged:
    users, items, fragments = IdEncoder(), IdEncoder(), IdEncoder()
    good: list[list[_Piece]] = [[] for _ in layouts]
    refused: list[pa.Table] = [_REFUSED.empty_table()]
    rows_in = [0] * len(layouts)
    for block in by_column(blocks, "source"):
        source = block["source"][0].as_py()
        rows_in[source] += len(block)
        refused.append(block.filter(pc.is_valid(block["reason"])).select(_REFUSED.names))
        for kept in by_column([block.filter(pc.is_null(block["reason"]))], "file"):
            columns = {name: kept[name].to_numpy() for name in ("rating", "time", "place")}
            columns |= {"user": users.of(kept["user"]), "item": items.of(kept["item"])}
            columns |= {"fragment": fragments.of(kept["fragment"])}
            good[source].append(_Piece.of(kept["file"][0].as_py(), kept["line"].to_numpy(), columns))
    rows = [_in_order(pieces) for pieces in good]
    quarantine = _labeled(pa.concat_tables(refused), layouts)
    assert sum(rows_in) == sum(map(len, rows)) + len(quarantine), "a row was lost between reading and staging"
    return Staged(rows, users.strings(), items.strings(), list(fragments), quarantine, rows_in)


@dataclasses.dataclass(frozen=True)
class _Piece:
    """Good rows of consecutive lines of one file: columns of `Rows`. `first` and `last` are (file, line)."""

    first: tuple[int, int]
    last: tuple[int, int]
    columns: dict[str, Array]

    @classmethod
    def of(cls, file: int, line: Array, columns: dict[str, Array]) -> _Piece:
        order = np.argsort(line)
        typed = {name: column[order].astype(_TYPES.get(name, np.int32)) for name, column in columns.items()}
        return cls((file, int(line[order[0]])), (file, int(line[order[-1]])), typed)


def _in_order(pieces: list[_Piece]) -> Rows:
    """The rows of one source by file and line, whichever task was done first. Takes the pieces' columns away."""
    pieces = sorted(pieces, key=lambda piece: piece.first)
    for one, after in itertools.pairwise(pieces):
        assert one.last < after.first, "two tasks had lines of the same stretch"
    joined = {}
    for field in dataclasses.fields(Rows):
        parts = [piece.columns.pop(field.name) for piece in pieces]
        joined[field.name] = np.concatenate([np.empty(0, _TYPES.get(field.name, np.int32)), *parts])
    return Rows(**joined)


def _labeled(refused: pa.Table, layouts: Sequence[Layout]) -> pa.Table:
    refused = refused.sort_by([(name, "ascending") for name in ("source", "file", "line")])
    labels = [layout.file_labels for layout in layouts]
    places = zip(refused["source"].to_pylist(), refused["file"].to_pylist(), strict=True)
    files = [labels[source][file] for source, file in places]
    roles = [layouts[source].role for source in refused["source"].to_pylist()]
    return pa.table(
        [pa.array(roles, pa.string()), pa.array(files, pa.string()), refused["line"], refused["reason"]],
        names=["source", "file", "line", "reason"],
    )
