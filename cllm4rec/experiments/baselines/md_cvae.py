"""MD-CVAE (Zhu and Chen, "Mutually-Regularized Dual Collaborative Variational Auto-encoder for Recommendation Systems",
WWW 2022): a Multi-VAE whose item weights are tied to a feature autoencoder over the words of the items.

Shapes: B users, J items, H hidden, W words.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from cllm4rec.arrays.ragged import Ragged
from cllm4rec.evaluation.baseline import TrainingData
from cllm4rec.experiments.baselines.multi_vae import MultiVAE
from cllm4rec.experiments.baselines.neural import bag, small_normal
from cllm4rec.experiments.baselines.text import item_tf_idf
from cllm4rec.typing import IntArray


class MDCVAE(MultiVAE):
    """Encoder and decoder of the Multi-VAE share one matrix of item weights V, with the prior N(Z, 1/tie). Z are the codes
    that the feature autoencoder computes from the items' bags of words. All parts are trained jointly.

    Cold items use Z as their weights and are excluded from the negatives in training. The feature autoencoder is a
    denoising autoencoder; the paper's is variational.
    """

    is_taken_J: Tensor

    def __init__(self, training: TrainingData, hidden: int = 200, tie: float = 1.0, **params: Any) -> None:
        super().__init__(training, hidden=hidden, **params)
        self.num_users, self.tie = len(training.histories), tie
        self.words_JW = item_tf_idf(training.item_texts, "md_cvae")
        num_words = self.words_JW.shape[1]
        self.words_in_WH, self.words_out_WH = small_normal(num_words, hidden), small_normal(num_words, hidden)
        self.coder = nn.Linear(hidden, hidden)
        self.register_buffer("is_taken_J", torch.from_numpy(training.is_taken))
        del self.decoder_JH  # the encoder's weights are used at both ends

    def codes(self) -> Tensor:
        """Z (J×H)."""
        words_JW = self.words_JW
        if self.training:
            words_JW = words_JW.copy()
            words_JW.data = functional.dropout(torch.from_numpy(words_JW.data), self.dropout).numpy()
        code_JH: Tensor = self.coder(torch.tanh(bag(words_JW, self.words_in_WH)))
        return code_JH

    def item_weights(self) -> tuple[Tensor, Tensor]:
        weight_JH = torch.where(self.is_taken_J[:, None], self.encoder_JH, self.codes())
        return weight_JH, weight_JH

    def loss(self, users: IntArray, histories: Ragged, random: np.random.Generator) -> Tensor:
        """The loss of Multi-VAE plus the loss of the items, divided by the number of users so that an epoch counts it once."""
        code_JH = self.codes()
        log_JW = functional.log_softmax(code_JH @ self.words_out_WH.T, dim=1)
        row, column = (torch.from_numpy(index.astype(np.int64)) for index in self.words_JW.nonzero())
        word_nll = -(log_JW[row, column] * torch.from_numpy(self.words_JW.data)).sum()
        distance = ((self.encoder_JH - code_JH) ** 2)[self.is_taken_J].sum()
        return super().loss(users, histories, random) + (word_nll + self.tie / 2 * distance) / self.num_users

    def reconstruct(self, histories: Ragged) -> tuple[Tensor, Tensor, Tensor]:
        logits_BJ, mean_BD, log_variance_BD = super().reconstruct(histories)
        if self.training:
            logits_BJ = logits_BJ.masked_fill(~self.is_taken_J, -torch.inf)
        return logits_BJ, mean_BD, log_variance_BD
