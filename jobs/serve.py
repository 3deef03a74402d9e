"""Serve live: `cllm4rec serve`, for `ray job submit --working-dir . -- python -m jobs.serve ...`."""

import sys

from cllm4rec.commands.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("serve", "python -m jobs.serve"))
