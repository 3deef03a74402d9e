"""Two-Tower retrieval (Yi et al., "Sampling-Bias-Corrected Neural Modeling for Large Corpus Item Recommendations",
RecSys 2019), with a softmax over the whole catalog instead of sampled negatives; and CLLM4Rec-Emb, which extends it.

Shapes: B users, I users, J items, H hidden, D vector, K width of CLLM4Rec's tables.
"""

from __future__ import annotations

import abc
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from cllm4rec.arrays.ragged import Ragged
from cllm4rec.errors import DataError
from cllm4rec.evaluation.baseline import TrainingData
from cllm4rec.experiments.baselines.neural import Network, bag, bag_of_items, hold_out, multinomial_nll, small_normal
from cllm4rec.experiments.baselines.text import item_tf_idf, tf_idf
from cllm4rec.typing import IntArray

PROJECTED = 128
"""Dimension to which the paper projects z^{l,u} and z^{l,v}."""

USER_DROPOUT = 0.2


class Retrieval(Network):
    """Users and items are unit vectors; the logit is their inner product divided by `temperature`. Training predicts the
    `held_out` fraction of a history from the rest. Cold items are excluded from the negatives, because a missing interaction
    is no evidence against them. In training a fraction USER_DROPOUT of the users is treated as unknown, so that the model
    does not rely on the user's text or embedding alone."""

    is_taken_J: Tensor

    def __init__(self, training: TrainingData, temperature: float, held_out: float) -> None:
        super().__init__()
        self.temperature, self.held_out = temperature, held_out
        self.register_buffer("is_taken_J", torch.from_numpy(training.is_taken))

    @abc.abstractmethod
    def user_vectors(self, users: IntArray, histories: Ragged) -> Tensor:
        """User vectors (B × D)."""

    @abc.abstractmethod
    def item_vectors(self) -> Tensor:
        """Item vectors (J × D)."""

    def loss(self, users: IntArray, histories: Ragged, random: np.random.Generator) -> Tensor:
        kept, held = hold_out(histories, self.held_out, random)
        users = np.where(random.random(len(users)) < USER_DROPOUT, -1, users)
        return multinomial_nll(self.logits(users, kept).masked_fill(~self.is_taken_J, -torch.inf), held)

    def logits(self, users: IntArray, histories: Ragged) -> Tensor:
        user_BD = functional.normalize(self.user_vectors(users, histories), dim=1)
        item_JD = functional.normalize(self.item_vectors(), dim=1)
        return user_BD @ item_JD.T / self.temperature


class TwoTower(Retrieval):
    """User tower: an MLP over the bag of items and the TF-IDF of the user's text. Item tower: an MLP over the TF-IDF of
    the item's text, so that cold items have a vector, too."""

    def __init__(
        self,
        training: TrainingData,
        hidden: int = 128,
        dropout: float = 0.3,
        temperature: float = 0.1,
        held_out: float = 0.5,
    ) -> None:
        super().__init__(training, temperature, held_out)
        self.user_words, self.item_words = (
            tf_idf([*training.user_texts, ""]),  # row -1 belongs to users that are unknown at training
            item_tf_idf(training.item_texts, "two_tower"),
        )
        self.history_JH = small_normal(training.num_items, hidden)
        self.user_words_WH = small_normal(max(1, self.user_words.shape[1]), hidden)
        self.item_words_WH = small_normal(self.item_words.shape[1], hidden)
        self.user_head, self.item_head = (
            nn.Sequential(nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, hidden)) for _ in range(2)
        )

    def user_vectors(self, users: IntArray, histories: Ragged) -> Tensor:
        vector: Tensor = self.user_head(self.user_inputs(users, histories))
        return vector

    def item_vectors(self) -> Tensor:
        vector: Tensor = self.item_head(self.item_inputs())
        return vector

    def user_inputs(self, users: IntArray, histories: Ragged) -> Tensor:
        """First layer of the user tower (B×H), before the nonlinearity."""
        known_words = self.user_words[users]
        bags_BJ = bag_of_items(histories, len(self.history_JH))
        return bag(bags_BJ, self.history_JH) + bag(known_words, self.user_words_WH)

    def item_inputs(self) -> Tensor:
        """First layer of the item tower (J×H), before the nonlinearity."""
        return bag(self.item_words, self.item_words_WH)


class CLLM4RecEmb(TwoTower):
    """The Two-Tower with z^{l,u} and z^{l,v}, projected to PROJECTED dimensions, as additional inputs: the paper's variant
    for low latency. The tables of CLLM4Rec stay fixed."""

    user_table_IK: Tensor
    item_table_JK: Tensor

    def __init__(self, training: TrainingData, hidden: int = 128, table_dropout: float = 0.5, **params: Any) -> None:
        super().__init__(training, hidden=hidden, **params)
        if training.user_table is None or training.item_table is None:
            raise DataError("cllm4rec_emb reads CLLM4Rec's tables; set user_table and item_table of TrainingData")
        # Row -1 belongs to users that are unknown at training.
        unknown = np.zeros((1, training.user_table.shape[1]), np.float32)
        self.register_buffer("user_table_IK", torch.from_numpy(np.concatenate([training.user_table, unknown])))
        self.register_buffer("item_table_JK", torch.from_numpy(np.asarray(training.item_table, np.float32)))
        # The tables were trained on all training interactions: without dropout the towers would read the targets from them.
        self.user_projection, self.item_projection = (
            nn.Sequential(nn.Linear(table.shape[1], PROJECTED), nn.Dropout(table_dropout), nn.Linear(PROJECTED, hidden))
            for table in (training.user_table, training.item_table)
        )

    def user_inputs(self, users: IntArray, histories: Ragged) -> Tensor:
        known_BK = self.user_table_IK[torch.from_numpy(users)]
        inputs: Tensor = super().user_inputs(users, histories) + self.user_projection(known_BK)
        return inputs

    def item_inputs(self) -> Tensor:
        inputs: Tensor = super().item_inputs() + self.item_projection(self.item_table_JK)
        return inputs
