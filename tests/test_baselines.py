"""Baselines on worlds whose answer is known, and on real data whose figures were measured by others.

Every method goes through one suite on the parity world; what one of them alone promises follows.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cllm4rec.baselines import item_knn
from cllm4rec.baselines.data import Baseline, Budget, Training, item_texts_with_reviews
from cllm4rec.baselines.ease import EASE, GRID, tune_ease
from cllm4rec.baselines.ease_text import EASEText
from cllm4rec.baselines.ials import IALS
from cllm4rec.baselines.item_knn import ItemKNN
from cllm4rec.baselines.popularity import Popularity
from cllm4rec.baselines.registry import BASELINES, make, trials
from cllm4rec.baselines.registry import GRID as GRIDS
from cllm4rec.baselines.text import tf_idf, word_counts
from cllm4rec.catalog import Catalog
from cllm4rec.config import BackboneSize, EvaluateConfig, ModelConfig
from cllm4rec.data import world as worlds
from cllm4rec.data.documents import Documents
from cllm4rec.data.prepared import Histories, write_table
from cllm4rec.data.ragged import Ragged
from cllm4rec.data.tokenizer import Encoder, save_tokenizer, tokenise_prompts
from cllm4rec.errors import ConfigError, DataError
from cllm4rec.evaluation.metrics import compute
from cllm4rec.evaluation.protocol import HeldOut, Recommender, Validation, means, rank_with

SHARED = Path(os.environ.get("CLLM4REC_SHARED", Path(__file__).parents[1] / "../shared"))
REVIEWS = SHARED / "data/amazon_musical_instruments/reviews_Musical_Instruments_5.json.gz"


def parity_world(num_users: int = 64, num_items: int = 12) -> Histories:
    """Even users like even items and odd users odd ones: each hides one liked item for validation and one for test."""
    orders = [np.random.default_rng(user).permutation(np.arange(user % 2, num_items, 2)) for user in range(num_users)]
    cut = [Ragged.from_lists([order[part] for order in orders]) for part in (slice(2, None), slice(0, 1), slice(1, 2))]
    return Histories(np.arange(num_users), *cut)


def noisy_world(num_users: int = 300, num_items: int = 60, seed: int = 0) -> Histories:
    """Parity users who take a third of their items anywhere."""
    generator = np.random.default_rng(seed)
    orders = []
    for user in range(num_users):
        weights = np.where(np.arange(num_items) % 2 == user % 2, 2.0, 1.0)
        orders.append(generator.choice(num_items, 8, replace=False, p=weights / weights.sum()))
    cut = [Ragged.from_lists([order[part] for order in orders]) for part in (slice(2, None), slice(0, 1), slice(1, 2))]
    return Histories(np.arange(num_users), *cut)


def training_of(histories: Histories, num_items: int, **changes: object) -> Training:
    nothing = Training(num_items, histories.train, Validation(histories), [""] * num_items, [""] * len(histories.user))
    return dataclasses.replace(nothing, **changes)


def recall(fitted: Recommender, histories: Histories, num_items: int, k: int) -> float:
    held_out = HeldOut.test(histories, EvaluateConfig())
    ranked_BK = rank_with(fitted, held_out.users, held_out.read, held_out.masked, num_items, k)
    return float(compute(ranked_BK, held_out.relevant, [f"recall@{k}"])[f"recall@{k}"].mean())


def test_popularity_ranks_by_training_interactions_with_ties_to_the_lower_index() -> None:
    train = Ragged.from_lists([[3, 1], [3, 2], [3]])
    nothing = Ragged.from_lists([[], [], []])
    popularity = Popularity().fit(training_of(Histories(np.arange(3), train, nothing, nothing), 5))
    nobody = nothing.take(np.array([0]))
    assert rank_with(popularity, np.array([-1]), nobody, nobody, 5, 5).tolist() == [[3, 1, 2, 0, 4]]


def test_ease_finds_the_hidden_item_of_the_parity_world_and_popularity_does_not() -> None:
    world = parity_world()
    training = training_of(world, 12)
    assert recall(EASE(1.0).fit(training), world, 12, 1) == 1.0
    assert recall(Popularity().fit(training), world, 12, 1) < 0.7


def test_ease_is_the_ridge_regression_of_each_item_on_the_others() -> None:
    training = training_of(noisy_world(), 60)
    dense_IJ, strength = training.matrix.toarray().astype(np.float64), 7.0
    weight_JJ = EASE(strength).fit(training).weight_JJ
    for item in (0, 17, 59):
        others = np.delete(np.arange(60), item)
        x, y = dense_IJ[:, others], dense_IJ[:, item]
        expected = np.linalg.solve(x.T @ x + strength * np.eye(59), x.T @ y)
        np.testing.assert_allclose(weight_JJ[others, item], expected, atol=1e-5)
        assert weight_JJ[item, item] == 0


def test_tuning_takes_the_best_regularisation_of_the_validation_split() -> None:
    world = noisy_world()
    training, validation = training_of(world, 60), Validation(world)
    best, reached = tune_ease(training)
    by_hand = {}
    for strength in GRID:
        ranked_BK = rank_with(EASE(strength).fit(training), world.user, world.train, world.train, 60, 20)
        by_hand[strength] = means(validation.metrics(ranked_BK))["recall@20"]
    assert reached == pytest.approx(by_hand)
    assert len(set(reached.values())) > 1
    assert reached[best.regularisation] == max(by_hand.values())
    np.testing.assert_array_equal(best.weight_JJ, EASE(best.regularisation).fit(training).weight_JJ)


def test_tuning_takes_the_stronger_of_two_equal_regularisations() -> None:
    world = parity_world()
    best, _ = tune_ease(training_of(world, 12), (1.0, 100.0, 10.0))
    assert best.regularisation == 100.0


def test_tuning_without_validation_items_is_refused() -> None:
    world = parity_world()
    nothing = Histories(world.user, world.train, Ragged.from_lists([[]] * 64), world.test)
    with pytest.raises(ValueError, match="nothing to tune EASE on"):
        tune_ease(training_of(nothing, 12))


LEARNED = [name for name in BASELINES if name != "popularity"]
NEURAL = ["multi_vae", "md_cvae", "bert4rec", "s3rec", "sasrec", "two_tower", "m6_retrieval", "cllm4rec_emb"]
READ_ITEM_TEXT = ["ease_text", "md_cvae", "s3rec", "two_tower", "m6_retrieval", "cllm4rec_emb"]
FIND_COLD_ITEMS = ["ease_text", "md_cvae", "two_tower", "m6_retrieval", "cllm4rec_emb"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def vectors(num_rows: int, seed: int, parity: bool = True) -> np.ndarray:
    """One dimension tells the parity of the row, seven tell nothing and are smaller."""
    noise = np.random.default_rng(seed).normal(0.0, 0.3, (num_rows, 7))
    told = np.where(np.arange(num_rows) % 2, 1.0, -1.0) * parity
    return np.column_stack([told, noise]).astype(np.float32)


def with_vectors(training: Training) -> Training:
    """A stand-in for what a language model and CLLM4Rec's tables know."""
    num_users, num_items = len(training.histories), training.num_items
    return dataclasses.replace(
        training,
        item_text_vectors=vectors(num_items, 1),
        item_table=vectors(num_items, 2),
        user_table=vectors(num_users, 3, parity=False),
    )


def parity_training(seed: int = 0) -> Training:
    world = worlds.parity_world()
    return with_vectors(Training.of(world.histories, world.catalog, seed=seed, budget=Budget(60, 60.0)))


@functools.cache
def fitted(name: str) -> Baseline:
    if name in ("item_knn", "ials"):
        pytest.importorskip("implicit", reason="the extra `baselines` is not installed")
    return make(name).fit(parity_training())


@pytest.mark.parametrize("name", LEARNED)
def test_a_baseline_finds_the_hidden_item_of_the_parity_world(name: str) -> None:
    assert recall(fitted(name), worlds.parity_world().histories, 20, 1) == 1.0


def test_popularity_finds_the_hidden_item_by_chance_only() -> None:
    assert recall(fitted("popularity"), worlds.parity_world().histories, 20, 1) < 0.2


@pytest.mark.parametrize("name", NEURAL)
def test_a_neural_baseline_knows_nothing_before_it_is_trained(name: str) -> None:
    untrained = dataclasses.replace(parity_training(), budget=Budget(0, 60.0))
    params = {"pretrain_epochs": 0} if name in ("bert4rec", "s3rec") else {}
    assert recall(make(name, **params).fit(untrained), worlds.parity_world().histories, 20, 1) < 0.9


@pytest.mark.parametrize("name", LEARNED)
def test_an_unknown_user_is_ranked_for_by_the_history_alone(name: str) -> None:
    histories = worlds.parity_world().histories
    nobody, known = np.full(len(histories.user), -1), histories.together("train", "validation")
    item_BK = rank_with(fitted(name), nobody, histories.train, known, 20, 1)
    assert (item_BK[:, 0] == histories.test.values).mean() == 1.0


@pytest.mark.parametrize("name", BASELINES)
def test_scores_are_finite_numbers_of_single_precision_also_without_a_history(name: str) -> None:
    score_BJ = fitted(name).scores(np.array([0, -1]), Ragged.from_lists([[], []]))
    assert score_BJ.shape == (2, 20)
    assert score_BJ.dtype == np.float32
    assert np.isfinite(score_BJ).all()


@pytest.mark.parametrize("name", LEARNED)
def test_a_users_scores_do_not_depend_on_who_is_asked_about_beside(name: str) -> None:
    histories = worlds.parity_world().histories.train
    rows = np.array([3, 17, 4])
    shorter = histories.where(histories.places < 2 + histories.rows % 5)  # of different lengths, so some are padded
    together = fitted(name).scores(rows, shorter.take(rows))
    alone = [fitted(name).scores(row, shorter.take(row)) for row in rows[:, None]]
    np.testing.assert_allclose(together, np.concatenate(alone), atol=1e-4)


@pytest.mark.parametrize("name", [*NEURAL, "ials"])
def test_the_same_seed_gives_the_same_scores_and_another_seed_others(name: str) -> None:
    histories = worlds.parity_world().histories
    first = fitted(name).scores(histories.user, histories.train)
    torch.manual_seed(1234)  # what others draw does not matter
    again, other = (make(name).fit(parity_training(seed)).scores(histories.user, histories.train) for seed in (0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize("name", NEURAL)
def test_a_neural_baseline_learns_the_parity_world_in_seconds(name: str) -> None:
    started = time.process_time()
    make(name).fit(parity_training())
    assert time.process_time() - started < 10


def cold_world() -> tuple[Histories, Training]:
    """The parity world with two more items that nobody has taken in training, one of each kind by its text; every
    user's test item is the one of the user's kind."""
    world = worlds.parity_world()
    test = Ragged.from_lists([[20 + user % 2] for user in range(world.num_users)])
    histories = dataclasses.replace(world.histories, test=test)
    texts = [*world.catalog.item_texts, *world.catalog.item_texts[:2]]
    catalog = Catalog(world.catalog.user_ids, [f"item-{item:02d}" for item in range(22)], None, texts)
    return histories, with_vectors(Training.of(histories, catalog, budget=Budget(60, 60.0)))


@pytest.mark.parametrize("name", FIND_COLD_ITEMS)
def test_an_item_that_nobody_has_taken_is_found_by_its_text(name: str) -> None:
    histories, training = cold_world()
    score_BJ = make(name).fit(training).scores(histories.user, histories.train)
    own, others = score_BJ[histories.user, 20 + histories.user % 2], score_BJ[histories.user, 21 - histories.user % 2]
    assert (own > others).all()
    other_kind_BJ = np.where(np.arange(20) % 2 == histories.user[:, None] % 2, -np.inf, score_BJ[:, :20])
    assert (own > other_kind_BJ.max(axis=1)).all(), "a fitting cold item beats every item of the other kind"


def test_ease_without_text_knows_nothing_of_cold_items() -> None:
    histories, training = cold_world()
    assert not EASE(1.0).fit(training).scores(histories.user, histories.train)[:, 20:].any()


def network_of(name: str, training: Training, **params: Any) -> Any:
    """A neural baseline's network, untrained."""
    return make(name, **params).fit(dataclasses.replace(training, budget=Budget(0, 60.0))).network.eval()


def test_sasrec_predicts_what_comes_next_in_time() -> None:
    """On a ring of items every user goes on from one to the next."""
    steps = [(user + np.arange(3 + user // 15 % 4)) % 15 for user in range(120)]  # any start with any length
    after = Ragged.from_lists([[(row[-1] + 1) % 15] for row in steps])
    histories = Histories(np.arange(120), Ragged.from_lists(steps), after, after)
    ranked = make("sasrec", learning_rate=1e-2, batch_users=16, patience=30).fit(training_of(histories, 15))
    assert (ranked.scores(histories.user, histories.train).argmax(axis=1) == after.values).mean() == 1.0


FINETUNED = ["bert4rec", "s3rec", "two_tower", "m6_retrieval", "cllm4rec_emb"]


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
        assert torch.isneginf(network._forward(histories.train)[0][:, 20:]).all()
        return
    monkeypatch.setattr(network, "logits", lambda users, kept: torch.tensor([[0.0] * 20 + [90.0] * 2] * len(users)))
    assert float(network.loss(np.arange(40), histories.train, np.random.default_rng(0))) < 10 * np.log(20)


def test_md_cvae_weighs_cold_items_by_their_words_and_others_by_their_own() -> None:
    network = network_of("md_cvae", cold_world()[1])
    for weight_JH in network.item_weights():
        torch.testing.assert_close(weight_JH[20:], network.codes()[20:])
        torch.testing.assert_close(weight_JH[:20], network.encoder_JH[:20].detach(), check_device=False)


def test_multi_vae_pays_for_the_distance_of_its_posterior_from_the_prior() -> None:
    network, histories = network_of("multi_vae", parity_training()), worlds.parity_world().histories.train
    network.step.fill_(network.anneal_steps)
    _, mean_BD, log_variance_BD = network._forward(histories)
    posterior = torch.distributions.Normal(mean_BD, (0.5 * log_variance_BD).exp())
    prior = torch.distributions.Normal(torch.zeros_like(mean_BD), 1.0)
    expected = torch.distributions.kl_divergence(posterior, prior).sum(dim=1).mean()
    losses = []
    for network.beta in (0.0, 0.7):
        losses.append(network.loss(np.arange(40), histories, np.random.default_rng(0)).item())
    assert losses[1] - losses[0] == pytest.approx(0.7 * expected.item(), rel=1e-3)


def test_bert4rec_hides_what_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    network = network_of("bert4rec", parity_training())
    read: list[torch.Tensor] = []

    def seen(item_BT: torch.Tensor) -> torch.Tensor:
        read.append(item_BT)
        first = torch.full((len(item_BT), 1), -1)
        return torch.cat([first, item_BT], dim=1)[:, :, None]

    monkeypatch.setattr(network, "_read", seen)
    histories = Ragged.from_lists([[3, 5, 7, 9], [2], [4, 6]])
    hidden_NH, item_N = network.hide(histories, np.random.default_rng(0))
    assert (hidden_NH == network.encoder.mask).all()
    left = read[0][read[0] < 20].tolist()
    assert sorted(item_N.tolist() + left) == sorted(histories.values.tolist())
    assert len(item_N) >= 3, "one of every user at least"


def test_s3rec_learns_the_words_of_items_in_pretraining() -> None:
    training = dataclasses.replace(parity_training(), budget=Budget(1, 60.0))
    network = make("s3rec", pretrain_epochs=30).fit(training).network.eval()
    told_JA = network.from_item(network.encoder.items) @ network.attribute_AH.T > 0
    assert torch.equal(told_JA, network.has_JA)


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


def test_ease_with_text_of_no_weight_is_ease() -> None:
    training = parity_training()
    plain, text = EASE(7.0).fit(training), EASEText(7.0, alpha=0.0).fit(training)
    np.testing.assert_array_equal(plain.weight_JJ, text.weight_JJ)
    assert np.abs(EASEText(7.0, alpha=3.0).fit(training).weight_JJ - plain.weight_JJ).max() > 1e-3


def test_ease_with_text_is_ease_on_users_and_words_together() -> None:
    training, alpha = parity_training(), 2.0
    stacked_NJ = np.concatenate([training.matrix.toarray(), alpha * tf_idf(training.item_texts).toarray().T])
    weight_JJ = EASEText(5.0, alpha).fit(training).weight_JJ
    others = np.arange(1, 20)
    x, y = stacked_NJ[:, others].astype(np.float64), stacked_NJ[:, 0].astype(np.float64)
    np.testing.assert_allclose(weight_JJ[others, 0], np.linalg.solve(x.T @ x + 5.0 * np.eye(19), x.T @ y), atol=1e-5)


@pytest.mark.parametrize("name", [name for name in READ_ITEM_TEXT if name != "m6_retrieval"])
def test_a_method_that_reads_texts_is_refused_where_there_are_none(name: str) -> None:
    with pytest.raises(DataError, match="no two items share a word"):
        make(name).fit(dataclasses.replace(parity_training(), item_texts=[""] * 20))


@pytest.mark.parametrize("name", ["m6_retrieval", "cllm4rec_emb"])
def test_a_method_that_needs_vectors_asks_for_them(name: str) -> None:
    with pytest.raises(DataError, match="give Training"):
        make(name).fit(dataclasses.replace(parity_training(), item_text_vectors=None, user_table=None))


def slow_als(train_IJ: np.ndarray, item_JF: np.ndarray, alpha: float, strength: float, rounds: int) -> np.ndarray:
    """Scores after alternating weighted ridge regressions, one user and one item at a time (Hu et al., Eq. 4 and 5)."""

    def solve(rows: np.ndarray, fixed: np.ndarray) -> np.ndarray:
        solved = []
        for row in rows:
            confidence = np.diag(np.where(row > 0, alpha, 1.0))
            left = fixed.T @ confidence @ fixed + strength * np.eye(fixed.shape[1])
            solved.append(np.linalg.solve(left, fixed.T @ confidence @ (row > 0)))
        return np.array(solved)

    for _ in range(rounds):
        item_JF = solve(train_IJ.T, solve(train_IJ, item_JF))
    return solve(train_IJ, item_JF) @ item_JF.T


def test_ials_is_alternating_least_squares() -> None:
    pytest.importorskip("implicit", reason="the extra `baselines` is not installed")
    training = training_of(noisy_world(40, 15), 15)
    # What `implicit` starts from: users first, then items.
    random = np.random.default_rng(training.seed)
    _, start_JF = (random.random((rows, 4), dtype=np.float32) * 0.01 for rows in (40, 15))
    expected = slow_als(training.matrix.toarray().astype(np.float64), start_JF.astype(np.float64), 5.0, 0.7, 6)
    reached = IALS(4, 0.7, 5.0, iterations=6).fit(training).scores(np.arange(40), training.histories)
    np.testing.assert_allclose(reached, expected, atol=2e-3)


def test_item_knn_adds_up_cosines_of_the_nearest_items() -> None:
    pytest.importorskip("implicit", reason="the extra `baselines` is not installed")
    training = training_of(noisy_world(500, 12), 12)
    dense_IJ = training.matrix.toarray().astype(np.float64)
    cosine_JJ = dense_IJ.T @ dense_IJ / np.sqrt(np.outer(dense_IJ.sum(0), dense_IJ.sum(0)))
    everyone = ItemKNN(neighbours=12).fit(training).scores(np.arange(500), training.histories)
    np.testing.assert_allclose(everyone, dense_IJ @ cosine_JJ, atol=1e-5)
    nearest_JJ = np.where(cosine_JJ >= np.sort(cosine_JJ, axis=1)[:, [-4]], cosine_JJ, 0)  # itself and three others
    assert ((nearest_JJ > 0).sum(axis=1) == 4).all(), "no ties"
    few = ItemKNN(neighbours=3).fit(training).scores(np.arange(500), training.histories)
    np.testing.assert_allclose(few, dense_IJ @ nearest_JJ.T, atol=1e-5)


def test_without_implicit_one_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(item_knn.importlib, "import_module", absent)
    with pytest.raises(ConfigError, match=r"cllm4rec\[baselines\]"):
        ItemKNN().fit(parity_training())


@pytest.mark.parametrize("name", BASELINES)
def test_every_value_of_a_grid_is_a_parameter_of_its_method(name: str) -> None:
    assert set(GRIDS) == set(BASELINES)
    # A neural network checks its parameters when it is fitted.
    training = dataclasses.replace(parity_training(), budget=Budget(0, 60.0))
    for parameter, values in GRIDS[name].items():
        assert len(set(values)) >= 3
        if name in NEURAL:
            make(name, **{parameter: values[0]}).fit(training)
        else:
            make(name, **{parameter: values[0]})


def test_trials_are_the_whole_grid_or_the_defaults_and_a_fixed_choice_of_it() -> None:
    assert trials("popularity", 5) == [{}]
    assert [params["regularisation"] for params in trials("ease", 9)] == list(GRID)
    some = trials("multi_vae", 6)
    assert some == trials("multi_vae", 6) != trials("multi_vae", 6, seed=1)
    assert some[0] == {}
    assert len({json.dumps(params) for params in some}) == 6
    assert all(params[name] in GRIDS["multi_vae"][name] for params in some for name in params)


def test_a_baseline_of_another_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="there is no baseline 'easy'; use one of popularity, item_knn"):
        make("easy")


def test_baselines_are_fitted_on_all_users_or_none() -> None:
    world = worlds.parity_world()
    with pytest.raises(DataError, match="39 of 40 users"):
        Training.of(world.histories.take(np.arange(39)), world.catalog)


def test_an_items_reviews_are_read_after_its_own_text(tmp_path: Path) -> None:
    own = ["warm wood, oiled", ""]
    reviews = {(0, 1): "a sharp, odd thing!", (1, 1): "sharper than <|endoftext|>", (2, 0): "rounder than I thought"}
    catalog = Catalog(["u", "v", "w"], ["a", "b"], None, own)
    save_tokenizer(ModelConfig(backbone=BackboneSize(vocab_size=300)), reviews.values(), str(tmp_path / "tokenizer"))
    encoder = Encoder.load(str(tmp_path / "tokenizer"))
    prompts, tokens = tokenise_prompts(encoder), catalog.tokens(encoder.num_words)
    user, item = np.array(list(reviews)).T
    documents = [
        prompts.interactions(tokens, np.arange(3), Ragged.from_lists([[1], [1], [0]])),
        prompts.reviews(tokens, user, item, encoder.encode(list(reviews.values()))),
        prompts.item_texts(tokens, np.array([0]), encoder.encode(own[:1])),
    ]
    write_table(Documents.concat(documents).to_arrow(), str(tmp_path / "documents" / "bucket-00000.parquet"))
    texts = item_texts_with_reviews(str(tmp_path), catalog)
    assert texts == ["warm wood, oiled rounder than I thought", texts[1]]
    assert texts[1].startswith(" a sharp, odd thing! sharper than ")


def test_words_that_tell_no_texts_apart_are_left_out() -> None:
    texts = ["The red, red box", "the blue box", "a blue BOX, the only"]
    assert word_counts(texts).toarray().tolist() == [
        [0],
        [1],
        [1],
    ]  # blue; the and box are everywhere, red and only once
    texts.append("")
    counts = word_counts(texts)
    assert counts.shape == (4, 3)
    assert counts.sum() == 2 + 3 + 3
    lengths = np.linalg.norm(tf_idf(texts).toarray(), axis=1)
    np.testing.assert_allclose(lengths, [1, 1, 1, 0], atol=1e-6)


def test_rarer_words_weigh_more_and_only_the_most_frequent_are_kept() -> None:
    texts = ["wood oak", "wood oak", "wood", "wood elm", "elm steel"]
    row = tf_idf(texts)[[0]].toarray()[0]  # elm, oak, wood
    assert row[1] / row[2] == pytest.approx(np.log(5 / 2) / np.log(5 / 4))
    assert word_counts(texts, max_words=1).toarray().ravel().tolist() == [1, 1, 1, 1, 0]


def musical_instruments(seed: int) -> tuple[Histories, int]:
    """Ratings above 3, 5-core, a random 80/10/10 split: read here without the project's own sources."""
    with gzip.open(REVIEWS, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    pairs = [(row["reviewerID"], row["asin"]) for row in rows if row["overall"] > 3]
    while True:
        users, items = Counter(user for user, _ in pairs), Counter(item for _, item in pairs)
        kept = [(user, item) for user, item in pairs if users[user] >= 5 and items[item] >= 5]
        if len(kept) == len(pairs):
            break
        pairs = kept
    index = {item: place for place, item in enumerate(sorted(items))}
    taken: dict[str, list[int]] = {user: [] for user in sorted(users)}
    for user, item in pairs:
        taken[user].append(index[item])
    generator = np.random.default_rng(seed)
    orders = [generator.permutation(values) for values in taken.values()]
    tenths = [max(1, len(order) // 10) for order in orders]
    cuts = [(order[2 * n :], order[:n], order[n : 2 * n]) for order, n in zip(orders, tenths, strict=True)]
    train, validation, test = (Ragged.from_lists(parts) for parts in zip(*cuts, strict=True))
    return Histories(np.arange(len(orders)), train, validation, test), len(index)


@pytest.mark.skipif(not REVIEWS.exists(), reason=f"no shared data: {REVIEWS.name}; set CLLM4REC_SHARED")
def test_musical_instruments_reach_the_figures_measured_elsewhere() -> None:
    reached: dict[str, list[float]] = {"popularity": [], "ease": []}
    for seed in range(3):
        histories, num_items = musical_instruments(seed)
        assert (len(histories.user), num_items) == (526, 347)
        training = training_of(histories, num_items)
        ease, _ = tune_ease(training)
        reached["popularity"].append(recall(Popularity().fit(training), histories, num_items, 20))
        reached["ease"].append(recall(ease, histories, num_items, 20))
    # Two standard errors of a mean over three random splits (0.015 between splits, measured over 12).
    assert np.mean(reached["popularity"]) == pytest.approx(0.241, abs=0.018)
    assert np.mean(reached["ease"]) == pytest.approx(0.280, abs=0.018)
