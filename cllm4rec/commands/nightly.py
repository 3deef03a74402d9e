"""Merge new interactions, score all users, audit the lists and publish them as the next version of the table.

    cllm4rec nightly --config FILE run_date=2026-11-20
    ray job submit --submission-id nightly-2026-11-20 --working-dir . -- python -m jobs.nightly --config FILE run_date=2026-11-20

The same run again does nothing. A run that was killed continues with the users that are not scored yet. A second run on
the same table is refused. Lists that fail the audit, or exceed a limit of nightly.drift, are not published (exit status
3). The report is in <output_dir>/nightly/<date>-<run>-<attempt>/.
"""

from __future__ import annotations

import argparse
from typing import Any

from cllm4rec.commands.cli import Command
from cllm4rec.commands.console import say
from cllm4rec.config import Config
from cllm4rec.nightly.plan import plan_score
from cllm4rec.pipeline import run_score
from cllm4rec.storage.table import current_run


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--accept-drift", action="store_true", help="publish even if the drift exceeds its limits")


def run(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    plan = plan_score(config, args.force, nightly=True)
    directory = {"directory": plan.dump_dir, "report": plan.report_dir}
    if not args.force and current_run(plan.dump_dir) == plan.run_id:
        say(f"nightly: run {plan.run_id} of {plan.run_date} is already published; --force scores all users again")
        return {"nightly": {**directory, "skipped": True}}
    say(f"nightly: run {plan.run_id} of {plan.run_date}, model {plan.model_version} from {plan.model_dir}")
    report = run_score(plan, args.force, args.accept_drift)
    say(f"nightly: {report.users:,} users published as version {report.table_version}; {plan.report_dir}/report.md")
    content = report.to_json()
    return {"nightly": {**directory, "skipped": False, **{name: content[name] for name in _SUMMARY if name in content}}}


_SUMMARY = (
    "run_id", "table_version", "users", "short_lists", "users_per_s", "cost", "seconds", "drift", "drift_breaches"
)  # fmt: skip
"""Fields of the report that `run.json` repeats."""


COMMAND = Command(run, __doc__ or "", add_flags=add_flags)
