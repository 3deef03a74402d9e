"""Prepare the data: `cllm4rec prepare`, for `ray job submit --working-dir . -- python -m jobs.prepare ...`."""

import sys

from cllm4rec.commands.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("prepare", "python -m jobs.prepare"))
