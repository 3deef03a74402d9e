"""Users and items: id ↔ index ↔ token id. The only file that adds offsets.

Token ids (docs/method.md, Tokens): words are 0..N-1, user i is N+i, item j is N+I+j. NOBODY replaces a user who is
unknown or hidden.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cllm4rec.arrays.ragged import Ragged
from cllm4rec.errors import ArtifactError
from cllm4rec.storage.files import filesystem, join
from cllm4rec.typing import Array, BoolArray, IntArray, ObjectArray

NOBODY = -1
"""Token id of an unknown or hidden user and of padding. Its embedding is the zero vector."""


@dataclasses.dataclass(frozen=True)
class TokenSpace:
    """Sizes of the three parts of the token ids: N words, I users, J items."""

    num_words: int
    num_users: int
    num_items: int

    def user_token(self, user_index: Any) -> Any:
        """Token id of a user index, or of an array of them; -1 (unknown) becomes NOBODY."""
        return np.where(np.asarray(user_index) >= 0, self.num_words + np.asarray(user_index), NOBODY)

    def item_token(self, item_index: Any) -> Any:
        return self.num_words + self.num_users + np.asarray(item_index)

    def is_word(self, token: Array) -> BoolArray:
        return (token >= 0) & (token < self.num_words)

    def is_user(self, token: Array) -> BoolArray:
        return (token >= self.num_words) & (token < self.num_words + self.num_users)

    def is_item(self, token: Array) -> BoolArray:
        return token >= self.num_words + self.num_users

    def user_index(self, user_token: Array) -> Array:
        return user_token - self.num_words

    def item_index(self, item_token: Array) -> Array:
        return item_token - self.num_words - self.num_users


Ids = Sequence[str] | ObjectArray
"""Id strings as a list, a numpy array of objects or (untyped) an Arrow array, chunked or not."""


class IdMap:
    """Ids → their indices in a list of distinct ids; -1 for an id that is not in it.

    index_of = IdMap(["B1", "B2"])
    index_of(["B2", "B9"])            # array([1, -1])
    index_of.one("B2")                # 1
    """

    def __init__(self, ids: Ids) -> None:
        self._ids = ids

    def __len__(self) -> int:
        return len(self._ids)

    def __call__(self, ids: Ids) -> IntArray:
        """The index of each of `ids`."""
        found = pc.index_in(_strings(ids), value_set=self._value_set)
        return np.asarray(found.fill_null(-1).to_numpy(zero_copy_only=False), np.int64)

    def one(self, id_: str) -> int:
        """The index of one id. The first call builds a dictionary of all ids, so later calls are fast."""
        return self._index.get(id_, -1)

    @functools.cached_property
    def _value_set(self) -> pa.Array:
        return _strings(self._ids)

    @functools.cached_property
    def _index(self) -> dict[str, int]:
        ids = self._ids.to_pylist() if isinstance(self._ids, pa.Array | pa.ChunkedArray) else self._ids
        return {id_: index for index, id_ in enumerate(ids)}


def remap_items(items: Ragged, index_of: IntArray) -> Ragged:
    """The same rows in other item indices, without the items that have none: `index_of[old]` is the new one or -1."""
    values = index_of[items.values]
    return Ragged(values, items.offsets).where(values >= 0)


def _strings(ids: Ids) -> pa.Array:
    """One Arrow array of strings."""
    if isinstance(ids, pa.ChunkedArray):
        return pa.concat_arrays([pa.array([], pa.string()), *ids.cast(pa.string()).chunks])
    return ids.cast(pa.string()) if isinstance(ids, pa.Array) else pa.array(ids, pa.string())


class Catalog:
    """The users and items of a prepared data set, in index order (sorted by id), with their texts.

    `item_counts` is the number of training interactions of each item, which defines its popularity.
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
    def user_map(self) -> IdMap:
        """User ids → row numbers, -1 for users that were unknown at training."""
        return IdMap(self.user_ids)

    @functools.cached_property
    def item_map(self) -> IdMap:
        """Item ids → row numbers, -1 for items that were unknown at training."""
        return IdMap(self.item_ids)

    @property
    def num_users(self) -> int:
        return len(self.user_ids)

    @property
    def num_items(self) -> int:
        return len(self.item_ids)

    def token_space(self, num_words: int) -> TokenSpace:
        return TokenSpace(num_words, self.num_users, self.num_items)

    def user_index(self, user_id: str) -> int:
        """Row number of one user, -1 if the user was unknown at training."""
        return self.user_map.one(user_id)

    def item_index(self, item_id: str) -> int:
        """Row number of one item, -1 if the item was unknown at training."""
        return self.item_map.one(item_id)

    def save(self, directory: str) -> None:
        """Write `users.parquet` (index, id, text) and `items.parquet` (the same columns and num_train)."""
        _write(_table(self.user_ids, self.user_texts), directory, "users")
        self.save_items(directory)

    def save_items(self, directory: str) -> None:
        """Write `items.parquet`."""
        counts = pa.array(self.item_counts, pa.int64())
        _write(_table(self.item_ids, self.item_texts).append_column("num_train", counts), directory, "items")

    @classmethod
    def load(cls, directory: str) -> Catalog:
        """Read both files. Raises ArtifactError if one of them is missing or damaged."""
        users, items = _read(directory, "users"), _read(directory, "items")
        return cls(users["id"], items["id"], users["text"], items["text"], items["num_train"])

    @classmethod
    def load_without_user_texts(cls, directory: str) -> Catalog:
        """Like `load`, with empty texts for users: ranking never reads them, and they are most of the bytes."""
        items = _read(directory, "items")
        users = read_ids(directory, "users").to_numpy(zero_copy_only=False)
        return cls(users, items["id"], None, items["text"], items["num_train"])

    @classmethod
    def load_items(cls, directory: str) -> Catalog:
        """Like `load`, without users. Their number has no bound."""
        items = _read(directory, "items")
        return cls([], items["id"], [], items["text"], items["num_train"])


def read_sizes(directory: str) -> tuple[int, int]:
    """The number of users and of items, from the metadata of the files. Raises ArtifactError like `Catalog.load`."""
    users, items = (_open(directory, name, lambda file: file.metadata.num_rows) for name in ("users", "items"))
    return users, items


def read_ids(directory: str, name: str) -> pa.Array:
    """The ids of `users` or `items` in index order, as Arrow strings. Raises ArtifactError like `Catalog.load`."""
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


def _write(table: pa.Table, directory: str, name: str) -> None:
    fs, path = filesystem(join(directory, f"{name}.parquet"))
    with fs.open(path, "wb") as stream:
        pq.write_table(table, stream)


def _table(ids: Array, texts: list[str]) -> pa.Table:
    return pa.table(
        {
            "index": pa.array(np.arange(len(ids)), pa.int64()),
            "id": pa.array(list(ids), pa.string()),
            "text": pa.array(texts, pa.string()),
        }
    )
