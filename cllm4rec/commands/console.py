"""How commands speak: one line at a time on stdout."""

import sys

from tqdm import tqdm


def say(line: str) -> None:
    """One line on stdout, without tearing a progress bar."""
    with tqdm.external_write_mode(file=sys.stdout):
        print(line, flush=True)
