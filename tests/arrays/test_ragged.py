from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from cllm4rec.arrays.ragged import Ragged, no_values

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
    assert no_values(2).tolist() == [[], []]
