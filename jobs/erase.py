"""Erase users: `cllm4rec erase`, for `ray job submit --working-dir . -- python -m jobs.erase ...`."""

import sys

from cllm4rec.commands.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("erase", "python -m jobs.erase"))
