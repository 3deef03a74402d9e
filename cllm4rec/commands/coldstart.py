"""Measure how well new items are recommended by their texts, beside controls → `coldstart/` with metrics.json and report.md.

    cllm4rec coldstart --config coldstart_movielens

For each seed of `coldstart.seeds`, some items are taken out of training, and the rows of the others are trained without a language
model. The rows of the new items are predicted from their texts as by `cllm4rec extend`, from words, from the states of the
language model, from both, from random weights of the same architecture, and from noise. Needs the prepared data, which it
prepares if they are out of date, and a pretrained `model.backbone`. The first lines of the configuration file say how long it takes.
"""

from __future__ import annotations

import argparse
from typing import Any

from cllm4rec.commands.cli import Command
from cllm4rec.commands.console import say
from cllm4rec.config import Config
from cllm4rec.data.prepare import check_sources, prepare, prepare_inputs
from cllm4rec.data.ray_data import LocalExecutor
from cllm4rec.experiments.coldstart.run import KIND, coldstart
from cllm4rec.progress import show_count
from cllm4rec.storage.artifacts import is_current
from cllm4rec.storage.files import join


def run(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    if args.force or not is_current(config.run.prepared, "prepared", prepare_inputs(config)):
        prepare(config, LocalExecutor())
    coldstart(config, show_count)
    report = join(config.run.directory(KIND), "report.md")
    say(f"coldstart: {report}")
    return {"report": report}


COMMAND = Command(run, __doc__ or "", needs_ray=False, trains=True, check=check_sources)
