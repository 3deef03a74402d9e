"""The whole comparison with its method runs in sequence, without Ray, and the files it writes."""

import json
from pathlib import Path

from support.comparisons import make_config

from cllm4rec.commands import compare
from cllm4rec.config import parse_config
from cllm4rec.experiments.comparison.report import markdown
from cllm4rec.experiments.comparison.results import METRICS, Splits
from cllm4rec.experiments.comparison.sweeps import sweep_runs
from cllm4rec.experiments.comparison.trial import of_split
from cllm4rec.storage.artifacts import read_manifest


def test_a_finished_row_is_not_run_again_and_metrics_have_their_shape(comparison_job, comparison):
    summary, _ = comparison_job()
    again, ran = comparison_job()
    assert ran == []
    assert again == summary
    metrics = json.loads(Path(summary["directory"], "metrics.json").read_text())
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
    assert metrics["beyond accuracy"]["popularity"]["popularity lift@20"] > 0
    names = set(read_manifest(summary["directory"], "evaluation").files)
    assert {"metrics.json", "report.md", "results.png", "learning_curves.png", "history_length.png"} <= names
    report = Path(summary["directory"], "report.md").read_text()
    assert "| CLLM4Rec | " in report
    assert "user-0" not in report
    assert "-0.0000" not in report


def test_a_row_that_was_lost_is_run_again_alone(comparison_job, comparison):
    comparison_job()
    Path(of_split(comparison, 1).run.directory("ease"), "manifest.json").unlink()
    for file in Path(of_split(comparison, 1).run.directory("ease")).iterdir():
        file.unlink()
    _, ran = comparison_job()
    assert ran == ["ease"]


def test_strata_hold_every_test_item_once_and_cold_items_apart(comparison):
    splits = Splits.load(comparison, [0, 1])
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
    assert sweep_runs(small) == []
    assert parse_config(small.model_dump()) == small
    assert small.finetune.epochs < whole.finetune.epochs
    assert small.output_dir != whole.output_dir


def test_published_figures_stand_beside_those_measured_here(comparison_job, comparison):
    summary, _ = comparison_job()
    metrics = json.loads(Path(summary["directory"], "metrics.json").read_text())
    assert "published / here" not in markdown(metrics)
    metrics["published"] = {"source": "a paper", "note": "Other data.", "results": {"ease": {"recall@20": 0.5}}}
    assert f"| EASE | 0.5000 / {metrics['results']['ease']['recall@20']['mean']:.4f} |" in markdown(metrics)
    assert "Published: a paper. Each cell: published / here. Other data." in markdown(metrics)
