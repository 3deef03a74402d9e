"""Sensitivity: the method runs of a sweep, and its values in the report."""

import json
from pathlib import Path

import pytest
from support.comparisons import make_config, run_methods, with_compare

from cllm4rec.errors import ConfigError, TrainingError
from cllm4rec.experiments.comparison import trial
from cllm4rec.experiments.comparison.report import axis_positions, render
from cllm4rec.experiments.comparison.results import METRICS, collect
from cllm4rec.experiments.comparison.sweeps import describe_sweeps, sweep_runs
from cllm4rec.experiments.comparison.trial import MethodRun, of_split, read_result, run_method

LAMBDA = {"name": "lambda c", "settings": ["pretrain.lambda_c", "finetune.lambda_c"], "values": [0, 1.0]}
WIDTH = {"name": "width", "settings": ["model.backbone.width"], "values": [16, 32]}
EPOCHS = {"name": "epochs", "settings": ["backbone.epochs"], "values": [0, 1]}


def test_a_sweep_sets_its_keys_together_and_shares_the_row_of_the_config(comparison):
    runs = sweep_runs(with_compare(comparison, sweeps=[LAMBDA, WIDTH, EPOCHS], sweep_seeds=[1], trials=3))
    found = {run.label: run.config for run in runs}
    assert sorted(found) == [
        "sweep_as_configured", "sweep_epochs_0", "sweep_lambda_c_0", "sweep_lambda_c_1.0", "sweep_width_16"
    ]  # fmt: skip
    changed = found["sweep_lambda_c_1.0"]
    assert (changed.pretrain.lambda_c, changed.finetune.lambda_c) == (1.0, 1.0)
    assert found["sweep_width_16"].model.backbone.width == 16
    assert found["sweep_as_configured"].model == comparison.model
    assert {run.config.data.split.seed for run in runs} == {1}
    assert all(run.grid_points == [{}] for run in runs), "a value is trained once, not tuned"
    assert len({run.directory for run in runs} | {MethodRun(of_split(comparison, 1), "cllm4rec").directory}) == 6


def test_values_begin_from_the_language_model_they_describe(comparison):
    backbones = {
        run.label: run.backbone for run in sweep_runs(with_compare(comparison, sweeps=[LAMBDA, WIDTH, EPOCHS]))
    }
    tuned = MethodRun(of_split(comparison, 0), "cllm4rec").backbone
    assert backbones["sweep_lambda_c_0"] == backbones["sweep_as_configured"] == tuned
    assert backbones["sweep_width_16"] not in (None, tuned)
    assert backbones["sweep_epochs_0"] is None


@pytest.mark.parametrize(
    ("settings", "values", "sentence"),
    [
        (["finetune.lambda"], [0, 1], "finetune.lambda is not a setting"),
        (["finetune.lambda.c"], [0, 1], "sets finetune.lambda.c, which is not a setting"),
        (["model.backbone.width"], [32, 30], "width 30 does not divide by 4 heads"),
        (["data.core"], [3, 5], "a sweep may change settings of model"),
        (["model.backbone.vocab_size"], [300, 400], "not those that prepare reads"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_before_anything_runs(comparison, settings, values, sentence):
    with pytest.raises(ConfigError, match=sentence):
        sweep_runs(with_compare(comparison, sweeps=[{"name": "x", "settings": settings, "values": values}]))


def test_what_a_sweep_is_described_by(comparison):
    ranges = {"name": "mask", "settings": ["finetune.mask_fraction"], "values": [0.2, [0.1, 0.9]]}
    described = describe_sweeps(with_compare(comparison, sweeps=[LAMBDA, ranges]))
    assert described["lambda c"] == {
        "seeds": [0], "settings": {"pretrain.lambda_c": 1.0, "finetune.lambda_c": 0.0}, "configured": None
    }  # fmt: skip
    assert described["mask"]["configured"] == [0.1, 0.9]


def test_sweeps_are_run_once_written_with_intervals_and_plotted(comparison_job):
    sweeps = [{**LAMBDA, "settings": ["finetune.lambda_c"]}, WIDTH]
    _, ran = comparison_job(sweeps=sweeps)
    assert sorted(ran)[-3:] == ["sweep_as_configured", "sweep_lambda_c_1.0", "sweep_width_16"]
    assert ran.count("backbone") == 1, "the other values start from the language model of cllm4rec"
    summary, ran = comparison_job(sweeps=sweeps)
    assert ran == []
    metrics = json.loads(Path(summary["directory"], "metrics.json").read_text())
    assert {name: [point["value"] for point in points] for name, points in metrics["sensitivity"].items()} == {
        "lambda c": [0, 1.0], "width": [16, 32]
    }  # fmt: skip
    for point in [*metrics["sensitivity"]["lambda c"], *metrics["sensitivity"]["width"]]:
        assert set(point) == {"value", *METRICS}
        assert point["recall@10"]["low"] <= point["recall@10"]["mean"] <= point["recall@10"]["high"]
    as_configured = metrics["sensitivity"]["lambda c"][0] | {"value": None}
    assert as_configured == metrics["sensitivity"]["width"][1] | {"value": None}
    assert metrics["sensitivity"]["lambda c"][0]["recall@10"]["mean"] > 0.9
    folder = Path(summary["directory"])
    for name in ("sensitivity_lambda_c.png", "sensitivity_width.png"):
        assert f"({name})" in (folder / "report.md").read_text()
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert not (
        Path(of_split(make_config(summary["output_dir"]), 0).run.directory("sweep_width_16")) / "tables.safetensors"
    ).exists()


def test_a_value_that_cannot_be_trained_is_reported_and_stops_nothing(comparison, monkeypatch):
    def fail(name, params, data, config):
        raise TrainingError("the loss is nan")

    monkeypatch.setattr(trial, "fit", fail)
    given = with_compare(comparison, sweeps=[{**LAMBDA, "values": [50, 100]}])
    for run in sweep_runs(given):
        run_method(run)
        assert read_result(run).summary["skipped"] == "the loss is nan"
    monkeypatch.undo()
    run_methods(comparison, ["popularity"])
    metrics = collect(given, ["popularity"])
    assert metrics["sensitivity"]["lambda c"] == [{"value": value, "failed": "the loss is nan"} for value in (50, 100)]
    report = render(metrics)["report.md"].decode()
    assert "100: the loss is nan." in report
    monkeypatch.setattr(trial, "fit", fail)
    with pytest.raises(TrainingError, match="no setting of cllm4rec"):
        run_method(MethodRun(of_split(comparison, 0), "cllm4rec"))


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
    found = axis_positions(values)
    scale = 1.0 if values != [0, 2, 8] else found[-1] / places[-1]
    assert found == pytest.approx([place * scale for place in places])
