"""The interface of baselines: what they may learn from, and what they return.

Shapes: I users, J items, B users asked about, K size of a text's or a user's vector.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Protocol, Self

import numpy as np
import tokenizers
from scipy import sparse

from cllm4rec.arrays.histories import Histories
from cllm4rec.arrays.ids import Catalog
from cllm4rec.arrays.ragged import Ragged
from cllm4rec.data.documents import Kind
from cllm4rec.data.prepared import load_documents
from cllm4rec.errors import DataError
from cllm4rec.metrics.protocol import Recommender, Validation, interaction_matrix
from cllm4rec.storage.files import join, read_bytes
from cllm4rec.typing import BoolArray, Float32Array


@dataclasses.dataclass(frozen=True)
class Budget:
    """The limits of a neural baseline. The result depends on the machine only if the seconds run out first."""

    max_epochs: int = 200
    max_seconds: float = 600.0


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """Everything a baseline may learn from. Row i of `histories` and of all user data belongs to user i.

    histories: training items, oldest first.
    validation: used to choose epochs and settings, never fitted on.
    item_texts, user_texts: one per item or user, empty if there is none.
    item_text_vectors (J×K), user_text_vectors (I×K): embeddings of them by a language model, for m6_retrieval.
    item_table (J×K), user_table (I×K): CLLM4Rec's z^{l,v} and z^{l,u}, for cllm4rec_emb.
    """

    num_items: int
    histories: Ragged
    validation: Validation
    item_texts: Sequence[str]
    user_texts: Sequence[str]
    seed: int = 0
    budget: Budget = Budget()
    item_text_vectors: Float32Array | None = None
    user_text_vectors: Float32Array | None = None
    item_table: Float32Array | None = None
    user_table: Float32Array | None = None

    @classmethod
    def of(
        cls,
        histories: Histories,
        catalog: Catalog,
        *,
        item_texts: Sequence[str] | None = None,
        seed: int = 0,
        budget: Budget = Budget(),
    ) -> Self:
        """From a prepared data set; `item_texts` replace those of the catalog (see `item_texts_with_reviews`).

        Raises DataError if `histories` do not contain every user.
        """
        if not np.array_equal(histories.user, np.arange(catalog.num_users)):
            raise DataError(
                f"there are histories of {len(histories.user)} of {catalog.num_users} users, but baselines are fitted on all "
                "users; load the whole of prepared/histories"
            )
        texts = catalog.item_texts if item_texts is None else item_texts
        return cls(catalog.num_items, histories.train, Validation(histories), texts, catalog.user_texts, seed, budget)

    @functools.cached_property
    def matrix(self) -> sparse.csr_array:
        """I × J: 1 if the user has the item."""
        return interaction_matrix(self.histories, self.num_items)

    @functools.cached_property
    def is_taken(self) -> BoolArray:
        """J: False for cold items, which have no training interaction."""
        return np.bincount(self.histories.values, minlength=self.num_items) > 0


class Baseline(Recommender, Protocol):
    """A method that learns from `TrainingData` alone. Equal training gives equal scores."""

    def fit(self, training: TrainingData) -> Self: ...


def item_texts_with_reviews(prepared_dir: str, catalog: Catalog) -> list[str]:
    """The text of each item, followed by its training reviews, truncated as for CLLM4Rec.

    Other methods read these texts if items have no texts of their own.
    """
    documents = load_documents(prepared_dir)
    reviews = documents.take(np.flatnonzero(documents.kind == Kind.REVIEW))
    tokenizer = tokenizers.Tokenizer.from_buffer(read_bytes(join(prepared_dir, "tokenizer", "tokenizer.json")))
    parts = [[text] for text in catalog.item_texts]
    for item, text in zip(reviews.item.tolist(), tokenizer.decode_batch(reviews.main.tolist()), strict=True):
        parts[item].append(text)
    return [" ".join(part) for part in parts]
