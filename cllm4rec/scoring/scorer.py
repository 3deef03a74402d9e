"""The one Scorer: evaluation, the batch job and the endpoint all ask it, so their answers cannot differ.

Lengths: B users, J items, K list length.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cllm4rec.catalog import Catalog
from cllm4rec.data.ragged import Ragged
from cllm4rec.model.ranking import FloatArray, IntArray, Ranker, merged
from cllm4rec.model.store import load_model
from cllm4rec.scoring.rules import Rules


class Scorer:
    """A trained model that answers: which k items for this user?"""

    def __init__(self, ranker: Ranker, catalog: Catalog, model_version: str) -> None:
        self.ranker, self.catalog, self.model_version = ranker, catalog, model_version
        self._popular = np.lexsort((np.arange(catalog.num_items), -catalog.item_counts))
        self._share = (catalog.item_counts / max(1, catalog.item_counts.sum())).astype(np.float32)

    @classmethod
    def load(cls, model_dir: str, device: str | None = None) -> Scorer:
        """Check every digest of a `model/` directory and load it, on the GPU where there is one.

        Raises ArtifactError where a file is missing or damaged, or the backbone is not the one trained with.
        """
        stored = load_model(model_dir, device=device)
        return cls(stored.ranker, stored.catalog, stored.manifest.digest[:12])

    def top_k(
        self,
        users: npt.ArrayLike,
        histories: Ragged,
        k: int,
        rules: Rules | None = None,
        exclude: Ragged | None = None,
    ) -> tuple[IntArray, FloatArray]:
        """The k best unseen, allowed items of each user, best first, ties by lower item index.

        users: B rows of the user tables, -1 where unknown at training. histories: item indices, a row a user, read as
        the prompt and left out of the answer; order and repeats do not matter, but where a history outgrows the prompt
        its last items are read. rules: what nobody is recommended. exclude: more item indices left out, a row a user.
        An unknown user without a history gets the popular items, scored by their share of all training interactions;
        everyone else's scores are logits.
        Returns (B, K) item indices, -1 where fewer than k remain, and scores, -inf there; the same for one or many.
        """
        rows = np.asarray(users, np.int64)
        hidden = merged(histories, (rules or Rules()).denied(len(rows)), *([exclude] if exclude is not None else []))
        items = np.full((len(rows), k), -1, np.int64)
        scores = np.full((len(rows), k), -np.inf, np.float32)
        is_cold = self.is_cold(rows, histories)
        for row in np.flatnonzero(is_cold).tolist():
            allowed = self._popular[~np.isin(self._popular, hidden[row])][:k]
            items[row, : len(allowed)], scores[row, : len(allowed)] = allowed, self._share[allowed]
        warm = np.flatnonzero(~is_cold)
        items[warm], scores[warm] = self.ranker.top_k(rows[warm], histories.take(warm), hidden.take(warm), k)
        return items, scores

    @staticmethod
    def is_cold(users: IntArray, histories: Ragged) -> npt.NDArray[np.bool_]:
        """Whom nothing is known of: unknown at training and without a history."""
        cold: npt.NDArray[np.bool_] = (users < 0) & (histories.lengths == 0)
        return cold
