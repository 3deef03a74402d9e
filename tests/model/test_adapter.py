"""LoRA adapters: what is trained, stored, bound to its base, and merged."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support.families import tiny_config
from support.parity import MAX_TOKENS, all_kinds, parity
from transformers import AutoModelForCausalLM

from cllm4rec.config import Adapter, ModelConfig, parse_config
from cllm4rec.errors import ArtifactError, ConfigError
from cllm4rec.model.adapter import adapter_weights, add_adapter, is_adapter
from cllm4rec.model.backbone_files import load_backbone, save_adapter, save_adapter_weights, save_reference
from cllm4rec.model.batch import batch_to_device
from cllm4rec.model.cllm4rec import TABLES, CLLM4Rec
from cllm4rec.model.stock_backbone import pretrained_backbone
from cllm4rec.training.loop import packer_for

CPU = torch.device("cpu")
ADAPTER = Adapter(rank=2, alpha=4.0)


@pytest.fixture(params=["llama", "gpt2"])
def stock(request, tmp_path) -> str:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config(request.param)).save_pretrained(tmp_path / "stock")
    return str(tmp_path / "stock")


def model_with_adapter(stock: str, precision: torch.dtype = torch.float32) -> CLLM4Rec:
    backbone = pretrained_backbone(stock, None, MAX_TOKENS)
    add_adapter(backbone, ADAPTER, seed=0)
    model = CLLM4Rec(backbone, parity().token_space, std=0.1)
    model.train_only([*TABLES.values(), "adapter"])
    model.compute_in(precision)
    return model


def loss_of(model: CLLM4Rec) -> torch.Tensor:
    packer = packer_for(model.backbone, model.token_space, 8 * MAX_TOKENS, MAX_TOKENS)
    return model(batch_to_device(next(iter(packer.batches([all_kinds()]))), CPU), 1.0).total


def train_a_few_steps(model: CLLM4Rec) -> None:
    optimizer = torch.optim.Adam([weight for weight in model.parameters() if weight.requires_grad], 0.01)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_an_adapter_starts_without_effect_and_alone_learns(stock, precision):
    model = model_with_adapter(stock, precision)
    plain = CLLM4Rec(pretrained_backbone(stock, None, MAX_TOKENS), parity().token_space, std=0.1)
    plain.train_only(TABLES.values())
    plain.compute_in(precision)
    assert loss_of(model).item() == pytest.approx(
        loss_of(plain).item(), rel=1e-2 if precision == torch.bfloat16 else 1e-5
    )
    before = {name: weight.detach().clone() for name, weight in model.backbone.named_parameters()}
    first = loss_of(model).item()
    train_a_few_steps(model)
    assert loss_of(model).item() < first
    for name, weight in model.backbone.named_parameters():
        assert torch.equal(weight, before[name]) != is_adapter(name), name
    assert all(weight.dtype == torch.float32 for weight in adapter_weights(model.backbone).values())


def test_a_merged_adapter_gives_the_same_hidden_states(stock, tmp_path):
    model = model_with_adapter(stock)
    train_a_few_steps(model)
    packer = packer_for(model.backbone, model.token_space, 8 * MAX_TOKENS, MAX_TOKENS)
    batch = batch_to_device(next(iter(packer.batches([all_kinds()]))), CPU)
    with torch.no_grad():
        beside = model.hidden_states(batch)
        untrained = CLLM4Rec(pretrained_backbone(stock, None, MAX_TOKENS), parity().token_space, std=0.1)
        for name, table in untrained.tables().items():
            table.copy_(model.tables()[name])
        without = untrained.hidden_states(batch)
        directory = str(tmp_path / "backbone")
        save_reference(ModelConfig(backbone=stock, max_tokens=MAX_TOKENS), directory)
        save_adapter(ADAPTER, 0, adapter_weights(model.backbone), directory)
        model.backbone = load_backbone(directory, MAX_TOKENS)
        model.compute_in(torch.float32)
        merged = model.hidden_states(batch)
    assert not adapter_weights(model.backbone)
    assert torch.allclose(merged, beside, atol=1e-4)
    assert (without - beside).abs().max() > 1e-2


def test_a_stored_adapter_is_bound_to_its_base(stock, tmp_path):
    model = model_with_adapter(stock)
    train_a_few_steps(model)
    directory = str(tmp_path / "backbone")
    save_reference(ModelConfig(backbone=stock, max_tokens=MAX_TOKENS), directory)
    save_adapter(ADAPTER, 0, {}, directory)
    untrained = adapter_weights(load_backbone(directory, MAX_TOKENS, merge=False))
    save_adapter_weights(adapter_weights(model.backbone), directory)
    loaded = adapter_weights(load_backbone(directory, MAX_TOKENS, merge=False))
    for name, weight in adapter_weights(model.backbone).items():
        assert torch.equal(loaded[name], weight)
        assert not torch.equal(untrained[name], weight)
    assert not adapter_weights(load_backbone(directory, MAX_TOKENS))

    other = shutil.copytree(stock, tmp_path / "other")
    config = json.loads((Path(other) / "config.json").read_text())
    (Path(other) / "config.json").write_text(json.dumps(config | {"added": 1}))
    save_reference(ModelConfig(backbone=str(other), max_tokens=MAX_TOKENS), directory)
    with pytest.raises(ArtifactError, match="trained for other weights"):
        load_backbone(directory, MAX_TOKENS)


def test_an_adapter_stays_float32_and_beside_bfloat16_weights(stock, tmp_path):
    """Added to bfloat16 weights, half of a change of a hundredth of a percent would be rounded away."""
    directory = str(tmp_path / "backbone")
    save_reference(ModelConfig(backbone=stock, max_tokens=MAX_TOKENS), directory)
    model = model_with_adapter(stock)
    train_a_few_steps(model)
    save_adapter(ADAPTER, 0, adapter_weights(model.backbone), directory)
    for merge in (False, True):
        backbone = load_backbone(directory, MAX_TOKENS, torch.bfloat16, merge=merge)
        assert backbone.dtype == torch.bfloat16
        loaded = adapter_weights(backbone)
        for name, weight in adapter_weights(model.backbone).items():
            assert loaded[name].dtype == torch.float32
            assert torch.equal(loaded[name], weight)
        scoring = CLLM4Rec(backbone, parity().token_space, std=0.1)
        scoring.train_only(())
        scoring.compute_in(torch.bfloat16)
        before = loss_of(scoring).item()
        with torch.no_grad():
            for name, weight in backbone.named_parameters():
                if is_adapter(name):
                    weight += 0.5
        assert loss_of(scoring).item() != before, "matrices that are loaded later count"


def test_targets_that_the_model_lacks_are_refused_with_its_layers(stock):
    backbone = pretrained_backbone(stock, None, MAX_TOKENS)
    with pytest.raises(ConfigError, match=r"targets names no_such_layer, .* its layers are (c_attn|down_proj)"):
        add_adapter(backbone, Adapter(targets=("no_such_layer",)), 0)


def test_chosen_targets_are_adapted_and_no_others(stock):
    backbone = pretrained_backbone(stock, None, MAX_TOKENS)
    chosen = "c_attn" if backbone.text_config.model_type == "gpt2" else "q_proj"
    add_adapter(backbone, Adapter(targets=(chosen,)), 0)
    assert {name.split(".")[-4] for name in adapter_weights(backbone)} == {chosen}
    assert len(adapter_weights(backbone)) == 2 * 2


def test_an_adapter_that_no_stage_trains_is_refused():
    config = {"output_dir": "runs/x", "data": {"interactions": {"path": "x.jsonl"}}}
    with pytest.raises(ConfigError, match="never trained"):
        parse_config({**config, "backbone": {"adapter": {"rank": 4}}})
    trained = parse_config({**config, "backbone": {"adapter": {"trained_in": ["pretrain"]}}})
    assert trained.backbone.trains_adapter("pretrain")
    assert not trained.backbone.trains_adapter("finetune")
    assert np.isclose(Adapter().alpha, 16)
