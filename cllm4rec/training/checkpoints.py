"""Training checkpoints: safetensors and JSON with a sha256 of each, so that a damaged or foreign one is never resumed.

<checkpoint>/state.safetensors   trained parameters, Adam's moments, step; empty between two stages
             best.safetensors    all parameters trained so far, those of this stage at its best epoch
             progress.json       where the run stands
             checkpoint.json     sha256 of the three, fingerprint of data and config; written last
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from cllm4rec.errors import ArtifactError

_SEAL = "checkpoint.json"


@dataclasses.dataclass
class Progress:
    """Where a run stands: `epoch` epochs of stage number `stage` are done."""

    stage: int = 0
    epoch: int = 0
    best_metric: float | None = None
    best_epoch: int = 0
    num_log_lines: int = 0


@dataclasses.dataclass
class Checkpoint:
    progress: Progress
    state: dict[str, Tensor]
    best: dict[str, Tensor]


def write_checkpoint(directory: str | Path, checkpoint: Checkpoint, fingerprint: str) -> None:
    folder = Path(directory)
    contents = {
        "state.safetensors": save(checkpoint.state),
        "best.safetensors": save(checkpoint.best),
        "progress.json": json.dumps(dataclasses.asdict(checkpoint.progress)).encode(),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    (folder / _SEAL).write_text(json.dumps({"fingerprint": fingerprint, "sha256": sums}))


def read_checkpoint(directory: str | Path, fingerprint: str) -> Checkpoint:
    """Raises ArtifactError where a file is missing or differs from its sha256, or where the run was another."""
    folder = Path(directory)
    try:
        seal: dict[str, Any] = json.loads((folder / _SEAL).read_text())
        contents = {name: (folder / name).read_bytes() for name in seal["sha256"]}
    except (OSError, ValueError, KeyError) as error:
        raise ArtifactError(f"checkpoint {folder.name} is incomplete ({type(error).__name__})") from None
    for name, content in contents.items():
        if hashlib.sha256(content).hexdigest() != seal["sha256"][name]:
            raise ArtifactError(f"checkpoint {folder.name} is damaged: the sha256 of {name} differs")
    if seal["fingerprint"] != fingerprint:
        raise ArtifactError(f"checkpoint {folder.name} belongs to a run with other data or another config")
    return Checkpoint(
        Progress(**json.loads(contents["progress.json"])),
        load(contents["state.safetensors"]),
        load(contents["best.safetensors"]),
    )


def newest_valid(directories: list[Path], fingerprint: str) -> tuple[Checkpoint | None, list[str]]:
    """The last of `directories` (oldest first) that can be trusted, and a sentence for each that had to be passed over."""
    passed_over: list[str] = []
    for directory in reversed(directories):
        try:
            return read_checkpoint(directory, fingerprint), passed_over
        except ArtifactError as error:
            passed_over.append(f"{error}; going back to the one before it")
    return None, passed_over
