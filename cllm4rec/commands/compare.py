"""Compare all methods on the same splits with the same budget → `evaluation/` with metrics.json, report.md and plots.

    cllm4rec compare --config compare_musical_instruments
    cllm4rec compare --config compare_musical_instruments --quick

Prepares one split per seed of `compare.seeds`, tunes each method on the validation split, and ranks the test split once.
`compare.sweeps` adds runs of CLLM4Rec with one setting changed. Finished runs of a method and seed are kept in
runs/compare/<seed>/<method> below output_dir and are skipped next time; `--force` repeats all of them. Runs are executed in
parallel, with one CPU each. `--quick` uses two seeds, two settings, the main methods (or `compare.methods`), few epochs and no
sweep, and writes to `<output_dir>/quick`. The first lines of each configuration file say how long it takes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from cllm4rec.commands.cli import Command
from cllm4rec.commands.console import say
from cllm4rec.config import Config
from cllm4rec.data.prepare import check_sources, prepare, prepare_inputs
from cllm4rec.data.ray_data import ray_map
from cllm4rec.experiments.comparison.examples import examples
from cllm4rec.experiments.comparison.language import backbone_inputs, run_backbone
from cllm4rec.experiments.comparison.methods import DEPENDS_ON, chosen_methods
from cllm4rec.experiments.comparison.report import EXAMPLES, render
from cllm4rec.experiments.comparison.results import collect
from cllm4rec.experiments.comparison.sweeps import sweep_runs
from cllm4rec.experiments.comparison.trial import MethodRun, of_split, run_method
from cllm4rec.storage.artifacts import is_current, read_manifest, write_directory
from cllm4rec.storage.files import digest_of, join, write_bytes, write_json
from cllm4rec.storage.tombstones import Tombstones
from cllm4rec.training.schedule import resolved

_QUICK_SEEDS, _QUICK_TRIALS, _QUICK_EPOCHS = 2, 2, 25

Map = Callable[[Iterable[Any], Callable[[Any], Any]], Iterator[Any]]
"""Calls a task for each input and yields the results; `ray_map` does so on Ray."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="a smaller comparison for a first look")


def run(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    return compare(quick(config) if args.quick else config, ray_map, args.force)


def compare(config: Config, parallel_map: Map, force: bool = False) -> dict[str, Any]:
    """Prepare the splits, run what is missing, and write `evaluation/`; returns the summary of the command."""
    names = chosen_methods(config)
    sweep_runs(config)  # a wrong sweep is refused before anything is prepared
    for split in _splits(config):
        _prepare(config, split, force)
    # Splits share one schedule, so that they differ in nothing but their data.
    config = resolved(config, read_manifest(_splits(config)[0].run.prepared, "prepared"))
    runs = [MethodRun(split, name) for name in names for split in _splits(config)] + sweep_runs(config)
    _train_backbones(runs, parallel_map, force)
    _run_methods([run for run in runs if run.name not in DEPENDS_ON], parallel_map, force)
    _run_methods([run for run in runs if run.name in DEPENDS_ON], parallel_map, force)
    directory = _write(config, runs, names)
    report = join(directory, "report.md")
    say(f"compare: {report}")
    return {"output_dir": config.output_dir, "directory": directory, "report": report, "methods": names}


def _check(config: Config) -> None:
    chosen_methods(config)
    sweep_runs(config)
    check_sources(config)


def _splits(config: Config) -> list[Config]:
    return [of_split(config, seed) for seed in config.compare.seeds]


def quick(config: Config) -> Config:
    """A smaller form of a comparison, with an output_dir of its own."""
    small = {
        "output_dir": join(config.output_dir, "quick"),
        "compare": config.compare.model_copy(
            update={
                "rows": "main",
                "seeds": config.compare.seeds[:_QUICK_SEEDS],
                "trials": min(config.compare.trials, _QUICK_TRIALS),
                "sweeps": [],
                "sweep_seeds": None,
            }
        ),
    }
    stages = {}
    for name in ("backbone", "pretrain", "finetune"):
        stage = getattr(config, name)
        epochs = _QUICK_EPOCHS if stage.epochs is None else min(stage.epochs, _QUICK_EPOCHS)
        stages[name] = stage.model_copy(update={"epochs": epochs})
    return config.model_copy(update=small | stages)


def _prepare(config: Config, split: Config, force: bool) -> None:
    erased = Tombstones.load(config.output_dir)
    if len(erased):
        erased.save(split.output_dir)
    directory = split.run.prepared
    if force or not is_current(directory, "prepared", prepare_inputs(split)):
        say(f"prepare: split seed {split.data.split.seed}")
        prepare(split)


def _train_backbones(runs: list[MethodRun], parallel_map: Map, force: bool) -> None:
    """Train each language model once per split, no matter how many runs start from it."""
    needed = {run.backbone: run.varied for run in runs if run.backbone is not None}
    missing = [
        varied
        for directory, varied in needed.items()
        if force or not is_current(directory, "backbone", backbone_inputs(varied))
    ]
    for number, directory in enumerate(parallel_map(missing, run_backbone), 1):
        say(f"language model {number} of {len(missing)}: {directory}")


def _run_methods(runs: list[MethodRun], parallel_map: Map, force: bool) -> None:
    missing = [run for run in runs if force or not run.is_done()]
    if len(runs) > len(missing):
        say(f"{len(runs) - len(missing)} of {len(runs)} method runs are finished and are skipped")
    for number, directory in enumerate(parallel_map(missing, run_method), 1):
        say(f"method run {number} of {len(missing)}: {directory}")


def _write(config: Config, runs: list[MethodRun], names: list[str]) -> str:
    """Write `evaluation/` from the finished runs alone."""
    metrics, uri = collect(config, names), config.run.evaluation
    inputs = {
        "rows": digest_of([read_manifest(run.directory, "compared").digest for run in runs]),
        "evaluate": digest_of(config.evaluate.model_dump()),
    }
    with write_directory(uri, kind="evaluation", inputs=inputs, config=config.model_dump(mode="json")) as draft:
        write_json(draft.path("metrics.json"), metrics)
        write_bytes(draft.path(EXAMPLES), examples(config, metrics).encode())
        for name, content in render(metrics).items():
            write_bytes(draft.path(name), content)
        draft.counts.update(methods=len(metrics["results"]), splits=len(config.compare.seeds))
    return uri


COMMAND = Command(run, __doc__ or "", add_flags=add_flags, trains=True, check=_check)
