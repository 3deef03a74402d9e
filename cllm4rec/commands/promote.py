"""Make the newly trained model the current one, which scores and serves, if it is at least as good.

    cllm4rec evaluate --config demo
    cllm4rec promote --config demo
    cllm4rec promote --config demo --rollback

Ranks the held-out users again with the current model (takes as long as an evaluation), compares user by user within the
limits of `promote` in the config, copies `model/` to `models/` and moves the pointer `models/current.json`. The nightly
run and a running endpoint follow the pointer. If the model does not pass, the exit status is 3, nothing changes, and the
numbers are in `models/report-<time>.json`. --rollback makes the previous model current again.
"""

from __future__ import annotations

import argparse
from typing import Any

from cllm4rec.commands.cli import Command
from cllm4rec.commands.console import say
from cllm4rec.config import Config
from cllm4rec.evaluation.promotion import promote, roll_back


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rollback", action="store_true", help="make the previous model current again")


def run(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    result = roll_back(config) if args.rollback else promote(config)
    if result.get("already_current"):
        say(f"promote: this model is already current, as {result['to']}; nothing to do")
    elif args.rollback:
        say(f"promote: back from {result['from']} to {result['to']}")
    else:
        say(
            f"promote: {result['to']} is current, after {result['from'] or 'none'}; the numbers are in {result['report']}"
        )
    return result


COMMAND = Command(run, __doc__ or "", add_flags=add_flags, needs_ray=False, writes=False, has_force=False)
