"""Training checkpoints: safetensors and JSON files with sha256 digests. A damaged or foreign checkpoint is never resumed.

<checkpoint>/state.safetensors   trained parameters, Adam's moments, step count; empty between two phases
             best.safetensors    all parameters trained so far; those of the current phase at its best epoch
             progress.json       completed phases and epochs
             checkpoint.json     sha256 of the three files, fingerprint of data and config; written last
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import Tensor

from cllm4rec.errors import ArtifactError
from cllm4rec.storage.files import digest_of_file
from cllm4rec.storage.tensors import map_tensors, save_tensors

_FILES = ("state.safetensors", "best.safetensors", "progress.json")
_MANIFEST = "checkpoint.json"


@dataclasses.dataclass
class Progress:
    """The progress of a run: `epoch` epochs of phase number `phase` are done."""

    phase: int = 0
    epoch: int = 0
    best_metric: float | None = None
    best_epoch: int = 0
    num_log_lines: int = 0


@dataclasses.dataclass
class Checkpoint:
    """A resumable state. Tensors are keyed by parameter name; `state` also has Adam's (`engine.Moments`)."""

    progress: Progress
    state: dict[str, Tensor]
    best: dict[str, Tensor]


def write_checkpoint(directory: str | Path, checkpoint: Checkpoint, fingerprint: str) -> None:
    """Write a checkpoint to a local directory. fingerprint: the digest of the data and config of the run."""
    folder = Path(directory)
    save_tensors(checkpoint.state, str(folder / "state.safetensors"))
    save_tensors(checkpoint.best, str(folder / "best.safetensors"))
    (folder / "progress.json").write_text(json.dumps(dataclasses.asdict(checkpoint.progress)))
    sums = {name: digest_of_file(str(folder / name)) for name in _FILES}
    (folder / _MANIFEST).write_text(json.dumps({"fingerprint": fingerprint, "sha256": sums}))


def read_checkpoint(directory: str | Path, fingerprint: str, name: str | None = None) -> Checkpoint:
    """Verify and read a checkpoint. name: for messages, by default that of the directory.

    `state` is memory-mapped and must be used before Ray deletes the checkpoint. `best` is copied.
    Raises ArtifactError if a file is missing or damaged, or if the fingerprint is that of another run.
    """
    folder = Path(directory)
    title = name or folder.name
    try:
        manifest: dict[str, Any] = json.loads((folder / _MANIFEST).read_text())
        sums = {file: (digest_of_file(str(folder / file)), manifest["sha256"][file]) for file in _FILES}
    except (OSError, ValueError, KeyError) as error:
        raise ArtifactError(f"checkpoint {title} is incomplete ({type(error).__name__})") from None
    for file, (found, expected) in sums.items():
        if found != expected:
            raise ArtifactError(f"checkpoint {title} is damaged: the sha256 of {file} differs")
    if manifest["fingerprint"] != fingerprint:
        raise ArtifactError(f"checkpoint {title} belongs to a run with other data or another config")
    progress = Progress(**json.loads((folder / "progress.json").read_text()))
    state, best = (map_tensors(str(folder / name)) for name in _FILES[:2])
    return Checkpoint(progress, state, {name: tensor.clone() for name, tensor in best.items()})


def newest_valid(
    directories: Mapping[str, AbstractContextManager[str | Path]], fingerprint: str
) -> tuple[Checkpoint | None, list[str]]:
    """The newest valid checkpoint, and a warning for each newer one that was skipped.

    directories: name → what gives a local copy while it is read, oldest first.
    """
    warnings: list[str] = []
    for name, local_copy in reversed([*directories.items()]):
        try:
            with local_copy as directory:
                return read_checkpoint(directory, fingerprint, name), warnings
        except ArtifactError as error:
            warnings.append(f"{error}; trying the previous one")
    return None, warnings
