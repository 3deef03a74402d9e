"""Every night: what happened since training is merged, everybody is scored, audited, and published in one commit.

    cllm4rec nightly --config FILE run_date=2026-11-20
    ray job submit --submission-id nightly-2026-11-20 --working-dir . -- cllm4rec nightly --config FILE run_date=2026-11-20

The same night again does nothing. A night that was killed goes on with the users it has not scored; a second one beside
a running one is refused. Lists that fail the audit, or are further from the last ones than nightly.drift allows, are not
published (status 3). The report lies in <output_dir>/nightly/<date>-<run>-<attempt>/.
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
    parser.add_argument("--accept-drift", action="store_true", help="publish though the drift is above its limits")


def run(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    plan = plan_score(config, args.force, nightly=True)
    directory = {"directory": plan.dump_dir, "report": plan.report_dir}
    if not args.force and current_run(plan.dump_dir) == plan.run_id:
        say(f"nightly: run {plan.run_id} of {plan.run_date} is published already; --force scores it anew")
        return {"nightly": {**directory, "skipped": True}}
    say(f"nightly: run {plan.run_id} of {plan.run_date}, model {plan.model_version} from {plan.model_dir}")
    facts = run_score(plan, args.force, args.accept_drift)
    say(f"nightly: {facts['users']:,} users published as version {facts['table_version']}; {plan.report_dir}/report.md")
    return {"nightly": {**directory, "skipped": False, **{name: facts[name] for name in _TOLD if name in facts}}}


_TOLD = ("run_id", "table_version", "users", "short_lists", "users_per_s", "cost", "seconds", "drift", "drift_breaches")


COMMAND = Command(run, __doc__ or "", add_flags=add_flags)
