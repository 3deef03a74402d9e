"""Array types by what they hold: shapes are in the names of variables (`item_BK`)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
"""Of several types, or of any."""
BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
Float32Array = npt.NDArray[np.float32]
ObjectArray = npt.NDArray[np.object_]
"""Strings, such as ids."""
