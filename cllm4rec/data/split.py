"""Interactions as integer columns: duplicates, k-core and split. Pure functions on numpy arrays.

Lengths: E interactions, I users. `user` and `item` are codes from 0. Rows are in the order of the raw files.
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
"""A user with fewer interactions stays in train, because there is not one for each split."""


def last_of_pairs(user_E: Array, item_E: Array, time_E: Array) -> BoolArray:
    """True for the last row by time of each (user, item) pair; of rows with equal times, for the last in file order."""
    order = np.lexsort((time_E, item_E, user_E))
    same_as_next = (np.diff(user_E[order]) == 0) & (np.diff(item_E[order]) == 0)
    keep = np.ones(len(user_E), bool)
    keep[order[:-1][same_as_next]] = False
    return keep


def k_core(user_E: Array, item_E: Array, core: int) -> BoolArray:
    """True for the rows of the largest subset in which each user and each item has at least `core` rows."""
    keep = np.ones(len(user_E), bool)
    while True:
        users = np.bincount(user_E[keep], minlength=_size(user_E))
        items = np.bincount(item_E[keep], minlength=_size(item_E))
        enough = keep & (users[user_E] >= core) & (items[item_E] >= core)
        if enough.sum() == keep.sum():
            return keep
        keep = enough


def split_rows(user_E: Array, time_E: Array, shuffle_E: Array, split: Split) -> npt.NDArray[np.int8]:
    """TRAIN, VALIDATION or TEST for each row. Each user is split separately.

    The rows of a user are ordered by `shuffle_E` (see `shuffle_keys`) for `random`, by time and then file order for
    `temporal` and `leave_one_out`. The last rows go to test and those before them to validation: at least one each, unless
    the fraction is 0. At least one stays in train. Users with fewer than MIN_TO_SPLIT rows stay in train.
    """
    key_E = shuffle_E if split.kind == "random" else time_E
    order = np.lexsort((key_E, user_E))
    count_I = np.bincount(user_E, minlength=_size(user_E))
    validation_I, test_I = _held_out(count_I, split)
    start_I = np.cumsum(count_I) - count_I
    sorted_user = user_E[order]
    # How many rows of the same user follow: 0 for the last.
    after = count_I[sorted_user] - 1 - (np.arange(len(order)) - start_I[sorted_user])
    where = np.full(len(order), TRAIN, np.int8)
    where[after < (validation_I + test_I)[sorted_user]] = VALIDATION
    where[after < test_I[sorted_user]] = TEST
    result = np.empty_like(where)
    result[order] = where
    return result


def _held_out(count_I: Array, split: Split) -> tuple[Array, Array]:
    """How many rows go to validation and to test, for users with these numbers of rows."""
    if split.kind == "leave_one_out":
        validation, test = np.ones_like(count_I), np.ones_like(count_I)
    else:
        validation, test = _share(count_I, split.validation), _share(count_I, split.test)
    test = np.minimum(test, count_I - 1 - (validation > 0))
    validation = np.minimum(validation, count_I - 1 - test)
    large = count_I >= MIN_TO_SPLIT
    return np.where(large, validation, 0), np.where(large, test, 0)


def _share(count_I: Array, fraction: float) -> Array:
    """The fraction of each count, rounded half up; at least one, unless the fraction is 0."""
    if fraction == 0.0:
        return np.zeros_like(count_I)
    return np.asarray(np.maximum(1, np.floor(count_I * fraction + 0.5)), count_I.dtype)


def shuffle_keys(user_id_E: Array, item_id_E: Array, seed: int) -> FloatArray:
    """A pseudo-random number for each pair of ids, independent of other rows and of the order of rows.

    Takes hashes of the ids (`hash_ids`) and not indices, because an index changes when another user is added.
    """
    return hash_uniform(seed, 0, 0, user_id_E, item_id_E)


def hash_ids(ids: Array) -> npt.NDArray[np.uint64]:
    """A 64-bit hash of each id string, the same in every process."""
    return np.asarray(pd.util.hash_array(np.asarray(ids, object), categorize=False), np.uint64)


def _size(codes: Array) -> int:
    return int(codes.max()) + 1 if len(codes) else 0
