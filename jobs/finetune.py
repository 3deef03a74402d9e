"""Finetune for recommendation: `cllm4rec finetune`, for `ray job submit --working-dir . -- python -m jobs.finetune ...`."""

import sys

from cllm4rec.commands.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("finetune", "python -m jobs.finetune"))
