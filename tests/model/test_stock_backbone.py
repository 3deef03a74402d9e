"""Stock language models: which families work, and what is said about the others."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.families import REFUSED, WORKING, tiny_config
from support.parity import MAX_TOKENS, all_kinds, parity
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from cllm4rec.config import ModelConfig, parse_config
from cllm4rec.data.documents import TEXT_KINDS, Kind
from cllm4rec.errors import ConfigError
from cllm4rec.model import attention
from cllm4rec.model.backbone import WordHead
from cllm4rec.model.backbone_files import load_backbone, save_trained
from cllm4rec.model.batch import batch_to_device
from cllm4rec.model.cllm4rec import TABLES, CLLM4Rec
from cllm4rec.model.family_check import FAMILIES, TOLERANCE, check_family, family_difference
from cllm4rec.model.stock_backbone import check_stock_backbone, pretrained_backbone
from cllm4rec.training.loop import packer_for


@pytest.mark.parametrize("family", WORKING)
def test_packed_documents_equal_the_own_forward_of_the_family(family):
    assert max(family_difference(tiny_config(family), MAX_TOKENS).values()) < 1e-4


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_computes_something_else_is_refused_in_one_sentence(family):
    with pytest.raises(ConfigError) as refused:
        check_family(tiny_config(family), "some/model", MAX_TOKENS)
    sentence = str(refused.value)
    assert "'some/model' is of the family " + REFUSED[family][0] in sentence
    assert "use a model of another family, such as bart, cohere" in sentence
    assert "\n" not in sentence


def test_the_families_that_the_error_names_are_those_that_work():
    assert {model_type for model_type, _ in WORKING.values()} >= set(FAMILIES)


def test_the_page_on_stock_models_lists_these_families():
    page = (Path(__file__).parents[2] / "docs" / "stock-models.md").read_text()
    works, refused = (
        part.partition("\n\n")[0] for part in (page.partition("| works |")[2], page.partition("| refused |")[2])
    )
    listed = [
        {word for row in part.splitlines() for word in re.findall(r"[a-z]+[0-9a-z_]*", row)}
        for part in (works, refused)
    ]
    for families, words in zip((WORKING, REFUSED), listed, strict=True):
        assert {model_type for model_type, _ in families.values()} <= words


@pytest.mark.parametrize(
    ("family", "option"), [("gemma2", "softcap"), ("gpt_oss", "s_aux"), ("mistral, short window", "sliding_window")]
)
def test_the_check_sees_attention_that_is_left_out(family, option, monkeypatch):
    attend = attention.attend
    monkeypatch.setattr(attention, "attend", lambda *states, **options: attend(*states, **{**options, option: None}))
    assert family_difference(tiny_config(family), MAX_TOKENS)["hidden states"] > TOLERANCE


@pytest.mark.parametrize("family", ["gemma2", "granite", "cohere", "phi"])
def test_the_check_sees_a_plain_output_layer(family, monkeypatch):
    monkeypatch.setattr(WordHead, "logits", lambda head, hidden: hidden @ head.table_NK.T)
    difference = family_difference(tiny_config(family), MAX_TOKENS)
    assert difference["logits"] > 10 * TOLERANCE
    assert difference["hidden states"] < TOLERANCE


def save_tiny(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    config = tiny_config(family)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    torch.manual_seed(0)
    auto.from_config(config, dtype=dtype).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["gemma2", "cohere", "phi", "mt5"])
def test_the_loss_of_texts_is_the_cross_entropy_of_the_models_own_logits(family, tmp_path):
    """Soft caps, scales and biases of the output layer reach the training loss, and its gradient."""
    backbone = pretrained_backbone(str(save_tiny(family, tmp_path)), None, MAX_TOKENS)
    backbone.requires_grad_(False)
    space = parity().token_space
    model = CLLM4Rec(backbone, space, std=0.1)
    model.train_only(("content_users", "content_items"))
    documents = all_kinds().take(all_kinds().rows_of(list(TEXT_KINDS))[:20])
    batch = batch_to_device(
        next(iter(packer_for(backbone, space, 8 * MAX_TOKENS, MAX_TOKENS).batches([documents]))), torch.device("cpu")
    )
    hidden_WK = model.hidden_states(batch)[batch.word_slots]
    logits_WN = backbone.word_head.logits(hidden_WK)[:, : space.num_words]
    expected = torch.nn.functional.cross_entropy(logits_WN, batch.word_targets, reduction="sum")
    found = model(batch, 0.0).words
    assert len(batch.word_targets)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    gradients = [torch.autograd.grad(loss, model.content_items, retain_graph=True)[0] for loss in (found, expected)]
    assert gradients[1].abs().max() > 1e-3
    assert torch.allclose(*gradients, atol=1e-4)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("start_token", [1, None])
def test_hidden_users_give_finite_gradients_in_a_deep_model(start_token, precision, tmp_path):
    """A hidden user that is a vector of zeros stays zero in every layer: its gradient overflows after about 20 layers."""
    config = tiny_config("llama")
    config.update({"num_hidden_layers": 30, "hidden_size": 64, "head_dim": 16, "bos_token_id": start_token})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    backbone = pretrained_backbone(str(tmp_path), None, MAX_TOKENS)
    model = CLLM4Rec(backbone, parity().token_space, std=0.1)
    model.train_only(TABLES.values())
    model.compute_in(precision)
    documents = all_kinds(user_dropout=1.0)
    documents = documents.take(documents.rows_of([Kind.INTERACTIONS])[:12])
    packer = packer_for(backbone, model.token_space, 8 * MAX_TOKENS, MAX_TOKENS)
    batch = batch_to_device(next(iter(packer.batches([documents]))), torch.device("cpu"))
    loss = model(batch, 1.0).total
    loss.backward()
    assert torch.isfinite(loss)
    for name, table in model.tables().items():
        assert torch.isfinite(table.grad).all(), name
    assert model.collaborative_items.grad.abs().max() < 1e4


def test_rotary_frequencies_stay_float32_in_bfloat16(tmp_path):
    backbone = pretrained_backbone(str(save_tiny("llama", tmp_path)), None, MAX_TOKENS)
    backbone.requires_grad_(False)
    CLLM4Rec(backbone, parity().token_space, std=0.1).compute_in(torch.bfloat16)
    assert backbone.dtype == torch.bfloat16
    assert backbone.model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_dropout_of_a_stock_model_is_off(tmp_path):
    config = tiny_config("gpt2")
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.5
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    backbone = pretrained_backbone(str(tmp_path), None, MAX_TOKENS).train()
    vectors = backbone.embed_words(torch.arange(5))[None]
    runs = [backbone.layers(inputs_embeds=vectors).last_hidden_state for _ in range(2)]
    assert torch.equal(*runs)


def refusal(folder: Path, num_words: int | None = None) -> str:
    """The sentence of the check before a run. Loading without it gives the same one, except about the tokenizer."""
    with pytest.raises(ConfigError) as refused:
        check_stock_backbone(ModelConfig(backbone=str(folder), max_tokens=MAX_TOKENS), num_words)
    assert "\n" not in str(refused.value)
    if num_words is None:
        with pytest.raises(ConfigError) as refused_later:
            pretrained_backbone(str(folder), None, MAX_TOKENS)
        assert str(refused_later.value) == str(refused.value)
    return str(refused.value)


def edit_config(folder: Path, **settings: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_what_is_wrong_with_a_folder_is_said_in_one_sentence(tmp_path):
    stock = save_tiny("llama", tmp_path / "stock")

    def broken(name: str) -> Path:
        return Path(shutil.copytree(stock, tmp_path / name))

    damaged = broken("damaged")
    (damaged / "model.safetensors").write_bytes((damaged / "model.safetensors").read_bytes()[:100])
    assert "copy it again if a file is damaged" in refusal(damaged)

    incomplete = broken("incomplete")
    weights = load_file(incomplete / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, incomplete / "model.safetensors", {"format": "pt"})
    assert "lacks 1 of the weights" in refusal(incomplete)

    weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 32)
    save_file(weights, incomplete / "model.safetensors", {"format": "pt"})
    assert "model.layers.1.mlp.up_proj.weight with (3, 32) instead of (64, 32)" in refusal(incomplete)

    deeper = broken("deeper")
    edit_config(deeper, num_hidden_layers=3)
    assert "lacks 9 of the weights" in refusal(deeper)

    pickled = broken("pickled")
    (pickled / "model.safetensors").unlink()
    torch.save({}, pickled / "pytorch_model.bin")
    assert "has no safetensors" in refusal(pickled)

    sharded = broken("sharded")
    (sharded / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "lacks model-00001-of-00002.safetensors" in refusal(sharded)

    for shards in ('{"a": "../stock/model.safetensors"}', '{"a": "evil.bin"}', "[", "{}x"):
        foreign = broken(f"foreign{len(shards)}")
        (foreign / "model.safetensors").unlink()
        (foreign / "model.safetensors.index.json").write_text(f'{{"weight_map": {shards}}}')
        assert "is damaged or names other files than safetensors beside it" in refusal(foreign)

    adapted = broken("adapted")
    (adapted / "adapter_config.json").write_text("{}")
    assert "has a PEFT adapter beside its weights" in refusal(adapted)

    quantized = broken("quantized")
    edit_config(quantized, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    assert "quantized checkpoint" in refusal(quantized)

    assert "64 positions" in refusal_of_length(stock)
    assert "has 500 tokens, but its model has 128 word embeddings" in refusal(stock, num_words=500)
    assert "has 50 tokens, but its model has 128 word embeddings" in refusal(stock, num_words=50)
    unknown = broken("unknown")
    edit_config(unknown, model_type="nobody_has_this")
    assert "cannot be loaded" in refusal(unknown)
    (unknown / "config.json").unlink()
    assert "has no config.json" in refusal(unknown)


def refusal_of_length(folder: Path) -> str:
    with pytest.raises(ConfigError) as refused:
        pretrained_backbone(str(folder), None, 1000)
    return str(refused.value)


def test_code_in_a_model_folder_is_never_run(tmp_path, monkeypatch):
    folder = save_tiny("llama", tmp_path / "stock")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'w')\nclass Evil: pass\n")
    edit_config(folder, model_type="evil", auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"})
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    assert "cannot be loaded" in refusal(folder)
    assert not (tmp_path / "trace").exists()


_KEPT: list[int] = []


def _count(tensor: torch.Tensor) -> torch.Tensor:
    _KEPT.append(tensor.numel())
    return tensor


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "t5"])
def test_gradient_checkpointing_keeps_less_and_gives_the_same_gradients(family, tmp_path):
    folder = str(save_tiny(family, tmp_path))
    results = []
    for checkpointing in (False, True):
        backbone = pretrained_backbone(folder, None, MAX_TOKENS)
        model = CLLM4Rec(backbone, parity().token_space, std=0.1)
        model.train_only(TABLES.values())
        model.compute_in(torch.float32)
        if checkpointing:
            backbone.checkpoint_layers()
        packer = packer_for(backbone, model.token_space, 8 * MAX_TOKENS, MAX_TOKENS)
        batch = batch_to_device(next(iter(packer.batches([all_kinds()]))), torch.device("cpu"))
        with torch.autograd.graph.saved_tensors_hooks(_count, lambda tensor: tensor):
            loss = model(batch, 1.0).total
        loss.backward()
        results.append((loss.item(), model.collaborative_items.grad, sum(_KEPT)))
        _KEPT.clear()
    (loss, gradient, all_kept), (loss_again, gradient_again, few_kept) = results
    assert loss_again == pytest.approx(loss, rel=1e-6)
    assert torch.allclose(gradient_again, gradient, atol=1e-5)
    assert few_kept < all_kept / 3


@pytest.mark.parametrize("family", ["gpt2", "llama", "bart"])
def test_trained_weights_of_a_stock_model_are_written_whole_and_in_float32(family, tmp_path):
    """With tied words, untied ones, and a bias that is no parameter; the stock files are in bfloat16."""
    folder = save_tiny(family, tmp_path / "stock", dtype=torch.bfloat16)
    config = parse_config(
        {
            "output_dir": "unused",
            "data": {"interactions": {"path": "unused"}, "max_text_tokens": 16},
            "model": {"backbone": str(folder), "max_tokens": MAX_TOKENS},
        }
    )
    expected = pretrained_backbone(str(folder), None, MAX_TOKENS)
    trained = {name: torch.randn(weight.shape) for name, weight in expected.named_parameters()}
    expected.load_state_dict(trained, strict=False)
    save_trained(config, 128, trained, str(tmp_path / "trained"))
    found = load_backbone(str(tmp_path / "trained"), MAX_TOKENS, dtype=None)
    assert found.dtype == torch.float32
    for name, values in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], values), name
