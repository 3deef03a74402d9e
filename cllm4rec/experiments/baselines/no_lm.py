"""CLLM4Rec without its language model: the query is the sum of the embeddings of the items that were read, and the item head is
tied to them. What a language model adds has to be better than this (docs/results.md).

Shapes: B users, J items, D width.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from cllm4rec.arrays.ragged import Ragged
from cllm4rec.evaluation.baseline import TrainingData
from cllm4rec.experiments.baselines.neural import Network, hold_out, multinomial_nll
from cllm4rec.experiments.baselines.text import word_counts
from cllm4rec.training.table_init import rows_from_texts
from cllm4rec.typing import IntArray

_HELD_OUT = (0.1, 0.9)
"""The share of a history that is predicted from the rest, drawn anew for each batch, as in finetuning."""


class NoLM(Network):
    """logits = (Σ rows of the history / √n + bias) · rowsᵀ / temperature, the query of `model.history: residual` alone."""

    def __init__(
        self, training: TrainingData, width: int = 96, temperature: float = 1.0, init: str = "texts", std: float = 0.1
    ) -> None:
        """init: texts for rows from the items' texts, at which CLLM4Rec starts, or noise. std: of rows that are noise."""
        super().__init__()
        rows_JD = torch.randn(training.num_items, width) * std
        if init == "texts":
            items, rows = rows_from_texts(word_counts(training.item_texts), width, training.seed)
            rows_JD[items] = rows.to(rows_JD)
        self.rows_JD = nn.Parameter(rows_JD)
        self.bias_D = nn.Parameter(torch.zeros(width))
        self.temperature = temperature

    def loss(self, users: IntArray, histories: Ragged, random: np.random.Generator) -> Tensor:
        kept, held_out = hold_out(histories, random.uniform(*_HELD_OUT), random)
        return multinomial_nll(self.logits(users, kept), held_out)

    def logits(self, users: IntArray, histories: Ragged) -> Tensor:
        return self.queries(histories) @ self.rows_JD.T

    def queries(self, histories: Ragged) -> Tensor:
        """(B, D): what is multiplied with the row of an item."""
        values = torch.from_numpy(histories.values.astype(np.int64))
        offsets = torch.from_numpy(histories.offsets[:-1].astype(np.int64))
        sums_BD = functional.embedding_bag(values, self.rows_JD, offsets, mode="sum")
        root_B = torch.from_numpy(np.sqrt(np.maximum(histories.lengths, 1)).astype(np.float32))
        return (sums_BD / root_B[:, None] + self.bias_D) / self.temperature
