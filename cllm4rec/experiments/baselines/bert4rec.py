"""BERT4Rec (Sun et al., CIKM 2019) with the recommendation-oriented finetuning of the CLLM4Rec paper (docs/method.md).

Shapes: B users, J items, T positions, H width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from cllm4rec.arrays.ragged import Ragged
from cllm4rec.evaluation.baseline import TrainingData
from cllm4rec.experiments.baselines.neural import hold_out, multinomial_nll, padded
from cllm4rec.experiments.baselines.sequence import SequenceNetwork
from cllm4rec.typing import IntArray


class BERT4Rec(SequenceNetwork):
    """Pretraining predicts masked items from both sides (the Cloze task). Finetuning removes a fraction `held_out` of each
    history; the hidden state of a mask token at the first position predicts the removed items (multinomial likelihood)."""

    is_causal = False
    num_masks = 1

    def __init__(
        self,
        training: TrainingData,
        pretrain_epochs: int = 20,
        masked: float = 0.2,
        held_out: float = 0.2,
        **params: Any,
    ) -> None:
        super().__init__(training, **params)
        self.pretrain_epochs, self.masked, self.held_out = pretrain_epochs, masked, held_out

    def pretrain_loss(self, users: IntArray, histories: Ragged, random: np.random.Generator) -> Tensor:
        hidden_NH, item_N = self.hide(histories, random)
        return functional.cross_entropy(self.encoder.item_logits(hidden_NH), item_N)

    def hide(self, histories: Ragged, random: np.random.Generator) -> tuple[Tensor, Tensor]:
        """(hidden states (N×H) at the masked positions, the items that were masked)."""
        item_BT = padded(histories, self.max_length, self.encoder.no_item)
        chance_BT = torch.from_numpy(random.random(item_BT.shape, np.float32))
        chance_BT[item_BT == self.encoder.no_item] = 2.0
        # The position with the lowest number is always masked, so that short histories contribute to every step.
        hidden_BT = (chance_BT < self.masked) | (chance_BT == chance_BT.min(dim=1, keepdim=True).values)
        read_BT = item_BT.masked_fill(hidden_BT, self.encoder.mask)
        return self._read(read_BT)[:, 1:][hidden_BT], item_BT[hidden_BT]

    def loss(self, users: IntArray, histories: Ragged, random: np.random.Generator) -> Tensor:
        kept, held = hold_out(histories, self.held_out, random)
        return multinomial_nll(self.logits(users, kept), held)

    def logits(self, users: IntArray, histories: Ragged) -> Tensor:
        hidden_BTH = self._read(padded(histories, self.max_length, self.encoder.no_item))
        return self.encoder.item_logits(hidden_BTH[:, 0])

    def _read(self, item_BT: Tensor) -> Tensor:
        """Hidden states of a mask token followed by the items."""
        mask_B1 = torch.full((len(item_BT), 1), self.encoder.mask)
        hidden: Tensor = self.encoder(torch.cat([mask_B1, item_BT], dim=1))
        return hidden
