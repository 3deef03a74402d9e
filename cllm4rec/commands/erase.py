"""Erase users: known to nobody from the first second, then out of prepared data, models, evaluation, table and staging.

    cllm4rec erase --config demo --user u00017
    cllm4rec erase --config demo --user u00017 --user u00023

Stop training first; the endpoint may go on, and knows an erased user no more within a second. Takes about as long as
reading and writing the directories once, and starts no Ray. Interrupted at any point, the same command finishes the
rest, and so does one without --user. Ends with a receipt, `erasures/<time>-<hash>.json`, which also lists what is left
to you: the raw files, and retraining if the weights are to forget as well. Older versions of the table, staged lists and
interrupted runs are removed whole where they could hold the user. An id that is still found afterwards: exit status 3.
"""

from __future__ import annotations

import argparse
from typing import Any

from cllm4rec.commands.cli import Command
from cllm4rec.commands.console import say
from cllm4rec.config import Config
from cllm4rec.privacy.erasure import erase


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--user", action="append", default=[], metavar="ID", help="the id as it stands in the data; may be repeated"
    )


def run(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    told = erase(config, args.user)
    if told["already_done"]:
        say("erase: was done before; looked again and found nothing")
    elif not told["touched"]:
        say("erase: nothing was found of these users; from now on they are left out of whatever is prepared or scored")
    else:
        say(f"erase: done, {told['touched']} places were changed")
    say(f"erase: the receipt is {told['receipt']}" if told["receipt"] else "erase: nobody was erased here yet")
    return told


COMMAND = Command(run, __doc__ or "", add_flags=add_flags, needs_ray=False)
