"""Add new items to the current model: `cllm4rec extend`, for `ray job submit --working-dir . -- python -m jobs.extend ...`."""

import sys

from cllm4rec.commands.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("extend", "python -m jobs.extend"))
