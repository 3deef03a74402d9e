"""Run the whole chain: `cllm4rec pipeline`, for `ray job submit --working-dir . -- python -m jobs.pipeline ...`."""

from cllm4rec.commands.cli import run_command

if __name__ == "__main__":
    run_command("pipeline", "python -m jobs.pipeline")
