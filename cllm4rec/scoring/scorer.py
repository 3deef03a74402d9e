"""The one Scorer: evaluation, the nightly job and the Recommender all use it, so their lists cannot differ.

Lengths: B users, J items, K list length.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cllm4rec.arrays.ids import Catalog
from cllm4rec.arrays.ragged import Ragged, chunks
from cllm4rec.model.ranker import Ranker
from cllm4rec.model.saved_model import SavedModel
from cllm4rec.scoring.rules import Rules
from cllm4rec.typing import Float32Array, IntArray

_CANDIDATES = 4
"""With category caps, this many times k candidates are ranked at a time."""
_CAPPED_ROWS = 64
_MAX_COLD_BOOST = 87.0
"""e^88 times a share of 1 is close to the largest float32."""


class Scorer:
    """A trained model that returns the k best items for each user."""

    def __init__(self, ranker: Ranker, catalog: Catalog, model_version: str) -> None:
        self.ranker, self.catalog, self.model_version = ranker, catalog, model_version
        self._device = ranker.model.collaborative_items.device
        self._without_rules = _Applied.to(Rules(), catalog, self._device)
        self._last = self._without_rules

    @classmethod
    def load(cls, model_dir: str, device: str | None = None) -> Scorer:
        """Load a model directory, by default on the GPU if there is one. Every file is checked against its digest.

        Raises ArtifactError if a file is missing or damaged, or if the backbone is not the one of the training.
        """
        stored = SavedModel.from_pretrained(model_dir, device=device)
        return cls(stored.ranker, stored.catalog, stored.manifest.digest[:12])

    def without_language_model(self) -> Scorer | None:
        """The same model without what its language model adds, or None if nothing would remain (`model.history: lm`)."""
        if not self.ranker.model.residual:
            return None
        ranker = dataclasses.replace(self.ranker, with_language_model=False)
        return Scorer(ranker, self.catalog, self.model_version)

    def top_k(
        self,
        users: npt.ArrayLike,
        histories: Ragged,
        k: int,
        rules: Rules | None = None,
        exclude: Ragged | None = None,
    ) -> tuple[IntArray, Float32Array]:
        """The k best unseen, allowed items of each user, best first; ties by lower item index.

        users: B rows of the user tables, -1 for users unknown at training.
        histories: item indices, one row per user. They are read as the prompt and never returned. Order and repeats do not
        matter, except that only the last items of a history are read if it is longer than the prompt.
        rules: blocked items, boosts and category caps. exclude: more item indices never returned, one row per user.

        A cold-start user (unknown and without a history) gets the popular items, scored by their share of all training
        interactions. All other scores are logits. A boost is added to a logit. A share is multiplied by e^boost, which is
        the same, because the logarithm of a share is its logit. Lists are ordered by the boosted scores.

        Returns (B, K) item indices, -1 where fewer than k items remain, and scores, -inf there. A user's list is the same
        alone and in any batch.
        """
        rows = np.asarray(users, np.int64)
        applied = self._under(rules)
        left_out = Ragged.interleave(histories, *([exclude] if exclude is not None else [])).unique()
        items = np.empty((len(rows), k), np.int64)
        scores = np.empty((len(rows), k), np.float32)
        is_cold = self.is_cold(rows, histories)
        cold, warm = np.flatnonzero(is_cold), np.flatnonzero(~is_cold)
        hidden_BK = self.ranker.encode_users(rows[warm], histories.take(warm))

        def best(which: IntArray, out: Ragged, num: int) -> tuple[IntArray, Float32Array]:
            return self.ranker.best_items(hidden_BK[which], out, num, applied.bias_J)

        def most_popular(_: IntArray, out: Ragged, num: int) -> tuple[IntArray, Float32Array]:
            return applied.most_popular(out, num)

        items[warm], scores[warm] = _ranked(best, left_out.take(warm), k, applied.rules)
        items[cold], scores[cold] = _ranked(most_popular, left_out.take(cold), k, applied.rules)
        return items, scores

    def similar(self, items: IntArray, k: int, rules: Rules | None = None) -> tuple[IntArray, Float32Array]:
        """The k items most similar to each of `items`: largest cosine of the collaborative embeddings, ties by lower index.

        Neither the item itself nor an item that the rules block is returned; boosts and caps do not apply.
        Returns (B, K) indices and cosines as `top_k` does.
        """
        bias_J = self._under(rules).bias_J
        blocked_J = None if bias_J is None else torch.where(torch.isneginf(bias_J), bias_J, 0.0)
        return self.ranker.similar_items(items, Ragged.from_lists([item] for item in items.tolist()), k, blocked_J)

    def _under(self, rules: Rules | None) -> _Applied:
        if rules is None:
            return self._without_rules
        last = self._last
        if last.rules is not rules:
            # Cached: a job has one set of rules, and the endpoint uses the same for a day.
            self._last = last = _Applied.to(rules, self.catalog, self._device)
        return last

    @staticmethod
    def is_cold(users: IntArray, histories: Ragged) -> npt.NDArray[np.bool_]:
        """Which users are cold-start users: unknown at training and without a history."""
        cold: npt.NDArray[np.bool_] = (users < 0) & (histories.lengths == 0)
        return cold


@dataclasses.dataclass(frozen=True)
class _Applied:
    """Rules in the form a scorer uses: one addition to all logits, and the popular items in order."""

    rules: Rules
    bias_J: Tensor | None
    popular: IntArray
    """The items that are not blocked, by boosted share; ties by lower index."""
    share_J: Float32Array

    @classmethod
    def to(cls, rules: Rules, catalog: Catalog, device: torch.device) -> _Applied:
        bias_J = np.zeros(catalog.num_items, np.float32) if rules.boost_J is None else rules.boost_J.copy()
        bias_J[rules.blocked] = -np.inf
        share_J = catalog.item_counts / max(1, catalog.item_counts.sum())
        if rules.boost_J is not None:
            share_J = share_J * np.exp(np.minimum(rules.boost_J.astype(np.float64), _MAX_COLD_BOOST))
        order = np.lexsort((np.arange(catalog.num_items), -share_J))
        return cls(
            rules,
            torch.from_numpy(bias_J).to(device) if bias_J.any() else None,
            order[~np.isneginf(bias_J[order])],
            share_J.astype(np.float32),
        )

    def most_popular(self, left_out: Ragged, k: int) -> tuple[IntArray, Float32Array]:
        """For each row of `left_out`, the k most popular items that are not in the row."""
        items = np.full((len(left_out), k), -1, np.int64)
        scores = np.full((len(left_out), k), -np.inf, np.float32)
        for row in range(len(left_out)):
            enough = self.popular[: k + len(left_out[row])]
            allowed = enough[~np.isin(enough, left_out[row])][:k]
            items[row, : len(allowed)], scores[row, : len(allowed)] = allowed, self.share_J[allowed]
        return items, scores


_Best = Callable[[IntArray, Ragged, int], tuple[IntArray, Float32Array]]
"""(rows, items left out in each row, number of items) → indices and scores of the best items, best first."""


def _ranked(best: _Best, left_out: Ragged, k: int, rules: Rules) -> tuple[IntArray, Float32Array]:
    """The k best items under the caps, for each row of `left_out`."""
    if rules.categories is None:
        return best(np.arange(len(left_out)), left_out, k)
    items = np.full((len(left_out), k), -1, np.int64)
    scores = np.full((len(left_out), k), -np.inf, np.float32)
    for rows in chunks(len(left_out), _CAPPED_ROWS):
        items[rows], scores[rows] = _capped(best, rows, left_out.take(rows), k, rules)
    return items, scores


def _capped(best: _Best, rows: IntArray, left_out: Ragged, k: int, rules: Rules) -> tuple[IntArray, Float32Array]:
    """The list built from the best item down, skipping items of a full category. Exact for any number of candidates.

    Candidates are ranked some at a time. A skipped item belongs to a category that stays full, so a list that is still
    short continues with the best items outside the list and outside its full categories. Each round adds at least one.
    """
    items = np.full((len(rows), k), -1, np.int64)
    scores = np.full((len(rows), k), -np.inf, np.float32)
    short = np.arange(len(rows))
    while len(short):
        taken = Ragged.from_rows(items[short][items[short] >= 0], np.nonzero(items[short] >= 0)[0], len(short))
        out = Ragged.interleave(left_out.take(short), taken, rules.full_categories(taken))
        more, more_scores = best(rows[short], out, _CANDIDATES * k)
        candidates = np.concatenate([items[short], more], axis=1)
        keep = rules.within_caps(candidates)
        first = np.argsort(~keep, axis=1, kind="stable")[:, :k]
        kept = np.take_along_axis(keep, first, axis=1)
        found = np.take_along_axis(np.concatenate([scores[short], more_scores], axis=1), first, axis=1)
        items[short] = np.where(kept, np.take_along_axis(candidates, first, axis=1), -1)
        scores[short] = np.where(kept, found, -np.inf)
        short = short[~kept[:, -1] & (more[:, -1] >= 0)]
    return items, scores
