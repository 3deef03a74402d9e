"""Who was erased, as the endpoint sees it while it runs."""

from __future__ import annotations

import logging
import time
from typing import Any

from cllm4rec.errors import ArtifactError
from cllm4rec.storage.files import filesystem, join
from cllm4rec.storage.tombstones import TOMBSTONES, Tombstones

log = logging.getLogger("ray.serve")

LOOK_EVERY_S = 1.0


class ErasedUsers:
    """The tombstones of an output_dir, read again when the file has changed, at most once every `every_s` seconds."""

    def __init__(self, output_dir: str, every_s: float = LOOK_EVERY_S) -> None:
        """Raises ArtifactError where the file is damaged."""
        self._output_dir, self._every_s = output_dir, every_s
        self._stamp, self._looked_at = self._current_stamp(), time.monotonic()
        self._tombstones = Tombstones.load(output_dir)
        self._is_told = False

    def now(self) -> Tombstones:
        """Whom to know no more. A file that cannot be read leaves those known so far, and is logged once."""
        if time.monotonic() - self._looked_at >= self._every_s:
            try:
                self._look()
                self._is_told = False
            except Exception as error:  # answers go on, whatever the storage raises
                if not self._is_told:
                    log.error("The list of erased users cannot be read, the one known so far stays: %s", error)
                self._is_told = True
            self._looked_at = time.monotonic()
        return self._tombstones

    def _look(self) -> None:
        stamp = self._current_stamp()
        if stamp is None and len(self._tombstones):
            raise ArtifactError(f"{TOMBSTONES} is gone")  # nobody comes back by that
        if stamp != self._stamp:
            # The stamp from before the reading: what changes between the two is read again next time.
            self._tombstones, self._stamp = Tombstones.load(self._output_dir), stamp

    def _current_stamp(self) -> dict[str, Any] | None:
        """Size, times, inode or ETag: what the file system tells without reading."""
        fs, path = filesystem(join(self._output_dir, TOMBSTONES))
        try:
            return dict(fs.info(path))
        except FileNotFoundError:
            return None
