"""The training stages around a stock model, in this process: what is written, what is frozen, and what an adapter changes."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.families import tiny_config
from support.parity import parity_frames
from transformers import AutoModelForCausalLM

import cllm4rec
from cllm4rec.config import BackboneSize, ModelConfig, load_config
from cllm4rec.data.tokenizer import save_tokenizer
from cllm4rec.errors import ArtifactError, ConfigError
from cllm4rec.evaluation.stage import evaluate
from cllm4rec.storage.files import digest_of_file, read_json

ADAPTER = "backbone/adapter.safetensors"


@pytest.fixture
def stock(tmp_path: Path) -> Path:
    """A tiny Llama of random weights with a tokenizer, as a folder of a stock model."""
    folder, config = tmp_path / "stock", tiny_config("llama")
    save_tokenizer(ModelConfig(backbone=BackboneSize(vocab_size=300)), parity_frames()[1]["text"], str(folder))
    config.update({"vocab_size": 300, "max_position_embeddings": 64})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def run(stock: Path, output_dir: Path, **settings: object) -> Path:
    interactions, items = parity_frames()
    config = cllm4rec.prepare(
        interactions,
        items,
        output_dir=output_dir,
        settings={
            "data.core": 2,
            "data.max_text_tokens": 24,
            "model.max_tokens": 64,
            "model.backbone": str(stock),
            "pretrain.warmup_epochs": 1,
            "pretrain.epochs": 2,
            "finetune.epochs": 2,
            **settings,
        },
    )
    recommender = cllm4rec.train(config)
    assert len(recommender.recommend(user_id=interactions["user"].iloc[0], k=3)) == 3
    return output_dir


def test_an_evaluation_shows_what_the_language_model_adds(stock, tmp_path):
    output = run(stock, tmp_path / "run")
    config = load_config(output / "config.yaml", ["evaluate.bootstrap_samples=20"])
    evaluate(config)
    report = (output / "evaluation" / "report.md").read_text()
    assert "CLLM4Rec without its language model" in report
    metrics = read_json(config.run.evaluation + "/metrics.json")
    assert {"cllm4rec", "without_lm", "popularity"} <= set(metrics["results"])
    assert metrics["comparison"]["baseline"] in ("popularity", "ease"), "a part of the model is no baseline"
    assert "without_lm" in metrics["comparison"]["difference"]


def digests(folder: Path) -> dict[str, str]:
    return {path.name: digest_of_file(str(path)) for path in folder.iterdir()}


def test_a_run_refers_to_a_stock_model_and_leaves_it_as_it_was(stock, tmp_path):
    before = digests(stock)
    output = run(stock, tmp_path / "run")
    assert digests(stock) == before
    reference = read_json(str(output / "model" / "backbone" / "reference.json"))
    assert reference["sha256"]["model.safetensors"] == before["model.safetensors"]
    assert not list((output / "model").rglob("model.safetensors"))


def test_a_copy_makes_the_model_directory_complete(stock, tmp_path):
    output = run(stock, tmp_path / "run", **{"model.store_backbone": "copy"})
    expected = cllm4rec.Recommender.from_pretrained(output).recommend(history=[parity_frames()[1]["item"][0]], k=3)
    stock.rename(tmp_path / "gone")
    copied = output / "model" / "backbone" / "model.safetensors"
    assert digest_of_file(str(copied)) == digest_of_file(str(tmp_path / "gone" / "model.safetensors"))
    found = cllm4rec.Recommender.from_pretrained(output).recommend(history=[parity_frames()[1]["item"][0]], k=3)
    assert found == expected


@pytest.mark.parametrize("stages", [("backbone",), ("pretrain",), ("pretrain", "finetune")])
def test_an_adapter_is_trained_in_the_stages_that_the_config_names(stock, tmp_path, stages):
    before = digests(stock)
    settings = {
        "backbone.adapter": {"rank": 2, "trained_in": list(stages)},
        "backbone.epochs": int("backbone" in stages),
    }
    output = run(stock, tmp_path / "run", **settings)
    assert digests(stock) == before, "the weights beside the adapter stay frozen"
    stored = [output / "backbone" / "adapter.safetensors", output / "pretrained" / ADAPTER, output / "model" / ADAPTER]
    changes = [
        after.exists() and (not earlier.exists() or digest_of_file(str(after)) != digest_of_file(str(earlier)))
        for earlier, after in zip([Path("none"), *stored[:-1]], stored, strict=True)
    ]
    assert changes == [stage in stages for stage in ("backbone", "pretrain", "finetune")]
    assert all(weight.abs().max() > 0 for weight in load_file(stored[-1]).values())


def test_training_the_adapter_in_another_stage_makes_that_stage_stale(stock, tmp_path):
    adapter = {"rank": 2, "trained_in": ["backbone"]}
    output = run(stock, tmp_path / "run", **{"backbone.adapter": adapter, "backbone.epochs": 1})
    before = digest_of_file(str(output / "pretrained" / ADAPTER))
    adapter["trained_in"].append("pretrain")
    run(stock, tmp_path / "run", **{"backbone.adapter": adapter, "backbone.epochs": 1})
    assert digest_of_file(str(output / "pretrained" / ADAPTER)) != before


def test_a_stock_model_whose_weights_changed_is_refused(stock, tmp_path):
    output = run(stock, tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(stock)
    with torch.no_grad():
        model.model.norm.weight += 1
    model.save_pretrained(stock)
    with pytest.raises(ArtifactError, match=r"the digest of model\.safetensors differs"):
        cllm4rec.Recommender.from_pretrained(output)


def test_a_stock_model_that_does_not_fit_is_refused_before_anything_is_written(stock, tmp_path):
    for settings, words in (
        ({"model.max_tokens": 128}, "more than the 64 positions"),
        ({"model.id_width": 64}, r"id_width 64 is above the width 32"),
        ({"model.backbone": str(tmp_path / "none")}, "does not exist"),
    ):
        with pytest.raises(ConfigError, match=words):
            run(stock, tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()
