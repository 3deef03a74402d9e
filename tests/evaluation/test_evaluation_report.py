"""The report and the evaluate stage, with a Scorer whose answers are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cllm4rec.arrays.histories import Histories
from cllm4rec.arrays.ids import Catalog
from cllm4rec.arrays.ragged import Ragged
from cllm4rec.config import Config, parse_config
from cllm4rec.errors import ArtifactError, DataError
from cllm4rec.evaluation import stage
from cllm4rec.evaluation.report import markdown, render, table, verdict
from cllm4rec.evaluation.results import EvaluationReport, PairedComparison
from cllm4rec.metrics.ranking import rank_scores
from cllm4rec.storage.artifacts import is_current, write_directory
from cllm4rec.storage.files import write_table

NUM_USERS, NUM_ITEMS = 48, 130
GENERATOR = np.random.default_rng(0)
ORDERS = [GENERATOR.permutation(NUM_ITEMS)[: 5 + user % 6] for user in range(NUM_USERS)]
HISTORIES = Histories(
    np.arange(NUM_USERS),
    Ragged.from_lists([order[2:] for order in ORDERS]),
    Ragged.from_lists([order[:1] for order in ORDERS]),
    Ragged.from_lists([order[1:2] if user else [] for user, order in enumerate(ORDERS)]),
)
CATALOG = Catalog(
    [f"reader-{user:02d}" for user in range(NUM_USERS)],
    [f"book-{item:03d}" for item in range(NUM_ITEMS)],
    item_counts=np.bincount(HISTORIES.train.values, minlength=NUM_ITEMS),
)


class Oracle:
    """Knows the test items of every second user and puts them first; of the others it knows nothing."""

    model_version = "oracle"

    def __init__(self, catalog: Catalog = CATALOG, score: float = 1.0) -> None:
        self.catalog, self.score, self.asked = catalog, score, []

    def without_language_model(self) -> None:
        return None

    def top_k(self, users: Any, histories: Ragged, k: int, rules: Any = None, exclude: Ragged | None = None) -> Any:
        assert exclude is not None
        self.asked += list(zip(users.tolist(), histories.tolist(), strict=True))
        score_BJ = np.zeros((len(users), NUM_ITEMS), np.float32)
        for row, user in enumerate(users):
            if user % 2:
                score_BJ[row, HISTORIES.test[user]] = self.score
        return rank_scores(score_BJ, Ragged.interleave(histories, exclude), k)


def config_for(output_dir: str = "out", **evaluate: Any) -> Config:
    return parse_config(
        {
            "output_dir": output_dir,
            "data": {"interactions": {"path": "none"}},
            "evaluate": {"bootstrap_samples": 200, **evaluate},
            "score": {"batch_users": 7},
        }
    )


@pytest.fixture(scope="module")
def evaluation() -> stage.Evaluation:
    return stage.evaluate_methods(HISTORIES, CATALOG, Oracle(), config_for())


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose `prepared/` is real and whose model is the oracle."""
    config = config_for(str(tmp_path)).model_dump(mode="json")
    with write_directory(str(tmp_path / "prepared"), kind="prepared", inputs={}, config=config) as draft:
        CATALOG.save(draft.uri)
        lists = {name: getattr(HISTORIES, name).to_arrow() for name in ("train", "validation", "test")}
        write_table(pa.table({"user": HISTORIES.user, **lists}), draft.path("histories", "bucket-00000.parquet"))
    with write_directory(str(tmp_path / "model"), kind="model", inputs={}, config=config):
        pass
    monkeypatch.setattr(stage.Scorer, "load", lambda model_dir: Oracle())
    return tmp_path


def test_the_scorer_gets_the_credit_for_what_it_knows(evaluation: stage.Evaluation) -> None:
    users = evaluation.held_out.users
    np.testing.assert_array_equal(evaluation.per_user["cllm4rec"]["recall@20"][users % 2 == 1], 1.0)
    np.testing.assert_array_equal(evaluation.per_user["cllm4rec"]["ndcg@100"][users % 2 == 1], 1.0)
    # Of all other users every item has the same score, so the list is that of the lowest indices.
    masked = evaluation.held_out.masked
    lists = [np.setdiff1d(np.arange(NUM_ITEMS), masked[row])[:20] for row in np.flatnonzero(users % 2 == 0)]
    by_index = [
        float(HISTORIES.test[user][0] in items) for user, items in zip(users[users % 2 == 0], lists, strict=True)
    ]
    np.testing.assert_array_equal(evaluation.per_user["cllm4rec"]["recall@20"][users % 2 == 0], by_index)
    assert set(evaluation.per_user) == {"cllm4rec", "popularity", "ease"}


def test_no_method_recommends_a_masked_item(evaluation: stage.Evaluation) -> None:
    masked = evaluation.held_out.masked.tolist()
    for lists in evaluation.ranked.values():
        assert all(not set(row) & set(out) for row, out in zip(lists.tolist(), masked, strict=True))


@pytest.mark.parametrize("read", ["train", "train+validation"])
def test_the_scorer_reads_what_the_policy_says(read: str) -> None:
    oracle = Oracle()
    stage.evaluate_methods(HISTORIES, CATALOG, oracle, config_for(read=read))
    expected = HISTORIES.together(*read.split("+")).tolist()
    assert oracle.asked == [(user, expected[user]) for user in range(1, NUM_USERS)]


def test_the_protocol_counts_who_was_dropped(evaluation: stage.Evaluation) -> None:
    protocol = evaluation.report.protocol
    assert (protocol.users_evaluated, protocol.users_dropped) == (NUM_USERS - 1, 1)
    assert protocol.mask == "train+validation"
    assert protocol.baselines["ease"]["regularization"] in map(float, protocol.baselines["ease"]["grid"])


def test_the_difference_is_paired_with_the_best_baseline(evaluation: stage.Evaluation) -> None:
    results, comparison = evaluation.report.results, evaluation.report.comparison
    best = max(("popularity", "ease"), key=lambda method: results[method]["recall@20"]["mean"])
    difference = comparison.difference["cllm4rec"]
    assert comparison.baseline == best
    assert difference["mean"] == pytest.approx(
        results["cllm4rec"]["recall@20"]["mean"] - results[best]["recall@20"]["mean"]
    )
    assert difference["low"] < difference["mean"] < difference["high"]
    assert best not in comparison.difference


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0.01, 0.03, "excludes 0: the difference is significant"),
        (-0.01, 0.03, "do not separate the two"),
        (-0.03, -0.01, "excludes 0: the difference is significant"),
    ],
)
def test_the_verdict_claims_no_more_than_the_interval(low: float, high: float, words: str) -> None:
    difference = {"cllm4rec": {"mean": (low + high) / 2, "low": low, "high": high}}
    sentence = verdict(PairedComparison("recall@20", "ease", difference))
    assert words in sentence
    assert ("above EASE" in sentence) == (low + high > 0)


def test_the_table_has_a_row_for_each_method_in_order(evaluation: stage.Evaluation) -> None:
    stored = json.loads(json.dumps(evaluation.report.to_json(), sort_keys=True))
    lines = table(EvaluationReport.from_json(stored)).splitlines()
    assert lines[0].split() == ["recall@20", "recall@40", "ndcg@100"]
    assert set(lines[1]) == {"─"}
    assert [line.split()[0] for line in lines[2:5]] == ["CLLM4Rec", "Popularity", "EASE"]
    value = evaluation.report.results["ease"]["ndcg@100"]
    assert f"{value['mean']:.4f} [{value['low']:.4f}, {value['high']:.4f}]" in lines[4]


def test_the_report_shows_every_plot_it_links_to(evaluation: stage.Evaluation) -> None:
    files = render(evaluation.report)
    linked = {part.split(")")[0] for part in files["report.md"].decode().split("](")[1:]}
    assert linked == set(files) - {"report.md"} == {"results.png", "history_length.png", "item_popularity.png"}
    assert all(files[name].startswith(b"\x89PNG") for name in linked)


def test_the_best_mean_of_each_column_is_bold(evaluation: stage.Evaluation) -> None:
    results = evaluation.report.results
    best = max(values["ndcg@100"]["mean"] for values in results.values())
    assert markdown(evaluation.report).count("**") == 2 * 3
    assert f"**{best:.4f}**" in markdown(evaluation.report)


def test_a_report_takes_methods_it_has_no_name_for(evaluation: stage.Evaluation) -> None:
    metrics = evaluation.report.to_json()
    parts = [metrics["results"], *(group["results"] for groups in metrics["strata"].values() for group in groups)]
    for part in parts:
        part["another"] = part["ease"]
    metrics["comparison"]["difference"]["another"] = metrics["comparison"]["difference"]["cllm4rec"]
    report = EvaluationReport.from_json(metrics)
    assert "\n| another |" in render(report)["report.md"].decode()
    assert "another" in table(report)


def test_published_figures_stand_beside_those_measured_here() -> None:
    figures = {"cllm4rec_t5": {"recall@20": 0.25}, "ease": {"ndcg@100": 0.125, "recall@20": 0.5}}
    published = {"source": "a paper", "note": "Other data.", "results": figures}
    measured = stage.evaluate_methods(HISTORIES, CATALOG, Oracle(), config_for(published=published)).report
    assert measured.to_json()["published"]["source"] == "a paper"
    here = measured.results["ease"]
    report = render(measured)["report.md"].decode()
    assert "Published: a paper. Each cell: published / here. Other data." in report
    assert "| published / here | recall@20 | ndcg@100 |" in report
    assert f"| EASE | 0.5000 / {here['recall@20']['mean']:.4f} | 0.1250 / {here['ndcg@100']['mean']:.4f} |" in report
    assert "| CLLM4Rec, T5 | 0.2500 / – | – / – |" in report


def test_no_table_of_published_figures_where_none_are_named(evaluation: stage.Evaluation) -> None:
    assert "published" not in evaluation.report.to_json()
    assert "ublished" not in markdown(evaluation.report)


def test_ease_is_skipped_out_loud_where_the_catalog_is_too_large(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(stage, "MAX_ITEMS", 100)
    report = stage.evaluate_methods(HISTORIES, CATALOG, Oracle(), config_for()).report
    assert set(report.results) == {"cllm4rec", "popularity"}
    for text in (caplog.text, table(report), markdown(report)):
        assert "EASE is skipped: its dense 130 × 130 matrices" in text


def test_scores_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ArtifactError, match="not finite"):
        stage.evaluate_methods(HISTORIES, CATALOG, Oracle(score=np.inf), config_for())


def test_data_without_test_items_are_refused() -> None:
    nothing = Histories(HISTORIES.user, HISTORIES.train, HISTORIES.validation, Ragged.from_lists([[]] * NUM_USERS))
    with pytest.raises(DataError, match=r"raise data\.split\.test"):
        stage.evaluate_methods(nothing, CATALOG, Oracle(), config_for())


def test_the_stage_writes_what_its_contract_names(run_dir: Path, evaluation: stage.Evaluation) -> None:
    manifest = stage.evaluate(config_for(str(run_dir)))
    folder = run_dir / "evaluation"
    assert {"metrics.json", "per_user.parquet", "top100.parquet", "report.md", "results.png"} <= set(manifest.files)
    content = json.loads((folder / "metrics.json").read_text())
    assert content.keys() == {"protocol", "results", "comparison", "strata"}
    assert content["results"] == evaluation.report.results
    assert content["strata"]["history length"][0].keys() == {"label", "users", "metric", "results"}
    assert EvaluationReport.load(str(folder)).comparison == evaluation.report.comparison
    per_user = pq.read_table(folder / "per_user.parquet").to_pandas()
    assert list(per_user.columns) == [
        "user_id",
        "num_train",
        "num_test",
        "method",
        "recall@20",
        "recall@40",
        "ndcg@100",
    ]
    means = per_user.groupby("method")["recall@20"].mean()
    assert means["ease"] == pytest.approx(evaluation.report.results["ease"]["recall@20"]["mean"])
    row = per_user[(per_user.user_id == "reader-07") & (per_user.method == "cllm4rec")].iloc[0]
    assert (row.num_train, row.num_test, row["recall@20"]) == (len(HISTORIES.train[7]), 1, 1.0)
    top = {row["user_id"]: row["item_ids"] for row in pq.read_table(folder / "top100.parquet").to_pylist()}
    assert len(top) == NUM_USERS - 1
    assert top["reader-07"][0] == CATALOG.item_ids[HISTORIES.test[7][0]]
    assert {len(items) for items in top.values()} == {100}


def test_a_result_is_current_until_something_it_depends_on_changes(run_dir: Path) -> None:
    config = config_for(str(run_dir))
    stage.evaluate(config)
    uri = str(run_dir / "evaluation")
    assert is_current(uri, "evaluation", stage.evaluate_inputs(config))
    published = {"source": "a paper", "results": {"ease": {"recall@20": 0.5}}}
    for changed in (
        config_for(str(run_dir), mask="train"),
        config_for(str(run_dir), published=published),
        config.model_copy(update={"seed": 1}),
    ):
        assert not is_current(uri, "evaluation", stage.evaluate_inputs(changed))


def test_a_model_of_another_catalog_is_refused(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Catalog(CATALOG.user_ids, [*CATALOG.item_ids[:-1], "another book"])
    monkeypatch.setattr(stage.Scorer, "load", lambda model_dir: Oracle(other))
    with pytest.raises(ArtifactError, match="trained on other users or items"):
        stage.evaluate(config_for(str(run_dir)))
    assert not (run_dir / "evaluation").exists()
