"""Stages of a run as plain Python calls, in this process and without Ray: `cllm4rec.prepare` and `cllm4rec.train`.

    config = prepare(interactions, items, output_dir="runs/mine", settings={"data.core": 2})
    recommender = train(config)

The commands continue from there: `cllm4rec evaluate --config runs/mine/config.yaml`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Mapping
from typing import Any, TypeAlias

import pandas as pd
import pyarrow as pa
import yaml

from cllm4rec.config import Config, parse_config
from cllm4rec.data.formats import ROLES
from cllm4rec.data.prepare import prepare as write_prepared
from cllm4rec.data.prepare import prepare_inputs
from cllm4rec.data.ray_data import LocalExecutor
from cllm4rec.errors import ConfigError, DataError
from cllm4rec.model.stock_backbone import check_stock_backbone
from cllm4rec.scoring.recommender import Recommender
from cllm4rec.stages import run_stage, training_stages
from cllm4rec.storage.artifacts import is_current
from cllm4rec.storage.files import absolute, check_writable, join, write_bytes, write_table
from cllm4rec.training.local_trainer import train_locally

Frame: TypeAlias = Any
"""A pandas DataFrame, an Arrow table, or what exports Arrow (`__arrow_c_stream__`): frames of Polars, relations of DuckDB."""
Columns = Mapping[str, Mapping[str, str | list[str]]]
"""Table → what a column means → its name, or several names for `text`."""

CONFIG_FILE = "config.yaml"
MEANINGS = ("user", "item", "rating", "text", "timestamp")

logger = logging.getLogger(__name__)


def prepare(
    interactions: Frame,
    items: Frame | None = None,
    users: Frame | None = None,
    *,
    output_dir: str | os.PathLike[str],
    settings: Mapping[str, Any] | None = None,
    columns: Columns | None = None,
) -> Config:
    """Prepare tables for training, in this process, and return the config of the run.

    interactions: one row per interaction with the columns `user` and `item` (strings or whole numbers) and, if you have
        them, `rating`, `text` and `timestamp` (Unix seconds, dates or times; other units with the setting
        data.interactions.time_unit). Without ratings, every row counts.
    items, users: the columns `item` (or `user`) and `text`.
    output_dir: a path or URI. The tables are kept below `raw/` as Parquet, the result is `prepared/`, and `config.yaml`
        is the config for the commands. A directory that is up to date is not prepared again.
    settings: settings of the configuration by dotted name, such as {"data.core": 2}.
    columns: other column names, by table: {"interactions": {"user": "reader"}, "items": {"text": ["title", "blurb"]}}.

    Raises ConfigError for settings and column names that do not fit, and DataError for tables that do not.
    """
    uri = absolute(os.fspath(output_dir))
    frames: dict[str, Any] = {"interactions": interactions, "items": items, "users": users}
    given = {role: frame for role, frame in frames.items() if frame is not None}
    for role in columns or {}:
        if role not in given:
            raise ConfigError(f"columns has the key {role!r}; its keys should be among {', '.join(given)}")
    sources = {role: _Source.of(role, frame, (columns or {}).get(role, {})) for role, frame in given.items()}
    config = _config(uri, sources, settings or {})
    check_stock_backbone(config.model)
    check_writable(uri, "output_dir")
    for source in sources.values():
        write_table(source.table, source.file(uri))
    text = yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True), sort_keys=False, allow_unicode=True)
    write_bytes(join(uri, CONFIG_FILE), text.encode())
    if is_current(config.run.prepared, "prepared", prepare_inputs(config)):
        logger.info(f"prepare: up to date, skipped ({config.run.prepared})")
    else:
        write_prepared(config, executor=LocalExecutor())
    return config


def train(config: Config, force: bool = False) -> Recommender:
    """Train the model of a prepared run in this process, and return a recommender with it.

    The stages backbone, pretrain and finetune, by plain torch: on the same machine the tables have the same bits as those
    of one Ray worker. Stages that are up to date are skipped, and an interrupted call resumes from its last checkpoint;
    `force` runs all three from their start. Raises ConfigError for anything but a config,
    ArtifactError if nothing is prepared, TrainingError at the first loss that is not finite.
    """
    if not isinstance(config, Config):
        raise ConfigError(
            f"train takes a config and got {config!r:.80}; pass what cllm4rec.prepare returned, or cllm4rec.load_config(...)"
        )
    for stage in training_stages(train_locally):
        run_stage(stage, config, force)
    return Recommender.from_pretrained(config.run.model, config.run.prepared, rules=config.score.rules)


@dataclasses.dataclass(frozen=True)
class _Source:
    """One of the tables, checked: the columns that are read, and what each means."""

    role: str
    table: pa.Table
    columns: dict[str, str | list[str]]

    @classmethod
    def of(cls, role: str, frame: Frame, names: Mapping[str, str | list[str]]) -> _Source:
        table = _arrow(role, frame)
        columns = _columns_of(role, table, names)
        if not len(table):
            raise DataError(f"{role} has no rows; pass a table with at least one")
        ids = [str(columns[meaning]) for meaning in ("user", "item") if meaning in columns]
        for name in ids:
            table = table.set_column(table.column_names.index(name), name, _ids(role, name, table[name]))
        return cls(role, table.select(_flat(columns)), columns)

    def file(self, output_dir: str) -> str:
        return join(output_dir, "raw", f"{self.role}.parquet")


def _config(output_dir: str, sources: Mapping[str, _Source], settings: Mapping[str, Any]) -> Config:
    data: dict[str, Any] = {
        role: {"path": source.file(output_dir), "format": "parquet", "columns": source.columns}
        for role, source in sources.items()
    }
    if "rating" not in sources["interactions"].columns:
        data["min_rating"] = None
    raw: dict[str, Any] = {"output_dir": output_dir, "data": data}
    for key, value in settings.items():
        _set(raw, key, value)
    return parse_config(raw)


def _set(raw: dict[str, Any], key: str, value: Any) -> None:
    """Set one setting by its dotted name. Raises ConfigError for what the arguments of `prepare` decide already."""
    *sections, last = names = str(key).split(".")
    is_of_table = sections[:1] == ["data"] and names[1] in ROLES
    if names in (["output_dir"], ["data"]) or (is_of_table and last not in ("time_unit", "time_format")):
        raise ConfigError(
            f"settings may not hold {key!r}: output_dir and the tables are arguments of prepare; set single keys such as "
            "'data.core'"
        )
    target = raw
    for name in sections:
        target = target.setdefault(name, {})
        if not isinstance(target, dict):
            raise ConfigError(f"the setting {key!r} goes through {name!r}, which settings sets to a value")
    target[last] = value


def _arrow(role: str, frame: Any) -> pa.Table:
    if isinstance(frame, pd.DataFrame):
        twice = frame.columns[frame.columns.duplicated()]
        if len(twice):
            raise DataError(f"{role} has the column {str(twice[0])!r} more than once; rename or remove all but one")
        try:
            return pa.Table.from_pandas(frame, preserve_index=False)
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
            reason = " ".join(map(str, error.args)).replace("\n", " ")
            raise DataError(
                f"{role} has a column with values of several types ({reason}); convert it, for example with astype(str)"
            ) from None
    if hasattr(frame, "__arrow_c_stream__"):
        return _without_views(pa.table(frame))
    raise DataError(
        f"{role} is of type {type(frame).__name__}; pass a pandas DataFrame, an Arrow table (pyarrow.Table) or another frame "
        "that exports Arrow, such as one of Polars"
    )


def _without_views(table: pa.Table) -> pa.Table:
    """Strings as Arrow has always had them, in place of the views that Polars exports."""
    for place, field in enumerate(table.schema):
        if pa.types.is_string_view(field.type):
            table = table.set_column(place, field.name, table.column(place).cast(pa.large_string()))
    return table


def _columns_of(role: str, table: pa.Table, names: Mapping[str, str | list[str]]) -> dict[str, str | list[str]]:
    """The name of each column that is read, by its meaning. Raises DataError for one that is missing."""
    needed = {"interactions": ("user", "item"), "items": ("item", "text"), "users": ("user", "text")}[role]
    possible = MEANINGS if role == "interactions" else needed
    _check_names(role, names, possible)
    columns = {meaning: names.get(meaning, meaning) for meaning in possible}
    for name in _flat({meaning: columns[meaning] for meaning in possible}):
        if table.column_names.count(name) > 1:
            raise DataError(f"{role} has the column {name!r} more than once; rename or remove all but one")
    for name in _flat({meaning: columns[meaning] for meaning in (*needed, *names)}):
        if name not in table.column_names:
            raise DataError(
                f"{role} has no column {name!r}; it has {', '.join(map(str, table.column_names)) or 'no columns'}. Rename "
                f"one, or name it in the argument columns={{{role!r}: ...}}"
            )
    return {
        meaning: name for meaning, name in columns.items() if set(_flat({meaning: name})) <= set(table.column_names)
    }


def _check_names(role: str, names: Any, possible: tuple[str, ...]) -> None:
    if not isinstance(names, Mapping):
        raise ConfigError(f"columns[{role!r}] should map {', '.join(possible)} to column names, and is {names!r}")
    for meaning, name in names.items():
        if meaning not in possible:
            raise ConfigError(f"columns[{role!r}] names {meaning!r}; what it can name is {', '.join(possible)}")
        several = meaning == "text" and isinstance(name, list) and all(isinstance(part, str) for part in name) and name
        if not isinstance(name, str) and not several:
            raise ConfigError(f"columns[{role!r}][{meaning!r}] should be the name of a column, and is {name!r}")


def _flat(columns: Mapping[str, str | list[str]]) -> list[str]:
    """The names of the columns, without repeats."""
    names = [[name] if isinstance(name, str) else name for name in columns.values()]
    return list(dict.fromkeys(name for group in names for name in group))


def _ids(role: str, name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column of ids, categories decoded. Raises DataError if it holds neither strings nor whole numbers.

    Whole numbers may be floats, which pandas makes of a column with gaps.
    """
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind = column.type
    if pa.types.is_floating(kind):
        with contextlib.suppress(pa.ArrowInvalid):
            column = column.cast(pa.int64())
    named = (pa.types.is_string, pa.types.is_large_string, pa.types.is_integer, pa.types.is_binary, pa.types.is_decimal)
    if not (any(is_kind(column.type) for is_kind in named) or kind == pa.uuid()):
        raise DataError(
            f"column {name!r} of {role} is of type {kind}; ids must be strings or whole numbers: convert it, for example "
            f"with astype(str) or astype('int64')"
        )
    return column
