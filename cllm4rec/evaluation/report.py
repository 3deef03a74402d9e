"""An evaluation for people: a table for the terminal, and `report.md` with its plots.

Everything here is derived from `metrics.json` alone, so a report can be drawn again without ranking again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cllm4rec.evaluation.results import (
    EvaluationProtocol,
    EvaluationReport,
    Interval,
    PairedComparison,
    Results,
    StratumResult,
)
from cllm4rec.reporting import INK, markdown_table, plain, png, text_table

NAMES = {
    "cllm4rec": "CLLM4Rec",
    "without_lm": "CLLM4Rec without its language model",
    "cllm4rec_t5": "CLLM4Rec, T5",
    "cllm4rec_llama": "CLLM4Rec, Llama",
    "llm_scratch": "LLM-Scratch",
    "llm_cf": "LLM-CF",
    "llm_ftall": "LLM-FtAll",
    "llm_fixord": "LLM-FixOrd",
    "llm_prerec": "LLM-PreRec",
    "shuffled_texts": "CLLM4Rec, shuffled texts",
    "texts_at_start": "CLLM4Rec, texts only at the start",
    "noise_at_start": "CLLM4Rec, noise at the start",
    "random_lm": "CLLM4Rec, random weights",
    "no_lm": "No language model",
    "popularity": "Popularity",
    "item_knn": "ItemKNN",
    "ease": "EASE",
    "ease_text": "EASE with text",
    "ials": "iALS",
    "multi_vae": "Multi-VAE",
    "md_cvae": "MD-CVAE",
    "bert4rec": "BERT4Rec",
    "s3rec": "S3Rec",
    "sasrec": "SASRec",
    "two_tower": "Two-Tower",
    "m6_retrieval": "M6-Retrieval",
    "cllm4rec_emb": "CLLM4Rec-Emb",
}
"""Method → its usual name, in the order of every table; other methods follow under their own name."""

COLORS = {"cllm4rec": "#0b6e99", "popularity": "#98a3ad", "ease": "#d9822b"}
OTHER_COLORS = ("#6b4c9a", "#3a923a", "#c03d3e", "#845b53", "#d684bd", "#b7950b", "#4c72b0", "#1f9e89")
STRATA = {
    "history length": ("history_length.png", "training items of a user"),
    "item popularity": (
        "item_popularity.png",
        "test items by popularity, each group a third of the training interactions",
    ),
}


def table(report: EvaluationReport) -> str:
    """Methods × metrics as plain text: mean and 95 % interval, what was skipped, and how it was measured."""
    results, protocol = report.results, report.protocol
    columns = metric_names(results)
    rows = [
        [name_of(method), *(with_interval(results[method][name]) for name in columns)] for method in methods_of(results)
    ]
    skipped = [f"{name_of(method)} is skipped: {reason}" for method, reason in protocol.skipped.items()]
    measured = (
        f"{protocol.users_evaluated:,} users, {protocol.items_ranked:,} items ranked; "
        f"read: {protocol.read}; masked: {protocol.mask}; [95 % bootstrap interval over users]"
    )
    return "\n".join([text_table(["", *columns], rows), *skipped, measured])


def render(report: EvaluationReport) -> dict[str, bytes]:
    """The files of the report by name: `report.md` and the plots it shows."""
    plots = {"results.png": plot_results(report.results)}
    plots |= {STRATA[kind][0]: plot_strata(kind, strata) for kind, strata in report.strata.items()}
    return {"report.md": markdown(report).encode(), **{name: png(figure) for name, figure in plots.items()}}


def markdown(report: EvaluationReport) -> str:
    """`report.md`: the table, what it shows, the protocol in words, and the plots."""
    protocol = report.protocol
    sections = [
        "# Evaluation",
        _results_table(report),
        f"Mean over {protocol.users_evaluated:,} users and 95 % bootstrap interval; the best mean of a column is bold. "
        + verdict(report.comparison),
        *(f"{name_of(method)} is skipped: {reason}." for method, reason in protocol.skipped.items()),
        "![Every method and metric with its interval](results.png)",
        *published_sections(report.published, report.results),
        "## Protocol",
        "\n".join(f"- {line}" for line in protocol_in_words(protocol)),
        "## Where the methods differ",
        "By history length: users in groups of nearly equal size by their number of training items.",
        "![By history length](history_length.png)",
        "By the popularity of the test items: head, middle and tail of the catalog each have a third of the training "
        "interactions; a user counts in a group with the test items that belong to it.",
        "![By item popularity](item_popularity.png)",
    ]
    return "\n\n".join(sections) + "\n"


def published_sections(published: Mapping[str, Any] | None, results: Results) -> list[str]:
    """Figures of others next to those measured here; nothing if the config names none."""
    if published is None:
        return []
    figures = published["results"]
    columns = sorted({name for row in figures.values() for name in row}, key=_by_function_and_k)
    rows = [
        [name_of(method), *(_pair(figures[method].get(name), results.get(method, {}).get(name)) for name in columns)]
        for method in methods_of(figures)
    ]
    sentences = [f"Published: {published['source']}. Each cell: published / here.", published["note"]]
    return [
        "## Published figures",
        " ".join(sentence for sentence in sentences if sentence),
        markdown_table(["published / here", *columns], rows),
    ]


def _pair(published: float | None, here: Interval | None) -> str:
    return f"{'–' if published is None else _number(published)} / {'–' if here is None else _number(here['mean'])}"


def verdict(comparison: PairedComparison) -> str:
    """One sentence on CLLM4Rec and the best baseline that claims no more than the interval allows."""
    difference = comparison.difference["cllm4rec"]
    side = "above" if difference["mean"] >= 0 else "below"
    if difference["low"] > 0 or difference["high"] < 0:
        meaning = "the 95 % interval excludes 0: the difference is significant for users like these"
    else:
        meaning = "the 95 % interval contains 0: these users do not separate the two"
    return (
        f"In {comparison.metric} CLLM4Rec is {side} {name_of(comparison.baseline)}, the best baseline: "
        f"{with_interval(difference, signed=True)}, paired over users; {meaning}."
    )


def protocol_in_words(protocol: EvaluationProtocol) -> list[str]:
    """One sentence per choice."""
    interval = protocol.interval
    lines = [
        _split_in_words(protocol.split),
        f"Every method is fitted on the training split, reads {_splits(protocol.read)} at test time and may not "
        f"recommend {_splits(protocol.mask)}.",
        f"Ranking: {protocol.ranking} ({protocol.items_ranked:,} items, no sampled candidates).",
        f"Users: {protocol.users_evaluated:,} with {protocol.test_items:,} test items; "
        f"{protocol.users_dropped:,} users without test items were left out.",
        *metrics_in_words(protocol.metrics),
        f"Interval: {interval['kind']}, {interval['confidence']:.0%}, {interval['samples']:,} samples, "
        f"seed {interval['seed']}.",
        f"Model: {protocol.model_version}.",
    ]
    return lines + [
        _tuning_in_words(name_of(method), choice) for method, choice in protocol.baselines.items() if "grid" in choice
    ]


def _split_in_words(split: Mapping[str, Any]) -> str:
    if split["kind"] == "leave_one_out":
        return "Split: the last item of each user for test, the one before it for validation."
    shares = f"{split['validation']:.0%} of a user's items for validation and {split['test']:.0%} for test"
    return f"Split: {split['kind']}, {shares}, seed {split['seed']}."


def metrics_in_words(metrics: Mapping[str, str]) -> list[str]:
    """One line per definition, with the names of all metrics that share it."""
    names: dict[str, list[str]] = {}
    for name, definition in metrics.items():
        names.setdefault(definition, []).append(name)
    return [f"{', '.join(same)}: {definition}." for definition, same in names.items()]


def _tuning_in_words(name: str, choice: Mapping[str, Any]) -> str:
    tried = ", ".join(f"{value} → {_number(reached)}" for value, reached in choice["grid"].items())
    return f"{name}: regularization {choice['regularization']:g}, tuned on {choice['tuned_on']} ({tried})."


def _results_table(report: EvaluationReport) -> str:
    results, comparison = report.results, report.comparison
    columns = metric_names(results)
    best = {name: max(row[name]["mean"] for row in results.values()) for name in columns}
    header = ["", *columns, f"{comparison.metric} minus {name_of(comparison.baseline)}"]
    rows = []
    for method in methods_of(results):
        cells = [
            with_interval(results[method][name], bold=results[method][name]["mean"] == best[name]) for name in columns
        ]
        difference = comparison.difference.get(method)
        rows.append([name_of(method), *cells, with_interval(difference, signed=True) if difference else "–"])
    return markdown_table(header, rows)


def plot_results(results: Results) -> Figure:
    """One panel per metric, one row per method: the mean as a dot, the interval as a line."""
    columns, methods = metric_names(results), methods_of(results)[::-1]
    figure = Figure(figsize=(3.4 * len(columns) + 1, 1.3 + 0.45 * len(methods)), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(columns), sharey=True, gridspec_kw={"wspace": 0.08}))
    for axes, column in zip(panels, columns, strict=True):
        for row, method in enumerate(methods):
            dot(axes, results[method][column], row, color_of(method, results), vertical=False)
        axes.set_yticks(range(len(methods)), [name_of(method) for method in methods])
        axes.set_ylim(-0.6, len(methods) - 0.4)
        axes.set_xlim(0, _limit(row[column] for row in results.values()))
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.set_title(column, fontsize=11, color=INK)
        plain(axes, "x")
    return figure


def plot_strata(kind: str, strata: Sequence[StratumResult]) -> Figure:
    """The strata side by side, with a dot and an interval for every method."""
    methods = methods_of(strata[0].results)
    step = 0.6 / max(len(methods), 2)
    figure = Figure(figsize=(max(5.5, 1.2 + 1.6 * len(strata)), 3.8), layout="constrained")
    axes = figure.subplots()
    for place, method in enumerate(methods):
        color = color_of(method, strata[0].results)
        for group, stratum in enumerate(strata):
            dot(axes, stratum.results[method], group + step * (place - (len(methods) - 1) / 2), color, vertical=True)
        axes.plot([], [], "o", color=color, label=name_of(method))
    axes.set_xticks(range(len(strata)), [f"{stratum.label}\n{stratum.users:,} users" for stratum in strata])
    axes.set_xlim(-0.5, len(strata) - 0.5)
    axes.set_ylim(0, _limit(value for stratum in strata for value in stratum.results.values()))
    axes.set_xlabel(STRATA[kind][1], color=INK)
    axes.set_ylabel(strata[0].metric, color=INK)
    plain(axes, "y")
    figure.legend(loc="outside upper center", ncols=min(len(methods), 4), frameon=False, handletextpad=0.2)
    return figure


def dot(axes: Axes, value: Interval, place: float, color: str, *, vertical: bool) -> None:
    """A mean as a dot and its interval as a line through it."""
    mean, ends, places = value["mean"], [value["low"], value["high"]], [place, place]
    if vertical:
        axes.plot(places, ends, color=color, linewidth=2.2, solid_capstyle="round", alpha=0.55)
        axes.plot([place], [mean], "o", color=color, markersize=7, clip_on=False)
        return
    axes.plot(ends, places, color=color, linewidth=2.6, solid_capstyle="round", alpha=0.55)
    axes.plot([mean], [place], "o", color=color, markersize=8, clip_on=False)
    axes.annotate(f"{mean:.3f}", (mean, place), (0, 7), textcoords="offset points", ha="center", fontsize=9, color=INK)


def _limit(values: Iterable[Interval]) -> float:
    """The end of a measured axis: a little above the highest interval, and above 0 if everything is 0."""
    return 1.08 * max(value["high"] for value in values) or 1.0


def metric_names(results: Results) -> list[str]:
    """The metrics in the order of the tables: by function, then by k."""
    return sorted(next(iter(results.values())), key=_by_function_and_k)


def _by_function_and_k(metric: str) -> tuple[bool, int]:
    return metric.startswith("ndcg"), int(metric.partition("@")[2])


def methods_of(results: Mapping[str, Any]) -> list[str]:
    known = [method for method in NAMES if method in results]
    return known + sorted(method for method in results if method not in NAMES)


def name_of(method: str) -> str:
    return NAMES.get(method, method)


def color_of(method: str, results: Mapping[str, Any]) -> str:
    others = [name for name in methods_of(results) if name not in COLORS]
    return COLORS[method] if method in COLORS else OTHER_COLORS[others.index(method) % len(OTHER_COLORS)]


def _splits(policy: str) -> str:
    return "the training and validation items" if policy == "train+validation" else "the training items"


def with_interval(value: Interval, *, signed: bool = False, bold: bool = False) -> str:
    mean = _number(value["mean"], signed)
    return f"{f'**{mean}**' if bold else mean} [{_number(value['low'], signed)}, {_number(value['high'], signed)}]"


def _number(value: float, signed: bool = False) -> str:
    return f"{value:+.4f}" if signed else f"{value:.4f}"
