"""Fetch a pretrained language model: `cllm4rec weights`, for `ray job submit --working-dir . -- python -m jobs.weights ...`."""

import sys

from cllm4rec.commands.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("weights", "python -m jobs.weights"))
