"""ItemKNN: items are similar if the same users interacted with them (Sarwar et al., "Item-Based Collaborative Filtering
Recommendation Algorithms", WWW 2001). The library `implicit` finds the neighbors."""

from __future__ import annotations

import importlib
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
from scipy import sparse

from cllm4rec.arrays.ragged import Ragged
from cllm4rec.errors import ConfigError
from cllm4rec.evaluation.baseline import TrainingData
from cllm4rec.metrics.protocol import interaction_matrix
from cllm4rec.typing import IntArray


class ItemKNN:
    """score = history · S, where S keeps the `neighbors` most similar items of each item.

    weighting: how users are weighted in the similarity. `cosine` weights all users equally; `tfidf` and `bm25` reduce the
    weight of users with many items.
    """

    def __init__(self, neighbors: int = 50, weighting: Literal["cosine", "tfidf", "bm25"] = "cosine") -> None:
        self.neighbors, self.weighting = neighbors, weighting

    def fit(self, training: TrainingData) -> Self:
        library = import_implicit("nearest_neighbours")
        weigh = {
            "cosine": library.normalize,
            "tfidf": lambda item_JI: library.normalize(library.tfidf_weight(item_JI)),
            "bm25": library.bm25_weight,
        }[self.weighting]
        model = library.ItemItemRecommender(K=self.neighbors + 1)  # an item is its own nearest neighbor
        model.fit(sparse.csr_matrix(weigh(training.matrix.T).T), show_progress=False)
        self.similarity_JJ = sparse.csr_array(model.similarity)
        return self

    def scores(self, users: IntArray, histories: Ragged) -> npt.NDArray[np.float32]:
        history_BJ = interaction_matrix(histories, self.similarity_JJ.shape[0])
        return np.asarray((history_BJ @ self.similarity_JJ.T).toarray(), np.float32)


def import_implicit(module: str) -> Any:
    """A module of `implicit`. Raises ConfigError if the library is not installed."""
    try:
        return importlib.import_module(f"implicit.{module}")
    except ImportError:
        raise ConfigError(
            'item_knn and ials need the library implicit; install it with pip install "cllm4rec[experiments]"'
        ) from None
