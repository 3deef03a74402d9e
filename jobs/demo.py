"""Run the chain over the sample world: `cllm4rec demo`, for `ray job submit --working-dir . -- python -m jobs.demo ...`."""

from cllm4rec.commands.cli import run_command

if __name__ == "__main__":
    run_command("demo", "python -m jobs.demo")
