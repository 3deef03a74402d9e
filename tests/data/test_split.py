from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm4rec.config import Split
from cllm4rec.data.split import TEST, TRAIN, VALIDATION, hash_ids, k_core, last_of_pairs, shuffle_keys, split_rows

Array = npt.NDArray[Any]
ROWS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 3)), max_size=40)


def columns(rows: list[tuple[int, int, int]]) -> tuple[Array, Array, Array]:
    user, item, time = np.array(rows, np.int64).reshape(-1, 3).T
    return user, item, time


def keys(user: Array, item: Array, seed: int = 0) -> Array:
    ids = np.array([f"id{number}" for number in range(1000)], object)
    return shuffle_keys(hash_ids(ids)[user], hash_ids(ids)[item], seed)


def split_of(rows: list[tuple[int, int, int]], **settings: Any) -> Array:
    user, item, time = columns(rows)
    split = Split(**settings)
    return split_rows(user, time, keys(user, item, split.seed), split)


@given(ROWS)
def test_the_last_of_each_pair_by_time_then_place_is_kept(rows: list[tuple[int, int, int]]) -> None:
    latest: dict[tuple[int, int], int] = {}
    for place, (user, item, time) in enumerate(rows):
        before = latest.get((user, item))
        if before is None or time >= rows[before][2]:
            latest[user, item] = place
    assert np.flatnonzero(last_of_pairs(*columns(rows))).tolist() == sorted(latest.values())


@given(ROWS, st.integers(1, 4))
def test_k_core_equals_taking_away_one_row_at_a_time(rows: list[tuple[int, int, int]], core: int) -> None:
    left = set(range(len(rows)))
    while True:
        weak = [
            place
            for place in left
            if any(sum(rows[other][column] == rows[place][column] for other in left) < core for column in (0, 1))
        ]
        if not weak:
            break
        left.remove(weak[0])
    user, item, _ = columns(rows)
    assert np.flatnonzero(k_core(user, item, core)).tolist() == sorted(left)


@pytest.mark.parametrize("kind", ["random", "temporal", "leave_one_out"])
@pytest.mark.parametrize("size", range(1, 60))
def test_every_user_with_three_rows_has_one_in_each_split_and_the_shares_are_right(kind: Any, size: int) -> None:
    where = split_of([(0, item, item) for item in range(size)], kind=kind)
    train, validation, test = np.bincount(where, minlength=3)
    if size < 3:
        assert (train, validation, test) == (size, 0, 0)
    elif kind == "leave_one_out":
        assert (validation, test) == (1, 1)
    else:
        assert validation == test == max(1, int(size / 10 + 0.5))
    assert train >= 1


@pytest.mark.parametrize(
    ("validation", "test", "size", "expected"),
    [
        (0.0, 0.1, 10, [9, 0, 1]),
        (0.1, 0.0, 10, [9, 1, 0]),
        (0.0, 0.0, 10, [10, 0, 0]),
        (0.45, 0.45, 3, [1, 1, 1]),
        (0.49, 0.5, 4, [1, 1, 2]),
        (0.9, 0.0, 3, [1, 2, 0]),
    ],
)
def test_fractions_leave_something_to_train_on(validation: float, test: float, size: int, expected: list[int]) -> None:
    where = split_of([(0, item, 0) for item in range(size)], validation=validation, test=test)
    assert np.bincount(where, minlength=3).tolist() == expected


@pytest.mark.parametrize("kind", ["temporal", "leave_one_out"])
def test_splits_by_time_test_on_the_latest(kind: Any) -> None:
    rows = [(user, item, (item * 7) % 20) for user in range(3) for item in range(20)]
    where = split_of(rows, kind=kind)
    for user in range(3):
        mine = [(rows[place][2], where[place]) for place in range(len(rows)) if rows[place][0] == user]
        assert [split for _, split in sorted(mine)] == sorted(split for _, split in mine)
        assert {split for _, split in mine} == {TRAIN, VALIDATION, TEST}


def test_of_equal_times_the_later_row_is_tested_on() -> None:
    assert split_of([(0, 3, 1), (0, 1, 1), (0, 2, 1)], kind="leave_one_out").tolist() == [TRAIN, VALIDATION, TEST]


def test_the_random_split_is_a_matter_of_user_and_seed_alone() -> None:
    rows = [(user, item, 0) for user in range(20) for item in range(user, user + 15)]
    where = dict(zip(rows, split_of(rows).tolist(), strict=True))
    shuffled = [rows[place] for place in np.random.default_rng(0).permutation(len(rows))]
    assert dict(zip(shuffled, split_of(shuffled).tolist(), strict=True)) == where, "the order of rows does not matter"
    fewer = [row for row in rows if row[0] != 7]
    assert split_of(fewer).tolist() == [where[row] for row in fewer], "nor do other users"
    assert split_of(rows, seed=1).tolist() != list(where.values())
    assert split_of(rows, seed=-1).tolist() != list(where.values())


def test_the_random_split_has_no_favorite_place_or_item() -> None:
    rows = [(user, item, 0) for user in range(1000) for item in range(10)]
    tested = (split_of(rows) == TEST).reshape(1000, 10).sum(axis=0)
    assert tested.sum() == 1000
    assert tested.min() > 60
    assert tested.max() < 140


def test_a_random_split_of_given_ids_never_changes() -> None:
    """Stored results refer to it: a library's new hash would show here."""
    ids = np.array(["anna", "ben"], object)
    assert shuffle_keys(hash_ids(ids), hash_ids(ids), 0).tolist() == [0.2998841889066288, 0.048594845827923505]
