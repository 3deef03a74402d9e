"""Build or train the language model: `cllm4rec backbone`, for `ray job submit --working-dir . -- python -m jobs.backbone ...`."""

import sys

from cllm4rec.commands.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("backbone", "python -m jobs.backbone"))
