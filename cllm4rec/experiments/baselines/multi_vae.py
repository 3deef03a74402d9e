"""Multi-VAE (Liang et al., "Variational Autoencoders for Collaborative Filtering", WWW 2018).

Shapes: B users, J items, H hidden, D latent.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from cllm4rec.arrays.ragged import Ragged
from cllm4rec.evaluation.baseline import TrainingData
from cllm4rec.experiments.baselines.neural import Network, bag, bag_of_items, multinomial_nll
from cllm4rec.typing import IntArray


class MultiVAE(Network):
    """J → H → D → H → J with a multinomial likelihood. The weight of the KL term rises to `beta` over `anneal_steps` steps."""

    step: Tensor

    def __init__(
        self,
        training: TrainingData,
        hidden: int = 200,
        latent: int = 64,
        dropout: float = 0.5,
        beta: float = 0.5,
        anneal_steps: int = 200,
    ) -> None:
        super().__init__()
        self.num_items, self.dropout, self.beta, self.anneal_steps = training.num_items, dropout, beta, anneal_steps
        self.encoder_JH = nn.Parameter(nn.init.xavier_normal_(torch.empty(training.num_items, hidden)))
        self.encoder_bias_H = nn.Parameter(torch.zeros(hidden))
        self.posterior = nn.Linear(hidden, 2 * latent)
        self.decoder = nn.Sequential(nn.Linear(latent, hidden), nn.Tanh())
        self.decoder_JH = nn.Parameter(nn.init.xavier_normal_(torch.empty(training.num_items, hidden)))
        self.bias_J = nn.Parameter(torch.zeros(training.num_items))
        self.register_buffer("step", torch.zeros(()))

    def item_weights(self) -> tuple[Tensor, Tensor]:
        """(J×H into the encoder, J×H out of the decoder)."""
        return self.encoder_JH, self.decoder_JH

    def loss(self, users: IntArray, histories: Ragged, random: np.random.Generator) -> Tensor:
        logits_BJ, mean_BD, log_variance_BD = self.reconstruct(histories)
        kl_B = 0.5 * (log_variance_BD.exp() + mean_BD**2 - 1 - log_variance_BD).sum(dim=1)
        self.step += 1
        beta = self.beta * min(1.0, float(self.step) / self.anneal_steps)
        return multinomial_nll(logits_BJ, histories) + beta * kl_B.mean()

    def logits(self, users: IntArray, histories: Ragged) -> Tensor:
        return self.reconstruct(histories)[0]

    def reconstruct(self, histories: Ragged) -> tuple[Tensor, Tensor, Tensor]:
        """(logits B×J, mean and log variance of the posterior B×D)."""
        encoder_JH, decoder_JH = self.item_weights()
        bags_BJ = bag_of_items(histories, self.num_items)
        if self.training:
            kept = torch.rand(len(bags_BJ.data)) >= self.dropout
            bags_BJ.data = bags_BJ.data * kept.numpy() / np.float32(1 - self.dropout)
        hidden_BH = torch.tanh(bag(bags_BJ, encoder_JH) + self.encoder_bias_H)
        mean_BD, log_variance_BD = self.posterior(hidden_BH).chunk(2, dim=1)
        latent_BD = mean_BD
        if self.training:
            latent_BD = mean_BD + torch.randn_like(mean_BD) * (0.5 * log_variance_BD).exp()
        return self.decoder(latent_BD) @ decoder_JH.T + self.bias_J, mean_BD, log_variance_BD
