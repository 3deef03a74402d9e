"""Promote a new model: `cllm4rec promote`, for `ray job submit --working-dir . -- python -m jobs.promote ...`."""

import sys

from cllm4rec.commands.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("promote", "python -m jobs.promote"))
