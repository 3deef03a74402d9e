"""Who was erased: known by salted digests alone, so that an id can be recognized and not be read off.

    <output_dir>/erased.json    {"schema_version": 1, "salt": ..., "digests": [...]}, sha256 of salt and user id

Prepare, the nightly job and the endpoint leave out whom it knows. It is a list of people who asked to be forgotten: who
has the file and guesses an id can test the guess, so keep it as private as the data.
"""

from __future__ import annotations

import dataclasses
import hashlib
import secrets
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cllm4rec.errors import ArtifactError
from cllm4rec.storage.files import digest_of, exists, join, read_json, replace_json

TOMBSTONES = "erased.json"
_SCHEMA_VERSION = 1
_SALT_BYTES = 16


@dataclasses.dataclass(frozen=True)
class Tombstones:
    """The users of one output_dir who were erased."""

    salt: str = ""
    digests: frozenset[str] = frozenset()

    @classmethod
    def load(cls, output_dir: str) -> Tombstones:
        """Read `erased.json`; empty where there is none. Raises ArtifactError where it is damaged: nobody may pass then."""
        uri = join(output_dir, TOMBSTONES)
        if not exists(uri):
            return cls()
        raw = read_json(uri)
        if not _is_ours(raw):
            raise ArtifactError(
                f"{uri} is damaged, so that nobody can tell who was erased; restore it from a backup, or erase those users "
                "again after you have moved it away"
            )
        return cls(raw["salt"], frozenset(raw["digests"]))

    def __len__(self) -> int:
        return len(self.digests)

    @property
    def digest(self) -> str:
        """sha256 of the set: another as soon as one more user is erased, the same for every empty set."""
        return digest_of(sorted(self.digests))

    def hash_of(self, user_id: str) -> str:
        """What stands for a user id in `erased.json` and in receipts; meaningful only with this salt."""
        return hashlib.sha256(f"{self.salt}:{user_id}".encode()).hexdigest()

    def contains(self, user_ids: Sequence[str] | npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """For each user id, whether it was erased. Costs nothing while nobody was, else about a second a million ids."""
        if not self.digests:
            return np.zeros(len(user_ids), bool)
        return np.fromiter((self.hash_of(str(one)) in self.digests for one in user_ids), bool, len(user_ids))

    def with_users(self, user_ids: Iterable[str]) -> Tombstones:
        """These users as well; the first of all draws the salt."""
        salted = self if self.salt else dataclasses.replace(self, salt=secrets.token_hex(_SALT_BYTES))
        return dataclasses.replace(salted, digests=salted.digests | {salted.hash_of(one) for one in user_ids})

    def save(self, output_dir: str) -> None:
        """Write `erased.json` whole or not at all: readers see the old one until the new one is there."""
        content = {"schema_version": _SCHEMA_VERSION, "salt": self.salt, "digests": sorted(self.digests)}
        replace_json(join(output_dir, TOMBSTONES), content)


def _is_ours(raw: Any) -> bool:
    if not isinstance(raw, dict) or raw.get("schema_version") != _SCHEMA_VERSION:
        return False
    salt, digests = raw.get("salt"), raw.get("digests")
    return isinstance(salt, str) and isinstance(digests, list) and all(isinstance(one, str) for one in digests)
