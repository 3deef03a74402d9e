"""Random histories with validation and test items for every user."""

from __future__ import annotations

import numpy as np

from cllm4rec.arrays.histories import Histories
from cllm4rec.arrays.ragged import Ragged


def random_histories(num_users: int = 60, num_items: int = 40, seed: int = 0) -> Histories:
    generator = np.random.default_rng(seed)
    orders = [generator.permutation(num_items)[: generator.integers(6, 14)] for _ in range(num_users)]
    cut = [Ragged.from_lists([order[part] for order in orders]) for part in (slice(4, None), slice(0, 2), slice(2, 4))]
    return Histories(np.arange(num_users), *cut)
