"""User and item ↔ index ↔ token id. The only file that adds offsets.

Token ids (method.md, Tokens): words 0..N-1, user i is N+i, item j is N+I+j. NOBODY stands where a user is unknown or
hidden.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from cllm4rec.errors import ArtifactError
from cllm4rec.storage.files import filesystem, join

IntArray = npt.NDArray[np.int64]

NOBODY = -1
"""Token id of an unknown or hidden user, and of padding: read as the zero vector."""


@dataclasses.dataclass(frozen=True)
class TokenSpace:
    """Sizes of the three parts of the token ids: N words, I users, J items."""

    num_words: int
    num_users: int
    num_items: int

    def user_token(self, user_index: Any) -> Any:
        """Token id of user rows; index -1 (unknown) becomes NOBODY. Takes a number or an array."""
        return np.where(np.asarray(user_index) >= 0, self.num_words + np.asarray(user_index), NOBODY)

    def item_token(self, item_index: Any) -> Any:
        return self.num_words + self.num_users + np.asarray(item_index)

    def is_word(self, token: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        return (token >= 0) & (token < self.num_words)

    def is_user(self, token: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        return (token >= self.num_words) & (token < self.num_words + self.num_users)

    def is_item(self, token: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        return token >= self.num_words + self.num_users

    def user_index(self, user_token: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return user_token - self.num_words

    def item_index(self, item_token: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return item_token - self.num_words - self.num_users


class Catalog:
    """The users and items of a prepared data set, in index order (sorted by id), with their texts.

    `item_counts` is each item's number of training interactions: what popularity is measured by.
    """

    def __init__(
        self,
        user_ids: Sequence[str],
        item_ids: Sequence[str],
        user_texts: Sequence[str] | None = None,
        item_texts: Sequence[str] | None = None,
        item_counts: Sequence[int] | None = None,
    ) -> None:
        self.user_ids = np.asarray(user_ids, dtype=object)
        self.item_ids = np.asarray(item_ids, dtype=object)
        self.user_texts = list(user_texts) if user_texts is not None else [""] * len(self.user_ids)
        self.item_texts = list(item_texts) if item_texts is not None else [""] * len(self.item_ids)
        self.item_counts = np.asarray(
            item_counts if item_counts is not None else np.zeros(len(self.item_ids)), np.int64
        )

    @functools.cached_property
    def _user_index(self) -> dict[str, int]:
        return {user_id: index for index, user_id in enumerate(self.user_ids)}

    @functools.cached_property
    def _item_index(self) -> dict[str, int]:
        return {item_id: index for index, item_id in enumerate(self.item_ids)}

    @property
    def num_users(self) -> int:
        return len(self.user_ids)

    @property
    def num_items(self) -> int:
        return len(self.item_ids)

    def token_space(self, num_words: int) -> TokenSpace:
        return TokenSpace(num_words, self.num_users, self.num_items)

    def user_index(self, user_id: str) -> int:
        """Row of a user, -1 where the user was unknown at training."""
        return self._user_index.get(user_id, -1)

    def item_index(self, item_id: str) -> int:
        """Row of an item, -1 where the item was unknown at training."""
        return self._item_index.get(item_id, -1)

    def save(self, directory: str) -> None:
        """Write `users.parquet` (index, id, text) and `items.parquet` (the same and num_train)."""
        users = _table(self.user_ids, self.user_texts)
        items = _table(self.item_ids, self.item_texts).append_column(
            "num_train", pa.array(self.item_counts, pa.int64())
        )
        for name, table in (("users", users), ("items", items)):
            fs, path = filesystem(join(directory, f"{name}.parquet"))
            with fs.open(path, "wb") as stream:
                pq.write_table(table, stream)

    @classmethod
    def load(cls, directory: str) -> Catalog:
        """Raises ArtifactError where one of the two files is missing or damaged."""
        users, items = _read(directory, "users"), _read(directory, "items")
        return cls(users["id"], items["id"], users["text"], items["text"], items["num_train"])

    @classmethod
    def load_without_user_texts(cls, directory: str) -> Catalog:
        """The same with empty texts for users, which no ranking reads and which would be most of it. Raises as `load`."""
        items = _read(directory, "items")
        users = read_ids(directory, "users").to_numpy(zero_copy_only=False)
        return cls(users, items["id"], None, items["text"], items["num_train"])

    @classmethod
    def load_items(cls, directory: str) -> Catalog:
        """The same without its users, whose number has no bound. Raises as `load`."""
        items = _read(directory, "items")
        return cls([], items["id"], [], items["text"], items["num_train"])


def read_sizes(directory: str) -> tuple[int, int]:
    """Numbers of users and items of a catalog, without reading them. Raises ArtifactError as `Catalog.load`."""
    users, items = (_open(directory, name, lambda file: file.metadata.num_rows) for name in ("users", "items"))
    return users, items


def read_ids(directory: str, name: str) -> pa.Array:
    """The ids of `users` or `items` of a catalog by index, as Arrow strings. Raises ArtifactError as `Catalog.load`."""
    ids: pa.Array = _read_table(directory, name, ["index", "id"]).column("id").combine_chunks()
    return ids


def _read(directory: str, name: str) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = _read_table(directory, name).to_pydict()
    return columns


def _read_table(directory: str, name: str, columns: list[str] | None = None) -> pa.Table:
    return _open(directory, name, lambda file: file.read(columns).sort_by("index"))


def _open(directory: str, name: str, read: Callable[[pq.ParquetFile], Any]) -> Any:
    uri = join(directory, f"{name}.parquet")
    fs, path = filesystem(uri)
    try:
        with fs.open(path, "rb") as stream:
            return read(pq.ParquetFile(stream))
    except (OSError, pa.ArrowInvalid) as error:
        what = "missing" if isinstance(error, FileNotFoundError) else "damaged"
        raise ArtifactError(f"{uri} is {what}; run the stage that writes it with --force") from None


def _table(ids: npt.NDArray[Any], texts: list[str]) -> pa.Table:
    return pa.table(
        {
            "index": pa.array(np.arange(len(ids)), pa.int64()),
            "id": pa.array(list(ids), pa.string()),
            "text": pa.array(texts, pa.string()),
        }
    )
