"""M6-Retrieval (Cui et al., "M6-Rec: Generative Pretrained Language Models are Open-Ended Recommender Systems", 2022):
contrastive retrieval from a language model's embeddings of texts.

M6 is not public, so the backbone of the run replaces it. An item's text is embedded as the mean of its hidden states
(`TrainingData.item_text_vectors`). These vectors stay fixed; the projections are trained.

Shapes: B users, I users in training, J items, K size of a text vector.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from cllm4rec.arrays.ragged import Ragged
from cllm4rec.errors import DataError
from cllm4rec.evaluation.baseline import TrainingData
from cllm4rec.experiments.baselines.neural import bag, bag_of_items
from cllm4rec.experiments.baselines.two_tower import Retrieval
from cllm4rec.typing import Float32Array, IntArray


class M6Retrieval(Retrieval):
    """A user is represented by the mean text vector of the history and, if available, the vector of the user's own text.

    The model has no ID embeddings: two items with the same text are indistinguishable, and cold items need no special case.
    """

    item_JK: Tensor
    user_IK: Tensor

    def __init__(
        self,
        training: TrainingData,
        width: int = 128,
        dropout: float = 0.1,
        temperature: float = 0.1,
        held_out: float = 0.5,
    ) -> None:
        super().__init__(training, temperature, held_out)
        if training.item_text_vectors is None:
            raise DataError("m6_retrieval reads texts as vectors; set item_text_vectors of TrainingData")
        users_IK = training.user_text_vectors
        if users_IK is None:
            users_IK = np.zeros((len(training.histories), 1), np.float32)
        # Row -1 belongs to users that are unknown at training.
        unknown = np.zeros((1, users_IK.shape[1]), np.float32)
        self.register_buffer("item_JK", torch.from_numpy(standardized(training.item_text_vectors)))
        self.register_buffer("user_IK", torch.from_numpy(np.concatenate([standardized(users_IK), unknown])))
        self.dropout = nn.Dropout(dropout)
        self.history_head, self.item_head = (nn.Linear(self.item_JK.shape[1], width) for _ in range(2))
        self.user_head = nn.Linear(self.user_IK.shape[1], width, bias=False)

    def user_vectors(self, users: IntArray, histories: Ragged) -> Tensor:
        history_BK = bag(bag_of_items(histories, len(self.item_JK)), self.item_JK)
        own_BK = self.user_IK[torch.from_numpy(users)]
        vector: Tensor = self.history_head(self.dropout(history_BK)) + self.user_head(self.dropout(own_BK))
        return vector

    def item_vectors(self) -> Tensor:
        vector: Tensor = self.item_head(self.dropout(self.item_JK))
        return vector


def standardized(vectors: Float32Array) -> Float32Array:
    """Mean 0 and standard deviation 1 in every dimension: hidden states lie in a narrow cone, far from the origin."""
    centered = vectors - vectors.mean(axis=0)
    return np.asarray(centered / np.maximum(centered.std(axis=0), 1e-6), np.float32)
