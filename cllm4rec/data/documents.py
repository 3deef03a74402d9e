"""Documents: a prompt (context, no loss) and a main text of one kind of token, which carries the loss.

docs/method.md describes them. `prepared/documents` holds the documents that do not change from epoch to epoch, tokenized
once. `cllm4rec.training.epochs` makes from them what changes: the order of a user's items, held-out items, hidden users.

Lengths: D documents.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cllm4rec.arrays.ids import TokenSpace
from cllm4rec.arrays.ragged import Ragged
from cllm4rec.typing import Array, BoolArray, IntArray


class Kind(IntEnum):
    INTERACTIONS = 0
    REVIEW = 1
    USER_TEXT = 2
    ITEM_TEXT = 3
    RECOMMENDATION = 4


TEXT_KINDS = (Kind.REVIEW, Kind.USER_TEXT, Kind.ITEM_TEXT)


@dataclasses.dataclass(frozen=True)
class Documents:
    """D documents as columns. `user` and `item` are indices, or -1 for kinds that have none.

    `prompt` and `main` are token ids. `target` holds item indices for recommendation documents, and is empty for others.
    """

    kind: npt.NDArray[np.int8]
    user: IntArray
    item: IntArray
    prompt: Ragged
    main: Ragged
    target: Ragged

    def __len__(self) -> int:
        return len(self.kind)

    @property
    def lengths(self) -> IntArray:
        """The number of tokens of prompt and main text together."""
        return self.prompt.lengths + self.main.lengths

    @property
    def num_bytes(self) -> int:
        ragged = (self.prompt, self.main, self.target)
        arrays = [self.kind, self.user, self.item, *(array for rows in ragged for array in (rows.values, rows.offsets))]
        return sum(array.nbytes for array in arrays)

    def take(self, rows: Array) -> Documents:
        return Documents(
            self.kind[rows],
            self.user[rows],
            self.item[rows],
            self.prompt.take(rows),
            self.main.take(rows),
            self.target.take(rows),
        )

    def rows_of(self, kinds: Sequence[Kind]) -> IntArray:
        return np.flatnonzero(np.isin(self.kind, [int(kind) for kind in kinds]))

    def of_kinds(self, kinds: Sequence[Kind]) -> Documents:
        return self.take(self.rows_of(kinds))

    def in_order(self) -> Documents:
        """Sorted by kind, user and item, so that the order does not depend on files and blocks."""
        return self.take(np.lexsort((self.item, self.user, self.kind)))

    def to_arrow(self) -> pa.Table:
        """The columns kind, user, item, prompt and main, as in `prepared/documents`."""
        return pa.table(
            {
                "kind": pa.array(self.kind, pa.int8()),
                "user": pa.array(self.user, pa.int64()),
                "item": pa.array(self.item, pa.int64()),
                "prompt": self.prompt.to_arrow(),
                "main": self.main.to_arrow(),
            }
        )

    @classmethod
    def empty(cls) -> Documents:
        """No documents."""
        none = np.empty(0, np.int64)
        return cls(none.astype(np.int8), none, none, Ragged.empty(0), Ragged.empty(0), Ragged.empty(0))

    @classmethod
    def from_arrow(cls, table: pa.Table) -> Documents:
        num_rows = len(table)
        return cls(
            table["kind"].to_numpy().astype(np.int8),
            table["user"].to_numpy().astype(np.int64),
            table["item"].to_numpy().astype(np.int64),
            Ragged.from_arrow(table["prompt"]),
            Ragged.from_arrow(table["main"]),
            Ragged.empty(num_rows),
        )

    @classmethod
    def concat(cls, parts: Sequence[Documents]) -> Documents:
        return cls(
            np.concatenate([part.kind for part in parts]),
            np.concatenate([part.user for part in parts]),
            np.concatenate([part.item for part in parts]),
            Ragged.concat([part.prompt for part in parts]),
            Ragged.concat([part.main for part in parts]),
            Ragged.concat([part.target for part in parts]),
        )


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The words of all prompts as token ids of the tokenizer of the backbone, all below N."""

    has_interacted: list[int]
    writes_review: list[int]
    colon: list[int]
    biography: list[int]
    content: list[int]
    copula: list[int]
    comma: list[int]
    will_interact: list[int]

    @classmethod
    def tokenize(cls, encode: Any) -> Prompts:
        """`encode` turns a text into a list of word tokens, without special tokens."""
        return cls(
            has_interacted=encode(" has interacted with"),
            writes_review=encode(" writes the review for"),
            colon=encode(" :"),
            biography=encode("The biography of"),
            content=encode("The content of"),
            copula=encode(" is:"),
            comma=encode(","),
            will_interact=encode(" will interact with"),
        )

    def overhead(self) -> int:
        """The number of tokens of the longest prompt with a history (recommendation), without its items."""
        return 2 + len(self.has_interacted) + len(self.comma) + len(self.will_interact)

    def interactions(
        self,
        token_space: TokenSpace,
        user: Array,
        items: Ragged,
        hidden: BoolArray | None = None,
    ) -> Documents:
        """`<user> has interacted with` → items. `items` holds item indices, one row per user.

        NOBODY replaces user -1 and users for which `hidden` is true.
        """
        user_tokens = _column(_user_tokens(token_space, user, hidden))
        prompt = Ragged.interleave(user_tokens, _repeat(self.has_interacted, len(user)))
        main = Ragged(token_space.item_token(items.values).astype(np.int32), items.offsets)
        return _documents(Kind.INTERACTIONS, user, None, prompt, main, Ragged.empty(len(user)))

    def recommendation(
        self,
        token_space: TokenSpace,
        user: Array,
        items: Ragged,
        target: Ragged,
        hidden: BoolArray | None = None,
    ) -> Documents:
        """`<user> has interacted with <items> , <user> will interact with` → target item indices."""
        num_documents = len(user)
        user_tokens = _column(_user_tokens(token_space, user, hidden))
        prompt = Ragged.interleave(
            user_tokens,
            _repeat(self.has_interacted, num_documents),
            Ragged(token_space.item_token(items.values).astype(np.int32), items.offsets),
            _repeat(self.comma, num_documents),
            user_tokens,
            _repeat(self.will_interact, num_documents),
        )
        return _documents(Kind.RECOMMENDATION, user, None, prompt, Ragged.empty(num_documents), target)

    def reviews(self, token_space: TokenSpace, user: Array, item: Array, words: Ragged) -> Documents:
        """`<user> writes the review for <item> :` → words."""
        prompt = Ragged.interleave(
            _column(token_space.user_token(user)),
            _repeat(self.writes_review, len(user)),
            _column(token_space.item_token(item)),
            _repeat(self.colon, len(user)),
        )
        return _documents(Kind.REVIEW, user, item, prompt, words, Ragged.empty(len(user)))

    def user_texts(self, token_space: TokenSpace, user: Array, words: Ragged) -> Documents:
        """`The biography of <user> is:` → words."""
        prompt = Ragged.interleave(
            _repeat(self.biography, len(user)), _column(token_space.user_token(user)), _repeat(self.copula, len(user))
        )
        return _documents(Kind.USER_TEXT, user, None, prompt, words, Ragged.empty(len(user)))

    def item_texts(self, token_space: TokenSpace, item: Array, words: Ragged) -> Documents:
        """`The content of <item> is:` → words."""
        prompt = Ragged.interleave(
            _repeat(self.content, len(item)), _column(token_space.item_token(item)), _repeat(self.copula, len(item))
        )
        return _documents(Kind.ITEM_TEXT, None, item, prompt, words, Ragged.empty(len(item)))


def _documents(kind: Kind, user: Any, item: Any, prompt: Ragged, main: Ragged, target: Ragged) -> Documents:
    none = np.full(len(prompt), -1, np.int64)
    return Documents(
        np.full(len(prompt), int(kind), np.int8),
        none if user is None else np.asarray(user, np.int64),
        none if item is None else np.asarray(item, np.int64),
        prompt,
        Ragged(main.values.astype(np.int32), main.offsets),
        target,
    )


def _user_tokens(token_space: TokenSpace, user: Array, hidden: BoolArray | None) -> Array:
    return np.asarray(token_space.user_token(user if hidden is None else np.where(hidden, -1, user)))


def _column(values: Array) -> Ragged:
    """Rows of one value each."""
    return Ragged(np.asarray(values).astype(np.int32), np.arange(len(values) + 1, dtype=np.int64))


def _repeat(values: list[int], num_rows: int) -> Ragged:
    return Ragged(
        np.tile(np.asarray(values, np.int32), num_rows), np.arange(num_rows + 1, dtype=np.int64) * len(values)
    )
