"""Texts as sparse word counts. Implemented here because it is short and the libraries that offer it are large.

Shapes: D texts, W words.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from scipy import sparse

from cllm4rec.data import tf_idf as weights
from cllm4rec.errors import DataError

MAX_WORDS = 5000
"""Only the most frequent words are kept, because rare words are shared by few texts."""

_WORD = re.compile(r"\w\w+")


def word_counts(texts: Sequence[str], max_words: int = MAX_WORDS) -> sparse.csr_array:
    """D × W: how often each word occurs in each text. Words that occur in only one text or in all texts are left out,
    because they do not relate texts to each other."""
    words = [_WORD.findall(text.lower()) for text in texts]
    index = {word: column for column, word in enumerate(sorted({word for row in words for word in row}))}
    column = np.array([index[word] for row in words for word in row], np.int64)
    row = np.repeat(np.arange(len(texts)), [len(row) for row in words])
    count_DW = sparse.coo_array((np.ones(len(row), np.float32), (row, column)), shape=(len(texts), len(index))).tocsr()
    frequency_W = np.bincount(count_DW.indices, minlength=len(index))
    useful = np.flatnonzero((frequency_W >= 2) & (frequency_W < len(texts)))
    most = useful[np.argsort(-frequency_W[useful], kind="stable")][:max_words]
    return sparse.csr_array(count_DW[:, np.sort(most)])


def tf_idf(texts: Sequence[str], max_words: int = MAX_WORDS) -> sparse.csr_array:
    """D × W: the TF-IDF weights of `word_counts`."""
    return weights.tf_idf(word_counts(texts, max_words))


def item_tf_idf(texts: Sequence[str], method: str) -> sparse.csr_array:
    """`tf_idf` of the item texts. Raises DataError if no two texts share a word."""
    weight_JW = tf_idf(texts)
    if not weight_JW.nnz:
        raise DataError(f"no two items share a word, so there is no text for {method} to read; give data.items a text")
    return weight_JW
