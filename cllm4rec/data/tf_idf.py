"""TF-IDF weights: high for words that are frequent in a text and rare in other texts.

The vocabulary is implemented here because it is short and the libraries that offer it are large.

Shapes: D texts, W words.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import numpy as np
from scipy import sparse

from cllm4rec.typing import Float32Array

_WORD = re.compile(r"\w\w+")


def tf_idf(count_DW: sparse.csr_array, idf_W: Float32Array | None = None) -> sparse.csr_array:
    """D × W weights (1 + log count) · idf. Rows have length 1; zeros for a text without words.

    idf_W: by default log(D / texts with the word), of these texts.
    """
    idf_W = _idf(count_DW) if idf_W is None else idf_W
    weight_DW = count_DW.copy()
    weight_DW.data = ((1 + np.log(count_DW.data)) * idf_W[count_DW.indices]).astype(np.float32)
    length_D = np.sqrt(weight_DW.multiply(weight_DW).sum(axis=1)).clip(np.finfo(np.float32).tiny)
    weight_DW.data /= np.repeat(length_D, np.diff(weight_DW.indptr))
    return weight_DW.astype(np.float32)


def _idf(count_DW: sparse.csr_array) -> Float32Array:
    num_texts, num_words = count_DW.shape
    idf_W: Float32Array = np.log(num_texts / np.bincount(count_DW.indices, minlength=num_words).clip(1))
    return idf_W


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The words that relate the texts of a set to each other: those of at least two texts and not of all."""

    column_of: dict[str, int]
    idf_W: Float32Array

    @classmethod
    def of(cls, texts: Sequence[str], max_words: int) -> Vocabulary:
        """The `max_words` words that are in most texts, in alphabetical order."""
        all_words = {
            word: column for column, word in enumerate(sorted({word for text in texts for word in _words(text)}))
        }
        frequency_W = np.bincount(_counts(texts, all_words).indices, minlength=len(all_words))
        useful = np.flatnonzero((frequency_W >= 2) & (frequency_W < len(texts)))
        kept = np.sort(useful[np.argsort(-frequency_W[useful], kind="stable")][:max_words])
        names = list(all_words)
        column_of = {names[column]: number for number, column in enumerate(kept.tolist())}
        return cls(column_of, np.log(len(texts) / frequency_W[kept]).astype(np.float32))

    def counts(self, texts: Sequence[str]) -> sparse.csr_array:
        """D × W: how often each word occurs in each text, of this set or not."""
        return _counts(texts, self.column_of)

    def weights(self, texts: Sequence[str]) -> sparse.csr_array:
        """D × W: TF-IDF weights of texts, of this set or not."""
        return tf_idf(self.counts(texts), self.idf_W)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _counts(texts: Sequence[str], column_of: dict[str, int]) -> sparse.csr_array:
    columns = [[column_of[word] for word in _words(text) if word in column_of] for text in texts]
    column = np.array([number for row in columns for number in row], np.int64)
    row = np.repeat(np.arange(len(texts)), [len(row) for row in columns])
    ones = np.ones(len(row), np.float32)
    return sparse.coo_array((ones, (row, column)), shape=(len(texts), len(column_of))).tocsr()
