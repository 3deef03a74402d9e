"""S3Rec (Zhou et al., "S3-Rec: Self-Supervised Learning for Sequential Recommendation with Mutual Information
Maximization", CIKM 2020), finetuned like BERT4Rec. The words of an item's text are its attributes.

Shapes: B users, J items, N masked positions, A attributes, H width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from cllm4rec.arrays.ragged import Ragged
from cllm4rec.errors import DataError
from cllm4rec.evaluation.baseline import TrainingData
from cllm4rec.experiments.baselines.bert4rec import BERT4Rec
from cllm4rec.experiments.baselines.neural import small_normal
from cllm4rec.experiments.baselines.text import word_counts
from cllm4rec.typing import IntArray


class S3Rec(BERT4Rec):
    """Three of the paper's four pretraining tasks: predict a masked item (MIP), the attributes of a masked item (MAP), and
    the attributes of an item from its own embedding (AAP). The fourth task, segment prediction (SP), needs long histories
    and is omitted."""

    has_JA: Tensor

    def __init__(
        self,
        training: TrainingData,
        width: int = 64,
        attributes: int = 500,
        attribute_weight: float = 1.0,
        **params: Any,
    ) -> None:
        super().__init__(training, width=width, **params)
        has_JA = word_counts(training.item_texts, attributes) > 0
        if not has_JA.nnz:
            raise DataError("no two items share a word, so s3rec has no attributes; give data.items a text")
        self.register_buffer("has_JA", torch.from_numpy(has_JA.toarray()))
        self.attribute_weight = attribute_weight
        self.attribute_AH = small_normal(has_JA.shape[1], width)
        self.from_hidden, self.from_item = nn.Linear(width, width), nn.Linear(width, width)

    def pretrain_loss(self, users: IntArray, histories: Ragged, random: np.random.Generator) -> Tensor:
        hidden_NH, item_N = self.hide(histories, random)
        loss = functional.cross_entropy(self.encoder.item_logits(hidden_NH), item_N)
        present = torch.from_numpy(np.unique(histories.values))
        masked_attributes = self._attribute_loss(self.from_hidden(hidden_NH), item_N)
        own_attributes = self._attribute_loss(self.from_item(self.encoder.items[present]), present)
        return loss + self.attribute_weight * (masked_attributes + own_attributes)

    def _attribute_loss(self, vector_NH: Tensor, item_N: Tensor) -> Tensor:
        """Sum over attributes, mean over items, so that an item has the same weight as in MIP."""
        logits_NA = vector_NH @ self.attribute_AH.T
        has_NA = self.has_JA[item_N].float()
        return functional.binary_cross_entropy_with_logits(logits_NA, has_NA, reduction="sum") / len(item_N)
