"""Pretrain the ID tables: `cllm4rec pretrain`, for `ray job submit --working-dir . -- python -m jobs.pretrain ...`."""

from cllm4rec.commands.cli import run_command

if __name__ == "__main__":
    run_command("pretrain", "python -m jobs.pretrain")
