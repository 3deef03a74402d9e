"""Every method on the same splits with the same budget → `evaluation/` with metrics.json, report.md and plots.

    cllm4rec compare --config compare_musical_instruments
    cllm4rec compare --config compare_musical_instruments --quick

Prepares once for each seed of `compare.seeds`, tunes each method on the validation split, and ranks the test split once.
`compare.sweeps` adds CLLM4Rec with one setting changed, value by value. A finished (method, seed) lies in
runs/compare/<seed>/<method> below output_dir and is not run again; `--force` runs all. Rows run side by side, one CPU each.
`--quick` takes two seeds, two settings, the main methods, few epochs and no sweep, into `<output_dir>/quick`. How long it
takes stands at the top of each config.
"""

from __future__ import annotations

import argparse
from typing import Any

from cllm4rec.commands.cli import Command
from cllm4rec.commands.console import say
from cllm4rec.config import Config
from cllm4rec.data.prepare import prepare, prepare_inputs
from cllm4rec.data.ray_data import ray_map
from cllm4rec.experiments.comparison.examples import examples
from cllm4rec.experiments.comparison.language import backbone_inputs, run_backbone
from cllm4rec.experiments.comparison.methods import AFTER, chosen_methods
from cllm4rec.experiments.comparison.report import EXAMPLES, render
from cllm4rec.experiments.comparison.results import collect
from cllm4rec.experiments.comparison.sweeps import sweep_rows
from cllm4rec.experiments.comparison.trial import Row, of_split, run_row
from cllm4rec.storage.artifacts import is_current, read_manifest, write_directory
from cllm4rec.storage.files import digest_of, join, write_bytes, write_json
from cllm4rec.storage.tombstones import Tombstones

_QUICK_SEEDS, _QUICK_TRIALS, _QUICK_EPOCHS = 2, 2, 25


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="a small form of the same, for a first look")


def run(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    """Prepare, train what is missing, and write `evaluation/`; what is returned ends up in the last line of JSON."""
    config = quick(config) if args.quick else config
    names = chosen_methods(config)
    splits = [of_split(config, seed) for seed in config.compare.seeds]
    rows = [Row(split, name) for name in names for split in splits] + sweep_rows(config)
    for split in splits:
        _prepare(config, split, args.force)
    _train_backbones(rows, args.force)
    _train_rows([row for row in rows if row.name not in AFTER], args.force)
    _train_rows([row for row in rows if row.name in AFTER], args.force)
    return {"output_dir": config.output_dir, "directory": _write(config, rows, names), "methods": names}


def quick(config: Config) -> Config:
    """A small form of a comparison, in a folder of its own."""
    small = {
        "output_dir": join(config.output_dir, "quick"),
        "compare": config.compare.model_copy(
            update={
                "rows": "main",
                "methods": [],
                "seeds": config.compare.seeds[:_QUICK_SEEDS],
                "trials": min(config.compare.trials, _QUICK_TRIALS),
                "sweeps": [],
                "sweep_seeds": None,
            }
        ),
    }
    stages = {
        name: getattr(config, name).model_copy(update={"epochs": min(getattr(config, name).epochs, _QUICK_EPOCHS)})
        for name in ("backbone", "pretrain", "finetune")
    }
    return config.model_copy(update=small | stages)


def _prepare(config: Config, split: Config, force: bool) -> None:
    erased = Tombstones.load(config.output_dir)
    if len(erased):
        erased.save(split.output_dir)
    directory = split.run.prepared
    if force or not is_current(directory, "prepared", prepare_inputs(split)):
        say(f"prepare: split seed {split.data.split.seed}")
        prepare(split)


def _train_backbones(rows: list[Row], force: bool) -> None:
    """Each language model once a split, however many rows begin from it."""
    wanted = {row.backbone: row.varied for row in rows if row.backbone is not None}
    missing = [
        varied
        for directory, varied in wanted.items()
        if force or not is_current(directory, "backbone", backbone_inputs(varied))
    ]
    for number, directory in enumerate(ray_map(missing, run_backbone), 1):
        say(f"language model {number} of {len(missing)}: {directory}")


def _train_rows(rows: list[Row], force: bool) -> None:
    missing = [row for row in rows if force or not row.is_done()]
    if len(rows) > len(missing):
        say(f"{len(rows) - len(missing)} of {len(rows)} rows are finished and not run again")
    for number, directory in enumerate(ray_map(missing, run_row), 1):
        say(f"row {number} of {len(missing)}: {directory}")


def _write(config: Config, rows: list[Row], names: list[str]) -> str:
    """Write `evaluation/` from the finished rows; nothing in it is not in them."""
    metrics, uri = collect(config, names), config.run.evaluation
    inputs = {
        "rows": digest_of([read_manifest(row.directory, "compared").digest for row in rows]),
        "evaluate": digest_of(config.evaluate.model_dump()),
    }
    with write_directory(uri, kind="evaluation", inputs=inputs, config=config.model_dump(mode="json")) as draft:
        write_json(draft.path("metrics.json"), metrics)
        write_bytes(draft.path(EXAMPLES), examples(config, metrics).encode())
        for name, content in render(metrics).items():
            write_bytes(draft.path(name), content)
        draft.counts.update(methods=len(metrics["results"]), splits=len(config.compare.seeds))
    say(f"compare: {join(uri, 'report.md')}")
    return uri


COMMAND = Command(run, __doc__ or "", add_flags=add_flags)
