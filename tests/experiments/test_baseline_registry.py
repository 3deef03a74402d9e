"""Baselines by name, and the grids of their parameters."""

from __future__ import annotations

import dataclasses
import json

import pytest
from support.trainings import NEURAL, parity_training

from cllm4rec.errors import ConfigError
from cllm4rec.evaluation.baseline import Budget
from cllm4rec.evaluation.ease import GRID
from cllm4rec.experiments.baselines.registry import BASELINES, grid_points, make, trials
from cllm4rec.experiments.baselines.registry import GRID as GRIDS

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", BASELINES)
def test_every_value_of_a_grid_is_a_parameter_of_its_method(name: str) -> None:
    assert set(GRIDS) == set(BASELINES)
    # A neural network checks its parameters when it is fitted.
    training = dataclasses.replace(parity_training(), budget=Budget(0, 60.0))
    for parameter, values in GRIDS[name].items():
        assert len(set(values)) == len(values) >= 2
        if name in NEURAL:
            make(name, **{parameter: values[0]}).fit(training)
        else:
            make(name, **{parameter: values[0]})


def test_trials_are_the_defaults_and_then_a_fixed_choice_of_the_grid() -> None:
    assert trials("popularity", 5) == [{}]
    all_trials = trials("ease", 20)
    assert all_trials[0] == {}
    assert sorted(params["regularization"] for params in all_trials[1:]) == list(GRID)
    drawn = trials("multi_vae", 6)
    assert drawn == trials("multi_vae", 6) != trials("multi_vae", 6, seed=1)
    assert drawn[0] == {}
    assert len({json.dumps(params) for params in drawn}) == 6
    assert all(params[name] in GRIDS["multi_vae"][name] for params in drawn for name in params)


def test_a_grid_is_walked_in_an_order_that_varies_every_parameter_early() -> None:
    grid = {"a": (1, 2), "b": (1, 2), "c": tuple(range(20))}
    first = grid_points(grid, 100)[:10]
    assert {point["a"] for point in first[1:]} == {point["b"] for point in first[1:]} == {1, 2}


def test_own_values_come_first_and_once() -> None:
    grid = {"a": (1, 2), "b": (3, 4)}
    assert grid_points(grid, 1, first={"a": 9, "b": 3}) == [{"a": 9, "b": 3}]
    tried = grid_points(grid, 10, first={"a": 2, "b": 3})
    assert tried[0] == {"a": 2, "b": 3}
    assert len(tried) == 4 == len({json.dumps(point) for point in tried})


def test_a_baseline_of_another_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="there is no baseline 'easy'; use one of popularity, item_knn"):
        make("easy")
