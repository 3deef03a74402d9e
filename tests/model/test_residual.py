"""Queries with the sum of the items' embeddings (`model.history: residual`)."""

import numpy as np
import pytest
import torch
from support.parity import ARCHITECTURES, MAX_TOKENS, all_kinds, parity

from cllm4rec.arrays.ragged import Ragged
from cllm4rec.config import BackboneSize, ModelConfig
from cllm4rec.data.documents import Kind
from cllm4rec.model.batch import batch_to_device
from cllm4rec.model.built_backbone import build_backbone
from cllm4rec.model.cllm4rec import TABLES, CLLM4Rec
from cllm4rec.model.ranker import Ranker
from cllm4rec.training.loop import packer_for

CPU = torch.device("cpu")


def residual_model(architecture: str = "gpt2", id_width: int | None = None, trained: bool = True) -> CLLM4Rec:
    size = BackboneSize(architecture=architecture, layers=2, width=32, heads=4, vocab_size=257)  # type: ignore[arg-type]
    backbone = build_backbone(size, parity().token_space.num_words, 2 * MAX_TOKENS, seed=0)
    model = CLLM4Rec(backbone, parity().token_space, std=0.3, id_width=id_width, residual=True)
    if trained:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            model.query_projection.normal_(std=0.3, generator=generator)
            model.query_bias.normal_(std=0.3, generator=generator)
    model.train_only(TABLES.values())
    return model


def batch_of(model: CLLM4Rec, documents):
    packer = packer_for(model.backbone, model.token_space, 16 * MAX_TOKENS, MAX_TOKENS)
    return batch_to_device(next(iter(packer.batches([documents]))), CPU)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_prediction_reads_the_items_before_it_and_no_others(architecture):
    model, documents = residual_model(architecture), all_kinds().take(np.arange(60))
    source = batch_of(model, documents).source
    space, expected = model.token_space, []
    packed = source.documents
    for row in np.flatnonzero(packed.kind == Kind.INTERACTIONS):
        items = space.item_index(packed.main[row].astype(np.int64)).tolist()
        expected += [items[:place] for place in range(len(items))]
    for row in np.flatnonzero(packed.kind == Kind.RECOMMENDATION):
        prompt = packed.prompt[row].astype(np.int64)
        expected.append(space.item_index(prompt[space.is_item(prompt)]).tolist())
    assert source.read_items.tolist() == expected
    assert len(expected) == len(source.item_slots)
    assert any(len(items) > 1 for items in expected)


@pytest.mark.parametrize("id_width", [None, 8])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_and_gradients_equal_a_plain_reference(architecture, id_width):
    model, documents = residual_model(architecture, id_width), all_kinds().take(np.arange(60))
    batch = batch_of(model, documents)
    losses = model(batch, 0.0)
    losses.items.backward()
    names = ("collaborative_items", "query_projection", "query_bias")
    found = {name: getattr(model, name).grad.clone() for name in names}
    model.zero_grad()
    hidden_PK = model.hidden_states(batch)[batch.item_slots]
    queries = []
    for hidden, items in zip(hidden_PK, batch.source.read_items.tolist(), strict=True):
        query = model.query_projection @ hidden / model.backbone.width + model.query_bias
        for item in items:
            query = query + model.collaborative_items[item] / len(items) ** 0.5
        queries.append(query)
    log_p = torch.log_softmax(torch.stack(queries) @ model.collaborative_items.T, dim=1)
    expected = -log_p[batch.item_target_rows, batch.item_targets].sum()
    expected.backward()
    assert losses.items.item() == pytest.approx(expected.item(), rel=1e-5)
    for name in names:
        assert torch.allclose(found[name], getattr(model, name).grad, atol=1e-3, rtol=1e-3), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_ranking_is_that_of_the_training_queries_and_the_same_bits_alone(architecture):
    model = residual_model(architecture).eval()
    ranker = Ranker(model, parity().prompts, MAX_TOKENS)
    rng = np.random.default_rng(0)
    users = np.arange(20)
    histories = Ragged.from_lists(
        [rng.choice(model.token_space.num_items, rng.integers(0, 9), replace=False) for _ in users]
    )
    together = ranker.encode_users(users, histories)
    for row in range(len(users)):
        assert torch.equal(ranker.encode_users(users[[row]], histories.take(np.array([row])))[0], together[row])
    ordered = Ragged.from_lists([np.sort(items) for items in histories.tolist()])
    documents = parity().prompts.recommendation(model.token_space, users, ordered, Ragged.empty(len(users)))
    batch = batch_of(model, documents)
    with torch.no_grad():
        expected = model.queries(model.hidden_states(batch)[batch.item_slots], batch.read_items)
    assert torch.allclose(together[batch.source.documents.user], expected, atol=1e-4)


def test_an_untrained_projection_leaves_the_sum_of_the_rows():
    """The control without a language model: items are ranked by the sum of the rows alone."""
    model = residual_model(trained=False).eval()
    ranker = Ranker(model, parity().prompts, MAX_TOKENS)
    query = ranker.encode_users(np.array([-1]), Ragged.from_lists([[1, 3, 5]]))[0]
    assert torch.allclose(query, model.collaborative_items[[1, 3, 5]].sum(dim=0) / 3**0.5, atol=1e-6)
    assert torch.equal(ranker.encode_users(np.array([-1]), Ragged.from_lists([[]]))[0], torch.zeros(32))


def test_without_the_language_model_the_sum_and_the_bias_remain():
    model = residual_model().eval()
    ranker = Ranker(model, parity().prompts, MAX_TOKENS, with_language_model=False)
    query = ranker.encode_users(np.array([0]), Ragged.from_lists([[1, 3]]))[0]
    assert torch.allclose(query, model.query_bias + model.collaborative_items[[1, 3]].sum(dim=0) / 2**0.5, atol=1e-6)
    whole = Ranker(model, parity().prompts, MAX_TOKENS).encode_users(np.array([0]), Ragged.from_lists([[1, 3]]))[0]
    assert (whole - query).abs().max() > 1e-2


def test_stock_models_take_it_by_default_and_built_ones_do_not():
    assert ModelConfig(backbone="gpt2").is_residual
    assert not ModelConfig().is_residual
    assert not ModelConfig(backbone="gpt2", history="lm").is_residual
    assert ModelConfig(history="residual").is_residual
