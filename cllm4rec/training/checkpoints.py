"""Training checkpoints: safetensors and JSON with a sha256 of each, so that a damaged or foreign one is never resumed.

<checkpoint>/state.safetensors   trained parameters, Adam's moments, step; empty between two stages
             best.safetensors    all parameters trained so far, those of this stage at its best epoch
             progress.json       where the run stands
             checkpoint.json     sha256 of the three, fingerprint of data and config; written last
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from cllm4rec.errors import ArtifactError
from cllm4rec.storage.files import digest_of_file
from cllm4rec.storage.tensors import map_tensors, save_tensors

_FILES = ("state.safetensors", "best.safetensors", "progress.json")
_SEAL = "checkpoint.json"


@dataclasses.dataclass
class Progress:
    """Where a run stands: `epoch` epochs of stage number `stage` are done."""

    phase: int = 0
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
    save_tensors(checkpoint.state, str(folder / "state.safetensors"))
    save_tensors(checkpoint.best, str(folder / "best.safetensors"))
    (folder / "progress.json").write_text(json.dumps(dataclasses.asdict(checkpoint.progress)))
    sums = {name: digest_of_file(str(folder / name)) for name in _FILES}
    (folder / _SEAL).write_text(json.dumps({"fingerprint": fingerprint, "sha256": sums}))


def read_checkpoint(directory: str | Path, fingerprint: str) -> Checkpoint:
    """`state` is read from its file when it is used, which has to be soon: Ray deletes old checkpoints.

    Raises ArtifactError where a file is missing or differs from its sha256, or where the run was another.
    """
    folder = Path(directory)
    try:
        seal: dict[str, Any] = json.loads((folder / _SEAL).read_text())
        sums = {name: (digest_of_file(str(folder / name)), seal["sha256"][name]) for name in _FILES}
    except (OSError, ValueError, KeyError) as error:
        raise ArtifactError(f"checkpoint {folder.name} is incomplete ({type(error).__name__})") from None
    for name, (found, sealed) in sums.items():
        if found != sealed:
            raise ArtifactError(f"checkpoint {folder.name} is damaged: the sha256 of {name} differs")
    if seal["fingerprint"] != fingerprint:
        raise ArtifactError(f"checkpoint {folder.name} belongs to a run with other data or another config")
    progress = Progress(**json.loads((folder / "progress.json").read_text()))
    state, best = (map_tensors(str(folder / name)) for name in _FILES[:2])
    return Checkpoint(progress, state, {name: tensor.clone() for name, tensor in best.items()})


def newest_valid(directories: list[Path], fingerprint: str) -> tuple[Checkpoint | None, list[str]]:
    """The last of `directories` (oldest first) that can be trusted, and a sentence for each that had to be passed over."""
    passed_over: list[str] = []
    for directory in reversed(directories):
        try:
            return read_checkpoint(directory, fingerprint), passed_over
        except ArtifactError as error:
            passed_over.append(f"{error}; going back to the one before it")
    return None, passed_over
