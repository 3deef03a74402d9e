"""Sensitivity: CLLM4Rec as configured with one setting changed, one method run per value and split.

A run is stored in sweep_<name>_<value> next to the directories of the methods. It is resumed and ranked like them. Values
that equal the configuration share one run, sweep_as_configured.
"""

from __future__ import annotations

import re
from typing import Any

from cllm4rec.config import Config, Sweep
from cllm4rec.errors import ConfigError
from cllm4rec.experiments.comparison.methods import MODEL, with_settings
from cllm4rec.experiments.comparison.trial import MethodRun, of_split

SECTIONS = ("model", "backbone", "pretrain", "finetune", "training")
"""Sections that a sweep may change: all values share the prepared splits."""
PREPARED = ("model.backbone", "model.backbone.vocab_size", "model.revision")
"""Settings in these sections that `prepare` reads."""


def sweep_runs(config: Config) -> list[MethodRun]:
    """The runs of all sweeps without duplicates. Raises ConfigError for an unknown setting or an invalid value."""
    runs = {
        run.directory: run
        for sweep in config.compare.sweeps
        for value in sweep.values
        for run in runs_of_value(config, sweep, value)
    }
    return list(runs.values())


def runs_of_value(config: Config, sweep: Sweep, value: Any) -> list[MethodRun]:
    """One run per split of `compare.sweep_seeds`."""
    label = "sweep_as_configured" if is_configured(config, sweep, value) else _label(sweep, value)
    splits = [of_split(config, seed) for seed in config.compare.seeds_of_sweeps]
    return [MethodRun(_changed(split, sweep, value), MODEL, label) for split in splits]


def is_configured(config: Config, sweep: Sweep, value: Any) -> bool:
    """Whether a value equals the configuration."""
    return _changed(config, sweep, value) == config


def describe_sweeps(config: Config) -> dict[str, dict[str, Any]]:
    """By name: the splits, the configured value of each setting, and which value of the sweep that is (None: none of them)."""
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
                f"{who} sets {key}; a sweep may change settings of {', '.join(SECTIONS)}, but not those that prepare reads "
                f"({', '.join(PREPARED)})"
            )
    return with_settings(config, dict.fromkeys(sweep.settings, value), who)


def _label(sweep: Sweep, value: Any) -> str:
    return f"sweep_{sweep.slug}_{re.sub(r'[^0-9A-Za-z.]+', '-', str(value)).strip('-')}"


def _value_of(raw: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        raw = raw[part]
    return raw
