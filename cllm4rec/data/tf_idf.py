"""TF-IDF weights: high for words that are frequent in a text and rare in other texts.

Shapes: D texts, W words.
"""

from __future__ import annotations

import numpy as np
from scipy import sparse


def tf_idf(count_DW: sparse.csr_array) -> sparse.csr_array:
    """D × W weights (1 + log count) · log(D / texts with the word). Rows have length 1; zeros for a text without words."""
    num_texts, num_words = count_DW.shape
    idf_W = np.log(num_texts / np.bincount(count_DW.indices, minlength=num_words).clip(1))
    weight_DW = count_DW.copy()
    weight_DW.data = ((1 + np.log(count_DW.data)) * idf_W[count_DW.indices]).astype(np.float32)
    length_D = np.sqrt(weight_DW.multiply(weight_DW).sum(axis=1)).clip(np.finfo(np.float32).tiny)
    weight_DW.data /= np.repeat(length_D, np.diff(weight_DW.indptr))
    return weight_DW.astype(np.float32)
