"""The report of a comparison: `report.md` and its plots, made from `metrics.json` alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cllm4rec.evaluation.report import (
    COLORS,
    color_of,
    dot,
    methods_of,
    metric_names,
    metrics_in_words,
    name_of,
    plot_results,
    plot_strata,
    published_sections,
    with_interval,
)
from cllm4rec.evaluation.results import StratumResult
from cllm4rec.evaluation.stage import HEADLINE
from cllm4rec.experiments.comparison.methods import MAIN, MODEL, VARIANTS
from cllm4rec.metrics.ranking import METRICS
from cllm4rec.reporting import INK, markdown_table, plain, png
from cllm4rec.training.loop import VALIDATION_METRIC

LEVEL = 0.05
EXAMPLES = "examples.md"
SWEEP_METRICS = (HEADLINE, VALIDATION_METRIC)
"""The metrics in the plot of a sweep."""
STRATA_FILES = {"history length": "history_length.png", "item popularity": "item_popularity.png"}


def render(metrics: Mapping[str, Any]) -> dict[str, bytes]:
    """The files of the report by name."""
    plots = {"results.png": plot_results(metrics["results"]), "learning_curves.png": plot_curves(metrics["curves"])}
    for kind, file in STRATA_FILES.items():
        plots[file] = plot_strata(kind, [_main_methods(stratum) for stratum in metrics["strata"][kind]])
    for name, points in metrics["sensitivity"].items():
        plots[_sweep_file(name)] = plot_sweep(name, points, metrics["protocol"]["sweeps"][name]["configured"])
    return {"report.md": markdown(metrics).encode(), **{name: png(figure) for name, figure in plots.items()}}


def markdown(metrics: Mapping[str, Any]) -> str:
    """`report.md`: results, significance tests, protocol, strata, learning curves, sensitivity and cost."""
    sections = [
        "# Comparison",
        _results_table(metrics),
        _legend(metrics),
        *_notes(metrics["protocol"]),
        "![All methods and metrics with intervals](results.png)",
        *published_sections(metrics.get("published"), metrics["results"]),
        "## CLLM4Rec compared with each other method",
        _model_table(metrics),
        "## Protocol",
        "\n".join(f"- {line}" for line in _protocol(metrics)),
        "## Results by stratum",
        *(f"![Results by {kind}]({file})" for kind, file in STRATA_FILES.items()),
        *(_strata_table(kind, strata) for kind, strata in metrics["strata"].items()),
        "## Coverage and popularity",
        _beyond_accuracy_table(metrics["beyond accuracy"]),
        "## Learning curves",
        "Validation metric after each epoch on the first split, with the chosen setting.",
        "![Validation metric by epoch](learning_curves.png)",
        *_sensitivity(metrics),
        "## Examples",
        f"[Five users]({EXAMPLES}) with their histories, their test items, and the lists of three methods.",
        "## Budget and cost",
        _cost_table(metrics),
        "Minutes per split include loading, validation and all settings tried, on one thread. A language model that several "
        "methods start from is trained once per split and has a row of its own. Memory is the peak of the process.",
        "## Chosen settings",
        _chosen_table(metrics["chosen"]),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _sensitivity(metrics: Mapping[str, Any]) -> list[str]:
    """A plot and a table per sweep; nothing without sweeps."""
    sweeps = metrics["protocol"]["sweeps"]
    if not sweeps:
        return []
    return [
        "## Sensitivity",
        "CLLM4Rec as configured, with one setting changed. Each value was trained once and evaluated on the test split, as in "
        "Figure 4 of the paper. No setting is chosen from these results. Intervals are over users. All values are evaluated on the "
        "same users, so a difference between two values can be significant although their intervals overlap. A ring marks the "
        "configured value. The axes do not start at 0.",
        *(part for name in sweeps for part in _sweep(name, sweeps[name], metrics["sensitivity"][name])),
    ]


def _sweep(name: str, sweep: Mapping[str, Any], points: Sequence[Mapping[str, Any]]) -> list[str]:
    """The section of one sweep; `points` are its values with their metrics."""
    configured = ", ".join(f"{key} {words_of(value)}" for key, value in sweep["settings"].items())
    seeds = f"split seed{'s' * (len(sweep['seeds']) > 1)} {', '.join(map(str, sweep['seeds']))}"
    columns = [metric for metric in METRICS if any(metric in point for point in points)]
    rows = [
        [
            words_of(point["value"]),
            *(with_interval(point[metric]) if metric in point else "not trained" for metric in columns),
        ]
        for point in points
    ]
    failed = [f"{words_of(point['value'])}: {point['failed']}." for point in points if "failed" in point]
    return [
        f"### {name}",
        f"{', '.join(sweep['settings'])}; {seeds}; configured: {configured}.",
        *([f"![{name}]({_sweep_file(name)})"] if columns else []),
        markdown_table([name, *columns], rows),
        *failed,
    ]


def words_of(value: Any) -> str:
    """A setting's value as text; a range as `0.1 to 0.9`."""
    if isinstance(value, list):
        return " to ".join(words_of(part) for part in value)
    return f"{value:g}" if is_number(value) else str(value)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _sweep_file(name: str) -> str:
    return f"sensitivity_{name.replace(' ', '_')}.png"


def _results_table(metrics: Mapping[str, Any]) -> str:
    results, columns = metrics["results"], metric_names(metrics["results"])
    best = {name: max(row[name]["mean"] for row in results.values()) for name in columns}
    rows = []
    for method in methods_of(results):
        cells = [
            with_interval(results[method][name], bold=results[method][name]["mean"] == best[name])
            + _mark(metrics, method, name)
            for name in columns
        ]
        rows.append([name_of(method), *cells])
    return markdown_table(["", *columns], rows)


def _mark(metrics: Mapping[str, Any], method: str, metric: str) -> str:
    """A dagger if the method differs significantly from the best other method."""
    tests = metrics["significance"].get(metric, {}).get("against best other", {})
    return " †" if method in tests and tests[method]["p_holm"] < LEVEL else ""


def _legend(metrics: Mapping[str, Any]) -> str:
    protocol, tests = metrics["protocol"], metrics["significance"]
    num_splits = len(protocol["split"]["seed"])
    mean = f"Mean over {num_splits} splits" if num_splits > 1 else "Mean on one split"
    return (
        f"{mean} with {protocol['interval']['confidence']:.0%} bootstrap intervals over {protocol['users_evaluated']:,} users. "
        f"The best mean of each column is bold. † ({', '.join(tests)}): significantly different from the best other method "
        f"(paired randomization test over users, Holm-corrected p < {LEVEL:g})."
    )


def _notes(protocol: Mapping[str, Any]) -> list[str]:
    return [f"{name_of(method)} was skipped: {reason}." for method, reason in protocol["skipped"].items()]


def _model_table(metrics: Mapping[str, Any]) -> str:
    rows = []
    for metric, tests in metrics["significance"].items():
        for method in methods_of(tests["against cllm4rec"]):
            test = tests["against cllm4rec"][method]
            # The tests hold the other method minus CLLM4Rec; the table shows the opposite sign.
            difference = {end: 0.0 - test["difference"][other] for end, other in _NEGATED.items()}
            rows.append(
                [
                    metric,
                    name_of(method),
                    with_interval(difference, signed=True),
                    f"{test['p']:.4f}",
                    f"{test['p_holm']:.4f}",
                ]
            )
    return markdown_table(["metric", "method", "CLLM4Rec minus method", "p", "p (Holm)"], rows) if rows else ""


_NEGATED = {"mean": "mean", "low": "high", "high": "low"}


def _protocol(metrics: Mapping[str, Any]) -> list[str]:
    protocol, budget = metrics["protocol"], metrics["budget"]
    split = protocol["split"]
    shares = f", {split['validation']:.0%} validation and {split['test']:.0%} test" * (split["kind"] != "leave_one_out")
    return [
        f"Splits: {split['kind']}{shares}, seeds "
        f"{', '.join(map(str, split['seed']))}; {protocol['users']:,} users, {protocol['items_ranked']:,} items, "
        f"{protocol['test_items']:,} test items over all splits. Items without a training interaction, by split: "
        f"{', '.join(map(str, protocol['cold_items']))}.",
        f"Each method is fitted on the training split. At test time it reads the {_splits(protocol['read'])} items, and the "
        f"{_splits(protocol['mask'])} items are masked. Ranking: {protocol['ranking']}.",
        f"Each method has the same budget on each split: at most {_count(budget['trials'], 'setting')}, and no setting is started "
        f"after {_count(budget['minutes'], 'minute')}.",
        f"Settings and epochs are chosen by {protocol['chosen_by']}. The test split is ranked once, with the chosen setting.",
        *metrics_in_words(protocol["metrics"]),
        *(
            f"{name_of(name)}: {VARIANTS[name].description}."
            for name in methods_of(metrics["results"])
            if name in VARIANTS
        ),
    ]


def _count(number: float, noun: str) -> str:
    return f"{number:g} {noun}{'s' * (number != 1)}"


def _splits(policy: str) -> str:
    return policy.replace("train", "training").replace("+", " and ")


def _strata_table(kind: str, strata: Sequence[Mapping[str, Any]]) -> str:
    methods = methods_of(strata[0]["results"])
    labels = [f"{stratum['label']} ({stratum['users']:,} users)" for stratum in strata]
    header = [f"{strata[0]['metric']} by {kind}", *labels]
    rows = [[name_of(method), *(with_interval(stratum["results"][method]) for stratum in strata)] for method in methods]
    return markdown_table(header, rows)


def _beyond_accuracy_table(measures: Mapping[str, Mapping[str, float]]) -> str:
    names = list(next(iter(measures.values())))
    rows = [[name_of(method), *(f"{measures[method][name]:.3f}" for name in names)] for method in methods_of(measures)]
    return markdown_table(["", *names], rows)


def _cost_table(metrics: Mapping[str, Any]) -> str:
    used, cost = metrics["budget"]["used"], metrics["cost"]
    rows = [
        [
            name_of(method),
            ", ".join(map(str, used[method]["trials"])) if method in used else "1",
            ", ".join(f"{minutes:g}" for minutes in used[method]["minutes"]) if method in used else "–",
            f"{cost[method]['minutes_per_setting']:.2f}",
            f"{cost[method]['peak_memory_mb']:,.0f} MB" if "peak_memory_mb" in cost[method] else "–",
        ]
        for method in methods_of(cost)
    ]
    return markdown_table(
        ["", "settings tried, by split", "minutes, by split", "minutes per setting", "peak memory"], rows
    )


def _chosen_table(chosen: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        [name_of(method), seed, ", ".join(f"{key} {value}" for key, value in params.items()) or "default"]
        for method in methods_of(chosen)
        for seed, params in chosen[method].items()
    ]
    return markdown_table(["", "split", "setting"], rows)


def _main_methods(stratum: Mapping[str, Any]) -> StratumResult:
    """The stratum with the main methods only, or with the first few: one plot cannot show all of them."""
    results = stratum["results"]
    shown = [name for name in MAIN if name in results] or methods_of(results)[: len(MAIN)]
    return StratumResult(stratum["label"], stratum["users"], stratum["metric"], {name: results[name] for name in shown})


def plot_curves(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Validation metric by epoch: one panel for CLLM4Rec and its variants, one for the neural baselines, if there are any."""
    known = [method for method in methods_of(curves) if curves[method]]
    parts = {
        "CLLM4Rec and its variants": [method for method in known if method in VARIANTS],
        "Baselines": [method for method in known if method not in VARIANTS],
    }
    parts = {title: methods for title, methods in parts.items() if methods} or {"No method has epochs": []}
    figure = Figure(figsize=(5.5 * len(parts), 4), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(parts), sharey=True))
    for axes, (title, methods) in zip(panels, parts.items(), strict=True):
        for method in methods:
            _curve(axes, method, curves[method], color_of(method, dict.fromkeys(methods)))
        axes.set_title(title, fontsize=11, color=INK)
        axes.set_xlabel("epoch (dotted: start of CLLM4Rec's finetuning)" if MODEL in methods else "epoch", color=INK)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        plain(axes, "y")
        if methods:
            axes.legend(frameon=False, fontsize=8)
    panels[0].set_ylabel(f"validation {VALIDATION_METRIC}", color=INK)
    return figure


def _curve(axes: Axes, method: str, curve: Sequence[Mapping[str, Any]], color: str) -> None:
    values = [entry[VALIDATION_METRIC] for entry in curve]
    axes.plot(range(1, len(values) + 1), values, color=color, label=name_of(method))
    finetune_epochs = [epoch for epoch, entry in enumerate(curve) if entry["phase"] == "finetune"]
    if method == MODEL and finetune_epochs:
        axes.axvline(finetune_epochs[0] + 0.5, color=INK, linewidth=0.8, linestyle=":")


def plot_sweep(name: str, points: Sequence[Mapping[str, Any]], configured: Any) -> Figure:
    """One panel per metric: mean and interval of each value, numbers joined by a line, a ring around the configured value."""
    points = [point for point in points if "failed" not in point]
    positions = axis_positions([point["value"] for point in points])
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    for axes, metric in zip(figure.subplots(1, len(SWEEP_METRICS)), SWEEP_METRICS, strict=True):
        _join(axes, points, positions, metric)
        for point, position in zip(points, positions, strict=True):
            dot(axes, point[metric], position, COLORS[MODEL], vertical=True)
            if point["value"] == configured:
                axes.plot([position], [point[metric]["mean"]], "o", markersize=15, fillstyle="none", color=INK)
        axes.set_xticks(positions, [words_of(point["value"]) for point in points])
        axes.set_xlim(min(positions, default=0) - 0.5, max(positions, default=0) + 0.5)
        axes.margins(y=0.12)
        axes.set_xlabel(name, color=INK)
        axes.set_title(metric, fontsize=11, color=INK)
        plain(axes, "y")
    return figure


def _join(axes: Axes, points: Sequence[Mapping[str, Any]], positions: Sequence[float], metric: str) -> None:
    """A line through the numbers; it is dotted towards a 0 on a logarithmic axis."""
    numbers = sorted(
        (position, point["value"], point[metric]["mean"])
        for position, point in zip(positions, points, strict=True)
        if is_number(point["value"])
    )
    is_logarithmic = _is_logarithmic([value for _, value, _ in numbers])
    for (left, value, low), (right, _, high) in itertools.pairwise(numbers):
        style = ":" if value == 0 and is_logarithmic else "-"
        axes.plot([left, right], [low, high], style, color=COLORS[MODEL], linewidth=1.2, alpha=0.6)


def axis_positions(values: Sequence[Any]) -> list[float]:
    """Positions of values along an axis, with an average distance of 1 between neighbors.

    Numbers are placed by size, or by logarithm if they span a decade; a 0 is then one step left of the smallest number.
    Other values follow to the right in the given order.
    """
    numbers = sorted({float(value) for value in values if is_number(value)})
    position_of = dict(zip(numbers, _number_positions(numbers), strict=True))
    last, positions = max(position_of.values(), default=-1.0), []
    for value in values:
        last += 0 if is_number(value) else 1
        positions.append(position_of[float(value)] if is_number(value) else last)
    return positions


def _number_positions(numbers: Sequence[float]) -> list[float]:
    is_logarithmic = _is_logarithmic(numbers)
    scaled = [math.log10(number) if is_logarithmic else number for number in numbers if number or not is_logarithmic]
    span = (scaled[-1] - scaled[0]) / (len(scaled) - 1) if len(scaled) > 1 else 1.0
    positions = [(number - scaled[0]) / span for number in scaled]
    return [-1.0, *positions] if len(positions) < len(numbers) else positions


def _is_logarithmic(numbers: Sequence[float]) -> bool:
    positive = [number for number in numbers if number > 0]
    return len(positive) > 1 and min(numbers) >= 0 and max(positive) >= 10 * min(positive)
