"""What each method of a comparison trains, and which language model it starts from."""

import dataclasses

import numpy as np
import pytest
import torch
from support.comparisons import NUM_WORDS, make_config
from support.parity import MAX_TOKENS
from support.weights import digest_of_weights

from cllm4rec.data.documents import Documents
from cllm4rec.errors import ConfigError
from cllm4rec.experiments.baselines.registry import BASELINES
from cllm4rec.experiments.comparison.language import backbone_directory, run_backbone, starting_backbone
from cllm4rec.experiments.comparison.methods import (
    ALL,
    GRID,
    MAIN,
    VARIANTS,
    chosen_methods,
    config_of,
    grid_points_of,
    phases_of,
    setting,
    with_settings,
)
from cllm4rec.experiments.comparison.trial import Data, MethodRun, fit, fit_variant, of_split
from cllm4rec.metrics.protocol import HeldOut
from cllm4rec.model.adapter import adapter_weights, merge_adapter
from cllm4rec.model.backbone_files import load_backbone, new_backbone
from cllm4rec.model.cllm4rec import CLLM4Rec
from cllm4rec.training.epochs import EpochBuilder
from cllm4rec.training.local_trainer import single_process
from cllm4rec.training.phases import CONTENT


@pytest.fixture(scope="module")
def split(comparison):
    return of_split(comparison, 0)


@pytest.fixture(scope="module")
def data(split):
    return Data.load(split.run.prepared)


def model_of(name, split, data, **settings):
    """A variant's model after a short training, and the same before."""
    short = {"finetune.epochs": 1, "pretrain.epochs": 1, "model.table_init": "noise"} | settings
    varied = config_of(name, split, short)
    fresh = CLLM4Rec(
        starting_backbone(varied, NUM_WORDS), data.catalog.token_space(NUM_WORDS), std=0.1, seed=varied.seed
    )
    return fit_variant(name, varied, data).model, fresh


@pytest.mark.parametrize(
    ("name", "content_moves", "backbone_moves"),
    [("cllm4rec", True, False), ("llm_cf", False, False), ("llm_ftall", True, True), ("llm_scratch", True, True)],
)
def test_a_variant_trains_what_its_name_says_and_nothing_else(split, data, name, content_moves, backbone_moves):
    trained, fresh = model_of(name, split, data)
    for table in CONTENT:
        assert torch.equal(getattr(trained, table), getattr(fresh, table)) != content_moves
    assert (digest_of_weights(trained.backbone) != digest_of_weights(fresh.backbone)) == backbone_moves
    assert not torch.equal(trained.collaborative_items, fresh.collaborative_items)


def test_from_scratch_means_without_the_trained_language_model(split, data):
    """cllm4rec starts from the language model trained on the texts, llm_scratch from random weights."""
    names = ("cllm4rec", "llm_cf", "llm_ftall", "llm_scratch")
    begun = {name: digest_of_weights(starting_backbone(config_of(name, split, {}), NUM_WORDS)) for name in names}
    assert begun["cllm4rec"] == begun["llm_cf"] == begun["llm_ftall"]
    assert begun["llm_scratch"] != begun["cllm4rec"]
    assert MethodRun(split, "llm_scratch").backbone is None


@pytest.mark.parametrize("stages", [["backbone"], ["pretrain", "finetune"]])
def test_an_adapter_is_trained_where_the_config_says_so_beside_frozen_weights(split, data, stages):
    epochs = int("backbone" in stages)
    adapter = {"rank": 2, "trained_in": stages}
    config = with_settings(split, {"backbone.adapter": adapter, "backbone.epochs": epochs}, "this test")
    plain = new_backbone(split.model, NUM_WORDS, split.seed)
    if epochs:
        directory = run_backbone(config)
        trained = load_backbone(directory, MAX_TOKENS, merge=False)
    else:
        trained = model_of("cllm4rec", config, data)[0].backbone
    assert all(weight.abs().max() > 0 for weight in adapter_weights(trained).values()), "B starts at zero"
    merge_adapter(trained)
    assert digest_of_weights(trained) != digest_of_weights(plain)
    begun = starting_backbone(config, NUM_WORDS)
    assert bool(adapter_weights(begun)) == (epochs == 0), "what no later stage trains is merged"
    assert MethodRun(config, "cllm4rec").inputs() != MethodRun(split, "cllm4rec").inputs()
    for name in ("llm_ftall", "llm_scratch"):
        assert config_of(name, config, {}).backbone.adapter is None, "all weights are trained"
    assert config_of("m6_retrieval", config, {}).backbone.epochs, "its texts are read by a trained model"


@pytest.mark.parametrize(("name", "is_fixed"), [("llm_fixord", True), ("cllm4rec", False)])
def test_only_llm_fixord_reads_items_in_one_order(split, data, name, is_fixed):
    phase = next(phase for phase in phases_of(name, config_of(name, split, {})) if phase.name == "pretrain")
    phase = dataclasses.replace(phase, reads=("interactions",))
    builder = EpochBuilder(data.prompt_tokens.prompts, data.catalog.token_space(NUM_WORDS), MAX_TOKENS, seed=0)
    first, second = (
        Documents.concat(list(phase.streams(builder, data.documents, epoch)[0][0])).in_order() for epoch in (0, 1)
    )
    assert np.array_equal(first.main.values, second.main.values) == is_fixed


def test_without_finetuning_the_pretrained_head_ranks(split, data):
    assert [phase.name for phase in phases_of("llm_prerec", config_of("llm_prerec", split, {})) if phase.epochs] == [
        "warmup", "pretrain"
    ]  # fmt: skip
    curve = fit("llm_prerec", {}, data, split).curve
    assert {entry["phase"] for entry in curve} == {"pretrain"}
    assert not any("finetune" in key for params in grid_points_of("llm_prerec", split) for key in params)


@pytest.mark.parametrize("name", ["cllm4rec", "cllm4rec_llama", "llm_cf", "llm_ftall", "ease", "multi_vae"])
def test_rows_find_the_hidden_item_of_the_parity_world(split, data, name):
    if name == "cllm4rec_llama":
        run_backbone(config_of(name, split, {}))
    held_out = HeldOut.test(data.histories, split.evaluate.read, split.evaluate.mask)
    ranked = fit(name, {}, data, split).rank(held_out)
    assert (ranked[:, 0] == held_out.relevant.values).mean() > 0.9


def test_t5_is_trained_as_one_more_architecture(split, data):
    run_backbone(config_of("cllm4rec_t5", split, {}))
    model, _ = model_of("cllm4rec_t5", split, data)
    assert model.backbone.is_encoder_decoder


def test_every_named_row_is_known_and_tuned_by_a_grid_that_fits_the_config(split):
    assert set(MAIN) <= set(ALL)
    assert set(ALL) == set(VARIANTS) | set(BASELINES)
    tried = grid_points_of("cllm4rec", make_config(split.output_dir, trials=100))
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
    assert {name for name in ALL if MethodRun(untrained, name).backbone} == {"llm_ftall", "m6_retrieval"}
    assert MethodRun(untrained, "llm_ftall").varied.backbone.epochs == 3
    assert MethodRun(untrained, "llm_ftall").backbone == MethodRun(untrained, "m6_retrieval").backbone
    assert MethodRun(split, "llm_ftall").varied.backbone.epochs == split.backbone.epochs == 1


def test_what_reads_no_texts_does_not_begin_from_them(split):
    assert split.model.table_init == "texts"
    assert config_of("llm_cf", split, {}).model.table_init == "noise"


def test_chosen_methods_bring_what_they_need_and_refuse_what_is_none(tmp_path):
    assert chosen_methods(make_config(tmp_path, methods=["cllm4rec_emb", "ease"])) == [
        "cllm4rec_emb",
        "ease",
        "cllm4rec",
    ]
    assert chosen_methods(make_config(tmp_path)) == list(MAIN)
    assert chosen_methods(make_config(tmp_path, rows="all")) == list(ALL)
    with pytest.raises(ConfigError, match="unknown names: easy"):
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
    assert MethodRun(split, "llm_cf").backbone == MethodRun(split, "m6_retrieval").backbone == directory
    assert MethodRun(split, "cllm4rec_t5").backbone in others


def test_rows_are_trained_by_plain_torch_whatever_the_engine(split):
    training = split.training.model_copy(update={"engine": "deepspeed", "zero_stage": 3})
    settings = single_process(split.model_copy(update={"training": training}))
    assert (settings.training.engine, settings.training.zero_stage) == ("torch", 0)
    assert settings.training.micro_batch_tokens == split.training.micro_batch_tokens
