"""Print the memory of a run: `cllm4rec plan`, for `ray job submit --working-dir . -- python -m jobs.plan ...`."""

import sys

from cllm4rec.commands.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("plan", "python -m jobs.plan"))
