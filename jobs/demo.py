"""Run the chain over the sample world: `cllm4rec demo`, for `ray job submit --working-dir . -- python -m jobs.demo ...`."""

import sys

from cllm4rec.commands.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("demo", "python -m jobs.demo"))
