"""The texts of a data set as sparse word counts.

Shapes: D texts, J items, W words.
"""

from __future__ import annotations

from collections.abc import Sequence

from scipy import sparse

from cllm4rec.data.tf_idf import Vocabulary
from cllm4rec.data.tf_idf import tf_idf as weights
from cllm4rec.errors import DataError

MAX_WORDS = 5000
"""Only the most frequent words are kept, because rare words are shared by few texts."""


def word_counts(texts: Sequence[str], max_words: int = MAX_WORDS) -> sparse.csr_array:
    """D × W: how often each word occurs in each text. Words that occur in only one text or in all texts are left out,
    because they do not relate texts to each other."""
    return Vocabulary.of(texts, max_words).counts(texts)


def tf_idf(texts: Sequence[str], max_words: int = MAX_WORDS) -> sparse.csr_array:
    """D × W: the TF-IDF weights of `word_counts`."""
    return weights(word_counts(texts, max_words))


def item_tf_idf(texts: Sequence[str], method: str) -> sparse.csr_array:
    """`tf_idf` of the item texts. Raises DataError if no two texts share a word."""
    weight_JW = tf_idf(texts)
    if not weight_JW.nnz:
        raise DataError(f"no two items share a word, so there is no text for {method} to read; give data.items a text")
    return weight_JW
