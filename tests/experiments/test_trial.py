"""A method run: one method on one split, tuned, stored, and repeated only if something changed."""

import dataclasses

import numpy as np
from safetensors.torch import load_file
from support.comparisons import run_methods

from cllm4rec.config import parse_config
from cllm4rec.errors import TrainingError
from cllm4rec.experiments.comparison import trial
from cllm4rec.experiments.comparison.report import render
from cllm4rec.experiments.comparison.results import collect
from cllm4rec.experiments.comparison.trial import Data, MethodRun, of_split, read_result, run_method
from cllm4rec.storage.files import join, read_json


def test_rows_that_read_what_others_learnt_get_it(comparison):
    run_methods(comparison, ["cllm4rec", "cllm4rec_emb", "m6_retrieval"])
    run = MethodRun(of_split(comparison, 0), "cllm4rec")
    tables = load_file(join(run.directory, "tables.safetensors"))
    assert tables["collaborative_items"].shape == (20, 32)
    facts = read_json(join(of_split(comparison, 0).run.directory("cllm4rec_emb"), "result.json"))
    assert facts["skipped"] == ""
    vectors = trial.training_data_of("m6_retrieval", Data.load(run.config.run.prepared), run.config)
    assert vectors.item_text_vectors.shape == (20, 32)
    assert np.abs(vectors.item_text_vectors).sum(axis=1).min() > 0


def test_validation_chooses_the_setting_and_its_lists_are_written(comparison, monkeypatch):
    reached = {0.2: 0.4, 0.5: 0.9, 1.0: 0.6}

    def fake_fit(name, params, data, config):
        if params["beta"] == 2.0:
            raise TrainingError("the loss is nan")
        item = int(10 * params["beta"])  # identifies the setting in the lists
        return trial.Fitted(lambda held_out: np.full((len(held_out.users), 100), item, np.int64), [params])

    monkeypatch.setattr(trial, "fit", fake_fit)
    monkeypatch.setattr(trial, "validate", lambda fitted, data: {"ndcg@100": reached[fitted.curve[0]["beta"]]})
    monkeypatch.setattr(trial, "grid_points_of", lambda name, config: [{"beta": beta} for beta in (0.2, 0.5, 2.0, 1.0)])
    run = MethodRun(of_split(comparison, 0), "multi_vae")
    run_method(run)
    result = read_result(run)
    assert result.summary["chosen"] == {"beta": 0.5}
    assert [tried.get("failed", "") for tried in result.summary["tried"]] == ["", "", "the loss is nan", ""]
    assert result.summary["curve"] == [{"beta": 0.5}]
    assert result.ranked.shape == (40, 100)
    assert set(result.ranked.ravel().tolist()) == {5}


def test_no_setting_is_begun_after_the_minutes_are_spent(comparison):
    run = MethodRun(of_split(comparison, 0), "item_knn")
    hurried = run.config.compare.model_copy(update={"trials": 5, "minutes": 1e-9})
    run_method(MethodRun(run.config.model_copy(update={"compare": hurried}), "item_knn"))
    assert len(read_json(join(run.directory, "result.json"))["tried"]) == 1


def test_a_row_is_done_until_something_it_depends_on_changes(comparison):
    run = MethodRun(of_split(comparison, 1), "popularity")
    assert not run.is_done()
    run_method(run)
    assert run.is_done()
    for changes in ({"seed": 5}, {"compare": comparison.compare.model_copy(update={"minutes": 1.0})}):
        assert not MethodRun(run.config.model_copy(update=changes), "popularity").is_done()


def test_published_figures_change_no_row(comparison):
    run = MethodRun(of_split(comparison, 0), "ease")
    published = {"source": "a paper", "results": {"ease": {"recall@20": 0.5}}}
    with_published = parse_config(
        run.config.model_dump() | {"evaluate": {"bootstrap_samples": 50, "published": published}}
    )
    assert MethodRun(with_published, "ease").inputs() == run.inputs()


def test_a_row_without_the_texts_it_reads_is_skipped_out_loud(comparison, monkeypatch):
    load = Data.load
    monkeypatch.setattr(Data, "load", lambda directory: dataclasses.replace(load(directory), item_texts=[""] * 20))
    for seed in (0, 1):
        run_method(MethodRun(of_split(comparison, seed), "two_tower"))
        run_method(MethodRun(of_split(comparison, seed), "ease"))
    metrics = collect(comparison, ["ease", "two_tower"])
    assert list(metrics["results"]) == ["ease"]
    assert "text" in metrics["protocol"]["skipped"]["two_tower"]
    assert "Two-Tower was skipped" in render(metrics)["report.md"].decode()
