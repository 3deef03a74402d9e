"""All baselines by name, with the grid of their parameters.

fitted = make("multi_vae", beta=0.5).fit(training)
for params in trials("multi_vae", 8): ...
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from cllm4rec.errors import ConfigError
from cllm4rec.evaluation.baseline import Baseline
from cllm4rec.evaluation.ease import EASE
from cllm4rec.evaluation.ease import GRID as EASE_GRID
from cllm4rec.evaluation.popularity import Popularity
from cllm4rec.experiments.baselines.bert4rec import BERT4Rec
from cllm4rec.experiments.baselines.ease_text import EASEText
from cllm4rec.experiments.baselines.ials import IALS
from cllm4rec.experiments.baselines.item_knn import ItemKNN
from cllm4rec.experiments.baselines.m6_retrieval import M6Retrieval
from cllm4rec.experiments.baselines.md_cvae import MDCVAE
from cllm4rec.experiments.baselines.multi_vae import MultiVAE
from cllm4rec.experiments.baselines.neural import Neural
from cllm4rec.experiments.baselines.no_lm import NoLM
from cllm4rec.experiments.baselines.s3rec import S3Rec
from cllm4rec.experiments.baselines.sasrec import SASRec
from cllm4rec.experiments.baselines.two_tower import CLLM4RecEmb, TwoTower

BASELINES: dict[str, Callable[..., Baseline]] = {
    "popularity": Popularity,
    "item_knn": ItemKNN,
    "ease": EASE,
    "ease_text": EASEText,
    "ials": IALS,
    "no_lm": functools.partial(Neural, NoLM),
    "multi_vae": functools.partial(Neural, MultiVAE),
    "md_cvae": functools.partial(Neural, MDCVAE),
    "bert4rec": functools.partial(Neural, BERT4Rec),
    "s3rec": functools.partial(Neural, S3Rec),
    "sasrec": functools.partial(Neural, SASRec),
    "two_tower": functools.partial(Neural, TwoTower),
    "m6_retrieval": functools.partial(Neural, M6Retrieval),
    "cllm4rec_emb": functools.partial(Neural, CLLM4RecEmb),
}

_RATES: dict[str, tuple[Any, ...]] = {"learning_rate": (1e-3, 3e-3, 1e-2)}
_SEQUENCE = {**_RATES, "width": (32, 64, 128), "dropout": (0.1, 0.3, 0.5, 0.7), "weight_decay": (0.0, 1e-4, 1e-3)}
_FINETUNED = {**_SEQUENCE, "held_out": (0.2, 0.5, 0.8)}
_RETRIEVAL = {**_RATES, "dropout": (0.1, 0.3, 0.5), "temperature": (0.05, 0.1, 0.2), "held_out": (0.2, 0.5, 0.8)}
_VAE = {**_RATES, "latent": (32, 64, 200), "beta": (0.2, 0.5, 1.0, 2.0), "weight_decay": (0.0, 1e-5, 1e-4)}

GRID: dict[str, Mapping[str, tuple[Any, ...]]] = {
    "popularity": {},
    "item_knn": {"neighbors": (20, 50, 100, 200, 500), "weighting": ("cosine", "tfidf", "bm25")},
    "ease": {"regularization": EASE_GRID},
    "ease_text": {
        "regularization": (30.0, 100.0, 300.0, 1000.0, 3000.0, 10000.0),
        "alpha": (0.0, 1.0, 3.0, 10.0, 30.0, 100.0),
    },
    "ials": {
        "factors": (64, 128),
        "regularization": (30.0, 100.0, 300.0),
        "alpha": (20.0, 50.0),
    },
    "no_lm": {
        "learning_rate": (1e-3, 3e-3),
        "width": (64, 128),
        "temperature": (0.5, 1.0, 2.0),
        "init": ("texts", "noise"),
    },
    "multi_vae": _VAE,
    "md_cvae": {**_VAE, "tie": (0.1, 1.0, 10.0, 100.0)},
    "bert4rec": _FINETUNED,
    "s3rec": {**_FINETUNED, "attribute_weight": (0.03, 0.1, 0.3, 1.0)},
    "sasrec": _SEQUENCE,
    "two_tower": _RETRIEVAL,
    "m6_retrieval": _RETRIEVAL,
    "cllm4rec_emb": _RETRIEVAL,
}
"""Values to try, by method and parameter. A method with an empty grid has nothing to tune."""


def make(name: str, **params: Any) -> Baseline:
    """An unfitted baseline. Raises ConfigError for an unknown name."""
    if name not in BASELINES:
        raise ConfigError(f"there is no baseline {name!r}; use one of {', '.join(BASELINES)}")
    return BASELINES[name](**params)


def trials(name: str, most: int, seed: int = 0) -> list[dict[str, Any]]:
    """`grid_points` of a method's grid."""
    return grid_points(GRID[name], most, seed)


def grid_points(
    grid: Mapping[str, tuple[Any, ...]], most: int, seed: int = 0, first: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Up to `most` settings to try: `first` (default: the method's defaults), then grid points in random order.

    The order is random so that a search that stops early has varied all parameters (Bergstra and Bengio, 2012). The same
    seed gives the same points.
    """
    defaults = dict(first or {})
    all_points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    others = [point for point in all_points if point != defaults]
    drawn = np.random.default_rng(seed).choice(len(others), min(most - 1, len(others)), replace=False)
    return [defaults, *(others[index] for index in drawn)]
