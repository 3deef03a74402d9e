"""A lease lets one process at a time write a directory. The holder renews it; the lease of a dead process expires.

    with hold(config.run.dump, "the run 1f3a"):
        ...

The lease is a small JSON file, `<directory>.lease`. It is created exclusively, which works on every fsspec file system.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

from cllm4rec.errors import ArtifactError, ResourceError
from cllm4rec.storage.files import exists, filesystem, read_bytes, remove_file, write_bytes

RENEW_S = 5.0
STALE_S = 60.0
_SETTLE_S = 0.5


@contextlib.contextmanager
def hold(directory: str, what: str) -> Iterator[None]:
    """Hold the lease of a directory until the block ends. Raises ResourceError if another process holds it.

    what: names the work in the error that another process gets. A lease is taken over if its process is dead (on the same
    host) or has not renewed it for a minute.
    """
    uri = f"{directory.rstrip('/')}.lease"
    mine = {"what": what, "host": socket.gethostname(), "pid": os.getpid(), "token": uuid.uuid4().hex}
    _take(uri, mine)
    done = threading.Event()
    renewer = threading.Thread(target=_renew, args=(uri, mine, done), daemon=True)
    renewer.start()
    try:
        yield
    finally:
        done.set()
        renewer.join()
        if _token(_read(uri)) == mine["token"]:
            remove_file(uri)


def _take(uri: str, mine: dict[str, Any]) -> None:
    if _create(uri, mine):
        return
    other = _read(uri)
    if other is not None and not _is_dead(uri, other):
        raise ResourceError(
            f"{other.get('what', 'another run')} is at work on {uri.removesuffix('.lease')} (process "
            f"{other.get('pid', 'unknown')} on {other.get('host', 'an unknown host')}); wait until it ends, or {STALE_S:g} s "
            "if it has died, and run the same command again"
        )
    remove_file(uri)
    taken = _create(uri, mine)
    # Two processes may have found the same dead lease, and the slower one may have removed the lease of the faster one.
    time.sleep(_SETTLE_S)
    if not taken or _token(_read(uri)) != mine["token"]:
        raise ResourceError(
            f"another run has just begun on {uri.removesuffix('.lease')}; wait until it ends and run the same command again"
        )


def _create(uri: str, mine: dict[str, Any]) -> bool:
    fs, path = filesystem(uri)
    fs.makedirs(fs._parent(path), exist_ok=True)
    try:
        fs.pipe_file(path, _renewed(mine), mode="create")
    except FileExistsError:
        return False
    return True


def _renewed(mine: dict[str, Any]) -> bytes:
    return json.dumps({**mine, "renewed": time.time()}).encode()


def _renew(uri: str, mine: dict[str, Any], done: threading.Event) -> None:
    while not done.wait(RENEW_S):
        with contextlib.suppress(OSError):  # the storage may be unavailable for a moment
            if exists(uri) and _token(_read(uri)) in (mine["token"], None):
                write_bytes(uri, _renewed(mine))


def _read(uri: str) -> dict[str, Any] | None:
    """The content of a lease; empty while it is being written, None if there is none."""
    try:
        content = json.loads(read_bytes(uri))
    except ArtifactError:
        return None
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _token(lease: dict[str, Any] | None) -> str | None:
    return None if lease is None else lease.get("token")


def _is_dead(uri: str, lease: dict[str, Any]) -> bool:
    if not lease:  # it is being written, or its process died while writing it
        fs, path = filesystem(uri)
        return bool(time.time() - fs.modified(path).timestamp() > STALE_S)
    if lease["host"] == socket.gethostname() and not _is_alive(lease["pid"]):
        return True
    return bool(time.time() - lease["renewed"] > STALE_S)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
