"""Compare methods: `cllm4rec compare`, for `ray job submit --working-dir . -- python -m jobs.compare ...`."""

from cllm4rec.commands.cli import run_command

if __name__ == "__main__":
    run_command("compare", "python -m jobs.compare")
