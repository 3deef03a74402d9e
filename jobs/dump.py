"""Look after the published table: `cllm4rec dump`, for `ray job submit --working-dir . -- python -m jobs.dump ...`."""

import sys

from cllm4rec.commands.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("dump", "python -m jobs.dump"))
