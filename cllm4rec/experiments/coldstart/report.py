"""`report.md` of the experiment, from `metrics.json` alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cllm4rec.evaluation.report import with_interval
from cllm4rec.reporting import markdown_table

NAMES = {
    "mean_row": "nothing (the mean row of the trained items)",
    "noise": "noise",
    "words": "words (TF-IDF)",
    "lm": "language model",
    "lm_words": "**language model and words**",
    "random_lm": "random weights of its architecture",
    "random_lm_words": "random weights and words",
}
"""Reader → its name in the report, in the order of every table: the mean row of the trained items (no text), random states in the
place of a model's, TF-IDF words, layers of the language model, both with the share that leave-one-out chooses, and the last two with
random weights of the same architecture."""

_READ_NOTHING = ("mean_row", "noise")


def markdown(metrics: Mapping[str, Any]) -> str:
    """The table of readers, what they add to words, what the new items take from the others, and the readings chosen."""
    splits = len(metrics["seeds"])
    lost = metrics["without_new_items"]["warm_recall@20"]
    sections = [
        "# New items from their texts",
        f"{splits} splits: each takes {metrics['fraction']:.0%} of the items out of training, whole. Their rows are predicted from "
        "their texts. Mean over splits with 95 % bootstrap intervals over users.",
        _results(metrics),
        f"Recall@20 of the users' other test items is {with_interval(lost)} without the new items in the catalog.",
        "## Compared with words",
        "Difference in recall among the new items, user by user; p by a paired randomization test, adjusted by Holm's method for all "
        "readers.",
        _paired(metrics),
        "## What was read",
        "Chosen by leave-one-out on the trained items; r2 is the predicted share of the variance of a left-out row.",
        markdown_table(
            ["reader", *(f"split {seed}" for seed in metrics["seeds"])],
            [
                [NAMES[name], *metrics["chosen"][name]]
                for name in NAMES
                if name in metrics["chosen"] and name not in _READ_NOTHING
            ],
        ),
        "## Recall@10 by split",
        markdown_table(
            ["reader", *(f"split {seed}" for seed in metrics["seeds"])],
            [[NAMES[name], *(f"{value:.3f}" for value in row)] for name, row in metrics["by_split"].items()],
        ),
    ]
    return "\n\n".join(sections) + "\n"


def _results(metrics: Mapping[str, Any]) -> str:
    header = [
        "read of a new item's text",
        "Recall@10 among new items",
        "Recall@20 among new items",
        "Recall@20 of other items",
    ]
    rows = [
        [NAMES[name], *(with_interval(row[metric]) for metric in ("recall@10", "recall@20", "warm_recall@20"))]
        for name, row in metrics["results"].items()
    ]
    return markdown_table(header, rows)


def _paired(metrics: Mapping[str, Any]) -> str:
    rows = [
        [NAMES[name], *(cell for metric in metrics["paired"] for cell in _cells(metrics["paired"][metric][name]))]
        for name in metrics["paired"]["recall@10"]
    ]
    header = ["reader", *(cell for metric in metrics["paired"] for cell in (metric, "p"))]
    return markdown_table(header, rows)


def _cells(test: Mapping[str, Any]) -> tuple[str, str]:
    return with_interval(test["difference"], signed=True), f"{test['p_holm']:.4f}"
