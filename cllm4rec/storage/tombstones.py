"""Erased users, stored as salted digests: an id can be recognized, but no id can be read from the file.

    <output_dir>/erased.json    {"schema_version": 1, "salt": ..., "digests": [...]}, sha256 of salt and user id

Prepare, the nightly job, exports and the Recommender leave these users out. Keep the file as private as the data: anyone
who has it can test whether a guessed id was erased.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import secrets
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cllm4rec.errors import ArtifactError
from cllm4rec.storage.files import digest_of, exists, filesystem, join, read_json, replace_json

logger = logging.getLogger(__name__)

TOMBSTONES = "erased.json"
CHECK_EVERY_S = 1.0
"""How soon a running process takes notice of an erasure."""
_SCHEMA_VERSION = 1
_SALT_BYTES = 16


@dataclasses.dataclass(frozen=True)
class Tombstones:
    """The users of one output_dir who were erased."""

    salt: str = ""
    digests: frozenset[str] = frozenset()

    @classmethod
    def load(cls, output_dir: str) -> Tombstones:
        """Read `erased.json`; empty if there is none. Raises ArtifactError if it is damaged: no user may be let through."""
        uri = join(output_dir, TOMBSTONES)
        if not exists(uri):
            return cls()
        raw = read_json(uri)
        if not _is_ours(raw):
            raise ArtifactError(
                f"{uri} is damaged, so it is unknown who was erased; restore it from a backup, or move it away and erase "
                "those users again"
            )
        return cls(raw["salt"], frozenset(raw["digests"]))

    def __len__(self) -> int:
        return len(self.digests)

    @property
    def digest(self) -> str:
        """sha256 of the set: it changes with every further erased user and is the same for every empty set."""
        return digest_of(sorted(self.digests))

    def hash_of(self, user_id: str) -> str:
        """The digest that replaces a user id in `erased.json` and in receipts; meaningful only with this salt."""
        return hashlib.sha256(f"{self.salt}:{user_id}".encode()).hexdigest()

    def contains(self, user_ids: Sequence[str] | npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """For each user id, whether it was erased. Takes about a second per million ids, and no time if no user was erased."""
        if not self.digests:
            return np.zeros(len(user_ids), bool)
        return np.fromiter((self.hash_of(str(user_id)) in self.digests for user_id in user_ids), bool, len(user_ids))

    def with_users(self, user_ids: Iterable[str]) -> Tombstones:
        """The set with these users added. The salt is drawn for the first user."""
        salted = self if self.salt else dataclasses.replace(self, salt=secrets.token_hex(_SALT_BYTES))
        return dataclasses.replace(salted, digests=salted.digests | {salted.hash_of(user_id) for user_id in user_ids})

    def save(self, output_dir: str) -> None:
        """Replace `erased.json` atomically: readers see the old file until the new one is complete."""
        content = {"schema_version": _SCHEMA_VERSION, "salt": self.salt, "digests": sorted(self.digests)}
        replace_json(join(output_dir, TOMBSTONES), content)


class TombstoneWatcher:
    """The tombstones of an output_dir in a process that runs on: read again when the file changes.

    The file is checked at most once every `every_s` seconds.
    """

    def __init__(self, output_dir: str, every_s: float = CHECK_EVERY_S) -> None:
        """Raises ArtifactError if the file is damaged."""
        self._output_dir, self._every_s = output_dir, every_s
        self._stamp, self._checked_at = self._current_stamp(), time.monotonic()
        self._tombstones = Tombstones.load(output_dir)
        self._has_failed = False

    def current(self) -> Tombstones:
        """The erased users. If the file cannot be read, the last known set stays valid and an error is logged once."""
        if time.monotonic() - self._checked_at >= self._every_s:
            try:
                self._read_if_changed()
                self._has_failed = False
            except Exception as error:  # whatever the storage raises, requests are still answered
                if not self._has_failed:
                    logger.error("The list of erased users cannot be read; the last known list stays valid: %s", error)
                self._has_failed = True
            self._checked_at = time.monotonic()
        return self._tombstones

    def _read_if_changed(self) -> None:
        stamp = self._current_stamp()
        if stamp is None and len(self._tombstones):
            raise ArtifactError(f"{TOMBSTONES} was removed")  # which must not bring an erased user back
        if stamp != self._stamp:
            # The stamp was taken before reading, so a change between the two is found by the next check.
            self._tombstones, self._stamp = Tombstones.load(self._output_dir), stamp

    def _current_stamp(self) -> dict[str, Any] | None:
        """Size, times, inode or ETag: what the file system says of the file without reading it."""
        fs, path = filesystem(join(self._output_dir, TOMBSTONES))
        try:
            return dict(fs.info(path))
        except FileNotFoundError:
            return None


def _is_ours(raw: Any) -> bool:
    if not isinstance(raw, dict) or raw.get("schema_version") != _SCHEMA_VERSION:
        return False
    salt, digests = raw.get("salt"), raw.get("digests")
    return isinstance(salt, str) and isinstance(digests, list) and all(isinstance(digest, str) for digest in digests)
