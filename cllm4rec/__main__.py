"""`python -m cllm4rec <command> ...`: the program without its console script."""

from cllm4rec.commands.cli import main

main()
