"""The gate: who may become the current model, judged on crafted values and on models whose skill is known."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml
from support.commands import run_command

from cllm4rec.arrays.histories import Histories
from cllm4rec.arrays.ids import Catalog
from cllm4rec.arrays.ragged import Ragged
from cllm4rec.config import Config, parse_config
from cllm4rec.errors import ArtifactError, PromotionError, ResourceError
from cllm4rec.evaluation import promotion, stage
from cllm4rec.evaluation.promotion import judge, measure_with, promote
from cllm4rec.evaluation.stage import evaluate
from cllm4rec.metrics.protocol import HeldOut
from cllm4rec.metrics.ranking import compute, rank_scores
from cllm4rec.scoring.scorer import Scorer
from cllm4rec.scoring.user_histories import UserHistories
from cllm4rec.storage import files
from cllm4rec.storage.artifacts import read_manifest, write_directory
from cllm4rec.storage.files import write_table
from cllm4rec.storage.lease import hold
from cllm4rec.storage.registry import current_model, promoted_directories, read_pointer

NUM_USERS, NUM_ITEMS = 60, 130
GENERATOR = np.random.default_rng(0)
ORDERS = [GENERATOR.permutation(NUM_ITEMS)[:8] for _ in range(NUM_USERS)]
CATALOG = Catalog(
    [f"reader-{user:02d}" for user in range(NUM_USERS)],
    [f"book-{item:03d}" for item in range(NUM_ITEMS)],
    item_counts=np.bincount(np.concatenate([order[3:] for order in ORDERS]), minlength=NUM_ITEMS),
)
HISTORIES = Histories(
    np.arange(NUM_USERS),
    Ragged.from_lists([order[3:] for order in ORDERS]),
    Ragged.from_lists([order[:1] for order in ORDERS]),
    Ragged.from_lists([order[1:3] for order in ORDERS]),
)
TEST_ITEMS = {
    user_id: CATALOG.item_ids[HISTORIES.test[row]].tolist() for row, user_id in enumerate(CATALOG.user_ids.tolist())
}


class Skilled:
    """Knows the test items of some users by id, and ranks the last item first for the others; skilled for nobody, it
    puts the test items last."""

    def __init__(self, catalog: Catalog, skilled_for: list[str]) -> None:
        self.catalog, self.skilled_for, self.model_version = catalog, set(skilled_for), "skilled"
        self.asked: dict[int, list[list[str]]] = {}

    def without_language_model(self) -> None:
        return None

    def top_k(self, users: Any, histories: Ragged, k: int, rules: Any = None, exclude: Ragged | None = None) -> Any:
        assert exclude is not None
        score_BJ = np.tile(np.arange(self.catalog.num_items, dtype=np.float32), (len(users), 1))
        for row, user in enumerate(users):
            self.asked.setdefault(int(user), []).append(self.catalog.item_ids[histories[row]].tolist())
            user_id = self.catalog.user_ids[user] if user >= 0 else ""
            if user_id in self.skilled_for or (user_id and not self.skilled_for):
                known = [self.catalog.item_index(item_id) for item_id in TEST_ITEMS[user_id]]
                score_BJ[row, [item for item in known if item >= 0]] = 1000 if self.skilled_for else -1000
        return rank_scores(score_BJ, Ragged.interleave(histories, exclude), k)


def write_prepared(folder: Path, catalog: Catalog = CATALOG, histories: Histories = HISTORIES) -> None:
    with write_directory(str(folder / "prepared"), kind="prepared", inputs={}, config={}) as draft:
        catalog.save(draft.uri)
        lists = {name: getattr(histories, name).to_arrow() for name in ("train", "validation", "test")}
        user_ids = pa.array(catalog.user_ids[histories.user], pa.string())
        write_table(
            pa.table({"user": histories.user, "user_id": user_ids, **lists}),
            draft.path("histories", "bucket-00000.parquet"),
        )


def train(config: Config, skill: float, catalog: Catalog = CATALOG) -> None:
    """A candidate that knows the test items of this share of the users, evaluated."""
    skilled_for = CATALOG.user_ids[: round(skill * NUM_USERS)].tolist()
    prepared = read_manifest(config.run.prepared, "prepared").digest
    with write_directory(config.run.model, kind="model", inputs={"prepared": prepared}, config={}) as draft:
        catalog.save(draft.uri)
        files.write_json(draft.path("skill.json"), skilled_for)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    write_prepared(tmp_path)

    def load(model_dir: str) -> Skilled:
        return Skilled(Catalog.load(model_dir), files.read_json(files.join(model_dir, "skill.json")))

    monkeypatch.setattr(Scorer, "load", load)
    monkeypatch.setattr(stage, "render", lambda metrics: {})  # plots and EASE take most of an evaluation's time
    monkeypatch.setattr(stage, "MAX_ITEMS", 0)
    return config_for(str(tmp_path))


def config_for(output_dir: str, **limits: Any) -> Config:
    return parse_config(
        {
            "output_dir": output_dir,
            "data": {"interactions": {"path": "none"}},
            "evaluate": {"bootstrap_samples": 200},
            "score": {"batch_users": 7},
            "promote": limits,
        }
    )


def trained_and_promoted(config: Config, skill: float) -> dict[str, Any]:
    train(config, skill)
    evaluate(config)
    return promote(config)


# The limits, on values a user


ZEROS, ONES = np.zeros(400), np.ones(400)
COIN = (np.arange(400) % 2).astype(float)


@pytest.mark.parametrize(
    ("candidate", "current", "passes"),
    [
        (COIN, COIN, True),
        (ONES, COIN, True),
        (COIN, ONES, False),
        (COIN - 0.009, COIN, True),  # the same loss for everyone: an interval without width, above -0.01
        (COIN - 0.011, COIN, False),
        (1 - COIN, COIN, False),  # no difference in the mean, but nobody can tell: the interval is ±0.1
        (ONES, None, True),
    ],
)
def test_a_loss_must_be_ruled_out(candidate: Any, current: Any, passes: bool) -> None:
    verdict = judge(candidate, current, ZEROS - 1, config_for("out"))
    assert verdict.passes is passes
    if current is None:
        assert verdict.difference is None
    else:
        assert verdict.difference is not None
        assert verdict.difference["mean"] == pytest.approx((candidate - current).mean())
        assert verdict.difference["low"] <= verdict.difference["mean"] <= verdict.difference["high"]
        assert any("max_loss" in reason for reason in verdict.reasons) is not passes


def test_a_wider_limit_lets_an_uncertain_model_in() -> None:
    assert judge(1 - COIN, COIN, ZEROS - 1, config_for("out", max_loss=0.2)).passes


@pytest.mark.parametrize(
    ("current", "asked", "passes"), [(None, True, False), (ZEROS, True, False), (None, False, True)]
)
def test_a_model_that_is_not_better_than_popularity_is_refused_where_that_is_asked(
    current: Any, asked: bool, passes: bool
) -> None:
    verdict = judge(COIN, current, COIN, config_for("out", above_popularity=asked))
    assert verdict.passes is passes
    assert any("above_popularity" in reason for reason in verdict.reasons) is not passes


# Models


def test_the_first_model_passes_by_popularity_alone_and_its_copy_is_current(config: Config) -> None:
    result = trained_and_promoted(config, 0.5)
    assert (result["promoted"], result["from"], result["difference"]) == (True, None, None)
    assert current_model(config.output_dir) == f"{config.output_dir}/models/{result['to']}"
    assert read_manifest(current_model(config.output_dir), "model") == read_manifest(config.run.model, "model")
    assert files.read_json(result["report"])["to"] == result["to"]


def test_a_first_model_below_popularity_is_refused(config: Config) -> None:
    with pytest.raises(PromotionError, match="differs from popularity"):
        trained_and_promoted(config, 0.0)
    assert current_model(config.output_dir) == config.run.model
    open_gate = config_for(config.output_dir, above_popularity=False)
    assert promote(open_gate)["promoted"]


def test_a_better_model_replaces_the_current_one_and_the_report_tells_by_how_much(config: Config) -> None:
    first = trained_and_promoted(config, 0.5)
    second = trained_and_promoted(config, 0.8)
    assert (second["from"], second["promoted"]) == (first["to"], True)
    assert second["difference"]["low"] > 0
    assert second["difference"]["mean"] == pytest.approx(second["candidate"] - second["current"])
    assert second["current"] == pytest.approx(first["candidate"])
    assert second["warnings"] == []


def test_a_worse_model_is_refused_with_its_numbers_and_nothing_changes(config: Config) -> None:
    trained_and_promoted(config, 0.8)
    pointer = read_pointer(config.output_dir)
    with pytest.raises(PromotionError, match="may not reach below") as caught:
        trained_and_promoted(config, 0.5)
    result = caught.value.details
    assert (result["promoted"], result["to"], caught.value.exit_status) == (False, None, 3)
    assert result["difference"]["high"] < 0
    assert files.read_json(str(result["report"]))["difference"] == result["difference"]
    assert read_pointer(config.output_dir) == pointer
    assert len(promoted_directories(config.output_dir)) == 1


def test_the_current_model_is_not_promoted_again(config: Config) -> None:
    first = trained_and_promoted(config, 0.5)
    assert promote(config) == {"promoted": False, "already_current": True, "from": first["to"], "to": first["to"]}
    assert len(promoted_directories(config.output_dir)) == 1


def test_a_model_that_was_not_evaluated_is_refused(config: Config) -> None:
    train(config, 0.5)
    with pytest.raises(ArtifactError, match=r"run cllm4rec evaluate first"):
        promote(config)
    evaluate(config)
    train(config, 0.6)
    with pytest.raises(ArtifactError, match=r"run cllm4rec evaluate first"):
        promote(config)


def test_a_damaged_evaluation_is_refused(config: Config) -> None:
    train(config, 0.5)
    evaluate(config)
    path = Path(config.run.evaluation) / "per_user.parquet"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=r"per_user\.parquet is damaged"):
        promote(config)


def test_two_do_not_promote_at_once(config: Config) -> None:
    train(config, 0.5)
    evaluate(config)
    with (
        hold(config.run.models, "another promotion"),
        pytest.raises(ResourceError, match="another promotion is at work"),
    ):
        promote(config)


# A current model with a catalog of its own


def other_catalog() -> Catalog:
    """Older: in another order, without five users and five items, with two users and two items that are gone now."""
    users = [*CATALOG.user_ids[:4:-1].tolist(), "reader-left", "reader-gone"]
    return Catalog(users, ["zine-1", *CATALOG.item_ids[:4:-1].tolist(), "zine-2"])


def test_another_order_of_users_and_items_makes_no_difference(config: Config) -> None:
    held_out = HeldOut.test(HISTORIES, config.evaluate.read, config.evaluate.mask)
    everyone = CATALOG.user_ids[::2].tolist()
    shuffled = Catalog(CATALOG.user_ids[::-1].tolist(), np.roll(CATALOG.item_ids, 20).tolist())
    values = [measure_with(Skilled(one, everyone), CATALOG, held_out, config) for one in (CATALOG, shuffled)]  # type: ignore[arg-type]
    assert (values[0][::2] == 1).all()
    np.testing.assert_array_equal(values[1][::2], 1)


def test_an_older_model_reads_what_it_knows_and_ranks_strangers_by_history(config: Config) -> None:
    held_out, older = HeldOut.test(HISTORIES, config.evaluate.read, config.evaluate.mask), other_catalog()
    skilled = Skilled(older, CATALOG.user_ids.tolist())
    values_B = measure_with(skilled, CATALOG, held_out, config)  # type: ignore[arg-type]
    unknown_items = set(CATALOG.item_ids[:5])
    expected = [
        [item_id for item_id in CATALOG.item_ids[HISTORIES.train[user]] if item_id not in unknown_items]
        for user in range(NUM_USERS)
    ]
    assert skilled.asked[-1] == expected[:5], "five users it has never seen"
    for user in range(5, NUM_USERS):
        assert skilled.asked[older.user_index(f"reader-{user:02d}")] == [expected[user]]
    findable_B = np.array([sum(item >= 5 for item in HISTORIES.test[user]) for user in range(NUM_USERS)])
    np.testing.assert_array_equal(values_B[5:], findable_B[5:] / 2)


def test_recommended_items_that_are_gone_are_misses(config: Config) -> None:
    """With k = 20 and 20 items that are gone on top, nothing is found."""
    held_out = HeldOut.test(HISTORIES, config.evaluate.read, config.evaluate.mask)
    older = Catalog(CATALOG.user_ids.tolist(), [*CATALOG.item_ids.tolist(), *(f"zine-{n}" for n in range(20))])
    assert measure_with(Skilled(older, ["nobody"]), CATALOG, held_out, config).max() == 0  # type: ignore[arg-type]
    assert measure_with(Skilled(CATALOG, ["nobody"]), CATALOG, held_out, config).max() > 0  # type: ignore[arg-type]


def test_a_current_model_of_other_data_is_compared_and_its_advantage_said(
    config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained_and_promoted(config, 0.3)
    orders = [np.roll(order, 1) for order in ORDERS]
    rolled = Histories(
        np.arange(NUM_USERS),
        Ragged.from_lists([order[3:] for order in orders]),
        HISTORIES.validation,
        HISTORIES.test,
    )
    write_prepared(tmp_path, histories=rolled)
    with caplog.at_level(logging.WARNING):
        result = trained_and_promoted(config, 0.9)
    assert "this favors it" in result["warnings"][0]
    assert "this favors it" in caplog.text


def test_no_user_or_item_is_named_in_reports_and_logs(config: Config, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    trained_and_promoted(config, 0.8)
    with pytest.raises(PromotionError) as caught:
        trained_and_promoted(config, 0.5)
    reports = "".join(path.read_text() for path in Path(config.run.models).glob("report-*.json"))
    assert reports.count("difference") == 2
    for text in (caplog.text, reports, str(caught.value)):
        assert "reader-" not in text
        assert "book-" not in text


# What serving and scoring read


def test_histories_in_the_terms_of_an_older_model_are_matched_by_id(config: Config) -> None:
    older = other_catalog()
    known = UserHistories.load(config.run.prepared, older)
    assert known.new_users == {f"reader-{row:02d}": older.num_users + row for row in range(5)}
    assert len(known.items) == older.num_users + 5
    places = {user_id: known.new_users.get(user_id, older.user_index(user_id)) for user_id in CATALOG.user_ids}
    together = HISTORIES.together("train", "validation", "test")
    for user, user_id in enumerate(CATALOG.user_ids):
        expected = [item_id for item_id in CATALOG.item_ids[together[user]] if item_id >= "book-005"]
        assert older.item_ids[known.items[places[user_id]]].tolist() == expected
    assert [known.items[older.user_index(gone)].tolist() for gone in ("reader-left", "reader-gone")] == [[], []]


def test_histories_of_the_same_catalog_are_as_prepared(config: Config) -> None:
    known = UserHistories.load(config.run.prepared, CATALOG)
    assert known.items.tolist() == HISTORIES.together("train", "validation", "test").tolist()
    assert known.new_users == {}


@pytest.mark.parametrize("foreign", [Catalog(["someone"], ["book-001"]), Catalog(["reader-01"], ["something"])])
def test_histories_of_other_data_are_refused(config: Config, foreign: Catalog) -> None:
    with pytest.raises(ArtifactError, match="no user or no item in common"):
        UserHistories.load(config.run.prepared, foreign)


# The job


def test_the_job_tells_in_its_last_line_and_by_its_exit_status(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_defaults=True)))

    def call(*flags: str) -> tuple[Any, dict[str, Any], str]:
        done = run_command(capsys, "promote", "--config", tmp_path / "run.yaml", *flags)
        said = "\n".join([*done.lines, done.errors])
        return done.status, {**json.loads(Path(config.output_dir, "run.json").read_text())["result"], **done.last}, said

    first = trained_and_promoted(config, 0.5)["to"]
    train(config, 0.8)
    evaluate(config)
    status, result, _ = call()
    assert (status, result["promoted"], result["from"]) == (0, True, first)
    assert set(result["difference"]) == {"mean", "low", "high"}
    status, result, said = call()
    assert (status, result["promoted"], "nothing to do" in said) == (0, False, True)
    train(config, 0.2)
    evaluate(config)
    status, result, said = call()
    assert (status, result["ok"], result["promoted"], result["to"]) == (3, False, False, None)
    assert "error: the model is not promoted: by recall@20, it differs from the current model" in said
    status, result, said = call("--rollback")
    assert (status, result["rolled_back"], result["to"]) == (0, True, first)
    assert current_model(config.output_dir).endswith(first)
    status, result, _ = call("--rollback")
    assert (status, result["ok"]) == (1, False)
    assert "no model promoted before it" in result["error"]


def test_a_bit_flipped_during_the_copy_leaves_the_old_model(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    first = trained_and_promoted(config, 0.5)
    plain = files.copy_file

    def flip(source: str, target: str) -> None:
        plain(source, target)
        if target.endswith("skill.json"):
            Path(target).write_text("[]")

    monkeypatch.setattr(files, "copy_file", flip)
    with pytest.raises(ArtifactError, match="is damaged"):
        trained_and_promoted(config, 0.8)
    assert current_model(config.output_dir).endswith(first["to"])


def test_the_metric_of_the_config_decides(config: Config) -> None:
    other = config_for(config.output_dir, metric="ndcg@100")
    train(other, 0.5)
    evaluate(other)
    assert promote(other)["metric"] == "ndcg@100"
    held_out = HeldOut.test(HISTORIES, other.evaluate.read, other.evaluate.mask)
    values_B = measure_with(Scorer.load(current_model(other.output_dir)), CATALOG, held_out, other)
    ranked = np.full((NUM_USERS, 2), -1)
    ranked[: NUM_USERS // 2] = [HISTORIES.test[user] for user in range(NUM_USERS // 2)]
    ideal = compute(ranked, held_out.relevant, ["ndcg@100"])["ndcg@100"]
    np.testing.assert_allclose(values_B[: NUM_USERS // 2], ideal[: NUM_USERS // 2])
    assert promotion.measure(other, None)[0].candidate == pytest.approx(values_B.mean())
