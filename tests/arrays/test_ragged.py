from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from cllm4rec.arrays.ragged import Ragged, chunks, slices

LISTS = st.lists(st.lists(st.integers(-5, 1000), max_size=5), max_size=8)


@given(LISTS)
def test_lists_survive_the_round_trip_through_ragged_and_arrow(lists: list[list[int]]) -> None:
    ragged = Ragged.from_lists(lists)
    assert ragged.tolist() == lists
    assert Ragged.from_arrow(ragged.to_arrow()).tolist() == lists


@given(LISTS, st.data())
def test_take_gives_the_rows_asked_for_in_the_order_asked_for(lists: list[list[int]], data: Any) -> None:
    rows = data.draw(st.lists(st.integers(0, len(lists) - 1), max_size=10)) if lists else []
    assert Ragged.from_lists(lists).take(np.array(rows, int)).tolist() == [lists[row] for row in rows]


@given(LISTS)
def test_rows_and_places_say_where_every_value_stands(lists: list[list[int]]) -> None:
    ragged = Ragged.from_lists(lists)
    assert ragged.rows.tolist() == [row for row, values in enumerate(lists) for _ in values]
    assert ragged.places.tolist() == [place for values in lists for place in range(len(values))]


@given(LISTS)
def test_where_drops_values_and_keeps_rows(lists: list[list[int]]) -> None:
    ragged = Ragged.from_lists(lists)
    assert ragged.where(ragged.values % 2 == 0).tolist() == [
        [value for value in row if value % 2 == 0] for row in lists
    ]


@given(st.lists(st.tuples(*[st.lists(st.integers(0, 9), max_size=3)] * 3), max_size=6))
def test_interleave_joins_row_by_row(rows: list[tuple[list[int], list[int], list[int]]]) -> None:
    parts = [Ragged.from_lists([row[part] for row in rows]) for part in range(3)]
    assert Ragged.interleave(*parts).tolist() == [first + second + third for first, second, third in rows]


def test_a_slice_and_chunks_of_an_arrow_column_are_read_right() -> None:
    column = pa.chunked_array([[[9]], [[1], [2, 3]], [[], [4]]], pa.large_list(pa.int32()))
    assert Ragged.from_arrow(column.slice(1, 3)).tolist() == [[1], [2, 3], []]
    assert Ragged.from_arrow(column.slice(0, 0)).tolist() == []


def test_from_rows_leaves_rows_without_values_empty() -> None:
    assert Ragged.from_rows(np.array([7, 8, 9]), np.array([0, 2, 2]), 4).tolist() == [[7], [], [8, 9], []]
    assert Ragged.empty(2).tolist() == [[], []]


COUNTS = st.lists(st.lists(st.integers(0, 6), max_size=5), min_size=4, max_size=4)


@given(COUNTS, COUNTS)
def test_isin_compares_each_row_with_the_same_row_only(left: list[list[int]], right: list[list[int]]) -> None:
    found = Ragged.from_lists(left).isin(Ragged.from_lists(right, np.int32))
    assert found.tolist() == [value in others for row, others in zip(left, right, strict=True) for value in row]


@given(COUNTS)
def test_unique_sorts_each_row_and_drops_repeats(lists: list[list[int]]) -> None:
    distinct = Ragged.from_lists(lists, np.int32).unique()
    assert distinct.tolist() == [sorted(set(row)) for row in lists]
    assert distinct.values.dtype == np.int64


@given(COUNTS, st.integers(7, 1 << 40))
def test_keys_hold_row_and_value(lists: list[list[int]], stride: int) -> None:
    keys = Ragged.from_lists(lists, np.int32).keys(stride).tolist()
    assert [divmod(key, stride) for key in keys] == [
        (row, value) for row, values in enumerate(lists) for value in values
    ]


@given(COUNTS, st.permutations(range(6)))
def test_scatter_is_undone_by_take(lists: list[list[int]], places: list[int]) -> None:
    rows = np.array(places[: len(lists)])
    spread = Ragged.from_lists(lists).scatter(rows, 6)
    assert spread.take(rows).tolist() == lists
    assert sum(spread.lengths) == sum(map(len, lists))


@given(st.integers(0, 30), st.integers(1, 9))
def test_chunks_and_slices_cover_everything_once_in_order(total: int, size: int) -> None:
    parts = [part.tolist() for part in chunks(total, size)]
    assert [index for part in parts for index in part] == list(range(total))
    assert all(len(part) == size for part in parts[:-1])
    assert [list(range(total))[part] for part in slices(total, size)] == parts
