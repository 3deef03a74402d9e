"""Run the pipeline from one config: prepare → backbone → pretrain → finetune → evaluate → score → serve.

    cllm4rec pipeline --config demo
    ray job submit --working-dir . -- python -m jobs.pipeline --config my.yaml pretrain.epochs=20

Stages whose inputs and settings have not changed are skipped. At the end the command prints the table of results, the output
directories, and the response of the endpoint to one request. --serve keeps the endpoint running.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from cllm4rec.commands import serve
from cllm4rec.commands.cli import Command
from cllm4rec.commands.console import say
from cllm4rec.config import Config
from cllm4rec.data.prepare import check_sources
from cllm4rec.evaluation.report import table
from cllm4rec.evaluation.results import EvaluationReport
from cllm4rec.pipeline import PIPELINE
from cllm4rec.stages import run_stage


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--serve", action="store_true", help="keep the endpoint running at the end, until interrupted")


def run(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    started = time.monotonic()
    result: dict[str, Any] = {stage.name: run_stage(stage, config, args.force) for stage in PIPELINE}
    say("serve: starting the endpoint")
    checked = serve.check(config)
    result |= {"serve": checked.summary, "report": result["evaluate"]["report"]}
    _show_results(config, checked, is_evaluated=result["evaluate"]["report"] is not None)
    say(f"pipeline: done in {time.monotonic() - started:.0f} s")
    if args.serve:
        args.check = False
        result |= serve.run(config, args)
    return result


def _show_results(config: Config, checked: serve.Check, is_evaluated: bool) -> None:
    say("")
    directories = {"model": "the trained model"}
    if is_evaluated:
        say(table(EvaluationReport.load(config.run.evaluation)))
        say("")
        directories["evaluation"] = "report.md, plots, per-user values"
    directories["dump"] = "the Delta table with a list for every user"
    for name, content in directories.items():
        say(f"{config.run.directory(name):<32} {content}")
    say("")
    checked.show()
    say("")


COMMAND = Command(run, __doc__ or "", add_flags=add_flags, trains=True, check=check_sources)
