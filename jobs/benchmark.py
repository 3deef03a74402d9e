"""Measure speed: `cllm4rec benchmark`, for `ray job submit --working-dir . -- python -m jobs.benchmark ...`."""

import sys

from cllm4rec.commands.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("benchmark", "python -m jobs.benchmark"))
