"""What SASRec, BERT4Rec and S3Rec share: a transformer over histories, and the network around it.

Shapes: B users, J items, T places, H width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cllm4rec.evaluation.baseline import TrainingData
from cllm4rec.experiments.baselines.neural import Network, small_normal


class SequenceEncoder(nn.Module):
    """Item indices (B×T) in, hidden states (B×T×H) out; `no_item` pads and `mask` stands for a hidden item."""

    def __init__(
        self, num_items: int, max_places: int, width: int, layers: int, heads: int, dropout: float, causal: bool
    ) -> None:
        super().__init__()
        self.num_items, self.no_item, self.mask, self.causal = num_items, num_items, num_items + 1, causal
        self.token_JH = small_normal(num_items + 2, width)
        self.position_TH = small_normal(max_places, width)
        self.dropout = nn.Dropout(dropout)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.bias_J = nn.Parameter(torch.zeros(num_items))

    @property
    def items(self) -> Tensor:
        """J × H."""
        return self.token_JH[: self.num_items]

    def forward(self, item_BT: Tensor) -> Tensor:
        places = item_BT.shape[1]
        vector_BTH = self.dropout(self.token_JH[item_BT] + self.position_TH[:places])
        if self.causal:  # padding comes last, so nothing sees it
            hidden: Tensor = self.layers(vector_BTH, mask=torch.ones(places, places).triu(1).bool())
        else:
            hidden = self.layers(vector_BTH, src_key_padding_mask=item_BT == self.no_item)
        return hidden

    def item_logits(self, hidden_BH: Tensor) -> Tensor:
        """Tied head over the whole catalog."""
        return hidden_BH @ self.items.T + self.bias_J


class SequenceNetwork(Network):
    """Reads the latest `max_length` items of a history; `num_masks` places more are there for what is put before them."""

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
