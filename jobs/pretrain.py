"""Pretrain the ID tables: `cllm4rec pretrain`, for `ray job submit --working-dir . -- python -m jobs.pretrain ...`."""

import sys

from cllm4rec.commands.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("pretrain", "python -m jobs.pretrain"))
