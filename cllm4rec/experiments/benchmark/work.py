"""Useful floating-point operations: those that the method needs, independent of the implementation.

A product of an (a, b) and a (b, c) matrix counts as 2abc. For real tokens, these are counted: the matrices of the backbone,
attention between tokens of the same document, and the heads at positions that predict something. Padding, norms, activations,
softmax, lookups and the optimizer are not counted.

In training the backbone is frozen. Its matrices need the forward pass and the gradient of their input, but no weight gradient:
twice the forward pass instead of three times. Both inputs of the attention products need gradients: three times. The item head
counts three times (its table is trained), the vocabulary head twice (it is frozen). In scoring, everything counts once.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from cllm4rec.model.cllm4rec import CLLM4Rec
from cllm4rec.model.packing import Batch


@dataclasses.dataclass(frozen=True)
class Work:
    """Counts the useful operations of a model from its sizes."""

    matrix_parameters: int
    layers: int
    width: int
    num_words: int
    num_items: int

    @classmethod
    def of(cls, model: CLLM4Rec) -> Work:
        return cls(
            matrix_parameters(model.backbone.model.base_model),
            int(model.backbone.model.config.num_hidden_layers),
            model.backbone.width,
            model.token_space.num_words,
            model.token_space.num_items,
        )

    def training_step(self, batch: Batch) -> float:
        """Forward and backward pass of one packed batch, with a frozen backbone."""
        lengths = document_lengths(batch)
        heads = 3 * len(batch.item_slots) * self.num_items + 2 * len(batch.word_slots) * self.num_words
        return 2 * self._matrices(lengths) + 3 * self._attention(lengths) + 2.0 * self.width * heads

    def scoring(self, lengths: npt.NDArray[np.int64]) -> float:
        """Prompts of these lengths; the last position of each scores the whole catalog."""
        head = 2.0 * self.width * self.num_items * len(lengths)
        return self._matrices(lengths) + self._attention(lengths) + head

    def _matrices(self, lengths: npt.NDArray[np.int64]) -> float:
        return 2.0 * self.matrix_parameters * float(lengths.sum())

    def _attention(self, lengths: npt.NDArray[np.int64]) -> float:
        # Each token attends to itself and all earlier tokens: one product for the weights, one for the values.
        pairs = float((lengths * (lengths + 1) // 2).sum())
        return 4.0 * self.layers * self.width * pairs


def matrix_parameters(module: nn.Module) -> int:
    """Number of entries of all matrices that tokens are multiplied with, without embedding tables and vectors."""
    tables = {id(inner.weight) for inner in module.modules() if isinstance(inner, nn.Embedding)}
    return sum(weight.numel() for weight in module.parameters() if weight.dim() == 2 and id(weight) not in tables)


def document_lengths(batch: Batch) -> npt.NDArray[np.int64]:
    """Number of tokens of each document in a packed batch."""
    segment_RT: Any = batch.grids[0].segment_RT
    rows = np.arange(len(segment_RT))[:, None] * (int(segment_RT.max(initial=0)) + 1)
    lengths = np.bincount((rows + segment_RT)[segment_RT > 0])
    return lengths[lengths > 0].astype(np.int64)
