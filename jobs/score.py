"""Score every user: `cllm4rec score`, for `ray job submit --working-dir . -- python -m jobs.score ...`."""

import sys

from cllm4rec.commands.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("score", "python -m jobs.score"))
