"""Erase users: `cllm4rec erase`, for `ray job submit --working-dir . -- python -m jobs.erase ...`."""

from cllm4rec.commands.cli import run_command

if __name__ == "__main__":
    run_command("erase", "python -m jobs.erase")
