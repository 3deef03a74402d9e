"""Intervals, paired tests and Holm's correction, beside slow and exact references."""

import itertools

import numpy as np
import pytest

from cllm4rec.metrics.intervals import (
    against_best_other,
    compared_with,
    holm,
    interval,
    mean_over_splits,
    randomization_test,
    summarize,
)

NAN = np.nan


def exact_p(difference_IS):
    """Every way to exchange the two results of whole users, one after another."""
    num_users = len(difference_IS)

    def statistic(signs):
        return np.mean([np.nanmean(np.array(signs) * column) for column in difference_IS.T])

    seen = abs(statistic([1] * num_users))
    reached = [abs(statistic(signs)) >= seen - 1e-12 for signs in itertools.product([1, -1], repeat=num_users)]
    return np.mean(reached)


def test_the_paired_test_agrees_with_all_exchanges_of_a_few_users():
    random = np.random.default_rng(3)
    differences = {f"shift {shift}": random.normal(shift, 1.0, (9, 3)) for shift in (0.0, 0.3, 0.8)}
    differences["gaps"] = np.where(random.random((9, 3)) < 0.3, NAN, random.normal(0.5, 1.0, (9, 3)))
    uneven = np.stack([random.normal(-0.6, 0.3, 9), np.full(9, 3.0)], axis=1)
    uneven[2:, 1] = NAN  # the two users of the second split count as much as the nine of the first
    differences["uneven"] = uneven
    found = randomization_test(differences, seed=0, draws=40_000)
    for name, difference_IS in differences.items():
        assert found[name] == pytest.approx(exact_p(difference_IS), abs=0.012), name


def test_a_user_of_several_splits_is_exchanged_as_a_whole():
    """Ten copies of one split say no more than the split does."""
    one = np.random.default_rng(0).normal(0.4, 1.0, (12, 1))
    found = randomization_test({"one": one, "ten": np.repeat(one, 10, axis=1)}, seed=0)
    assert found["ten"] == found["one"]
    low, high = (interval(np.repeat(one, 10, axis=1), 500, 0)[end] for end in ("low", "high"))
    single = interval(one, 500, 0)
    assert (low, high) == pytest.approx((single["low"], single["high"]))


def test_a_real_difference_is_found_and_identical_methods_are_told_apart_by_nothing():
    random = np.random.default_rng(1)
    base = random.random((200, 2))
    better = base + random.normal(0.05, 0.1, base.shape)
    found = randomization_test({"better": better - base, "same": base - base}, seed=0)
    assert found["better"] < 0.001
    assert found["same"] == 1.0


def test_p_values_of_chance_differences_are_spread_evenly():
    """An honest test calls a twentieth of nothing significant."""
    random = np.random.default_rng(2)
    nothing = {str(number): random.normal(0, 1, (40, 1)) for number in range(400)}
    p_values = np.array(list(randomization_test(nothing, seed=0, draws=999).values()))
    assert 0.02 < np.mean(p_values < 0.05) < 0.09
    assert 0.4 < p_values.mean() < 0.6


def test_holm_is_as_computed_by_hand():
    # Sorted .01 .02 .03 .5 times 4 3 2 1: .04 .06 .06 .5; the third may not be below the second.
    found = holm({"c": 0.03, "a": 0.01, "d": 0.5, "b": 0.02})
    assert found == pytest.approx({"a": 0.04, "b": 0.06, "c": 0.06, "d": 0.5})
    assert holm({"a": 0.6, "b": 0.9}) == {"a": 1.0, "b": 1.0}


def slow_ends(value_I, samples, seed, most_values=1 << 22):
    """Redraw the users of one split again and again; where draws are cut into chunks decides which users are drawn."""
    generator, num_users = np.random.default_rng(seed), len(value_I)
    size = max(1, most_values // num_users)
    sizes = [min(size, samples - begin) for begin in range(0, samples, size)]
    drawn = [row for rows in sizes for row in generator.integers(0, num_users, (rows, num_users))]
    return np.quantile([value_I[row].mean() for row in drawn], [0.025, 0.975]).tolist()


@pytest.mark.parametrize(("num_users", "samples"), [(1, 20), (101, 250), (30_000, 300)])
def test_the_interval_of_one_split_has_the_bits_of_a_slow_reference(num_users, samples):
    """`metrics.json` of runs from before is compared with that of runs from now."""
    value_I = np.random.default_rng(0).exponential(size=num_users)
    found = interval(value_I, samples, seed=3)
    assert [found["mean"], found["low"], found["high"]] == [value_I.mean(), *slow_ends(value_I, samples, seed=3)]
    assert interval(value_I[:, None], samples, seed=3) == found, "a single split may have an axis of its own"
    assert samples == 20 or interval(value_I, samples, seed=4) != found


def slow_means(value_IS, samples, seed):
    """One draw after another: all splits of a user together, each split by its own users."""
    drawn_RI = np.random.default_rng(seed).integers(0, len(value_IS), (samples, len(value_IS)))
    means = []
    for row in drawn_RI:
        columns = [column[~np.isnan(column)] for column in value_IS[row].T]
        means += [np.mean([column.mean() for column in columns if len(column)])] if any(map(len, columns)) else []
    return means


def test_the_interval_of_several_splits_agrees_with_a_slow_reference():
    random = np.random.default_rng(4)
    value_IS = np.where(random.random((12, 3)) < 0.4, NAN, random.random((12, 3)))
    value_IS[:, 2] = NAN
    value_IS[0, 2] = 0.5  # some draws leave the third split without users
    found = interval(value_IS, 400, seed=0)
    ends = np.quantile(slow_means(value_IS, 400, seed=0), [0.025, 0.975])
    assert (found["low"], found["high"]) == pytest.approx(tuple(ends))


def test_the_interval_is_that_of_the_normal_theory_for_many_users():
    value_I = np.random.default_rng(0).exponential(size=4000)
    found, half = interval(value_I, 2000, seed=1), 1.96 * value_I.std() / np.sqrt(4000)
    assert found["low"] == pytest.approx(value_I.mean() - half, abs=0.1 * half)
    assert found["high"] == pytest.approx(value_I.mean() + half, abs=0.1 * half)


def test_a_summary_holds_the_mean_inside_its_interval():
    summary = summarize({"recall@20": np.array([0.0, 0.0, 1.0, 0.5] * 20)}, 200, seed=0)["recall@20"]
    assert summary["low"] < summary["mean"] == 0.375 < summary["high"]


def test_splits_count_alike_however_many_users_they_have():
    value_IS = np.array([[1.0, 0.0], [1.0, NAN], [1.0, NAN], [1.0, NAN]])
    assert mean_over_splits(value_IS) == 0.5
    assert interval(value_IS, 200, 0)["mean"] == 0.5


@pytest.mark.parametrize("values", [np.empty(0), np.empty((3, 0)), np.full((3, 1), NAN), np.array([[1.0, NAN]] * 3)])
def test_a_split_without_users_has_no_interval(values):
    with pytest.raises(ValueError, match="no values of a split"):
        interval(values, 10, 0)


def test_everyone_is_tested_against_the_best_and_the_best_against_the_second():
    random = np.random.default_rng(5)
    base = random.random((100, 2))
    values = {"low": base - 0.3, "best": base + random.normal(0.1, 0.05, base.shape), "second": base}
    found = against_best_other(values, 200, 0)
    assert {name: test["against"] for name, test in found.items()} == {
        "low": "best", "second": "best", "best": "second"
    }  # fmt: skip
    assert found["best"]["p_holm"] == found["second"]["p_holm"]
    assert found["best"]["difference"]["mean"] == pytest.approx(0.1, abs=0.02)
    assert found["best"]["difference"]["low"] == -found["second"]["difference"]["high"]
    assert found["low"]["difference"]["high"] < 0


def test_one_method_alone_is_compared_with_nothing():
    assert compared_with("a", {"a": np.ones((3, 1))}, 10, 0) == {}
    assert against_best_other({"a": np.ones((3, 1))}, 10, 0) == {}
