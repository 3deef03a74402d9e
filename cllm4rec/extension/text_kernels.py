"""Similarities of texts: by their words, and by the states of a language model that reads them.

A kernel is fitted on some texts: these center it, and give it its vocabulary and its scale. Every text has length 1 in it (0 if
it shares nothing with the fitted texts), so that kernels can be mixed by shares.

Shapes: B texts, F fitted texts, L layers, K hidden size, W words.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from scipy import sparse

from cllm4rec.data.tf_idf import Vocabulary
from cllm4rec.typing import Float32Array, FloatArray, IntArray

MAX_WORDS = 50_000


@dataclasses.dataclass(frozen=True)
class Texts:
    """Texts, and what a language model makes of them.

    states_LBK: the mean states of the texts in each of `layers` (`model.text_states`); None if no layer was read.
    """

    texts: Sequence[str]
    layers: tuple[int, ...] = ()
    states_LBK: Float32Array | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: IntArray) -> Texts:
        states = None if self.states_LBK is None else self.states_LBK[:, rows]
        return Texts([self.texts[row] for row in rows.tolist()], self.layers, states)

    def states_of(self, layer: int) -> Float32Array:
        """B × K."""
        assert self.states_LBK is not None, "no layer of a language model was read"
        states_BK: Float32Array = self.states_LBK[self.layers.index(layer)]
        return states_BK


class Kernel(Protocol):
    def __call__(self, texts: Texts) -> FloatArray:
        """B × F: the similarity of each text to each fitted one."""
        ...


class WordKernel:
    """Cosines of centered TF-IDF weights."""

    def __init__(self, fitted: Texts) -> None:
        self._vocabulary = Vocabulary.of(fitted.texts, MAX_WORDS)
        self._weight_FW = self._vocabulary.weights(fitted.texts)
        self._mean_W = np.asarray(self._weight_FW.mean(axis=0)).ravel()
        self._along_F, self._inverse_F = self._centering(self._weight_FW)

    def __call__(self, texts: Texts) -> FloatArray:
        weight_BW = self._vocabulary.weights(texts.texts)
        along_B, inverse_B = self._centering(weight_BW)
        # (x - m)(y - m) without a dense copy of the sparse weights x and y.
        product_BF = np.asarray((weight_BW @ self._weight_FW.T).toarray(), np.float64)
        product_BF += self._mean_W @ self._mean_W - along_B[:, None] - self._along_F
        return np.asarray(product_BF * inverse_B[:, None] * self._inverse_F)

    def _centering(self, weight_BW: sparse.csr_array) -> tuple[FloatArray, FloatArray]:
        """The product of each row with the mean, and 1 / its length after centering (0 for a text without known words)."""
        along_B = np.asarray(weight_BW @ self._mean_W, np.float64)
        square_B = np.asarray(weight_BW.multiply(weight_BW).sum(axis=1), np.float64).ravel()
        length_B = np.sqrt((square_B - 2 * along_B + self._mean_W @ self._mean_W).clip(0.0))
        has_words_B = (square_B > 0) & (length_B > _MIN_LENGTH)
        return along_B, np.divide(1.0, length_B, out=np.zeros_like(length_B), where=has_words_B)


class StateKernel:
    """Cosines of the states of one layer, each of its dimensions standardized over the fitted texts."""

    def __init__(self, fitted: Texts, layer: int) -> None:
        self._layer, states_FK = layer, fitted.states_of(layer)
        self._mean_K, self._std_K = states_FK.mean(axis=0), states_FK.std(axis=0) + _MIN_LENGTH
        self._unit_FK = self._units(states_FK)

    def __call__(self, texts: Texts) -> FloatArray:
        return np.asarray(self._units(texts.states_of(self._layer)) @ self._unit_FK.T, np.float64)

    def _units(self, states_BK: Float32Array) -> Float32Array:
        scaled_BK = (states_BK - self._mean_K) / self._std_K
        return np.asarray(scaled_BK / np.linalg.norm(scaled_BK, axis=1, keepdims=True).clip(_MIN_LENGTH), np.float32)


@dataclasses.dataclass(frozen=True)
class MixedKernel:
    """share · first + (1 - share) · second."""

    first: Kernel
    second: Kernel
    share: float

    def __call__(self, texts: Texts) -> FloatArray:
        return self.share * self.first(texts) + (1 - self.share) * self.second(texts)


_MIN_LENGTH = 1e-6
