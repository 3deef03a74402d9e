"""Predicts rows of an embedding table from the texts of their items.

    regression = fit(texts_of_trained_items, rows, counts, readings(layers))
    regression.predict(texts_of_new_items)

The rows of trained items are regressed on a kernel of their texts. Which kernel, and how strong the ridge is, is decided by how
well the row of a trained item is predicted when it is left out. No held-out interaction is read.

Shapes: F fitted items, N new ones, E width of the rows.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np

from cllm4rec.arrays.ragged import slices
from cllm4rec.extension.ridge import Ridge, Solution
from cllm4rec.extension.text_kernels import Kernel, MixedKernel, StateKernel, Texts, WordKernel
from cllm4rec.typing import Float32Array, FloatArray, IntArray

Reader = Literal["auto", "words", "language_model"]

SHARES = (0.25, 0.5, 0.75)
"""The shares of the language model that are tried in a mixture with words."""
STRENGTHS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
MAX_FITTED = 4096
"""Time grows with the cube of the number of fitted items: half a minute for these on two cores."""
MAX_COMPARED = 1500
"""The number of items on which kernels are compared."""
_AT_ONCE = 4096
_TINY = 1e-12


@dataclasses.dataclass(frozen=True)
class Reading:
    """What is read of a text: its words, the states of a layer, or both. share: that of the layer in the mixture."""

    layer: int | None = None
    share: float = 0.0

    def __str__(self) -> str:
        if self.layer is None:
            return "words"
        return f"layer {self.layer} of the language model" + (
            "" if self.share == 1.0 else f" ({self.share:.0%}) and words"
        )


@dataclasses.dataclass(frozen=True)
class TextRegression:
    """A fitted regression. `solution.r2` says how well it predicts a trained item that is left out.

    longest: the length of the longest fitted row. A short text can be purer than every fitted one, and its row is cut to that.
    """

    reading: Reading
    strength: float
    kernel: Kernel
    solution: Solution
    longest: float

    def predict(self, texts: Texts) -> Float32Array:
        """The rows of new items, (N, E). `texts` must have the layer of `reading`, if it has one."""
        width, number = len(self.solution.intercept_D), np.arange(len(texts))
        parts = [self.kernel(texts.take(number[part])) @ self.solution.dual_FD for part in slices(len(texts), _AT_ONCE)]
        rows_NE = np.concatenate([np.empty((0, width)), *parts]) + self.solution.intercept_D
        length_N = np.linalg.norm(rows_NE, axis=1, keepdims=True)
        return np.asarray(rows_NE * np.minimum(1.0, self.longest / length_N.clip(_TINY)), np.float32)


def readings(layers: Sequence[int], reader: Reader = "auto") -> Iterator[Reading]:
    """The readings to compare. reader: words, language_model (a layer alone), or auto for these and mixtures."""
    if reader != "language_model":
        yield Reading()
    if reader != "words":
        shares = (1.0,) if reader == "language_model" else (*SHARES, 1.0)
        yield from (Reading(layer, share) for layer in layers for share in shares)


def fit(texts: Texts, rows_FE: FloatArray, count_F: IntArray, candidates: Sequence[Reading]) -> TextRegression:
    """Regress the rows of trained items on their texts with the best of some readings.

    count_F: how many training interactions each item has, at least 1. Items with more weigh more, with the root of it, because
    their rows are less noisy. Of many items, the MAX_FITTED with most are fitted.
    """
    most_read = np.argsort(-count_F, kind="stable")
    compared, kept = most_read[:MAX_COMPARED], most_read[:MAX_FITTED]
    reading = best_reading(texts.take(compared), rows_FE[compared], count_F[compared], candidates)
    fitted = texts.take(kept)
    kernel = _kernel(reading, _base_kernels(fitted))
    solutions = _solutions(kernel(fitted), rows_FE[kept], count_F[kept])
    strength = max(solutions, key=lambda strength: solutions[strength].r2)
    longest = float(np.linalg.norm(rows_FE[kept], axis=1).max())
    return TextRegression(reading, strength, kernel, solutions[strength], longest)


def best_reading(texts: Texts, rows_FE: FloatArray, count_F: IntArray, candidates: Sequence[Reading]) -> Reading:
    """The reading that predicts left-out rows best, at its best strength. The first of equals."""
    base = _base_kernels(texts)

    def r2(reading: Reading) -> float:
        gram_FF = _kernel(reading, base)(texts)
        return max(solution.r2 for solution in _solutions(gram_FF, rows_FE, count_F).values())

    return max(candidates, key=r2) if len(candidates) > 1 else candidates[0]


def _solutions(gram_FF: FloatArray, rows_FE: FloatArray, count_F: IntArray) -> dict[float, Solution]:
    ridge = Ridge(gram_FF, np.sqrt(count_F / count_F.mean()))
    return {strength: ridge.solve(rows_FE, strength) for strength in STRENGTHS}


def _kernel(reading: Reading, base: Callable[[int | None], Kernel]) -> Kernel:
    if reading.layer is None or reading.share == 1.0:
        return base(reading.layer)
    return MixedKernel(base(reading.layer), base(None), reading.share)


def _base_kernels(texts: Texts) -> Callable[[int | None], Kernel]:
    """The kernel of a layer, or that of words for None, fitted on these texts when it is first asked for."""
    return functools.cache(lambda layer: WordKernel(texts) if layer is None else StateKernel(texts, layer))
