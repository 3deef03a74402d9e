"""Make the newly trained model the one that scores and answers, if it is at least as good as the present one.

    cllm4rec evaluate --config demo
    cllm4rec promote --config demo
    cllm4rec promote --config demo --rollback

Ranks the held-out users once more with the present model (as long as an evaluation takes), compares user by user within
the limits of `promote` in the config, copies `model/` to `models/` and moves `models/current.json`. The nightly job and
a running endpoint take it from there. A model that does not pass: exit status 3, nothing changes, and the numbers are in
`models/report-<time>.json`. --rollback goes back to the model before.
"""

from __future__ import annotations

import argparse
from typing import Any

from cllm4rec.commands.cli import Command
from cllm4rec.commands.console import say
from cllm4rec.config import Config
from cllm4rec.evaluation.promotion import promote, roll_back


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rollback", action="store_true", help="make the model before the present one current again")


def run(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    told = roll_back(config) if args.rollback else promote(config)
    if told.get("already_current"):
        say(f"promote: this model is current already, as {told['to']}; nothing to do")
    elif args.rollback:
        say(f"promote: back from {told['from']} to {told['to']}")
    else:
        say(f"promote: {told['to']} is current, after {told['from'] or 'none'}; the numbers are in {told['report']}")
    return told


COMMAND = Command(run, __doc__ or "", add_flags=add_flags, needs_ray=False)
