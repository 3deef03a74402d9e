"""Compare methods: `cllm4rec compare`, for `ray job submit --working-dir . -- python -m jobs.compare ...`."""

import sys

from cllm4rec.commands.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("compare", "python -m jobs.compare"))
