"""What may not be recommended, whatever the scores say: one place for the batch job and the endpoint."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from cllm4rec import artifacts
from cllm4rec.catalog import Catalog
from cllm4rec.data.ragged import Ragged
from cllm4rec.errors import ArtifactError, DataError


@dataclasses.dataclass(frozen=True)
class Rules:
    """`deny`: item indices that nobody is recommended, ascending and without repeats."""

    deny: npt.NDArray[np.int64] = dataclasses.field(default_factory=lambda: np.empty(0, np.int64))

    def denied(self, num_users: int) -> Ragged:
        """The deny list as a row for every user."""
        offsets = np.arange(num_users + 1, dtype=np.int64) * len(self.deny)
        return Ragged(np.tile(self.deny, num_users), offsets)


def read_rules(deny_items: str | None, catalog: Catalog) -> tuple[Rules, int]:
    """Rules from a file with one item id a line, and how many of its ids the catalogue does not know.

    Raises DataError where the file is missing or not UTF-8.
    """
    indices = np.array([catalog.item_index(item_id) for item_id in read_deny_list(deny_items)], np.int64)
    return Rules(np.unique(indices[indices >= 0])), int((indices < 0).sum())


def read_deny_list(deny_items: str | None) -> list[str]:
    """The item ids of a deny list; none without a file. Raises as `read_rules`."""
    if deny_items is None:
        return []
    try:
        lines = artifacts.read_bytes(deny_items).decode("utf-8").splitlines()
    except ArtifactError:
        raise DataError(
            f"the deny list {deny_items} does not exist; correct score.rules.deny or set it to null"
        ) from None
    except UnicodeDecodeError:
        raise DataError(f"the deny list {deny_items} is not UTF-8; write one item id a line") from None
    return [line.strip() for line in lines if line.strip()]
