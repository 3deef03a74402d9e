"""The transformer over histories that SASRec, BERT4Rec and S3Rec share, and their base class.

Shapes: B users, J items, T positions, H width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cllm4rec.evaluation.baseline import TrainingData
from cllm4rec.experiments.baselines.neural import Network, small_normal


class SequenceEncoder(nn.Module):
    """Item indices (B×T) → hidden states (B×T×H). The index `no_item` is padding, the index `mask` a masked item."""

    def __init__(
        self, num_items: int, max_positions: int, width: int, layers: int, heads: int, dropout: float, causal: bool
    ) -> None:
        super().__init__()
        self.num_items, self.no_item, self.mask, self.causal = num_items, num_items, num_items + 1, causal
        self.token_JH = small_normal(num_items + 2, width)
        self.position_TH = small_normal(max_positions, width)
        self.dropout = nn.Dropout(dropout)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.bias_J = nn.Parameter(torch.zeros(num_items))

    @property
    def items(self) -> Tensor:
        """Item embeddings (J × H)."""
        return self.token_JH[: self.num_items]

    def forward(self, item_BT: Tensor) -> Tensor:
        length = item_BT.shape[1]
        vector_BTH = self.dropout(self.token_JH[item_BT] + self.position_TH[:length])
        if self.causal:  # padding comes last, so no item attends to it
            hidden: Tensor = self.layers(vector_BTH, mask=torch.ones(length, length).triu(1).bool())
        else:
            hidden = self.layers(vector_BTH, src_key_padding_mask=item_BT == self.no_item)
        return hidden

    def item_logits(self, hidden_BH: Tensor) -> Tensor:
        """Logits over the whole catalog; the head is tied to the item embeddings."""
        return hidden_BH @ self.items.T + self.bias_J


class SequenceNetwork(Network):
    """Reads the latest `max_length` items of a history. `num_masks` more positions are reserved for mask tokens before them."""

    is_causal = True
    num_masks = 0

    def __init__(
        self,
        training: TrainingData,
        width: int = 64,
        layers: int = 2,
        heads: int = 2,
        dropout: float = 0.3,
        max_length: int = 100,
    ) -> None:
        super().__init__()
        self.max_length = max_length
        self.encoder = SequenceEncoder(
            training.num_items, max_length + self.num_masks, width, layers, heads, dropout, self.is_causal
        )
