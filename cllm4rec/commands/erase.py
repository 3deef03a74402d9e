"""Erase users: they are ignored at once, then removed from prepared data, models, evaluation, table and staging.

    cllm4rec erase --config demo --user A000000017
    cllm4rec erase --config demo --user A000000017 --user A000000023

Stop training first; the endpoint may keep running, and ignores an erased user within a second. Takes about as long as
reading and writing the directories once; Ray is not started. If it is interrupted, the same command finishes the rest, and
so does one without --user. The receipt, `erasures/<time>-<hash>.json`, also lists what remains to be done: the raw files,
and training again if the weights must not depend on the users. Older versions of the table, staged lists and interrupted
runs that may contain the users are removed. Raw files are not changed; those below output_dir that still contain an id are
named. If an id is still found anywhere else, the exit status is 3.
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
        "--user", action="append", default=[], metavar="ID", help="the id as it is in the data; may be repeated"
    )


def run(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    result = erase(config, args.user)
    if result["already_done"]:
        say("erase: already done; a new search found nothing")
    elif not result["touched"]:
        say("erase: these users were not found; from now on they are left out of all prepared data and lists")
    else:
        say(f"erase: done, {result['touched']} directories and files were changed")
    if result["raw_files"]:
        say(f"erase: raw files are not changed; remove the users from {', '.join(result['raw_files'])}")
    say(f"erase: the receipt is {result['receipt']}" if result["receipt"] else "erase: no user was erased here yet")
    return result


COMMAND = Command(run, __doc__ or "", add_flags=add_flags, needs_ray=False, writes=False, has_force=False)
