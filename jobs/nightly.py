"""Score and publish a night: `cllm4rec nightly`, for `ray job submit --working-dir . -- python -m jobs.nightly ...`."""

import sys

from cllm4rec.commands.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("nightly", "python -m jobs.nightly"))
