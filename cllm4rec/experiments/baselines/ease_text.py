"""EASE with text: the words of the items are additional rows of the regression (CEASE: Jeunen, Van Balen and Goethals,
"Closed-Form Models for Collaborative Filtering with Side-Information", RecSys 2020)."""

from __future__ import annotations

from typing import Self

from cllm4rec.evaluation.baseline import TrainingData
from cllm4rec.evaluation.ease import EASE, gram
from cllm4rec.experiments.baselines.text import item_tf_idf


class EASEText(EASE):
    """EASE on the interaction matrix, extended below by `alpha` times the TF-IDF matrix of words and items (W × J).

    Items that share words predict each other, so a cold item can be recommended from its text. alpha = 0 is EASE.
    """

    def __init__(self, regularization: float = 100.0, alpha: float = 3.0) -> None:
        super().__init__(regularization)
        self.alpha = alpha

    def fit(self, training: TrainingData) -> Self:
        words_WJ = item_tf_idf(training.item_texts, "ease_text").T
        return self.fit_gram(gram(training.matrix) + self.alpha**2 * gram(words_WJ))
