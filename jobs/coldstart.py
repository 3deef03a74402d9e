"""Measure recommendations of new items: `cllm4rec coldstart`, for `ray job submit --working-dir . -- python -m jobs.coldstart ...`."""

import sys

from cllm4rec.commands.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("coldstart", "python -m jobs.coldstart"))
