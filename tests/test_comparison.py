"""The comparison on the parity world: what variants train, what is run again, and the shape of what is written."""

import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from comparisons import NUM_WORDS, make_config
from directories import write_prepared
from parity import MAX_TOKENS, parity
from safetensors.torch import load_file

from cllm4rec.artifacts import join, read_json, read_manifest
from cllm4rec.baselines.registry import BASELINES
from cllm4rec.comparison import examples as examples_page
from cllm4rec.comparison import trial
from cllm4rec.comparison.examples import chosen_users, examples, plain_markdown, shortened, shown_methods
from cllm4rec.comparison.language import backbone_directory, bare_settings, run_backbone, starting_backbone
from cllm4rec.comparison.methods import (
    ALL,
    GRID,
    MAIN,
    VARIANTS,
    chosen_methods,
    config_of,
    points_of,
    setting,
    stages_of,
    with_settings,
)
from cllm4rec.comparison.report import markdown, places_of, render
from cllm4rec.comparison.results import METRICS, Splits, collect
from cllm4rec.comparison.sweeps import describe_sweeps, sweep_rows
from cllm4rec.comparison.trial import (
    Data,
    Row,
    fit,
    fit_variant,
    of_split,
    read_row,
    run_row,
)
from cllm4rec.config import parse_config
from cllm4rec.data.documents import Documents
from cllm4rec.data.epochs import Maker
from cllm4rec.data.prepared import Language, write_table
from cllm4rec.data.tokenizer import save_tokenizer
from cllm4rec.errors import ConfigError, TrainingError
from cllm4rec.evaluation.protocol import HeldOut
from cllm4rec.model.cllm4rec import CLLM4Rec
from cllm4rec.training.stages import CONTENT
from jobs import compare


def prepared(config):
    """The parity world as the stages find it, for each seed; splits by parity do not depend on the seed."""
    torch.set_num_threads(1)
    for seed in config.compare.seeds:
        split = of_split(config, seed)
        directory = write_prepared(Path(split.directory("prepared")))
        Language(parity().prompts, NUM_WORDS).save(directory)
        tokens = dataclasses.replace(parity().tokens, num_words=NUM_WORDS)
        shifted = parity().documents
        move = NUM_WORDS - parity().tokens.num_words

        def moved(ragged, move=move):
            ids = ragged.values
            return dataclasses.replace(ragged, values=np.where(ids >= parity().tokens.num_words, ids + move, ids))

        documents = dataclasses.replace(shifted, prompt=moved(shifted.prompt), main=moved(shifted.main))
        assert tokens.is_item(documents.main.values).any()
        write_table(documents.to_arrow(), join(directory, "documents", "bucket-00000.parquet"))
        save_tokenizer(config.model, parity().world.catalog.item_texts, join(directory, "tokenizer"))
        run_backbone(split)
    return config


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return prepared(make_config(tmp_path_factory.mktemp("parity")))


@pytest.fixture(scope="module")
def split(config):
    return of_split(config, 0)


@pytest.fixture(scope="module")
def data(split):
    return Data.load(split.directory("prepared"))


def model_of(name, split, data, **settings):
    """A variant's model after a short training, and the same before."""
    short = {"finetune.epochs": 1, "pretrain.epochs": 1, "model.table_start": "noise"} | settings
    varied = config_of(name, split, short)
    fresh = CLLM4Rec(starting_backbone(varied, NUM_WORDS), data.catalog.tokens(NUM_WORDS), std=0.1, seed=varied.seed)
    return fit_variant(name, varied, data).model, fresh


# What each name means


@pytest.mark.parametrize(
    ("name", "content_moves", "backbone_moves"),
    [("cllm4rec", True, False), ("llm_cf", False, False), ("llm_ftall", True, True), ("llm_scratch", True, True)],
)
def test_a_variant_trains_what_its_name_says_and_nothing_else(split, data, name, content_moves, backbone_moves):
    trained, fresh = model_of(name, split, data)
    for table in CONTENT:
        assert torch.equal(getattr(trained, table), getattr(fresh, table)) != content_moves
    assert (trained.backbone.digest() != fresh.backbone.digest()) == backbone_moves
    assert not torch.equal(trained.collaborative_items, fresh.collaborative_items)


def test_from_scratch_means_without_the_trained_language_model(split, data):
    """cllm4rec begins from the one that texts have trained, llm_scratch from random weights."""
    names = ("cllm4rec", "llm_cf", "llm_ftall", "llm_scratch")
    begun = {name: starting_backbone(config_of(name, split, {}), NUM_WORDS).digest() for name in names}
    assert begun["cllm4rec"] == begun["llm_cf"] == begun["llm_ftall"]
    assert begun["llm_scratch"] != begun["cllm4rec"]
    assert Row(split, "llm_scratch").backbone is None


@pytest.mark.parametrize(("name", "is_fixed"), [("llm_fixord", True), ("cllm4rec", False)])
def test_only_llm_fixord_reads_items_in_one_order(split, data, name, is_fixed):
    stage = next(stage for stage in stages_of(name, config_of(name, split, {})) if stage.name == "pretrain")
    stage = dataclasses.replace(stage, reads=("interactions",))
    maker = Maker(data.language.prompts, data.catalog.tokens(NUM_WORDS), MAX_TOKENS, seed=0)
    first, second = (
        Documents.concat(list(stage.streams(maker, data.documents, epoch)[0][0])).in_order() for epoch in (0, 1)
    )
    assert np.array_equal(first.main.values, second.main.values) == is_fixed


def test_without_finetuning_the_pretrained_head_ranks(split, data):
    assert [stage.name for stage in stages_of("llm_prerec", config_of("llm_prerec", split, {})) if stage.epochs] == [
        "warmup", "pretrain"
    ]  # fmt: skip
    curve = fit("llm_prerec", {}, data, split).curve
    assert {entry["stage"] for entry in curve} == {"pretrain"}
    assert not any("finetune" in key for params in points_of("llm_prerec", split) for key in params)


@pytest.mark.parametrize("name", ["cllm4rec", "cllm4rec_llama", "llm_cf", "llm_ftall", "ease", "multi_vae"])
def test_rows_find_the_hidden_item_of_the_parity_world(split, data, name):
    if name == "cllm4rec_llama":
        run_backbone(config_of(name, split, {}))
    held_out = HeldOut.test(data.histories, split.evaluate)
    ranked = fit(name, {}, data, split).rank(held_out)
    assert (ranked[:, 0] == held_out.relevant.values).mean() > 0.9


def test_t5_is_trained_as_one_more_architecture(split, data):
    run_backbone(config_of("cllm4rec_t5", split, {}))
    model, _ = model_of("cllm4rec_t5", split, data)
    assert model.backbone.pairs


def test_every_named_row_is_known_and_tuned_by_a_grid_that_fits_the_config(split):
    assert set(MAIN) <= set(ALL)
    assert set(ALL) == set(VARIANTS) | set(BASELINES)
    tried = points_of("cllm4rec", make_config(split.output_dir, trials=100))
    for params in tried:
        config_of("cllm4rec", split, params)
    assert tried[0] == {key: setting(split, key) for key in GRID}
    assert len(tried) == 1 + np.prod([len(values) for values in GRID.values()])


def test_a_backbone_that_is_trained_is_given_no_higher_rate_than_it_bears(split):
    assert split.pretrain.learning_rate == 1e-2
    assert config_of("llm_ftall", split, {}).pretrain.learning_rate == 1e-3
    assert config_of("llm_ftall", split, {"pretrain.learning_rate": 5e-4}).pretrain.learning_rate == 5e-4
    slow = with_settings(split, {"pretrain.learning_rate": 1e-5}, "this test")
    assert config_of("llm_scratch", slow, {}).pretrain.learning_rate == 1e-5


def test_rows_that_begin_trained_do_so_whatever_the_others_begin_from(split):
    untrained = with_settings(split, {"backbone.epochs": 0, "compare.backbone_epochs": 3}, "this test")
    assert {name for name in ALL if Row(untrained, name).backbone} == {"llm_ftall", "m6_retrieval"}
    assert Row(untrained, "llm_ftall").varied.backbone.epochs == 3
    assert Row(untrained, "llm_ftall").backbone == Row(untrained, "m6_retrieval").backbone
    assert Row(split, "llm_ftall").varied.backbone.epochs == split.backbone.epochs == 1


def test_what_reads_no_texts_does_not_begin_from_them(split):
    assert split.model.table_start == "texts"
    assert config_of("llm_cf", split, {}).model.table_start == "noise"


def test_chosen_methods_bring_what_they_need_and_refuse_what_is_none(tmp_path):
    assert chosen_methods(make_config(tmp_path, methods=["cllm4rec_emb", "ease"])) == [
        "cllm4rec_emb",
        "ease",
        "cllm4rec",
    ]
    assert chosen_methods(make_config(tmp_path)) == list(MAIN)
    assert chosen_methods(make_config(tmp_path, rows="all")) == list(ALL)
    with pytest.raises(ConfigError, match="names easy"):
        chosen_methods(make_config(tmp_path, methods=["easy"]))


@pytest.mark.parametrize("name", ["cllm4rec_t5", "llm_scratch"])
def test_a_named_backbone_is_not_turned_into_another_or_an_untrained_one(split, name):
    stock = split.model_copy(update={"model": split.model.model_copy(update={"backbone": "gpt2"})})
    with pytest.raises(ConfigError, match="size to build"):
        config_of(name, stock, {})


def test_rows_share_a_language_model_only_where_it_is_the_same(split):
    directory = backbone_directory(split)
    same = ({"model.table_std": 0.5}, {"finetune.lambda_c": 9.0}, {"training.engine": "deepspeed"})
    for settings in same:
        assert backbone_directory(config_of("cllm4rec", split, settings)) == directory
    others = [
        backbone_directory(config_of("cllm4rec", split, settings))
        for settings in (
            {"model.backbone.width": 16},
            {"model.backbone.layers": 1},
            {"model.backbone.architecture": "t5"},
            {"backbone.epochs": 2},
            {"training.bf16": True},
        )
    ]
    assert len({directory, *others}) == 6
    assert Row(split, "llm_cf").backbone == Row(split, "m6_retrieval").backbone == directory
    assert Row(split, "cllm4rec_t5").backbone in others


def test_rows_are_trained_by_plain_torch_whatever_the_engine(split):
    training = split.training.model_copy(update={"engine": "deepspeed", "zero_stage": 3})
    settings = bare_settings(split.model_copy(update={"training": training}))
    assert (settings.engine, settings.zero_stage) == ("torch", 0)
    assert settings.micro_batch_tokens == split.training.micro_batch_tokens


# A row


def run_rows(config, names):
    return [run_row(Row(of_split(config, seed), name)) for name in names for seed in config.compare.seeds]


def test_rows_that_read_what_others_learnt_get_it(config):
    run_rows(config, ["cllm4rec", "cllm4rec_emb", "m6_retrieval"])
    row = Row(of_split(config, 0), "cllm4rec")
    tables = load_file(join(row.directory, "tables.safetensors"))
    assert tables["collaborative_items"].shape == (20, 32)
    facts = read_json(join(of_split(config, 0).directory("cllm4rec_emb"), "result.json"))
    assert facts["skipped"] == ""
    vectors = trial.training_of("m6_retrieval", Data.load(row.config.directory("prepared")), row.config)
    assert vectors.item_text_vectors.shape == (20, 32)
    assert np.abs(vectors.item_text_vectors).sum(axis=1).min() > 0


def test_validation_chooses_the_setting_and_its_lists_are_written(config, monkeypatch):
    reached = {0.2: 0.4, 0.5: 0.9, 1.0: 0.6}

    def fake_fit(name, params, data, config):
        if params["beta"] == 2.0:
            raise TrainingError("the loss is nan")
        item = int(10 * params["beta"])  # every list holds the setting, to be known again by
        return trial.Fitted(lambda held_out: np.full((len(held_out.users), 100), item, np.int64), [params])

    monkeypatch.setattr(trial, "fit", fake_fit)
    monkeypatch.setattr(trial, "validate", lambda fitted, data: {"ndcg@100": reached[fitted.curve[0]["beta"]]})
    monkeypatch.setattr(trial, "points_of", lambda name, config: [{"beta": beta} for beta in (0.2, 0.5, 2.0, 1.0)])
    row = Row(of_split(config, 0), "multi_vae")
    run_row(row)
    result = read_row(row)
    assert result.facts["chosen"] == {"beta": 0.5}
    assert [tried.get("failed", "") for tried in result.facts["tried"]] == ["", "", "the loss is nan", ""]
    assert result.facts["curve"] == [{"beta": 0.5}]
    assert result.ranked.shape == (40, 100)
    assert set(result.ranked.ravel().tolist()) == {5}


def test_no_setting_is_begun_after_the_minutes_are_spent(config):
    row = Row(of_split(config, 0), "item_knn")
    hurried = row.config.compare.model_copy(update={"trials": 5, "minutes": 1e-9})
    run_row(Row(row.config.model_copy(update={"compare": hurried}), "item_knn"))
    assert len(read_json(join(row.directory, "result.json"))["tried"]) == 1


def test_a_row_is_done_until_something_it_depends_on_changes(config):
    row = Row(of_split(config, 1), "popularity")
    assert not row.is_done()
    run_row(row)
    assert row.is_done()
    for changes in ({"seed": 5}, {"compare": config.compare.model_copy(update={"minutes": 1.0})}):
        assert not Row(row.config.model_copy(update=changes), "popularity").is_done()


def test_published_figures_change_no_row(config):
    row = Row(of_split(config, 0), "ease")
    published = {"source": "a paper", "results": {"ease": {"recall@20": 0.5}}}
    told = parse_config(row.config.model_dump() | {"evaluate": {"bootstrap_samples": 50, "published": published}})
    assert Row(told, "ease").inputs() == row.inputs()


def test_a_row_without_the_texts_it_reads_is_skipped_out_loud(config, monkeypatch):
    load = Data.load
    monkeypatch.setattr(Data, "load", lambda directory: dataclasses.replace(load(directory), item_texts=[""] * 20))
    for seed in (0, 1):
        run_row(Row(of_split(config, seed), "two_tower"))
        run_row(Row(of_split(config, seed), "ease"))
    metrics = collect(config, ["ease", "two_tower"])
    assert list(metrics["results"]) == ["ease"]
    assert "text" in metrics["protocol"]["skipped"]["two_tower"]
    assert "Two-Tower is skipped" in render(metrics)["report.md"].decode()


# The whole job, with the rows run one after another in place of Ray


@pytest.fixture
def job(monkeypatch, config):
    ran = []

    def each(inputs, task):
        for one in inputs:
            ran.append((one.label or one.name) if isinstance(one, Row) else "backbone")
            yield task(one)

    monkeypatch.setattr(compare, "each", each)
    monkeypatch.setattr(compare, "_prepare", lambda config, split, force: None)

    def run(**changes):
        ran.clear()
        given = with_compare(config, methods=["popularity", "ease", "cllm4rec"], **changes)
        told = compare.run(given, argparse.Namespace(quick=False, force=False))
        return told, list(ran)

    return run


def with_compare(config, **changes):
    return parse_config(config.model_dump() | {"compare": config.compare.model_dump() | changes})


def test_a_finished_row_is_not_run_again_and_metrics_have_their_shape(job, config):
    told, _ = job()
    again, ran = job()
    assert ran == []
    assert again == told
    metrics = json.loads(Path(told["directory"], "metrics.json").read_text())
    assert set(metrics["results"]) == {"popularity", "ease", "cllm4rec"}
    for result in metrics["results"].values():
        assert set(result) == set(METRICS)
        assert all(value["low"] <= value["mean"] <= value["high"] for value in result.values())
    tests = metrics["significance"]["recall@20"]["against best other"]
    assert set(tests) == set(metrics["results"])
    assert all(test["p"] <= test["p_holm"] <= 1 for test in tests.values())
    assert metrics["budget"]["used"]["ease"]["trials"] == [1, 1]
    assert metrics["cost"]["cllm4rec"]["peak_memory_mb"] > 10
    assert metrics["protocol"]["split"]["seed"] == [0, 1]
    assert metrics["beside accuracy"]["popularity"]["popularity lift@20"] > 0
    names = set(read_manifest(told["directory"], "evaluation").files)
    assert {"metrics.json", "report.md", "results.png", "learning_curves.png", "history_length.png"} <= names
    report = Path(told["directory"], "report.md").read_text()
    assert "| CLLM4Rec | " in report
    assert "user-0" not in report
    assert "-0.0000" not in report


def test_a_row_that_was_lost_is_run_again_alone(job, config):
    job()
    Path(of_split(config, 1).directory("ease"), "manifest.json").unlink()
    for file in Path(of_split(config, 1).directory("ease")).iterdir():
        file.unlink()
    _, ran = job()
    assert ran == ["ease"]


def test_strata_hold_every_test_item_once_and_cold_items_apart(config):
    splits = Splits.load(config, [0, 1])
    strata = splits.strata()
    popularity = [stratum for stratum in strata["item popularity"] if stratum.label != "cold"]
    assert sum(len(stratum.relevant.values) for stratum in popularity) == len(splits.held_out.relevant.values)
    assert sum(len(stratum.rows) for stratum in strata["history length"]) == len(splits.held_out.users) == 80
    assert not [stratum for stratum in strata["item popularity"] if stratum.label == "cold"]
    counts = splits.catalogs[1].item_counts
    cold_item = int(splits.held_out.relevant.values[-1])
    counts[cold_item] = 0
    (cold,) = (stratum for stratum in splits.strata()["item popularity"] if stratum.label == "cold")
    assert set(cold.relevant.values.tolist()) == {cold_item}
    assert (splits.split_B[cold.rows] == 1).all(), "it is cold in the second split alone"


def test_quick_is_smaller_and_lies_apart(tmp_path):
    sweep = {"name": "lambda_c", "settings": ["finetune.lambda_c"], "values": [0, 1]}
    whole = make_config(tmp_path, seeds=[4, 5, 6], trials=9, rows="all", sweeps=[sweep], sweep_seeds=[6])
    whole = whole.model_copy(update={"finetune": whole.finetune.model_copy(update={"epochs": 60})})
    small = compare.quick(whole)
    assert (small.compare.seeds, small.compare.trials, small.compare.rows) == ([4, 5], 2, "main")
    assert sweep_rows(small) == []
    assert parse_config(small.model_dump()) == small
    assert small.finetune.epochs < whole.finetune.epochs
    assert small.output_dir != whole.output_dir


# Sensitivity

LAMBDA = {"name": "lambda c", "settings": ["pretrain.lambda_c", "finetune.lambda_c"], "values": [0, 1.0]}
WIDTH = {"name": "width", "settings": ["model.backbone.width"], "values": [16, 32]}
EPOCHS = {"name": "epochs", "settings": ["backbone.epochs"], "values": [0, 1]}


def test_a_sweep_sets_its_keys_together_and_shares_the_row_of_the_config(config):
    rows = sweep_rows(with_compare(config, sweeps=[LAMBDA, WIDTH, EPOCHS], sweep_seeds=[1], trials=3))
    found = {row.label: row.config for row in rows}
    assert sorted(found) == [
        "sweep_as_configured", "sweep_epochs_0", "sweep_lambda_c_0", "sweep_lambda_c_1.0", "sweep_width_16"
    ]  # fmt: skip
    changed = found["sweep_lambda_c_1.0"]
    assert (changed.pretrain.lambda_c, changed.finetune.lambda_c) == (1.0, 1.0)
    assert found["sweep_width_16"].model.backbone.width == 16
    assert found["sweep_as_configured"].model == config.model
    assert {row.config.data.split.seed for row in rows} == {1}
    assert all(row.points == [{}] for row in rows), "a value is trained once, not tuned"
    assert len({row.directory for row in rows} | {Row(of_split(config, 1), "cllm4rec").directory}) == 6


def test_values_begin_from_the_language_model_they_describe(config):
    rows = {row.label: row.backbone for row in sweep_rows(with_compare(config, sweeps=[LAMBDA, WIDTH, EPOCHS]))}
    tuned = Row(of_split(config, 0), "cllm4rec").backbone
    assert rows["sweep_lambda_c_0"] == rows["sweep_as_configured"] == tuned
    assert rows["sweep_width_16"] not in (None, tuned)
    assert rows["sweep_epochs_0"] is None


@pytest.mark.parametrize(
    ("settings", "values", "sentence"),
    [
        (["finetune.lambda"], [0, 1], "finetune.lambda is no setting"),
        (["finetune.lambda.c"], [0, 1], "sets finetune.lambda.c, which is no setting"),
        (["model.backbone.width"], [32, 30], "width 30 does not divide by 4 heads"),
        (["data.core"], [3, 5], "a sweep may change settings of model"),
        (["model.backbone.vocab_size"], [300, 400], "not what prepare has read"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_before_anything_runs(config, settings, values, sentence):
    with pytest.raises(ConfigError, match=sentence):
        sweep_rows(with_compare(config, sweeps=[{"name": "x", "settings": settings, "values": values}]))


def test_what_a_sweep_is_described_by(config):
    ranges = {"name": "mask", "settings": ["finetune.mask_fraction"], "values": [0.2, [0.1, 0.9]]}
    told = describe_sweeps(with_compare(config, sweeps=[LAMBDA, ranges]))
    assert told["lambda c"] == {
        "seeds": [0], "settings": {"pretrain.lambda_c": 1.0, "finetune.lambda_c": 0.0}, "configured": None
    }  # fmt: skip
    assert told["mask"]["configured"] == [0.1, 0.9]


def test_sweeps_are_run_once_written_with_intervals_and_plotted(job):
    sweeps = [{**LAMBDA, "settings": ["finetune.lambda_c"]}, WIDTH]
    _, ran = job(sweeps=sweeps)
    assert sorted(ran)[-3:] == ["sweep_as_configured", "sweep_lambda_c_1.0", "sweep_width_16"]
    assert ran.count("backbone") == 1, "the other values begin from the one that cllm4rec has"
    told, ran = job(sweeps=sweeps)
    assert ran == []
    metrics = json.loads(Path(told["directory"], "metrics.json").read_text())
    assert {name: [point["value"] for point in points] for name, points in metrics["sensitivity"].items()} == {
        "lambda c": [0, 1.0], "width": [16, 32]
    }  # fmt: skip
    for point in [*metrics["sensitivity"]["lambda c"], *metrics["sensitivity"]["width"]]:
        assert set(point) == {"value", *METRICS}
        assert point["recall@10"]["low"] <= point["recall@10"]["mean"] <= point["recall@10"]["high"]
    as_configured = metrics["sensitivity"]["lambda c"][0] | {"value": None}
    assert as_configured == metrics["sensitivity"]["width"][1] | {"value": None}
    assert metrics["sensitivity"]["lambda c"][0]["recall@10"]["mean"] > 0.9
    folder = Path(told["directory"])
    for name in ("sensitivity_lambda_c.png", "sensitivity_width.png"):
        assert f"({name})" in (folder / "report.md").read_text()
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert not (
        Path(of_split(make_config(told["output_dir"]), 0).directory("sweep_width_16")) / "tables.safetensors"
    ).exists()


def test_a_value_that_cannot_be_trained_is_told_and_stops_nothing(config, monkeypatch):
    def fail(name, params, data, config):
        raise TrainingError("the loss is nan")

    monkeypatch.setattr(trial, "fit", fail)
    given = with_compare(config, sweeps=[{**LAMBDA, "values": [50, 100]}])
    for row in sweep_rows(given):
        run_row(row)
        assert read_row(row).facts["skipped"] == "the loss is nan"
    monkeypatch.undo()
    run_rows(config, ["popularity"])
    metrics = collect(given, ["popularity"])
    assert metrics["sensitivity"]["lambda c"] == [{"value": value, "failed": "the loss is nan"} for value in (50, 100)]
    report = render(metrics)["report.md"].decode()
    assert "100: the loss is nan." in report
    monkeypatch.setattr(trial, "fit", fail)
    with pytest.raises(TrainingError, match="no setting of cllm4rec"):
        run_row(Row(of_split(config, 0), "cllm4rec"))


@pytest.mark.parametrize(
    ("values", "places"),
    [
        ([0.1, 1, 10, 100], [0, 1, 2, 3]),
        ([0, 0.1, 1, 10], [-1, 0, 1, 2]),
        ([10, 0, 0.1], [1, -1, 0]),
        ([0, 2, 8], [0, 0.5, 2]),
        ([0.2, 0.4, [0.1, 0.9]], [0, 1, 2]),
        (["a", "b", True], [0, 1, 2]),
        ([5], [0]),
        ([], []),
    ],
)
def test_values_stand_by_size_by_logarithm_or_in_order(values, places):
    found = places_of(values)
    scale = 1.0 if values != [0, 2, 8] else found[-1] / places[-1]
    assert found == pytest.approx([place * scale for place in places])


# Examples


def test_examples_mark_the_hits_and_name_no_user(job, config):
    told, _ = job()
    page = Path(told["directory"], "examples.md").read_text()
    assert page == examples(
        with_compare(config, methods=[]), json.loads(Path(told["directory"], "metrics.json").read_text())
    )
    assert page.count("## User ") == 5
    assert "user-" not in page
    metrics_header = "|  | CLLM4Rec | EASE | Popularity |"
    assert page.count(metrics_header) == 5
    split = of_split(config, 0)
    data = Data.load(split.directory("prepared"))
    held_out = HeldOut.test(data.histories, config.evaluate)
    users = chosen_users(held_out.num_train, config.seed)
    lists = [read_row(Row(split, name)).ranked[:, :10] for name in ("cllm4rec", "ease", "popularity")]
    hits = sum(np.isin(ranked[row], held_out.relevant[row]).sum() for ranked in lists for row in users)
    assert page.count("**") == 2 * hits > 0
    first = page.split("## User ")[1]
    for item in held_out.relevant[users[0]]:
        assert f"- {data.catalog.item_ids[item]}: " in first


def test_users_of_the_examples_are_spread_over_histories():
    num_train = np.array([9, 1, 8, 2, 7, 3, 6, 4, 5, 5])
    found = num_train[chosen_users(num_train, seed=0)]
    assert found.tolist() == sorted(found)
    groups = [(1, 2), (3, 4), (5, 5), (6, 7), (8, 9)]
    assert all(low <= value <= high for value, (low, high) in zip(found, groups, strict=True))
    assert len(chosen_users(num_train[:3], seed=0)) == 3
    draws = {tuple(chosen_users(num_train, seed)) for seed in range(20)}
    assert len(draws) > 1
    assert chosen_users(num_train, 3).tolist() == chosen_users(num_train, 3).tolist()


def test_the_best_baseline_is_shown_between_the_method_and_popularity():
    results = {name: {"ndcg@100": {"mean": mean}} for name, mean in
               [("popularity", 0.9), ("ease", 0.3), ("ials", 0.4), ("llm_cf", 0.8), ("cllm4rec", 0.1)]}  # fmt: skip
    assert shown_methods(results) == ["cllm4rec", "ials", "popularity"]
    assert shown_methods({"popularity": results["popularity"]}) == ["popularity"]


def test_a_review_stands_in_for_a_text_that_is_missing(job, config, monkeypatch):
    told, _ = job()
    metrics = json.loads(Path(told["directory"], "metrics.json").read_text())
    assert "stands in" not in examples(config, metrics)
    load = examples_page.Catalog.load

    def without_texts(directory):
        catalog = load(directory)
        catalog.item_texts = [""] * catalog.num_items
        return catalog

    monkeypatch.setattr(examples_page.Catalog, "load", without_texts)
    page = examples(config, metrics)
    assert "first training review stands in" in page
    assert "“" in page.split("## User 1")[1]
    monkeypatch.setattr(examples_page, "_first_reviews", lambda directory, items: {})
    assert ": no text" in examples(config, metrics)


def test_texts_of_the_data_are_one_line_and_no_markup():
    assert shortened("two\nlines  here") == "two lines here"
    long = shortened("word " * 40)
    assert long.endswith("word …")
    assert len(long) <= examples_page.TEXT_CHARS + 2
    assert shortened("x" * 100) == "x" * examples_page.TEXT_CHARS + " …"
    assert plain_markdown("**a** | <b> [c](d) `e`") == r"\*\*a\*\* \| &lt;b&gt; \[c\](d) \`e\`"


# Published figures


def test_published_figures_stand_beside_those_measured_here(job, config):
    told, _ = job()
    metrics = json.loads(Path(told["directory"], "metrics.json").read_text())
    assert "published / here" not in markdown(metrics)
    metrics["published"] = {"source": "a paper", "note": "Other data.", "results": {"ease": {"recall@20": 0.5}}}
    assert f"| EASE | 0.5000 / {metrics['results']['ease']['recall@20']['mean']:.4f} |" in markdown(metrics)
    assert "Published: a paper. Each cell: published / here. Other data." in markdown(metrics)
