"""A row of a comparison: one method on one split, tuned, kept, done again only where something changed."""

import dataclasses

import numpy as np
from safetensors.torch import load_file
from support.comparisons import run_rows

from cllm4rec.config import parse_config
from cllm4rec.errors import TrainingError
from cllm4rec.experiments.comparison import trial
from cllm4rec.experiments.comparison.report import render
from cllm4rec.experiments.comparison.results import collect
from cllm4rec.experiments.comparison.trial import Data, Row, of_split, read_row, run_row
from cllm4rec.storage.files import join, read_json


def test_rows_that_read_what_others_learnt_get_it(comparison):
    run_rows(comparison, ["cllm4rec", "cllm4rec_emb", "m6_retrieval"])
    row = Row(of_split(comparison, 0), "cllm4rec")
    tables = load_file(join(row.directory, "tables.safetensors"))
    assert tables["collaborative_items"].shape == (20, 32)
    facts = read_json(join(of_split(comparison, 0).run.directory("cllm4rec_emb"), "result.json"))
    assert facts["skipped"] == ""
    vectors = trial.training_of("m6_retrieval", Data.load(row.config.run.prepared), row.config)
    assert vectors.item_text_vectors.shape == (20, 32)
    assert np.abs(vectors.item_text_vectors).sum(axis=1).min() > 0


def test_validation_chooses_the_setting_and_its_lists_are_written(comparison, monkeypatch):
    reached = {0.2: 0.4, 0.5: 0.9, 1.0: 0.6}

    def fake_fit(name, params, data, config):
        if params["beta"] == 2.0:
            raise TrainingError("the loss is nan")
        item = int(10 * params["beta"])  # every list holds the setting, to be known again by
        return trial.Fitted(lambda held_out: np.full((len(held_out.users), 100), item, np.int64), [params])

    monkeypatch.setattr(trial, "fit", fake_fit)
    monkeypatch.setattr(trial, "validate", lambda fitted, data: {"ndcg@100": reached[fitted.curve[0]["beta"]]})
    monkeypatch.setattr(trial, "points_of", lambda name, config: [{"beta": beta} for beta in (0.2, 0.5, 2.0, 1.0)])
    row = Row(of_split(comparison, 0), "multi_vae")
    run_row(row)
    result = read_row(row)
    assert result.facts["chosen"] == {"beta": 0.5}
    assert [tried.get("failed", "") for tried in result.facts["tried"]] == ["", "", "the loss is nan", ""]
    assert result.facts["curve"] == [{"beta": 0.5}]
    assert result.ranked.shape == (40, 100)
    assert set(result.ranked.ravel().tolist()) == {5}


def test_no_setting_is_begun_after_the_minutes_are_spent(comparison):
    row = Row(of_split(comparison, 0), "item_knn")
    hurried = row.config.compare.model_copy(update={"trials": 5, "minutes": 1e-9})
    run_row(Row(row.config.model_copy(update={"compare": hurried}), "item_knn"))
    assert len(read_json(join(row.directory, "result.json"))["tried"]) == 1


def test_a_row_is_done_until_something_it_depends_on_changes(comparison):
    row = Row(of_split(comparison, 1), "popularity")
    assert not row.is_done()
    run_row(row)
    assert row.is_done()
    for changes in ({"seed": 5}, {"compare": comparison.compare.model_copy(update={"minutes": 1.0})}):
        assert not Row(row.config.model_copy(update=changes), "popularity").is_done()


def test_published_figures_change_no_row(comparison):
    row = Row(of_split(comparison, 0), "ease")
    published = {"source": "a paper", "results": {"ease": {"recall@20": 0.5}}}
    told = parse_config(row.config.model_dump() | {"evaluate": {"bootstrap_samples": 50, "published": published}})
    assert Row(told, "ease").inputs() == row.inputs()


def test_a_row_without_the_texts_it_reads_is_skipped_out_loud(comparison, monkeypatch):
    load = Data.load
    monkeypatch.setattr(Data, "load", lambda directory: dataclasses.replace(load(directory), item_texts=[""] * 20))
    for seed in (0, 1):
        run_row(Row(of_split(comparison, seed), "two_tower"))
        run_row(Row(of_split(comparison, seed), "ease"))
    metrics = collect(comparison, ["ease", "two_tower"])
    assert list(metrics["results"]) == ["ease"]
    assert "text" in metrics["protocol"]["skipped"]["two_tower"]
    assert "Two-Tower is skipped" in render(metrics)["report.md"].decode()
