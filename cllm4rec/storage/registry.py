"""Which model answers: promoted copies of `model/`, and a pointer that moves in one step.

    output_dir/
      model/                             the candidate, as training left it
      models/20261120T031500Z-<digest>/  a promoted copy, whole and verified before the pointer names it
      models/current.json                {"current": name, "previous": [names, newest first], "promoted_at", "why"}

A directory's name tells when it was promoted and from what; its own manifest is what counts, for an erasure rewrites a
model in place. Whoever scores or serves asks `current_model`; training and evaluation go on with `model/`. One process
promotes at a time (`cllm4rec.evaluation.promotion` sees to that); any number may read.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Collection
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
    """`current.json`: names below `models/`; `previous` newest first, for rollbacks."""

    current: str
    previous: tuple[str, ...]
    promoted_at: str
    why: str

    @property
    def names(self) -> tuple[str, ...]:
        return (self.current, *self.previous)


def current_model(output_dir: str) -> str:
    """URI of the promoted model directory, or of `model/` where nothing was promoted yet.

    Raises ArtifactError where `current.json` is damaged or names a directory that is not there.
    """
    pointer = read_pointer(output_dir)
    return files.join(output_dir, "model") if pointer is None else _finished(output_dir, pointer.current)


def read_pointer(output_dir: str) -> Pointer | None:
    """None where nothing was promoted yet. Raises ArtifactError where the file is damaged."""
    uri = _pointer_uri(output_dir)
    if not files.exists(uri):
        return None
    raw = files.read_json(uri)
    try:
        pointer = Pointer(raw["current"], tuple(raw["previous"]), str(raw["promoted_at"]), str(raw["why"]))
        # A name that is none of ours could lead anywhere.
        is_ours = all(_NAME.fullmatch(name) for name in pointer.names)
    except (TypeError, KeyError):
        is_ours = False
    if not is_ours:
        raise ArtifactError(f"{uri} is damaged; bring it back from a backup, or remove it and promote again")
    return pointer


def promoted_directories(output_dir: str) -> list[str]:
    """URIs of all promoted copies, oldest first; also of those no pointer names, which the next promotion removes."""
    return [_directory(output_dir, name) for name in _names_below(output_dir)]


def promote_directory(output_dir: str, digest: str, why: str, keep: int) -> Pointer:
    """Copy `model/` to `models/`, verify the copy, point to it, drop the oldest beyond `keep` models.

    digest: of the model that was judged. Wherever this stops, what was current still is, and whole; a copy left behind
    is removed by the next promotion. Raises ArtifactError where `model/` is missing, damaged or another by now.
    """
    source = files.join(output_dir, "model")
    manifest = artifacts.read_manifest(source, "model")
    if manifest.digest != digest:
        raise ArtifactError(f"{source} was replaced meanwhile; run cllm4rec evaluate and promote again")
    before = read_pointer(output_dir)
    _remove_all_but(output_dir, before.names if before else ())
    now = datetime.now(UTC)
    name = f"{now:%Y%m%dT%H%M%SZ}-{digest[:12]}"
    _copy_verified(source, _directory(output_dir, name), manifest)
    previous = before.names[: keep - 1] if before else ()
    pointer = _point(output_dir, Pointer(name, previous, now.isoformat(timespec="seconds"), why))
    _remove_all_but(output_dir, pointer.names)
    return pointer


def rollback(output_dir: str) -> tuple[Pointer, Pointer]:
    """Point to the model that was current before; what is left is still there to be looked at until the next promotion.

    Returns the pointer as it was and as it is. Raises ArtifactError where there is no earlier model, or it is damaged.
    """
    before = read_pointer(output_dir)
    if before is None or not before.previous:
        raise ArtifactError(f"{files.join(output_dir, MODELS)} holds no earlier model to go back to; promote one")
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
            f"{_pointer_uri(output_dir)} names {name}, which is no finished model directory; bring it back from a "
            "backup, or remove the pointer and promote again"
        )
    return uri


def _names_below(output_dir: str, suffixes: str = "") -> list[str]:
    pattern = re.compile(_NAME.pattern + suffixes)
    fs, path = files.filesystem(files.join(output_dir, MODELS))
    fs.invalidate_cache()
    found = fs.ls(path, detail=False) if fs.exists(path) else []
    names = (str(one).rstrip("/").rpartition("/")[2] for one in found)
    return sorted(name for name in names if pattern.fullmatch(name))


def _remove_all_but(output_dir: str, names: Collection[str]) -> None:
    for name in _names_below(output_dir, suffixes=r"(\.old|\.partial)?"):
        if name.partition(".")[0] not in names:
            files.remove_directory(_directory(output_dir, name))


def _copy_verified(source: str, target: str, manifest: Manifest) -> None:
    """Every file of the manifest, then the manifest itself: without it a directory is not there (see artifacts)."""
    try:
        for name in [*manifest.files, artifacts.MANIFEST]:
            files.copy_file(files.join(source, name), files.join(target, name))
        artifacts.verify_files(target, manifest)
        if artifacts.read_manifest(target, "model") != manifest:
            raise ArtifactError(f"{source} was replaced while it was copied; run cllm4rec evaluate and promote again")
    except Exception:
        files.remove_directory(target)
        raise
    if isinstance(files.filesystem(target)[0], LocalFileSystem):
        os.sync()  # the pointer is on the disk at once: what it names must be there before


def _point(output_dir: str, pointer: Pointer) -> Pointer:
    files.replace_json(_pointer_uri(output_dir), dataclasses.asdict(pointer))
    return pointer
