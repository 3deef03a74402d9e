"""Run the whole chain: `cllm4rec pipeline`, for `ray job submit --working-dir . -- python -m jobs.pipeline ...`."""

import sys

from cllm4rec.commands.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("pipeline", "python -m jobs.pipeline"))
