"""One raw file: opened, unpacked, and what its name and folders say. Everything else sees bytes, lines or Parquet batches."""

from __future__ import annotations

import bz2
import codecs
import gzip
import lzma
import posixpath
import urllib.parse
import zlib
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cllm4rec.data.formats import Layout, short_name
from cllm4rec.errors import DataError
from cllm4rec.storage.files import filesystem


def _unpack_zstandard(stream: Any) -> Any:
    return pa.CompressedInputStream(pa.PythonFile(stream, mode="r"), "zstd")


PACKED: dict[str, tuple[str, bytes, Callable[[Any], Any]]] = {
    ".gz": ("gzip", b"\x1f\x8b", lambda stream: gzip.GzipFile(fileobj=stream, mode="rb")),
    ".bz2": ("bzip2", b"BZh", bz2.BZ2File),
    ".xz": ("xz", b"\xfd7zXZ\x00", lzma.LZMAFile),
    ".zst": ("Zstandard", b"\x28\xb5\x2f\xfd", _unpack_zstandard),
}
"""End of the name → what it is called, its first bytes, and what unpacks it."""
ARCHIVES = {".zip": "zip", ".tar": "tar", ".tgz": "tar", ".tar.gz": "tar", ".tar.bz2": "tar", ".tar.xz": "tar"}
"""End of the name → the protocol of fsspec that opens members of the archive."""
_HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"


def open_file(file: str, layout: Layout) -> Any:
    """The bytes of a file, unpacked if its name says that it is packed. Raises DataError if name and content differ."""
    fs, path = filesystem(file)
    label = f"{short_name(file)} (data.{layout.role})"
    for end, protocol in ARCHIVES.items():
        if path.endswith(end):
            raise DataError(f"{label} is an archive; name its members, as in {protocol}://*.csv::{file}")
    stream = fs.open(path, "rb")
    head = stream.read(6)
    stream.seek(0)
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{label} is UTF-16; write it as UTF-8, for example with iconv -f UTF-16 -t UTF-8")
    for end, (name, magic, unpack) in PACKED.items():
        if path.endswith(end):
            if head and not head.startswith(magic):
                raise DataError(f"{label} is not a {name} file; rename it without {end} or pack it again")
            return unpack(stream) if head else stream
        if head.startswith(magic) and not path.endswith(tuple(PACKED)):
            raise DataError(f"{label} is a {name} file; give it a name that ends in {end}")
    return stream


def is_damage(error: Exception) -> bool:
    """Whether an error while reading means that a packed file is damaged or cut short, and not that storage failed."""
    if isinstance(error, (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)):
        return True
    return type(error) is OSError and error.errno is None  # how bzip2 and Zstandard say it


def open_parquet(file: str, layout: Layout) -> Any:
    fs, path = filesystem(file)
    label = short_name(file)
    if not fs.size(path):
        raise DataError(f"{label} (data.{layout.role}) is empty; write it again or leave it out")
    try:
        return pq.ParquetFile(fs.open(path, "rb"))
    except pa.ArrowInvalid:
        raise DataError(f"{label} is not a parquet file; correct data.{layout.role}.format") from None


def partitions(file: str) -> dict[str, str | None]:
    """The columns that stand in the names of folders, as Hive, Spark and Delta write them: day=2020-01-31/part-0.parquet."""
    found: dict[str, str | None] = {}
    for folder in posixpath.dirname(file).split("/"):
        name, equals, value = folder.partition("=")
        if equals and name:
            found[urllib.parse.unquote(name)] = None if value == _HIVE_NULL else urllib.parse.unquote(value)
    return found
