"""The directories between stages: each is complete or absent, and its manifest describes it.

    with write_directory(uri, kind="model", inputs={"prepared": digest}, config=config) as draft:
        ...                                # write files below draft.path, fill draft.counts
    manifest = read_manifest(uri, kind="model")

Files are written to `<uri>.partial`. `manifest.json` (sha256 of every file, digests of the inputs, resolved config) is
written last; then the directory is moved to its name, while the directory it replaces waits as `<uri>.old`. A directory
without a manifest does not count as existing. Paths are local or any fsspec URI.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from cllm4rec.errors import ArtifactError, Cllm4RecError, ResourceError, is_full_disk
from cllm4rec.storage.files import (
    digest_of,
    digest_of_file,
    exists,
    filesystem,
    join,
    list_files,
    read_json,
    remove_directory,
    remove_file,
    write_json,
)

SCHEMA_VERSION = 1
_COMMANDS = {"prepared": "prepare", "backbone": "backbone", "pretrained": "pretrain", "model": "finetune"} | {
    "evaluation": "evaluate", "histories": "nightly"
}  # fmt: skip
"""Kind → the command that writes it, for messages."""
MANIFEST = "manifest.json"
EXTENDED_FROM = "extended_from"
"""In the inputs of a model to which items were added after training: the digest of the model that was trained."""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The description of a finished directory."""

    kind: str
    schema_version: int
    counts: dict[str, Any]
    files: dict[str, dict[str, Any]]
    inputs: dict[str, str]
    config: dict[str, Any]
    digest: str
    created: str


@dataclasses.dataclass
class Draft:
    """A directory that is being written: files go below `path`, numbers for the manifest into `counts`."""

    uri: str
    counts: dict[str, Any] = dataclasses.field(default_factory=dict)

    def path(self, *parts: str) -> str:
        return join(self.uri, *parts)


@contextlib.contextmanager
def write_directory(uri: str, *, kind: str, inputs: Mapping[str, str], config: Mapping[str, Any]) -> Iterator[Draft]:
    """Write a directory under a temporary name; on success add the manifest and replace the directory at `uri`.

    On an error the draft is removed and the directory at `uri` stays. A full disk becomes a ResourceError. Raises
    ArtifactError if `uri` has files that are not a directory of this kind, because they would be deleted.
    """
    draft = Draft(f"{uri.rstrip('/')}.partial")
    _bring_back(uri)
    _refuse_foreign(uri, kind)
    remove_directory(draft.uri)
    fs, path = filesystem(draft.uri)
    try:
        fs.makedirs(path, exist_ok=True)
        yield draft
        write_json(draft.path(MANIFEST), _manifest(draft, kind, inputs, config))
        _move_into_place(draft.uri, uri)
    except Exception as error:
        if is_full_disk(error) and not isinstance(error, Cllm4RecError):
            raise ResourceError(
                f"the disk is full while writing {uri}; free some space and run the same command again"
            ) from error
        raise
    finally:
        remove_directory(draft.uri)


def read_manifest(uri: str, kind: str) -> Manifest:
    """The manifest of a finished directory. Raises ArtifactError if it is missing, damaged or of another kind."""
    if not exists(join(uri, MANIFEST)):
        what = f"run cllm4rec {_COMMANDS[kind]}" if kind in _COMMANDS else "run the stage that writes it"
        raise ArtifactError(f"{uri} is not a finished {kind} directory (no {MANIFEST}); check output_dir, or {what}")
    raw = read_json(join(uri, MANIFEST))
    # Checked first: another version may have other fields.
    if isinstance(raw, dict) and raw.get("schema_version", SCHEMA_VERSION) != SCHEMA_VERSION:
        raise ArtifactError(
            f"{uri} was written with schema version {raw['schema_version']} and this code reads {SCHEMA_VERSION}; "
            "run the stage that writes it again"
        )
    try:
        manifest = Manifest(**raw)
    except TypeError:
        raise ArtifactError(f"{uri}/{MANIFEST} is damaged; run the stage that writes it with --force") from None
    if manifest.kind != kind:
        raise ArtifactError(f"{uri} is a {manifest.kind} directory, but a {kind} directory is needed; check the path")
    return manifest


def verify_files(uri: str, manifest: Manifest, names: Iterable[str] | None = None) -> None:
    """Compare every file, or those of `names` that the manifest has, with its sha256 in the manifest.

    Raises ArtifactError naming the first file that differs and the command that writes it.
    """
    fs, root = filesystem(uri)
    command = f"cllm4rec {_COMMANDS[manifest.kind]}" if manifest.kind in _COMMANDS else "its stage"
    for name in manifest.files if names is None else [name for name in names if name in manifest.files]:
        if not fs.exists(f"{root}/{name}"):
            raise ArtifactError(f"{uri}/{name} is missing; copy the directory again or run {command} with --force")
        if digest_of_file(join(uri, name)) != manifest.files[name]["sha256"]:
            raise ArtifactError(
                f"{uri}/{name} is damaged (sha256 differs); copy it again or run {command} with --force"
            )


def is_current(uri: str, kind: str, inputs: Mapping[str, str]) -> bool:
    """Whether a finished directory was made from exactly these inputs, so that its stage can be skipped.

    A directory that cannot be read is not current, so its stage writes it again. Only that stage may call this.
    """
    _bring_back(uri)
    try:
        return read_manifest(uri, kind).inputs == dict(inputs)
    except ArtifactError:
        return False


def settle(uri: str) -> None:
    """Clean up after interrupted writers: a replaced directory gets its name back if that is free; drafts are removed.

    No writer may be at work.
    """
    _bring_back(uri)
    for leftover in (_old(uri), f"{uri.rstrip('/')}.partial"):
        remove_directory(leftover)


def _manifest(draft: Draft, kind: str, inputs: Mapping[str, str], config: Mapping[str, Any]) -> dict[str, Any]:
    fs, root = filesystem(draft.uri)
    files = {
        name: {"sha256": digest_of_file(draft.path(name)), "bytes": fs.size(f"{root}/{name}")}
        for name in list_files(draft.uri)
    }
    manifest = Manifest(
        kind=kind,
        schema_version=SCHEMA_VERSION,
        counts=draft.counts,
        files=files,
        inputs=dict(inputs),
        config=dict(config),
        digest=digest_of(
            {"kind": kind, "files": {name: entry["sha256"] for name, entry in files.items() if _is_content(name)}}
        ),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    return dataclasses.asdict(manifest)


def _is_content(name: str) -> bool:
    """False for logs (`metrics.jsonl`), which contain times: equal results should have equal digests and versions."""
    return not name.endswith(".jsonl")


def _move_into_place(draft_uri: str, uri: str) -> None:
    old_uri = _old(uri)
    remove_directory(old_uri)
    if exists(uri):
        move_directory(uri, old_uri)
    move_directory(draft_uri, uri)
    remove_directory(old_uri)


def _bring_back(uri: str) -> None:
    """Undo a move that a crash interrupted: the replaced directory gets its name back."""
    if exists(join(_old(uri), MANIFEST)) and not exists(join(uri, MANIFEST)):
        remove_directory(uri)
        move_directory(_old(uri), uri)


def _old(uri: str) -> str:
    return f"{uri.rstrip('/')}.old"


def move_directory(source_uri: str, target_uri: str) -> None:
    """Rename a finished directory: atomically on a local disk, elsewhere with the manifest last."""
    (fs, source), (_, target) = filesystem(source_uri), filesystem(target_uri)
    if isinstance(fs, LocalFileSystem):
        os.rename(source, target)
        return
    for name in sorted(list_files(source_uri), key=lambda name: name == MANIFEST):
        fs.makedirs(fs._parent(f"{target}/{name}"), exist_ok=True)
        fs.copy(f"{source}/{name}", f"{target}/{name}")
    remove_file(join(source_uri, MANIFEST))  # first, so that a remainder of the source is not a finished directory
    remove_directory(source_uri)


def _refuse_foreign(uri: str, kind: str) -> None:
    fs, _ = filesystem(uri)
    if exists(join(uri, MANIFEST)):
        is_foreign = _kind_of(uri) not in (kind, None)
    else:
        # On object stores a directory appears file by file; without a manifest it may be an interrupted move.
        is_foreign = isinstance(fs, LocalFileSystem) and bool(list_files(uri))
    if is_foreign:
        raise ArtifactError(
            f"{uri} has files that no {kind} stage wrote, and they would be deleted; move them away or set another "
            "output_dir"
        )


def _kind_of(uri: str) -> str | None:
    """The kind in a manifest; None if it is damaged."""
    try:
        raw = read_json(join(uri, MANIFEST))
    except ArtifactError:
        return None
    return raw.get("kind") if isinstance(raw, dict) else None
