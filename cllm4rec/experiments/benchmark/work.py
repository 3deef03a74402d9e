"""Useful floating-point operations: what the method needs, whatever the implementation spends.

A product of (a, b) and (b, c) is 2abc. Counted are, of real tokens only: the backbone's matrices, attention between tokens
of the same document, and the heads where something is predicted. Not counted: padding, norms, activations, softmax,
look-ups, the optimizer.

Training holds the backbone frozen, so its matrices cost the forward pass once and the gradient of their input once, never
a gradient of themselves: twice the forward pass, not three times. Attention has two inputs to each of its products, so
three times. The item head is three times (its table is trained), the vocabulary head twice (frozen); a head none of whose
inputs need a gradient is counted once.
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
    """Sizes of a model, to count with."""

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
        """Forward and backward of one packed batch around a frozen backbone."""
        lengths = document_lengths(batch)
        heads = 3 * len(batch.item_slots) * self.num_items + 2 * len(batch.word_slots) * self.num_words
        return 2 * self._matrices(lengths) + 3 * self._attention(lengths) + 2.0 * self.width * heads

    def scoring(self, lengths: npt.NDArray[np.int64]) -> float:
        """Prompts of these lengths, each ranked against the whole catalog from its last position."""
        head = 2.0 * self.width * self.num_items * len(lengths)
        return self._matrices(lengths) + self._attention(lengths) + head

    def _matrices(self, lengths: npt.NDArray[np.int64]) -> float:
        return 2.0 * self.matrix_parameters * float(lengths.sum())

    def _attention(self, lengths: npt.NDArray[np.int64]) -> float:
        # Each token looks at itself and all before it: one product for the weights, one for the values.
        pairs = float((lengths * (lengths + 1) // 2).sum())
        return 4.0 * self.layers * self.width * pairs


def matrix_parameters(module: nn.Module) -> int:
    """Entries of all matrices a token is multiplied with: look-up tables and vectors are none."""
    tables = {id(inner.weight) for inner in module.modules() if isinstance(inner, nn.Embedding)}
    return sum(weight.numel() for weight in module.parameters() if weight.dim() == 2 and id(weight) not in tables)


def document_lengths(batch: Batch) -> npt.NDArray[np.int64]:
    """Tokens of every document of a packed batch."""
    segment_RT: Any = batch.grids[0].segment_RT
    rows = np.arange(len(segment_RT))[:, None] * (int(segment_RT.max(initial=0)) + 1)
    lengths = np.bincount((rows + segment_RT)[segment_RT > 0])
    return lengths[lengths > 0].astype(np.int64)
