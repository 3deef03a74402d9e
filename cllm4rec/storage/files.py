"""Files by path or URI: a local path or any fsspec URI (s3://, gs://, ...)."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from cllm4rec.errors import ArtifactError, ConfigError


def filesystem(uri: str) -> tuple[Any, str]:
    """The fsspec file system of a URI and the path on it; local paths become absolute."""
    fs, path = fsspec.core.url_to_fs(uri)
    return fs, path


def absolute(uri: str) -> str:
    """The URI in a form that does not depend on the working directory. Of a chained URI the last link names the place."""
    *outer, last = uri.split("::")
    fs, path = filesystem(last)
    return "::".join([*outer, path if isinstance(fs, LocalFileSystem) else str(fs.unstrip_protocol(path))])


def join(uri: str, *parts: str) -> str:
    return "/".join([uri.rstrip("/"), *parts])


def digest_of(value: Any) -> str:
    """The sha256 of a JSON-like value; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def digest_of_file(uri: str) -> str:
    """The sha256 of a file, which is read in pieces."""
    fs, path = filesystem(uri)
    sha = hashlib.sha256()
    with fs.open(path, "rb") as stream:
        while piece := stream.read(1 << 20):
            sha.update(piece)
    return sha.hexdigest()


def write_bytes(uri: str, content: bytes) -> None:
    fs, path = filesystem(uri)
    fs.makedirs(fs._parent(path), exist_ok=True)
    with fs.open(path, "wb") as stream:
        stream.write(content)


def append_bytes(uri: str, content: bytes) -> None:
    """Append to a file, which is created if necessary. On object stores, which cannot append, it is rewritten."""
    fs, path = filesystem(uri)
    if isinstance(fs, LocalFileSystem):
        fs.makedirs(fs._parent(path), exist_ok=True)
        with fs.open(path, "ab") as stream:
            stream.write(content)
    else:
        write_bytes(uri, (read_bytes(uri) if exists(uri) else b"") + content)


def read_bytes(uri: str) -> bytes:
    fs, path = filesystem(uri)
    try:
        content: bytes = fs.cat_file(path)
    except FileNotFoundError:
        raise ArtifactError(f"{uri} is missing; run the stage that writes it") from None
    return content


def copy_file(source: str, target: str) -> None:
    """Copy a file in pieces, also between file systems."""
    (source_fs, source_path), (target_fs, target_path) = filesystem(source), filesystem(target)
    target_fs.makedirs(target_fs._parent(target_path), exist_ok=True)
    with source_fs.open(source_path, "rb") as reader, target_fs.open(target_path, "wb") as writer:
        shutil.copyfileobj(reader, writer, 1 << 20)


def write_json(uri: str, value: Any) -> None:
    write_bytes(uri, (json.dumps(value, indent=2, sort_keys=True, default=str) + "\n").encode())


def replace_json(uri: str, value: Any) -> None:
    """Replace a small file atomically: readers see either the old or the new content, also after a crash."""
    content = (json.dumps(value, indent=2, sort_keys=True, default=str) + "\n").encode()
    fs, path = filesystem(uri)
    fs.makedirs(fs._parent(path), exist_ok=True)
    if not isinstance(fs, LocalFileSystem):
        fs.pipe_file(path, content)  # an object store shows an object only when it is complete
        return
    draft = f"{path}.partial"
    with open(draft, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(draft, path)
    folder = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        os.fsync(folder)  # so that the new name survives a power failure
    finally:
        os.close(folder)


def read_json(uri: str) -> Any:
    try:
        return json.loads(read_bytes(uri))
    except ValueError:
        raise ArtifactError(f"{uri} is damaged (it is not JSON); run the stage that writes it with --force") from None


def list_files(uri: str) -> list[str]:
    """Paths of all files below a directory, relative to it, sorted. Markers of empty folders on object stores are no files."""
    fs, root = filesystem(uri)
    names = (str(path)[len(root.rstrip("/")) + 1 :] for path in fs.find(root))
    return sorted(name for name in names if name and not name.endswith("/"))


def exists(uri: str) -> bool:
    fs, path = filesystem(uri)
    return bool(fs.exists(path))


def check_writable(uri: str, setting: str) -> None:
    """Raise ConfigError if a local directory cannot be written, or created. Creates nothing."""
    fs, path = filesystem(uri)
    if not isinstance(fs, LocalFileSystem):
        return
    parent = path
    while not os.path.lexists(parent):
        parent = os.path.dirname(parent)
    try:
        with tempfile.TemporaryDirectory(dir=parent):
            pass
    except OSError as error:
        raise ConfigError(
            f"cannot write to {setting} {uri} ({error.strerror}: {parent}); choose a directory that you can write"
        ) from None


def remove_file(uri: str) -> None:
    fs, path = filesystem(uri)
    if fs.exists(path):
        fs.rm_file(path)


def remove_directory(uri: str) -> None:
    fs, path = filesystem(uri)
    if fs.exists(path):
        fs.rm(path, recursive=True)


def read_tables(paths: Sequence[str], columns: list[str] | None = None) -> pa.Table:
    """Several Parquet files as one table, in this order. Raises ArtifactError if one is missing or damaged."""
    return pa.concat_tables([_read_table(uri, columns) for uri in paths])


def _read_table(uri: str, columns: list[str] | None) -> pa.Table:
    fs, path = filesystem(uri)
    try:
        with fs.open(path, "rb") as stream:
            return pq.read_table(stream, columns=columns)
    except FileNotFoundError:
        raise ArtifactError(f"{uri} is missing; run the stage that writes it with --force") from None
    except (pa.ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None:  # the storage failed, not the file
            raise
        reason = str(error).strip().partition("\n")[0]
        raise ArtifactError(f"{uri} is damaged ({reason}); run the stage that writes it with --force") from None


def write_table(table: pa.Table, uri: str, row_group_size: int | None = None) -> None:
    """Write one Parquet file; its folder is created."""
    fs, path = filesystem(uri)
    fs.makedirs(fs._parent(path), exist_ok=True)
    with fs.open(path, "wb") as stream:
        pq.write_table(table, stream, row_group_size=row_group_size)
