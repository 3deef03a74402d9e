"""Array types by the type of their values. Shapes are in the names of variables, such as `item_BK`."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
"""Any type of values."""
BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
Float32Array = npt.NDArray[np.float32]
ObjectArray = npt.NDArray[np.object_]
"""Strings, such as ids."""
