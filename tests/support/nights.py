"""Runs of the scoring job on the parity world: configs, what readers see, and what the Scorer would answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from deltalake import DeltaTable

from cllm4rec.config import Config, parse_config
from cllm4rec.data.prepared import load_histories
from cllm4rec.scoring.rules import read_rules
from cllm4rec.scoring.scorer import Scorer


def config_of(
    folder: Path, name: str, run_date: str | None = "2026-11-20", nightly: dict[str, Any] | None = None, **score: Any
) -> Config:
    """A run with a dump and runs/ of its own, on the shared directories."""
    (folder / name).mkdir(exist_ok=True)
    for directory in ("prepared", "model"):
        if not (folder / name / directory).exists():
            (folder / name / directory).symlink_to(folder / directory)
    return parse_config(
        {
            "output_dir": str(folder / name),
            "data": {"interactions": {"path": "unread"}},
            "run_date": run_date,
            "score": {"k": 5, "batch_users": 4, **score},
            "nightly": nightly or {},
        }
    )


def published(config: Config, version: int | None = None) -> dict[str, tuple[list[str], list[float]]]:
    """user_id → items and scores as readers see them; fails where a user is there twice."""
    frame = DeltaTable(config.run.dump, version=version).to_pandas()
    assert frame["user_id"].is_unique
    return {row.user_id: (list(row.item_ids), list(row.scores)) for row in frame.itertuples()}


def expected(config: Config) -> dict[str, tuple[list[str], list[float]]]:
    """What the Scorer answers, one user at a time."""
    torch.set_num_threads(1)
    scorer = Scorer.load(config.run.model)
    histories = load_histories(config.run.prepared)
    known = histories.together("train", "validation", "test")
    rules = read_rules(config.score.rules, scorer.catalog, config.run_date)
    lists = {}
    for user in histories.user:
        items, scores = scorer.top_k([user], known.take(np.array([user])), config.score.k, rules)
        found = items[0] >= 0
        lists[scorer.catalog.user_ids[user]] = (
            scorer.catalog.item_ids[items[0][found]].tolist(),
            list(scores[0][found]),
        )
    return lists
