"""Sampled softmax: which items are sampled, and that it estimates the full softmax."""

import dataclasses

import numpy as np
import pytest
import torch
from support.parity import parity, phases, recall_at_1, settings, train

from cllm4rec.arrays.ids import TokenSpace
from cllm4rec.arrays.ragged import Ragged
from cllm4rec.data.documents import Prompts
from cllm4rec.model.batch import batch_to_device
from cllm4rec.model.cllm4rec import CLLM4Rec
from cllm4rec.model.packing import Packer
from cllm4rec.model.ranker import Ranker
from cllm4rec.model.sampling import ItemSample, ItemSampler, sampling_probabilities

CPU = torch.device("cpu")
COUNTS = np.random.default_rng(0).zipf(1.6, 400).clip(max=10_000) - 1


@pytest.mark.parametrize("size", [1, 2, 30, 399])
def test_probabilities_grow_with_popularity_and_sum_to_the_size_asked_for(size):
    probability = sampling_probabilities(COUNTS, size)
    assert (np.diff(probability[np.argsort(COUNTS, kind="stable")]) >= 0)[:-1].all()
    assert (probability > 0).all()
    assert (probability <= 1).all()
    certain = probability == 1.0
    assert certain[np.argmax(COUNTS)]
    ratio = probability[~certain] / (COUNTS[~certain] + 1)
    assert np.ptp(ratio) < 1e-12
    # Raising the probability of the most popular item to 1 may add up to 1.
    assert size - 1e-9 <= probability.sum() < size + 1


def test_items_are_drawn_as_often_as_their_chance_says_and_anew_each_step():
    sampler = ItemSampler(sampling_probabilities(COUNTS, 50), seed=3)
    draws = [sampler.draw(1, step) for step in range(2000)]
    found = np.bincount(np.concatenate([draw.items for draw in draws]), minlength=400) / len(draws)
    assert np.abs(found - sampler.probability_J).max() < 5 * np.sqrt(0.25 / len(draws))
    assert np.exp(draws[0].log_probability) == pytest.approx(sampler.probability_J[draws[0].items])
    again = ItemSampler(sampling_probabilities(COUNTS, 50), seed=3).draw(1, 7)
    assert np.array_equal(again.items, draws[7].items)
    assert not np.array_equal(draws[6].items, draws[7].items)
    assert not np.array_equal(sampler.draw(2, 7).items, draws[7].items)


def test_popularity_is_counted_in_interactions():
    space = TokenSpace(10, 3, 5)
    prompts = Prompts.tokenize(lambda text: [1])
    documents = prompts.interactions(space, np.arange(3), Ragged.from_lists([[0, 2], [2], [2, 4]]))
    sampler = ItemSampler.from_documents(documents, space, 2, seed=0)
    assert sampler is not None
    assert np.array_equal(sampler.probability_J, sampling_probabilities(np.array([1, 0, 3, 0, 1]), 2))


@pytest.mark.parametrize("size", [None, 5, 6])
def test_there_is_no_sampler_for_a_full_softmax(size):
    assert ItemSampler.from_documents(parity().documents, TokenSpace(10, 3, 5), size, seed=0) is None


SPACE = TokenSpace(parity().token_space.num_words, 40, len(COUNTS))


def losses(sample: ItemSample | None):
    """The joint loss of 40 users over 400 items, and the gradient of the item table."""
    model = CLLM4Rec(parity().make_model().backbone, SPACE, std=0.1)
    rng = np.random.default_rng(1)
    items = Ragged.from_lists([rng.choice(len(COUNTS), 12, replace=False).tolist() for _ in range(40)])
    documents = parity().prompts.interactions(SPACE, np.arange(40), items)
    batch = next(iter(Packer(SPACE, 4096, settings().model.max_tokens).batches([documents])))
    model.train_only(("collaborative_users", "collaborative_items"))
    total = model(batch_to_device(batch, CPU, sample=sample), 0.5).total
    return total.item(), torch.autograd.grad(total, model.collaborative_items)[0]


def test_a_sample_has_all_targets_and_few_shapes():
    """A CPU caches one kernel for each number of items."""
    source = parity().documents.take(np.arange(40))
    batch = next(iter(Packer(parity().token_space, 4096, settings().model.max_tokens).batches([source])))
    sizes = set()
    for drawn in (np.arange(1), np.arange(0, parity().token_space.num_items, 3)):
        sampled = batch_to_device(batch, CPU, sample=ItemSample(drawn, np.zeros(len(drawn), np.float32))).sampled
        assert sampled is not None
        assert np.array_equal(sampled.items_M[sampled.targets_E], batch.item_targets)
        assert sorted(sampled.items_M[sampled.bias_M == 0].tolist()) == drawn.tolist()
        sizes.add(len(sampled.items_M))
    assert sizes == {256}


def test_a_sample_of_all_items_is_the_whole_softmax():
    items = np.arange(len(COUNTS))
    whole, gradient = losses(None)
    found, found_gradient = losses(ItemSample(items, np.zeros(len(items), np.float32)))
    assert found == pytest.approx(whole, rel=1e-6)
    assert torch.allclose(found_gradient, gradient, atol=1e-5)


def test_samples_give_the_loss_and_gradient_of_the_whole_softmax_on_average():
    """Approximately: the mean of logarithms is slightly less than the logarithm of the mean."""
    whole, gradient = losses(None)
    sampler = ItemSampler(sampling_probabilities(COUNTS, 200), seed=0)
    found = [losses(sampler.draw(0, step)) for step in range(200)]
    assert np.mean([loss for loss, _ in found]) == pytest.approx(whole, rel=0.002)
    average = torch.stack([sampled_gradient for _, sampled_gradient in found]).mean(dim=0)
    assert (average - gradient).norm() < 0.15 * gradient.norm()
    errors = [((sampled_gradient - gradient).norm() / gradient.norm()).item() for _, sampled_gradient in found]
    assert np.mean(errors) > 1.0


def test_hidden_items_are_found_after_training_with_few_items_per_step():
    world = parity()
    weights, _ = train(phases(), sampled_items=world.token_space.num_items // 4)
    model = world.make_model()
    model.load_state_dict(weights, strict=False)
    assert recall_at_1(Ranker(model, world.prompts, settings().model.max_tokens)) == 1.0
    sampled, _ = train([dataclasses.replace(phases()[2], epochs=1)], sampled_items=world.token_space.num_items // 4)
    full, _ = train([dataclasses.replace(phases()[2], epochs=1)])
    assert not torch.equal(sampled["collaborative_items"], full["collaborative_items"])
