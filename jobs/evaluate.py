"""Evaluate the model: `cllm4rec evaluate`, for `ray job submit --working-dir . -- python -m jobs.evaluate ...`."""

import sys

from cllm4rec.commands.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("evaluate", "python -m jobs.evaluate"))
