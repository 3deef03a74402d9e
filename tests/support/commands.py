"""Commands run within the test's process."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from cllm4rec.commands import cli


@dataclasses.dataclass(frozen=True)
class Outcome:
    """`last` is the last line on stdout, `result` what `run.json` holds beside it."""

    status: int
    lines: list[str]
    last: dict[str, Any]
    result: dict[str, Any]
    errors: str


def run_command(capsys: pytest.CaptureFixture[str], name: str, *words: object) -> Outcome:
    """`cllm4rec <name> <words>`."""
    capsys.readouterr()
    status = cli.run_command(name, f"cllm4rec {name}", [str(word) for word in words])
    shown = capsys.readouterr()
    *lines, line = shown.out.splitlines()
    last = json.loads(line)
    run_file = Path(last.get("output_dir") or "") / cli.RUN_FILE
    result = json.loads(run_file.read_text())["result"] if last["ok"] and run_file.is_file() else {}
    return Outcome(status, lines, last, result, shown.err)
