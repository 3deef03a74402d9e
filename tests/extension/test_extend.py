"""New items in a trained model: recommended to the right users by the endpoint's Recommender, and nothing else changes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from support.commands import Outcome, run_command

import cllm4rec
from cllm4rec import Recommender
from cllm4rec.config import Config, load_config
from cllm4rec.evaluation import promotion
from cllm4rec.nightly.plan import plan_score
from cllm4rec.scoring.recommender import Query
from cllm4rec.storage.artifacts import read_manifest
from cllm4rec.storage.lease import hold
from cllm4rec.storage.registry import current_model, read_pointer
from cllm4rec.storage.tensors import map_tensors

NUM_USERS, NUM_ITEMS = 60, 40
SETTINGS = {
    "data.core": 2,
    "data.max_text_tokens": 24,
    "model.backbone": {"layers": 1, "width": 32, "heads": 2, "vocab_size": 300},
    "model.max_tokens": 64,
    "pretrain.warmup_epochs": 1,
    "pretrain.epochs": 12,
    "finetune.epochs": 6,
    "training.bf16": False,
    "training.micro_batch_tokens": 1024,
}
WORDS = ("calm sea and sand", "loud city at night")


def text_of(item: int) -> str:
    return f"{WORDS[item % 2]}, edition {item % 5}"


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run: users like items of their parity, which the items' texts tell."""
    folder = tmp_path_factory.mktemp("extend") / "run"
    generator = np.random.default_rng(0)
    pairs = [
        (f"u{user:02d}", f"i{2 * item + user % 2:02d}")
        for user in range(NUM_USERS)
        for item in generator.choice(NUM_ITEMS // 2, 8, replace=False)
    ]
    items = pd.DataFrame(
        {"item": [f"i{item:02d}" for item in range(NUM_ITEMS)], "text": map(text_of, range(NUM_ITEMS))}
    )
    config = cllm4rec.prepare(
        pd.DataFrame(pairs, columns=["user", "item"]), items, output_dir=folder, settings=SETTINGS
    )
    cllm4rec.train(config)
    return folder


@pytest.fixture
def run(template: Path, tmp_path: Path) -> Path:
    shutil.copytree(template, tmp_path / "run")
    raw = yaml.safe_load((template / "config.yaml").read_text())
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump({**raw, "output_dir": str(tmp_path / "run")}))
    return tmp_path / "run"


def new_items(run: Path, **texts: str) -> str:
    path = run.parent / "new.jsonl"
    path.write_text("".join(json.dumps({"item": item, "text": text}) + "\n" for item, text in texts.items()))
    return f'extend.items={{"path": "{path}", "columns": {{"item": "item", "text": "text"}}}}'


def extend(capsys: pytest.CaptureFixture[str], run: Path, *words: str) -> Outcome:
    return run_command(capsys, "extend", "--config", run / "config.yaml", *words)


def config_of(run: Path) -> Config:
    return load_config(str(run / "config.yaml"))


def test_new_items_reach_the_users_who_like_their_kind(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = Recommender.from_pretrained(run).recommend(user_id="u00", k=40)
    source = new_items(run, sea="calm sea and sand, a new one", city="loud city at night, a new one")
    outcome = extend(capsys, run, source)
    assert outcome.status == 0
    assert outcome.result["new_items"] == 2
    assert outcome.result["r2"] > 0.5
    after = Recommender.from_pretrained(run)
    is_right = []
    for user in range(NUM_USERS):
        liked, other = ("city", "sea") if user % 2 else ("sea", "city")
        ranks = {item.item_id: rank for rank, item in enumerate(after.recommend(user_id=f"u{user:02d}", k=50))}
        is_right.append(ranks[liked] < ranks[other])
    assert np.mean(is_right) > 0.9
    kept = [item for item in after.recommend(user_id="u00", k=50) if item.item_id not in ("sea", "city")]
    assert [(item.item_id, item.text) for item in kept] == [(item.item_id, item.text) for item in before]
    np.testing.assert_allclose([item.score for item in kept], [item.score for item in before], rtol=1e-5)
    assert next(item.text for item in after.recommend(user_id="u00", k=50) if item.item_id == "sea").startswith("calm")


def test_a_new_item_can_be_read_in_a_history(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    query = Query(history=["i02", "sea"])
    before = Recommender.from_pretrained(run).answer([query])[0]
    extend(capsys, run, new_items(run, sea="calm sea and sand, a new one"))
    after = Recommender.from_pretrained(run).answer([query])[0]
    assert before.ignored_items == ["sea"]
    assert after.ignored_items == []
    assert [item.score for item in after.items] != [item.score for item in before.items]


def test_the_second_time_there_is_nothing_to_do(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = new_items(run, sea="calm sea and sand")
    first = extend(capsys, run, source)
    again = extend(capsys, run, source)
    assert again.status == 0
    assert again.result["new_items"] == 0
    assert again.result["model"] == first.result["model"]
    more = extend(capsys, run, new_items(run, sea="calm sea and sand", shore="sand and sea"))
    assert more.result["new_items"] == 1
    assert Recommender.from_pretrained(run).scorer.catalog.item_ids[NUM_ITEMS:].tolist() == ["sea", "shore"]
    trained = read_manifest(str(run / "model"), "model").digest
    assert read_manifest(more.result["model"], "model").inputs["extended_from"] == trained


def test_force_predicts_added_items_again(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    extend(capsys, run, new_items(run, thing="calm sea and sand"))
    wrong = rows_of(run)
    assert extend(capsys, run, "--force", new_items(run, thing="loud city at night")).result["new_items"] == 1
    right = rows_of(run)
    assert len(right) == NUM_ITEMS + 1
    np.testing.assert_array_equal(right[:NUM_ITEMS], wrong[:NUM_ITEMS])
    assert np.linalg.norm(right[NUM_ITEMS] - wrong[NUM_ITEMS]) > 0.5 * np.linalg.norm(wrong[NUM_ITEMS])


def rows_of(run: Path) -> np.ndarray:
    tables = map_tensors(f"{current_model(str(run))}/tables.safetensors")
    return tables["collaborative_items"].numpy().copy()


def test_scoring_takes_the_extended_model(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = plan_score(config_of(run)).run_id
    model = extend(capsys, run, new_items(run, sea="calm sea and sand")).result["model"]
    plan = plan_score(config_of(run))
    assert plan.model_dir == model
    assert plan.run_id != before


def test_a_promotion_does_not_replace_the_model_that_was_extended(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = extend(capsys, run, new_items(run, sea="calm sea and sand")).result["model"]
    assert promotion.promote(config_of(run))["already_current"]
    assert current_model(str(run)) == model


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("cllm4rec.extension.extend.save_tensors", fail)
        yield


@pytest.mark.usefixtures("interrupted")
def test_an_interruption_leaves_the_current_model(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = extend(capsys, run, new_items(run, sea="calm sea and sand"))
    assert outcome.status == 1
    assert read_pointer(str(run)) is None
    assert not list(run.glob("models/2*"))


def test_wrong_input_is_one_sentence(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = extend(capsys, run, "data.items=null")
    assert outcome.status == 2
    assert "set data.items or extend.items" in outcome.last["error"]
    missing = extend(capsys, run, 'extend.items={"path": "nowhere.jsonl", "columns": {"item": "i", "text": "t"}}')
    assert missing.status == 1
    assert "nowhere.jsonl" in missing.last["error"]
    with hold(str(run / "models"), "a promotion"):
        held = extend(capsys, run, new_items(run, sea="calm sea and sand"))
    assert held.status == 1
    assert "a promotion" in held.last["error"]
    assert read_pointer(str(run)) is None


def test_a_catalog_without_texts_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frame = pd.DataFrame(
        [(f"u{user}", f"i{item}") for user in range(6) for item in range(user, user + 5)], columns=["user", "item"]
    )
    config = cllm4rec.prepare(frame, output_dir=run.parent / "bare", settings={**SETTINGS, "pretrain.epochs": 1})
    cllm4rec.train(config)
    outcome = extend(capsys, run.parent / "bare", new_items(run, sea="calm sea and sand"))
    assert outcome.status == 1
    assert "have a text of their own" in outcome.last["error"]
