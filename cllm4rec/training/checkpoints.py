"""Training checkpoints: safetensors and JSON files with sha256 digests. A damaged or foreign checkpoint is never resumed.

<checkpoint>/state.safetensors   trained parameters, Adam's moments, step count; empty between two phases
             best.safetensors    all parameters trained so far; those of the current phase at its best epoch
             progress.json       completed phases and epochs
             checkpoint.json     sha256 of the three files, fingerprint of data and config; written last

With ZeRO-3 every worker writes four such files with its shares, named like `state-00000-of-00002.safetensors`. They can be
resumed at another number of workers, and by every engine.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from cllm4rec.errors import ArtifactError
from cllm4rec.storage.files import digest_of_file
from cllm4rec.storage.tensors import map_tensors, save_tensors
from cllm4rec.training.shares import Share, Value, map_parts, save_shares, share_of, whole


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
    state: dict[str, Value]
    best: dict[str, Value]


def write_checkpoint(
    directory: str | Path, checkpoint: Checkpoint, fingerprint: str, rank: int = 0, num_workers: int = 1
) -> None:
    """Write a checkpoint to a local directory. fingerprint: the digest of the data and config of the run.

    If it consists of shares, every worker must call it, with its `rank` and the number of workers, and all files must come
    together in one directory. Otherwise the first worker does so.
    """
    folder = Path(directory)
    is_divided = any(isinstance(value, Share) for value in [*checkpoint.state.values(), *checkpoint.best.values()])
    part = f"-{rank:05d}-of-{num_workers:05d}" if is_divided else ""
    if rank and not is_divided:
        return
    for kind, tensors in (("state", checkpoint.state), ("best", checkpoint.best)):
        path = folder / f"{kind}{part}.safetensors"
        if is_divided:
            save_shares({name: share_of(value, rank, num_workers) for name, value in tensors.items()}, path)
        else:
            save_tensors({name: whole(value) for name, value in tensors.items()}, str(path))
    progress = folder / f"progress{part}.json"
    progress.write_text(json.dumps(dataclasses.asdict(checkpoint.progress)))
    names = [f"state{part}.safetensors", f"best{part}.safetensors", progress.name]
    sums = {name: digest_of_file(str(folder / name)) for name in names}
    (folder / f"checkpoint{part}.json").write_text(json.dumps({"fingerprint": fingerprint, "sha256": sums}))


def read_checkpoint(directory: str | Path, fingerprint: str, name: str | None = None) -> Checkpoint:
    """Verify and read a checkpoint. name: for messages, by default that of the directory.

    Tensors of `state` and shares are memory-mapped and must be used before Ray deletes the checkpoint. Whole tensors of `best`
    are copied.
    Raises ArtifactError if a file is missing or damaged, or if the fingerprint is that of another run.
    """
    folder = Path(directory)
    parts = _parts(folder)
    for part in parts:
        _verify(folder, part, fingerprint, name or folder.name)
    # All workers write the same progress; only the first one counts the lines of the log.
    progress = Progress(**json.loads((folder / f"progress{parts[0]}.json").read_text()))
    if parts == [""]:
        state, best = (map_tensors(str(folder / f"{kind}.safetensors")) for kind in ("state", "best"))
        return Checkpoint(progress, dict(state), {name: tensor.clone() for name, tensor in best.items()})
    divided = [map_parts([folder / f"{kind}{part}.safetensors" for part in parts]) for kind in ("state", "best")]
    return Checkpoint(progress, dict(divided[0]), dict(divided[1]))


def _parts(folder: Path) -> list[str]:
    """What the names of the files of each worker end with; only "" for a checkpoint of the first worker."""
    found = sorted(path.stem.removeprefix("checkpoint") for path in folder.glob("checkpoint-*-of-*.json"))
    if not found:
        return [""]
    num_workers = int(found[0].rpartition("-")[2])
    return [f"-{rank:05d}-of-{num_workers:05d}" for rank in range(num_workers)]


def _verify(folder: Path, part: str, fingerprint: str, title: str) -> None:
    try:
        manifest: dict[str, Any] = json.loads((folder / f"checkpoint{part}.json").read_text())
        names = (f"state{part}.safetensors", f"best{part}.safetensors", f"progress{part}.json")
        sums = {file: (digest_of_file(str(folder / file)), manifest["sha256"][file]) for file in names}
    except (OSError, ValueError, KeyError) as error:
        raise ArtifactError(f"checkpoint {title} is incomplete ({type(error).__name__})") from None
    for file, (found, expected) in sums.items():
        if found != expected:
            raise ArtifactError(f"checkpoint {title} is damaged: the sha256 of {file} differs")
    if manifest["fingerprint"] != fingerprint:
        raise ArtifactError(f"checkpoint {title} belongs to a run with other data or another config")


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
