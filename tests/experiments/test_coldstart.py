"""The experiment on new items: what is held out, that readers of texts beat those of nothing, and what a user sees."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from support.commands import run_command
from support.families import tiny_config
from transformers import AutoModelForCausalLM

from cllm4rec.arrays.ids import Catalog
from cllm4rec.config import BackboneSize, ModelConfig
from cllm4rec.data.prepared import load_histories
from cllm4rec.data.tokenizer import save_tokenizer
from cllm4rec.experiments.coldstart.protocol import Split

WORDS = ("calm sea and sand", "loud city at night", "green hills in rain")
NUM_USERS, NUM_ITEMS = 90, 60


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Users like items of one of three kinds, which the items' texts tell; a tiny Llama of random weights reads them."""
    folder = tmp_path_factory.mktemp("coldstart")
    generator = np.random.default_rng(0)
    texts = [f"{WORDS[item % 3]}, edition {item % 7}" for item in range(NUM_ITEMS)]
    pairs = [
        {"user": f"u{user}", "item": f"i{3 * item + user % 3:02d}"}
        for user in range(NUM_USERS)
        for item in generator.choice(NUM_ITEMS // 3, 12, replace=False)
    ]
    pd.DataFrame(pairs).to_json(folder / "interactions.jsonl", orient="records", lines=True)
    items = pd.DataFrame({"item": [f"i{item:02d}" for item in range(NUM_ITEMS)], "text": texts})
    items.to_json(folder / "items.jsonl", orient="records", lines=True)
    llama = tiny_config("llama")
    save_tokenizer(ModelConfig(backbone=BackboneSize(vocab_size=300)), texts, str(folder / "stock"))
    llama.update({"vocab_size": 300, "max_position_embeddings": 64})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(llama).save_pretrained(folder / "stock")
    raw = {
        "output_dir": str(folder / "run"),
        "data": {
            "interactions": {"path": str(folder / "interactions.jsonl"), "columns": {"user": "user", "item": "item"}},
            "items": {"path": str(folder / "items.jsonl"), "columns": {"item": "item", "text": "text"}},
            "min_rating": None,
            "core": 2,
            "max_text_tokens": 24,
        },
        "model": {"backbone": str(folder / "stock"), "max_tokens": 64},
        "coldstart": {"seeds": [0, 1], "fraction": 0.3},
        "evaluate": {"bootstrap_samples": 50},
        "training": {"bf16": False},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(raw))
    return folder / "config.yaml"


def test_readers_of_texts_rank_new_items_and_controls_do_not(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run_command(capsys, "coldstart", "--config", config)
    assert outcome.status == 0
    metrics = json.loads((config.parent / "run" / "coldstart" / "metrics.json").read_text())
    recall = {name: row["recall@10"]["mean"] for name, row in metrics["results"].items()}
    assert min(recall["words"], recall["lm_words"]) > 0.9 > 0.8 > max(recall["mean_row"], recall["noise"])
    assert metrics["paired"]["recall@10"]["noise"]["p_holm"] < 0.01
    assert metrics["without_new_items"]["warm_recall@20"]["mean"] > 0.9
    report = Path(outcome.last["report"]).read_text()
    assert "| words (TF-IDF)" in report
    assert "language model and words" in report


def test_cold_items_are_held_out_whole(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepared = str(config.parent / "run" / "prepared")
    if not Path(prepared).exists():
        run_command(capsys, "coldstart", "--config", config)
    catalog, histories = Catalog.load(prepared), load_histories(prepared)
    split, other = (Split.of(histories, catalog, 0.3, seed) for seed in (0, 1))
    assert 0.1 < split.is_cold_J.mean() < 0.5
    assert (split.is_cold_J != other.is_cold_J).any()
    everything = histories.together("train", "validation", "test")
    warm = np.flatnonzero(~split.is_cold_J)
    left = split.histories.together("train", "validation", "test")
    for row in range(len(everything)):
        found = {*warm[left[row]].tolist(), *split.cold[row].tolist()}
        assert found == set(everything[row].tolist())
        assert split.is_cold_J[split.cold[row]].all()


def test_it_needs_a_pretrained_model_and_texts(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    built = run_command(
        capsys, "coldstart", "--config", config, f"output_dir={config.parent / 'built'}", "model.backbone={layers: 1}"
    )
    assert built.status == 2
    assert "set model.backbone" in built.last["error"]
    bare = run_command(
        capsys, "coldstart", "--config", config, f"output_dir={config.parent / 'bare'}", "data.items=null"
    )
    assert bare.status == 1
    assert "set data.items" in bare.last["error"]
