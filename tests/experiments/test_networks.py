"""Properties of single neural baselines that the common suite does not test."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from support.trainings import cold_world, fitted, network_of, parity_training, training_of

from cllm4rec.arrays.histories import Histories
from cllm4rec.arrays.ragged import Ragged
from cllm4rec.data import world as worlds
from cllm4rec.evaluation.baseline import Budget
from cllm4rec.experiments.baselines.registry import make

FINETUNED = ["bert4rec", "s3rec", "two_tower", "m6_retrieval", "cllm4rec_emb"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", FINETUNED)
def test_what_is_held_out_is_the_target_and_the_rest_is_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network, histories = network_of(name, parity_training()), worlds.parity_world().histories.train
    for sign in (1.0, -1.0):  # sure of what is read, then sure of what is not

        def logits(users: Any, kept: Ragged, sign: float = sign) -> torch.Tensor:
            score_BJ = torch.zeros(len(users), 20)
            score_BJ[kept.rows, kept.values] = 50.0 * sign
            return score_BJ

        monkeypatch.setattr(network, "logits", logits)
        loss = float(network.loss(np.arange(40), histories, np.random.default_rng(0)))
        assert (loss > 50) == (sign > 0)


@pytest.mark.parametrize("name", ["md_cvae", "two_tower", "m6_retrieval", "cllm4rec_emb"])
def test_cold_items_are_no_negatives_of_a_method_that_reads_text(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    histories, training = cold_world()
    network = network_of(name, training).train()
    if name == "md_cvae":
        assert torch.isneginf(network.logits(np.arange(40), histories.train)[:, 20:]).all()
        return
    monkeypatch.setattr(network, "logits", lambda users, kept: torch.tensor([[0.0] * 20 + [90.0] * 2] * len(users)))
    assert float(network.loss(np.arange(40), histories.train, np.random.default_rng(0))) < 10 * np.log(20)


def test_sasrec_predicts_what_comes_next_in_time() -> None:
    """On a ring of items every user repeats on from one to the next."""
    steps = [(user + np.arange(3 + user // 15 % 4)) % 15 for user in range(120)]  # any start with any length
    after = Ragged.from_lists([[(row[-1] + 1) % 15] for row in steps])
    histories = Histories(np.arange(120), Ragged.from_lists(steps), after, after)
    ranked = make("sasrec", learning_rate=1e-2, batch_users=16, patience=30).fit(training_of(histories, 15))
    assert (ranked.scores(histories.user, histories.train).argmax(axis=1) == after.values).mean() == 1.0


def test_bert4rec_hides_what_it_is_asked_for() -> None:
    network = network_of("bert4rec", parity_training())
    read: list[torch.Tensor] = []

    def return_the_items_read(
        module: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor
    ) -> torch.Tensor:
        read.append(inputs[0])
        return inputs[0][:, :, None]

    network.encoder.register_forward_hook(return_the_items_read)
    histories = Ragged.from_lists([[3, 5, 7, 9], [2], [4, 6]])
    hidden_NH, item_N = network.hide(histories, np.random.default_rng(0))
    assert (hidden_NH == network.encoder.mask).all()
    left = read[0][read[0] < 20].tolist()
    assert sorted(item_N.tolist() + left) == sorted(histories.values.tolist())
    assert len(item_N) >= 3, "one of every user at least"


def test_s3rec_learns_the_words_of_items_in_pretraining() -> None:
    training = dataclasses.replace(parity_training(), budget=Budget(1, 60.0))
    network = make("s3rec", pretrain_epochs=30).fit(training).network.eval()
    predicted_JA = network.from_item(network.encoder.items) @ network.attribute_AH.T > 0
    assert torch.equal(predicted_JA, network.has_JA)


def test_multi_vae_pays_for_the_distance_of_its_posterior_from_the_prior() -> None:
    network, histories = network_of("multi_vae", parity_training()), worlds.parity_world().histories.train
    network.step.fill_(network.anneal_steps)
    _, mean_BD, log_variance_BD = network.reconstruct(histories)
    posterior = torch.distributions.Normal(mean_BD, (0.5 * log_variance_BD).exp())
    prior = torch.distributions.Normal(torch.zeros_like(mean_BD), 1.0)
    expected = torch.distributions.kl_divergence(posterior, prior).sum(dim=1).mean()
    losses = []
    for network.beta in (0.0, 0.7):
        losses.append(network.loss(np.arange(40), histories, np.random.default_rng(0)).item())
    assert losses[1] - losses[0] == pytest.approx(0.7 * expected.item(), rel=1e-3)


def test_md_cvae_weighs_cold_items_by_their_words_and_others_by_their_own() -> None:
    network = network_of("md_cvae", cold_world()[1])
    for weight_JH in network.item_weights():
        torch.testing.assert_close(weight_JH[20:], network.codes()[20:])
        torch.testing.assert_close(weight_JH[:20], network.encoder_JH[:20].detach(), check_device=False)


def test_two_tower_reads_what_users_say_of_themselves() -> None:
    nothing_read = Ragged.from_lists([[]] * 40)
    score_BJ = fitted("two_tower").scores(np.arange(40), nothing_read)
    own_BJ = np.arange(20) % 2 == np.arange(40)[:, None] % 2
    assert (np.where(own_BJ, score_BJ, np.inf).min(axis=1) > np.where(own_BJ, -np.inf, score_BJ).max(axis=1)).all()
    unknown_BJ = fitted("two_tower").scores(np.full(40, -1), nothing_read)
    assert (unknown_BJ[0] == unknown_BJ).all()
    assert (unknown_BJ != score_BJ).all(axis=1).all()


@pytest.mark.parametrize("table", ["user_table_IK", "item_table_JK"])
def test_cllm4rec_emb_reads_both_tables(table: str) -> None:
    histories, network = worlds.parity_world().histories, network_of("cllm4rec_emb", parity_training())
    before = network.logits(histories.user, histories.train)
    getattr(network, table).zero_()
    assert (network.logits(histories.user, histories.train) != before).any(dim=1).all()
