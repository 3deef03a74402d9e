"""Drift: small cases by hand, larger ones against a slow reference, limits in full sentences, plots that are pictures."""

import dataclasses
import json
import math

import numpy as np
import pyarrow as pa
import pytest
from scipy.stats import ks_2samp

from cllm4rec.config import DriftLimits
from cllm4rec.nightly.drift import COLUMNS, Drift, breaches, compare, render, sample
from cllm4rec.storage.table import SCHEMA

TYPES = pa.schema([SCHEMA.field(name).with_nullable(True) for name in COLUMNS])
NOTHING_ALLOWED = DriftLimits(
    max_users_gone=0, max_top10_changed=0, max_coverage_drop=0, max_lift_ratio=1, max_score_shift=0
)


def lists(rows: dict[str, str], scores: dict[str, list[float]] | None = None) -> pa.Table:
    """user → items, a letter each; scores fall by one from place to place."""
    items = [list(word) for word in rows.values()]
    values = [(scores or {}).get(user, [float(-place) for place in range(len(word))]) for user, word in rows.items()]
    return pa.table([list(rows), items, values], names=COLUMNS).cast(TYPES)


def random_lists(seed: int, users: range, num_items: int, shift: float = 0.0) -> pa.Table:
    random = np.random.default_rng(seed)
    items = [[f"i{item}" for item in random.permutation(num_items)[: random.integers(0, 16)]] for _ in users]
    scores = [sorted(random.normal(shift, 1, len(row)), reverse=True) for row in items]
    order = random.permutation(len(users))  # rows come in another order every night
    return pa.table([[f"u{user}" for user in users], items, scores], names=COLUMNS).take(order)


# Values


def test_a_small_case_by_hand():
    old = lists({"gone": "ab", "same": "abc", "turned": "abc", "other": "abcd"})
    new = lists({"other": "abef", "turned": "cba", "same": "abc", "added": "gg"})
    found = compare(old, new, (list("abcdz"), [8, 4, 4, 2, 2]))
    assert (found.old_users, found.new_users, found.users_compared) == (4, 4, 3)
    assert (found.users_gone, found.users_added) == (1 / 4, 1 / 4)
    assert found.top10_changed == pytest.approx(1 / 3)  # the order alone is no change
    assert found.top10_overlap == pytest.approx((1 + 1 + 2 / 4) / 3)
    assert (found.coverage_old, found.coverage_new) == (4, 6)
    # Mean of the catalog: 4. Old entries: 4 × a, 4 × b, 3 × c, 1 × d; new: 3 × a, 3 × b, 2 × c, and 4 unknown ones.
    assert found.lift_old == pytest.approx((4 * 8 + 4 * 4 + 3 * 4 + 2) / 12 / 4)
    assert found.lift_new == pytest.approx((3 * 8 + 3 * 4 + 2 * 4) / 12 / 4)


def test_only_the_ten_first_items_make_the_top_10():
    old = lists({"a": "0123456789x", "b": "0123456789"})
    new = lists({"a": "0123456789y", "b": "012345678z9"})
    found = compare(old, new, ([], []))
    assert (found.top10_changed, found.top10_overlap) == (0.5, 0.95)


def test_a_shorter_list_is_another_list():
    found = compare(lists({"a": "0123"}), lists({"a": "01"}), ([], []))
    assert (found.top10_changed, found.top10_overlap) == (1.0, 0.5)


def test_scores_are_compared_as_distributions():
    old = lists({"a": "xyzw"}, {"a": [4.0, 3.0, 2.0, 1.0]})
    new = lists({"a": "xyzw"}, {"a": [5.0, 4.0, 3.0, 3.0]})
    found = compare(old, new, ([], []))
    assert found.score_shift == 0.5  # below 2.5: half of the old scores and none of the new
    assert (found.score_quantiles_old[0], found.score_quantiles_old[3], found.score_quantiles_old[-1]) == (1, 2.5, 4)
    assert compare(old, old, ([], [])).score_shift == 0


def test_nothing_differs_between_a_table_and_itself():
    table = random_lists(0, range(50), 30)
    found = compare(table, table.slice(10, 40).take(np.arange(39, -1, -1)), ([], []))
    assert (found.users_gone, found.users_added, found.top10_changed, found.top10_overlap) == (10 / 50, 0, 0, 1)
    assert breaches(compare(table, table, ([], [])), NOTHING_ALLOWED) == []


def test_values_agree_with_a_slow_reference():
    old, new = random_lists(1, range(200), 40), random_lists(2, range(30, 260), 60, shift=0.3)
    item_ids, counts = [f"i{item}" for item in range(50)], np.arange(50) ** 2
    found = compare(old, new, (item_ids, counts))
    before, after = ({row["user_id"]: row for row in table.to_pylist()} for table in (old, new))
    shared = before.keys() & after.keys()
    tops = [(set(before[user]["item_ids"][:10]), set(after[user]["item_ids"][:10])) for user in shared]
    count_of = dict(zip(item_ids, counts, strict=True))
    entries = [[item for row in table.values() for item in row["item_ids"]] for table in (before, after)]
    scores = [[score for row in table.values() for score in row["scores"]] for table in (before, after)]
    expected = {
        "users_compared": len(shared),
        "users_gone": 30 / 200,
        "users_added": 60 / 230,
        "top10_changed": np.mean([one != other for one, other in tops]),
        "top10_overlap": np.mean(
            [len(one & other) / max(len(one), len(other)) if one or other else 1 for one, other in tops]
        ),
        "coverage_old": len(set(entries[0])),
        "coverage_new": len(set(entries[1])),
        "lift_old": np.mean([count_of.get(item, 0) for item in entries[0]]) / np.mean(counts),
        "lift_new": np.mean([count_of.get(item, 0) for item in entries[1]]) / np.mean(counts),
        "score_shift": ks_2samp(*scores).statistic,
    }
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(value), name


def test_tables_in_many_chunks_and_with_wide_types_give_the_same():
    """As Ray, Parquet and Delta hand them over."""
    old, new = random_lists(1, range(60), 40), random_lists(2, range(5, 70), 40)
    wide = pa.schema(
        [("user_id", pa.large_string()), ("item_ids", pa.large_list(pa.large_string())), ("scores", pa.list_(pa.float64()))]
    )  # fmt: skip
    chunked = pa.concat_tables([old.slice(0, 7), old.slice(7, 0), old.slice(7)])
    plain = compare(old, new, (["i1"], [1]))
    assert compare(chunked, new.cast(wide), (["i1"], [1])) == plain
    assert compare(sample([chunked.cast(wide)], 100, 60), sample([new], 100, 60), (["i1"], [1])).users_gone == 5 / 60


def test_empty_tables_are_compared_without_an_error():
    empty, some = lists({}), lists({"a": "xy"})
    neither, first, last = (compare(*pair, (["x"], [0])) for pair in ((empty, empty), (empty, some), (some, empty)))
    assert (neither.users_gone, first.users_gone, first.users_added, last.users_gone) == (0, 0, 1, 1)
    assert (neither.top10_overlap, last.coverage_drop, last.score_quantiles_new) == (1, 1, ())
    assert all(math.isfinite(one.lift_old + one.lift_new + one.score_shift) for one in (neither, first, last))
    assert all(len(render(one, empty, empty)) == 2 for one in (neither, first, last))


def test_a_drift_can_be_written_as_json():
    found = compare(lists({"a": "xy"}), lists({"a": "yz"}), (["x"], [3]))
    assert json.loads(json.dumps(dataclasses.asdict(found)))["coverage_new"] == 2


# Samples


def test_the_same_users_are_sampled_of_both_tables():
    old, new = random_lists(1, range(4000), 5), random_lists(2, range(4000), 5)
    one = sample([old.slice(0, 1500), old.slice(1500)], 500, 4000)
    other = sample([new], 500, 4000)
    assert set(one["user_id"].to_pylist()) == set(other["user_id"].to_pylist())
    assert 400 < len(one) < 600
    row = one.to_pylist()[7]
    assert row in old.cast(one.schema).to_pylist()  # the user's own list


def test_everybody_is_taken_where_there_are_no_more_than_asked_for():
    table = random_lists(1, range(40), 5)
    assert sample([table], 40, 40)["user_id"].to_pylist() == table["user_id"].to_pylist()
    assert len(sample([table], 39, 40)) <= 40
    assert len(sample([], 40, 0)) == 0


def test_a_sample_estimates_the_whole():
    old, new = random_lists(1, range(8000), 30), random_lists(2, range(800, 8800), 30)
    whole = compare(old, new, ([], []))
    part = compare(sample([old], 2000, 8000), sample([new], 2000, 8000), ([], []))
    assert part.users_gone == pytest.approx(whole.users_gone, abs=0.03)
    assert part.top10_overlap == pytest.approx(whole.top10_overlap, abs=0.03)


def test_published_tables_can_be_sampled():
    table = pa.table([["a"], [["x"]], [[1.0]], ["2026-11-20"], ["m"]], schema=SCHEMA)
    assert sample([table], 5, 1).to_pylist() == [{"user_id": "a", "item_ids": ["x"], "scores": [1.0]}]


# Limits


CALM = Drift(
    old_users=100, new_users=100, users_compared=100, users_gone=0.0, users_added=0.0, top10_changed=0.0,
    top10_overlap=1.0, coverage_old=200, coverage_new=200, lift_old=2.0, lift_new=2.0, score_shift=0.0,
    score_quantiles_old=(), score_quantiles_new=(),
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"users_gone": 0.111}, "11.10% of the last table's users are missing in the new table (100 were sampled); the "
         "limit nightly.drift.max_users_gone is 10.00%."),
        ({"top10_changed": 0.75}, "75.00% of 100 users in both tables have other items in their top ten; the "
         "limit nightly.drift.max_top10_changed is 50.00%."),
        ({"coverage_new": 80}, "60.00% of the coverage is lost (200 distinct items before, 80 now); the limit "
         "nightly.drift.max_coverage_drop is 50.00%."),
        ({"lift_new": 6.0}, "3 is the factor by which the popularity lift changed (from 2 to 6); the limit "
         "nightly.drift.max_lift_ratio is 2."),
        ({"lift_new": 0.5}, "4 is the factor by which the popularity lift changed (from 2 to 0.5); the limit "
         "nightly.drift.max_lift_ratio is 2."),
        ({"lift_new": 0.0}, "inf is the factor by which the popularity lift changed (from 2 to 0); the limit "
         "nightly.drift.max_lift_ratio is 2."),
        ({"score_shift": 0.4}, "0.400 is the Kolmogorov-Smirnov distance between the old and the new scores; the limit "
         "nightly.drift.max_score_shift is 0.300."),
    ],
)  # fmt: skip
def test_an_exceeded_limit_is_one_sentence(change, words):
    limits = DriftLimits(max_top10_changed=0.5, max_score_shift=0.3)
    assert breaches(dataclasses.replace(CALM, **change), limits) == [words]


def test_what_reaches_a_limit_is_no_breach():
    limits = DriftLimits(max_top10_changed=0.5, max_score_shift=0.3)
    edge = dataclasses.replace(CALM, users_gone=0.1, top10_changed=0.5, coverage_new=100, lift_new=4.0, score_shift=0.3)
    assert breaches(CALM, limits) == breaches(edge, limits) == []
    assert breaches(dataclasses.replace(CALM, coverage_new=900), NOTHING_ALLOWED) == []  # more is no drop


@pytest.mark.parametrize(("num_users", "gone", "limit"), [(20, 1, 0.05), (10, 3, 0.3), (1000, 7, 0.007)])
def test_a_share_that_is_just_allowed_is_not_rounded_over_its_limit(num_users, gone, limit):
    rows = {f"u{user}": "x" for user in range(num_users)}
    found = compare(lists(rows), lists(dict(list(rows.items())[gone:])), ([], []))
    assert breaches(found, DriftLimits(max_users_gone=limit)) == []


def test_every_limit_can_be_exceeded():
    far = dataclasses.replace(CALM, users_gone=1, top10_changed=1, coverage_new=1, lift_new=9, score_shift=1)
    sentences = breaches(far, NOTHING_ALLOWED)
    settings = set(DriftLimits.model_fields) - {"sample_users"}
    assert {name for name in settings for sentence in sentences if f"nightly.drift.{name} " in sentence} == settings


# Plots


def test_plots_are_pictures():
    old, new = random_lists(1, range(50), 20), random_lists(2, range(5, 60), 20, shift=1)
    plots = render(compare(old, new, ([], [])), old, new)
    assert list(plots) == ["drift_scores.png", "drift_items.png"]
    assert all(content.startswith(b"\x89PNG") and len(content) > 5_000 for content in plots.values())
