"""One suite for every backbone: the properties of the joint model that hold for any language model."""

import numpy as np
import pytest
import torch
from support.parity import ARCHITECTURES, MAX_TOKENS, NARROW, all_kinds, parity
from support.weights import digest_of_weights
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from cllm4rec.arrays.ragged import Ragged
from cllm4rec.config import BackboneSize, ModelConfig
from cllm4rec.data.documents import Documents
from cllm4rec.errors import ArtifactError, ConfigError
from cllm4rec.model.backbone_files import load_backbone, new_backbone, save_backbone, save_reference
from cllm4rec.model.batch import batch_to_device
from cllm4rec.model.built_backbone import build_backbone
from cllm4rec.model.cllm4rec import TABLES, CLLM4Rec, new_model
from cllm4rec.model.ranker import Ranker
from cllm4rec.model.stock_backbone import check_stock_backbone, pretrained_backbone
from cllm4rec.training.loop import packer_for
from cllm4rec.training.phases import CONTENT

CPU = torch.device("cpu")
WITH_WIDTHS = [*((name, None) for name in ARCHITECTURES), *((name, NARROW) for name in ARCHITECTURES)]


def documents() -> Documents:
    return all_kinds().take(np.arange(120))


def model_of(architecture: str, id_width: int | None = None) -> CLLM4Rec:
    model = parity().make_model(architecture, id_width)
    with torch.no_grad():
        for number, table in enumerate(model.own_parameters().values()):
            table += 0.05 * torch.randn(table.shape, generator=torch.Generator().manual_seed(number))
    model.train_only(TABLES.values())
    return model


def total_and_gradients(model: CLLM4Rec, parts: list[Documents], micro_batch_tokens: int = 8 * MAX_TOKENS):
    packer = packer_for(model.backbone, model.token_space, micro_batch_tokens, MAX_TOKENS)
    model.zero_grad()
    total = 0.0
    for part in parts:
        for batch in packer.batches([part]):
            loss = model(batch_to_device(batch, CPU), 0.7).total
            loss.backward()
            total += loss.item()
    return total, {name: weight.grad.clone() for name, weight in model.own_parameters().items()}


@pytest.mark.parametrize(("architecture", "id_width"), WITH_WIDTHS)
def test_packed_rows_equal_one_document_at_a_time(architecture, id_width):
    model, sample = model_of(architecture, id_width), documents()
    packed, packed_gradients = total_and_gradients(model, [sample])
    single, single_gradients = total_and_gradients(
        model, [sample.take(np.array([number])) for number in range(len(sample))], MAX_TOKENS
    )
    assert packed == pytest.approx(single, rel=1e-5)
    assert len(packed_gradients) == (6 if id_width else 4)
    for name, gradient in packed_gradients.items():
        scale = gradient.abs().max().item()
        assert torch.allclose(gradient / scale, single_gradients[name] / scale, atol=1e-5), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_pass_over_all_kinds_equals_a_pass_for_each_kind(architecture):
    model, sample = model_of(architecture), documents()
    joint, _ = total_and_gradients(model, [sample])
    separate, _ = total_and_gradients(
        model, [sample.take(np.flatnonzero(sample.kind == kind)) for kind in np.unique(sample.kind)]
    )
    assert joint == pytest.approx(separate, rel=1e-5)


@pytest.mark.parametrize(("architecture", "id_width"), WITH_WIDTHS)
def test_only_trained_parameters_get_a_gradient(architecture, id_width):
    model = model_of(architecture, id_width)
    model.train_only(CONTENT)
    packer = packer_for(model.backbone, model.token_space, 8 * MAX_TOKENS, MAX_TOKENS)
    model(batch_to_device(next(iter(packer.batches([documents()]))), CPU), 1.0).total.backward()
    has_gradient = {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert has_gradient == {*CONTENT, *(["input_projection"] if id_width else [])}


@pytest.mark.parametrize(("architecture", "id_width"), WITH_WIDTHS)
def test_bf16_stays_near_float32(architecture, id_width):
    model, sample = model_of(architecture, id_width), documents()
    exact, _ = total_and_gradients(model, [sample])
    model.compute_in(torch.bfloat16)
    rounded, gradients = total_and_gradients(model, [sample])
    assert rounded == pytest.approx(exact, rel=0.02)
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())


def test_a_backbone_that_is_trained_stays_float32_and_computes_in_bf16():
    hidden = {}
    for precision in (torch.float32, torch.bfloat16):
        model = model_of("gpt2")
        model.train_only(("backbone",))
        model.compute_in(precision)
        batch = next(
            iter(packer_for(model.backbone, model.token_space, 8 * MAX_TOKENS, MAX_TOKENS).batches([documents()]))
        )
        hidden[precision] = model.hidden_states(batch_to_device(batch, CPU)).float()
        assert model.backbone.dtype == torch.float32
    assert 1e-3 < float((hidden[torch.bfloat16] - hidden[torch.float32]).abs().max()) < 0.1


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_loss_of_interactions_equals_a_plain_run_of_the_backbone(temperature):
    """Eq. 7 without packing and without the fused head: embed, run, softmax."""
    model = model_of("gpt2")
    model.temperature = temperature
    space = parity().token_space
    document = parity().prompts.interactions(space, np.array([3]), Ragged.from_lists([[1, 5, 7]]))
    found, _ = total_and_gradients(model, [document])
    words = model.backbone.word_embeddings[torch.tensor(document.prompt[0][1:].astype(int))]
    embeddings = torch.cat([model.collaborative_users[3:4], words, model.collaborative_items[[1, 5]]])
    hidden = model.backbone.model.transformer(inputs_embeds=embeddings[None]).last_hidden_state[0]
    log_p = torch.log_softmax(hidden[-3:] @ model.collaborative_items.T / temperature, dim=1)
    penalty = (model.collaborative_users[3] - model.content_users[3]).square().sum()
    penalty += (model.collaborative_items[[1, 5, 7]] - model.content_items[[1, 5, 7]]).square().sum()
    expected = -(log_p[0, 1] + log_p[1, 5] + log_p[2, 7]) + 0.35 * penalty
    assert found == pytest.approx(expected.item(), rel=1e-5)


def test_projections_have_the_loss_and_gradients_of_a_plain_model():
    """Eq. 7 with narrow tables, dense and in float64: embeddings are rows times P, logits (Q h) times the table."""
    model = model_of("gpt2", NARROW)
    model.temperature = 2.0
    model.backbone.unknown_K.fill_(0.3)  # may not be added to the embedding of a known user or item
    document = parity().prompts.interactions(parity().token_space, np.array([3]), Ragged.from_lists([[1, 5, 7]]))
    found, gradients = total_and_gradients(model, [document])
    plain = {name: weight.detach().double().requires_grad_() for name, weight in model.own_parameters().items()}
    words = model.backbone.word_embeddings[torch.tensor(document.prompt[0][1:].astype(int))].detach().double()
    users, items = plain["collaborative_users"], plain["collaborative_items"]
    into = plain["input_projection"].T
    embeddings = torch.cat([users[3:4] @ into, words, items[[1, 5]] @ into])
    hidden = model.backbone.model.double().transformer(inputs_embeds=embeddings[None]).last_hidden_state[0]
    log_p = torch.log_softmax(hidden[-3:] @ plain["query_projection"].T @ items.T / 2.0, dim=1)
    penalty = (users[3] - plain["content_users"][3]).square().sum()
    penalty = penalty + (items[[1, 5, 7]] - plain["content_items"][[1, 5, 7]]).square().sum()
    expected = -(log_p[0, 1] + log_p[1, 5] + log_p[2, 7]) + 0.35 * penalty
    expected.backward()
    assert found == pytest.approx(expected.item(), rel=1e-6)
    for name, gradient in gradients.items():
        scale = plain[name].grad.abs().max()
        assert scale > 1e-3, name
        assert (gradient - plain[name].grad).abs().max() < 1e-5 * scale, name


@pytest.mark.parametrize("id_width", [8, 32])
def test_narrow_rows_start_with_the_length_and_the_logits_of_a_tied_head(id_width):
    wide, narrow = parity().make_model(), parity().make_model(id_width=id_width)
    read = narrow.content_items @ narrow.input_projection.T
    assert narrow.content_items.shape == (20, id_width)
    assert torch.allclose(read.norm(dim=1), narrow.content_items.norm(dim=1), rtol=1e-5)
    length = narrow.content_items.square().sum(dim=1).mean() / wide.content_items.square().sum(dim=1).mean()
    assert 0.7 < length < 1.4
    hidden = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(narrow.queries(hidden) @ narrow.collaborative_items.T, hidden @ read.T, atol=1e-5)


def test_tables_wider_than_a_pretrained_model_are_refused_before_anything_starts(shared_dir):
    folder = str(shared_dir / "weights" / "stories260k_llama")
    config = ModelConfig(backbone=folder, max_tokens=128, id_width=65)
    sentence = r"id_width 65 is above the width 64 of the language model; use 64 or less, or null"
    with pytest.raises(ConfigError, match=sentence):
        check_stock_backbone(config)
    with pytest.raises(ConfigError, match=sentence):
        new_model(config, pretrained_backbone(folder, None, 128), parity().token_space, 0)
    check_stock_backbone(config.model_copy(update={"id_width": 64}))


@pytest.mark.parametrize("final_norm", [False, True])
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "t5"])
def test_without_the_final_norm_similar_items_give_a_longer_hidden_state(architecture, final_norm, tmp_path):
    """Items 0 to 3 are identical, items 4 to 7 are not."""
    size = BackboneSize(architecture=architecture, layers=1, width=32, heads=4, vocab_size=300, final_norm=final_norm)
    backbone = build_backbone(size, parity().token_space.num_words, MAX_TOKENS, 0)
    save_backbone(backbone, str(tmp_path))
    lengths = []
    for built_or_loaded in (backbone, load_backbone(str(tmp_path), MAX_TOKENS)):
        model = CLLM4Rec(built_or_loaded, parity().token_space, std=1.0, seed=0)
        with torch.no_grad():
            model.collaborative_items[:4] = model.collaborative_items[0].clone()
        ranker = Ranker(model.eval(), parity().prompts, MAX_TOKENS)
        histories = Ragged.from_lists([[0, 1, 2, 3], [4, 5, 6, 7]])
        lengths.append(ranker.encode_users(np.array([-1, -1]), histories).norm(dim=1).tolist())
    assert lengths[0] == lengths[1]
    auto = AutoModelForSeq2SeqLM if architecture == "t5" else AutoModelForCausalLM
    assert not auto.from_pretrained(tmp_path, output_loading_info=True)[1]["missing_keys"]
    alike, unlike = lengths[0]
    assert (alike > 1.005 * unlike) == (not final_norm)
    assert (alike == pytest.approx(unlike, rel=1e-3)) == final_norm


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_saved_backbone_loads_with_the_same_bytes(architecture, tmp_path):
    backbone = parity().make_model(architecture).backbone
    save_backbone(backbone, str(tmp_path))
    assert digest_of_weights(load_backbone(str(tmp_path), MAX_TOKENS)) == digest_of_weights(backbone)


def test_a_pretrained_llama_loads_by_reference_and_is_refused_when_its_bytes_change(shared_dir, tmp_path):
    import shutil

    stock, written = tmp_path / "stock", tmp_path / "written"
    shutil.copytree(shared_dir / "weights" / "stories260k_llama", stock)
    config = ModelConfig(backbone=str(stock), max_tokens=128)
    backbone = new_backbone(config, num_words=512, seed=0)
    assert backbone.width == 64
    save_reference(config, str(written))
    assert digest_of_weights(load_backbone(str(written), 128)) == digest_of_weights(backbone)
    blob = bytearray((stock / "model.safetensors").read_bytes())
    blob[-1] ^= 1
    (stock / "model.safetensors").write_bytes(bytes(blob))
    with pytest.raises(ArtifactError, match=r"digest of model\.safetensors differs"):
        load_backbone(str(written), 128)


def test_a_pretrained_llama_predicts_stories_better_than_chance(shared_dir):
    """Pretrained weights in packed rows: a wrong mask, position or head would raise the loss."""
    from transformers import AutoTokenizer

    from cllm4rec.arrays.ids import TokenSpace

    folder = str(shared_dir / "weights" / "stories260k_llama")
    backbone = pretrained_backbone(folder, None, 128)
    words = AutoTokenizer.from_pretrained(folder)("Once upon a time, there was a little girl named Lily.")["input_ids"]
    space = TokenSpace(512, 1, 1)
    text = parity().prompts
    story = text.item_texts(space, np.array([0]), Ragged.from_lists([words[1:]]))
    plain = Documents(
        story.kind, story.user, story.item, Ragged.from_lists([words[:1]], np.int32), story.main, story.target
    )
    batch = next(iter(packer_for(backbone, space, 256, 128).batches([plain, plain])))
    with torch.no_grad():
        found = CLLM4Rec(backbone, space, std=0.1)(batch_to_device(batch, CPU), 0.0).words.item()
    assert found / len(batch.word_targets) < 2.5  # chance is ln 512 = 6.2


def test_a_missing_backbone_is_named_in_the_error():
    with pytest.raises(ConfigError, match="cannot be loaded"):
        pretrained_backbone("no/such/folder/at-all", None, 64)


def test_a_fresh_model_is_the_same_for_the_same_seed():
    first, second = parity().make_model("t5"), parity().make_model("t5")
    assert digest_of_weights(first.backbone) == digest_of_weights(second.backbone)
    assert torch.equal(first.content_items, second.content_items)


def test_bf16_replaces_the_approximate_gelu_by_the_exact_one():
    model = parity().make_model("gpt2")
    names = lambda: {type(module).__name__ for module in model.backbone.modules()}  # noqa: E731
    assert "GELUTanh" in names()
    model.compute_in(torch.bfloat16)
    assert "GELUTanh" not in names()
    assert "GELU" in names()
