"""Interactions as integer columns: threshold, duplicates, k-core and split. Pure numpy, a line of code per rule.

Lengths: E interactions. `user` and `item` are codes from 0; a row's place is its place in the raw files.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pandas as pd

from cllm4rec.arrays.histories import SPLITS
from cllm4rec.arrays.random import hash_uniform
from cllm4rec.config import Split
from cllm4rec.typing import Array, BoolArray, FloatArray

TRAIN, VALIDATION, TEST = range(len(SPLITS))
MIN_TO_SPLIT = 3
"""A user with fewer interactions stays in train: one for each split is not there."""


def last_of_pairs(user_E: Array, item_E: Array, time_E: Array) -> BoolArray:
    """True where a row is the last of its (user, item) pair by time; of equal times, the one that comes last."""
    order = np.lexsort((time_E, item_E, user_E))
    same_as_next = (np.diff(user_E[order]) == 0) & (np.diff(item_E[order]) == 0)
    keep = np.ones(len(user_E), bool)
    keep[order[:-1][same_as_next]] = False
    return keep


def k_core(user_E: Array, item_E: Array, core: int) -> BoolArray:
    """True for the rows of the largest subset in which every user and every item has `core` rows or more."""
    keep = np.ones(len(user_E), bool)
    while True:
        users = np.bincount(user_E[keep], minlength=_size(user_E))
        items = np.bincount(item_E[keep], minlength=_size(item_E))
        enough = keep & (users[user_E] >= core) & (items[item_E] >= core)
        if enough.sum() == keep.sum():
            return keep
        keep = enough


def split_rows(user_E: Array, time_E: Array, shuffle_E: Array, split: Split) -> npt.NDArray[np.int8]:
    """TRAIN, VALIDATION or TEST for every row; each user is split alone.

    `random` orders a user's rows by `shuffle_E` (see `shuffle_keys`), `temporal` and `leave_one_out` by time, then
    place. The last go to test, those before them to validation: at least one each (unless the fraction is 0), and at
    least one stays in train. Users with fewer than MIN_TO_SPLIT rows stay in train.
    """
    key_E = shuffle_E if split.kind == "random" else time_E
    order = np.lexsort((key_E, user_E))
    count_I = np.bincount(user_E, minlength=_size(user_E))
    validation_I, test_I = _held_out(count_I, split)
    start_I = np.cumsum(count_I) - count_I
    sorted_user = user_E[order]
    # How many of the user's rows come after this one: 0 for the last.
    after = count_I[sorted_user] - 1 - (np.arange(len(order)) - start_I[sorted_user])
    where = np.full(len(order), TRAIN, np.int8)
    where[after < (validation_I + test_I)[sorted_user]] = VALIDATION
    where[after < test_I[sorted_user]] = TEST
    result = np.empty_like(where)
    result[order] = where
    return result


def _held_out(count_I: Array, split: Split) -> tuple[Array, Array]:
    """Rows in validation and in test for users with these many rows."""
    if split.kind == "leave_one_out":
        validation, test = np.ones_like(count_I), np.ones_like(count_I)
    else:
        validation, test = _share(count_I, split.validation), _share(count_I, split.test)
    test = np.minimum(test, count_I - 1 - (validation > 0))
    validation = np.minimum(validation, count_I - 1 - test)
    large = count_I >= MIN_TO_SPLIT
    return np.where(large, validation, 0), np.where(large, test, 0)


def _share(count_I: Array, fraction: float) -> Array:
    """The fraction of each count, rounded half up, at least one."""
    if fraction == 0.0:
        return np.zeros_like(count_I)
    return np.asarray(np.maximum(1, np.floor(count_I * fraction + 0.5)), count_I.dtype)


def shuffle_keys(user_id_E: Array, item_id_E: Array, seed: int) -> FloatArray:
    """A pseudo-random number for each pair of ids, the same whatever else is in the data and in whatever order.

    Takes hashes of the ids (`hash_ids`), not indices: an index shifts when another user joins.
    """
    return hash_uniform(seed, 0, 0, user_id_E, item_id_E)


def hash_ids(ids: Array) -> npt.NDArray[np.uint64]:
    """A 64-bit hash of each id string, the same in every process."""
    return np.asarray(pd.util.hash_array(np.asarray(ids, object), categorize=False), np.uint64)


def _size(codes: Array) -> int:
    return int(codes.max()) + 1 if len(codes) else 0
