"""The current model: promoted copies of `model/`, and a pointer that moves in one step.

    output_dir/
      model/                             the new model, as training left it
      models/20261120T031500Z-<digest>/  a promoted copy; the pointer names it only after it is complete and verified
      models/current.json                {"current": name, "previous": [names, newest first], "promoted_at", "why"}

The name of a copy shows when it was promoted and from which model; its manifest is authoritative, because an erasure
rewrites a model in place. Scoring and serving use `current_model`; training and evaluation use `model/`. Only one process
may promote at a time (`cllm4rec.evaluation.promotion` holds a lease); any number may read.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Collection
from datetime import UTC, datetime

from fsspec.implementations.local import LocalFileSystem

from cllm4rec.errors import ArtifactError
from cllm4rec.storage import artifacts, files
from cllm4rec.storage.artifacts import Manifest

MODELS = "models"
POINTER = "current.json"

_NAME = re.compile(r"\d{8}T\d{6}Z-[0-9a-f]{12}")


@dataclasses.dataclass(frozen=True)
class Pointer:
    """The content of `current.json`: names below `models/`; `previous` is newest first, for rollbacks."""

    current: str
    previous: tuple[str, ...]
    promoted_at: str
    why: str

    @property
    def names(self) -> tuple[str, ...]:
        return (self.current, *self.previous)


def current_model(output_dir: str) -> str:
    """The URI of the promoted model, or of `model/` if no model was promoted yet.

    Raises ArtifactError if `current.json` is damaged or names a directory that does not exist.
    """
    pointer = read_pointer(output_dir)
    return files.join(output_dir, "model") if pointer is None else _finished(output_dir, pointer.current)


def serving_order(output_dir: str) -> list[str]:
    """URIs of the models to serve: the current one, then those before it, newest first, for a replica that starts while the
    current one is damaged; or `model/` if no model was promoted yet. Whether they exist is not checked.

    Raises ArtifactError if `current.json` is damaged: only the pointer tells a promoted model from one that was rolled back.
    """
    pointer = read_pointer(output_dir)
    if pointer is None:
        return [files.join(output_dir, "model")]
    return [_directory(output_dir, name) for name in pointer.names]


def read_pointer(output_dir: str) -> Pointer | None:
    """None if no model was promoted yet. Raises ArtifactError if the file is damaged."""
    uri = _pointer_uri(output_dir)
    if not files.exists(uri):
        return None
    raw = files.read_json(uri)
    try:
        pointer = Pointer(raw["current"], tuple(raw["previous"]), str(raw["promoted_at"]), str(raw["why"]))
        # Any other name could point outside of models/.
        is_valid = all(_NAME.fullmatch(name) for name in pointer.names)
    except (TypeError, KeyError):
        is_valid = False
    if not is_valid:
        raise ArtifactError(f"{uri} is damaged; restore it from a backup, or remove it and run cllm4rec promote")
    return pointer


def promoted_directories(output_dir: str) -> list[str]:
    """URIs of all copies, oldest first, including those that the pointer does not name; the next promotion removes them."""
    return [_directory(output_dir, name) for name in _names_below(output_dir)]


def promote_directory(output_dir: str, digest: str, why: str, keep: int) -> Pointer:
    """Copy `model/` to `models/` and make the copy current, as `make_current` does.

    digest: of the model that was evaluated. Raises ArtifactError if `model/` is missing, damaged or another one by now.
    """
    source = files.join(output_dir, "model")
    manifest = artifacts.read_manifest(source, "model")
    if manifest.digest != digest:
        raise ArtifactError(f"{source} was replaced meanwhile; run cllm4rec evaluate and cllm4rec promote again")
    return make_current(output_dir, digest, why, keep, lambda target: _copy_verified(source, target, manifest))


def make_current(output_dir: str, digest: str, why: str, keep: int, write: Callable[[str], None]) -> Pointer:
    """Write a model directory below `models/`, move the pointer to it, remove all but the newest `keep` models.

    digest: becomes a part of the name. write: writes the directory at the URI that it gets, whole or not at all. If this is
    interrupted, the current model stays current and complete; the next call removes an unfinished directory.
    """
    before = read_pointer(output_dir)
    _remove_all_but(output_dir, before.names if before else ())
    now = datetime.now(UTC)
    name = f"{now:%Y%m%dT%H%M%SZ}-{digest[:12]}"
    write(_directory(output_dir, name))
    if isinstance(files.filesystem(output_dir)[0], LocalFileSystem):
        os.sync()  # the pointer is written to the disk at once, so its target must be there before
    previous = before.names[: keep - 1] if before else ()
    pointer = _point(output_dir, Pointer(name, previous, now.isoformat(timespec="seconds"), why))
    _remove_all_but(output_dir, pointer.names)
    return pointer


def rollback(output_dir: str) -> tuple[Pointer, Pointer]:
    """Make the previous model current. The other one stays in `models/` until the next promotion.

    Returns the pointer before and after. Raises ArtifactError if there is no previous model, or it is damaged.
    """
    before = read_pointer(output_dir)
    if before is None:
        raise ArtifactError(f"{files.join(output_dir, MODELS)} has no promoted model; run cllm4rec promote first")
    if not before.previous:
        raise ArtifactError(
            f"{before.current} is current, and {files.join(output_dir, MODELS)} has no model promoted before it; a rollback "
            "needs one"
        )
    name, *older = before.previous
    uri = _finished(output_dir, name)
    artifacts.verify_files(uri, artifacts.read_manifest(uri, "model"))
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return before, _point(output_dir, Pointer(name, tuple(older), now, f"rollback from {before.current}"))


def _pointer_uri(output_dir: str) -> str:
    return files.join(output_dir, MODELS, POINTER)


def _directory(output_dir: str, name: str) -> str:
    return files.join(output_dir, MODELS, name)


def _finished(output_dir: str, name: str) -> str:
    uri = _directory(output_dir, name)
    if not files.exists(files.join(uri, artifacts.MANIFEST)):
        raise ArtifactError(
            f"{_pointer_uri(output_dir)} names {name}, which is not a finished model directory; restore it from a "
            "backup, or remove current.json and run cllm4rec promote"
        )
    return uri


def _names_below(output_dir: str, suffixes: str = "") -> list[str]:
    pattern = re.compile(_NAME.pattern + suffixes)
    fs, path = files.filesystem(files.join(output_dir, MODELS))
    fs.invalidate_cache()
    found = fs.ls(path, detail=False) if fs.exists(path) else []
    names = (str(path).rstrip("/").rpartition("/")[2] for path in found)
    return sorted(name for name in names if pattern.fullmatch(name))


def _remove_all_but(output_dir: str, names: Collection[str]) -> None:
    for name in _names_below(output_dir, suffixes=r"(\.old|\.partial)?"):
        if name.partition(".")[0] not in names:
            files.remove_directory(_directory(output_dir, name))


def _copy_verified(source: str, target: str, manifest: Manifest) -> None:
    """Copy every file of the manifest, then the manifest itself: without it a directory is not finished (see artifacts)."""
    try:
        for name in [*manifest.files, artifacts.MANIFEST]:
            files.copy_file(files.join(source, name), files.join(target, name))
        artifacts.verify_files(target, manifest)
        if artifacts.read_manifest(target, "model") != manifest:
            raise ArtifactError(
                f"{source} was replaced while it was copied; run cllm4rec evaluate and cllm4rec promote again"
            )
    except Exception:
        files.remove_directory(target)
        raise


def _point(output_dir: str, pointer: Pointer) -> Pointer:
    files.replace_json(_pointer_uri(output_dir), dataclasses.asdict(pointer))
    return pointer
