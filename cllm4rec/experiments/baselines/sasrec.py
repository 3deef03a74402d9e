"""SASRec (Kang and McAuley, "Self-Attentive Sequential Recommendation", ICDM 2018) with cross-entropy over the whole
catalog instead of one sampled negative, which makes it competitive (Klenitskiy and Vasilev, RecSys 2023).

Shapes: B users, J items, T positions, H width.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from cllm4rec.arrays.ragged import Ragged
from cllm4rec.experiments.baselines.neural import padded
from cllm4rec.experiments.baselines.sequence import SequenceNetwork
from cllm4rec.typing import IntArray


class SASRec(SequenceNetwork):
    """Predicts each item of a history from the earlier ones. The hidden state of the last item ranks the catalog."""

    def loss(self, users: IntArray, histories: Ragged, random: np.random.Generator) -> Tensor:
        item_BT = padded(histories, self.max_length + 1, self.encoder.no_item)
        read_BT, next_BT = item_BT[:, :-1], item_BT[:, 1:]
        is_item_BT = next_BT != self.encoder.no_item
        if not is_item_BT.any():  # no user of this batch has a second item
            return 0.0 * self.encoder.token_JH.sum()
        hidden_NH = self.encoder(read_BT)[is_item_BT]
        return functional.cross_entropy(self.encoder.item_logits(hidden_NH), next_BT[is_item_BT])

    def logits(self, users: IntArray, histories: Ragged) -> Tensor:
        hidden_BTH = self.encoder(padded(histories, self.max_length, self.encoder.no_item))
        last_B = torch.from_numpy(np.clip(histories.lengths, 1, self.max_length) - 1)
        return self.encoder.item_logits(hidden_BTH[torch.arange(len(last_B)), last_B])
