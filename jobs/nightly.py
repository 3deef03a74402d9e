"""Score and publish a night: `cllm4rec nightly`, for `ray job submit --working-dir . -- python -m jobs.nightly ...`."""

from cllm4rec.commands.cli import run_command

if __name__ == "__main__":
    run_command("nightly", "python -m jobs.nightly")
