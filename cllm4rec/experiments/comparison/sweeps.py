"""Sensitivity: CLLM4Rec under the config's own values with one thing changed, a row for each value and split.

A value's rows lie in sweep_<name>_<value> beside the methods' and are finished, resumed and ranked as those are. What
equals the config itself is one row for all sweeps, sweep_as_configured.
"""

from __future__ import annotations

import re
from typing import Any

from cllm4rec.config import Config, Sweep
from cllm4rec.errors import ConfigError
from cllm4rec.experiments.comparison.methods import MODEL, with_settings
from cllm4rec.experiments.comparison.trial import Row, of_split

SECTIONS = ("model", "backbone", "pretrain", "finetune", "training")
"""What a sweep may change: all values share the prepared splits."""
PREPARED = ("model.backbone", "model.backbone.vocab_size", "model.revision")
"""What of these sections `prepare` has read."""


def sweep_rows(config: Config) -> list[Row]:
    """Every row of every sweep, once. Raises ConfigError for a value that is none, or that the config refuses."""
    rows = {
        row.directory: row
        for sweep in config.compare.sweeps
        for value in sweep.values
        for row in rows_of_value(config, sweep, value)
    }
    return list(rows.values())


def rows_of_value(config: Config, sweep: Sweep, value: Any) -> list[Row]:
    """A row for each split of `compare.sweep_seeds`."""
    label = "sweep_as_configured" if is_configured(config, sweep, value) else _label(sweep, value)
    splits = [of_split(config, seed) for seed in config.compare.seeds_of_sweeps]
    return [Row(_changed(split, sweep, value), MODEL, label) for split in splits]


def is_configured(config: Config, sweep: Sweep, value: Any) -> bool:
    """Whether a value is what the config says anyway."""
    return _changed(config, sweep, value) == config


def describe_sweeps(config: Config) -> dict[str, dict[str, Any]]:
    """By name: the splits, what the config says of each setting, and which of the values that is (None: of none)."""
    raw = config.model_dump(mode="json")
    return {
        sweep.name: {
            "seeds": config.compare.seeds_of_sweeps,
            "settings": {key: _value_of(raw, key) for key in sweep.settings},
            "configured": next((value for value in sweep.values if is_configured(config, sweep, value)), None),
        }
        for sweep in config.compare.sweeps
    }


def _changed(config: Config, sweep: Sweep, value: Any) -> Config:
    who = f"the sweep {sweep.name!r}"
    for key in sweep.settings:
        if key.partition(".")[0] not in SECTIONS or key in PREPARED:
            raise ConfigError(
                f"{who} sets {key}; a sweep may change settings of {', '.join(SECTIONS)}, but not what prepare has read "
                f"({', '.join(PREPARED)})"
            )
    return with_settings(config, dict.fromkeys(sweep.settings, value), who)


def _label(sweep: Sweep, value: Any) -> str:
    return f"sweep_{sweep.slug}_{re.sub(r'[^0-9A-Za-z.]+', '-', str(value)).strip('-')}"


def _value_of(raw: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        raw = raw[part]
    return raw
