"""`metrics.json` of a comparison for people: `report.md` and its plots, made from its content alone."""

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
SWEPT = (HEADLINE, VALIDATION_METRIC)
"""What a sweep's plot shows."""
STRATA_FILES = {"history length": "history_length.png", "item popularity": "item_popularity.png"}


def render(metrics: Mapping[str, Any]) -> dict[str, bytes]:
    """Files of the report by name."""
    plots = {"results.png": plot_results(metrics["results"]), "learning_curves.png": plot_curves(metrics["curves"])}
    for kind, file in STRATA_FILES.items():
        plots[file] = plot_strata(kind, [_of_few(stratum) for stratum in metrics["strata"][kind]])
    for name, points in metrics["sensitivity"].items():
        plots[_sweep_file(name)] = plot_sweep(name, points, metrics["protocol"]["sweeps"][name]["configured"])
    return {"report.md": markdown(metrics).encode(), **{name: png(figure) for name, figure in plots.items()}}


def markdown(metrics: Mapping[str, Any]) -> str:
    """`report.md`: the table, what is significant, the protocol, strata, learning curves and cost."""
    sections = [
        "# Comparison",
        _results_table(metrics),
        _legend(metrics),
        *_notes(metrics["protocol"]),
        "![Every method and metric with its interval](results.png)",
        *published_sections(metrics.get("published"), metrics["results"]),
        "## CLLM4Rec against every other method",
        _model_table(metrics),
        "## Protocol",
        "\n".join(f"- {line}" for line in _protocol(metrics)),
        "## Where the methods differ",
        *(f"![By {kind}]({file})" for kind, file in STRATA_FILES.items()),
        *(_strata_table(kind, strata) for kind, strata in metrics["strata"].items()),
        "## Beside accuracy",
        _beside_table(metrics["beside accuracy"]),
        "## Learning curves",
        "Validation by epoch on the first split, of the setting that was chosen.",
        "![Validation by epoch](learning_curves.png)",
        *_sensitivity(metrics),
        "## Examples",
        f"[Five users]({EXAMPLES}) with what was read of them, what should be found, and the lists of three methods.",
        "## Budget and cost",
        _cost_table(metrics),
        "Minutes of a split include reading, validating and every setting tried; all on one thread. A language model "
        "that several rows begin from is trained once a split and stands in a line of its own. Memory is the process's.",
        "## Chosen settings",
        _chosen_table(metrics["chosen"]),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _sensitivity(metrics: Mapping[str, Any]) -> list[str]:
    """A plot and a table for each sweep; nothing where there is none."""
    sweeps = metrics["protocol"]["sweeps"]
    if not sweeps:
        return []
    return [
        "## Sensitivity",
        "CLLM4Rec as configured but for one thing, trained once for each value and ranked on the test split, as in the "
        "paper's Figure 4. Nothing is chosen by it. Intervals are of one value over users; all values share the users, so "
        "two values can differ more surely than their intervals show. A ring is what is configured; axes do not begin at 0.",
        *(part for name in sweeps for part in _sweep(name, sweeps[name], metrics["sensitivity"][name])),
    ]


def _sweep(name: str, sweep: Mapping[str, Any], points: Sequence[Mapping[str, Any]]) -> list[str]:
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
    """A setting's value for people; a range as `0.1 to 0.9`."""
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
    """A dagger where the best other method is told apart from this one."""
    tests = metrics["significance"].get(metric, {}).get("against best other", {})
    return " †" if method in tests and tests[method]["p_holm"] < LEVEL else ""


def _legend(metrics: Mapping[str, Any]) -> str:
    protocol, tests = metrics["protocol"], metrics["significance"]
    num_splits = len(protocol["split"]["seed"])
    mean = f"Mean over {num_splits} splits" if num_splits > 1 else "Mean of one split"
    return (
        f"{mean} and {protocol['interval']['confidence']:.0%} bootstrap interval "
        f"over {protocol['users_evaluated']:,} users; a column's best mean is bold. † ({', '.join(tests)}): differs from the "
        f"best other method, paired randomization test over users, Holm-corrected p < {LEVEL:g}."
    )


def _notes(protocol: Mapping[str, Any]) -> list[str]:
    return [f"{name_of(method)} is skipped: {reason}." for method, reason in protocol["skipped"].items()]


def _model_table(metrics: Mapping[str, Any]) -> str:
    rows = []
    for metric, tests in metrics["significance"].items():
        for method in methods_of(tests["against cllm4rec"]):
            found = tests["against cllm4rec"][method]
            less = {end: 0.0 - found["difference"][other] for end, other in _TURNED.items()}
            rows.append(
                [
                    metric,
                    name_of(method),
                    with_interval(less, signed=True),
                    f"{found['p']:.4f}",
                    f"{found['p_holm']:.4f}",
                ]
            )
    return markdown_table(["metric", "other", "CLLM4Rec less the other", "p", "p (Holm)"], rows) if rows else ""


_TURNED = {"mean": "mean", "low": "high", "high": "low"}


def _protocol(metrics: Mapping[str, Any]) -> list[str]:
    protocol, budget = metrics["protocol"], metrics["budget"]
    split = protocol["split"]
    return [
        f"Splits: {split['kind']}, {split['validation']:.0%} validation and {split['test']:.0%} test, seeds "
        f"{', '.join(map(str, split['seed']))}; {protocol['users']:,} users, {protocol['items_ranked']:,} items, "
        f"{protocol['test_items']:,} test items of all splits; items without a training interaction: "
        f"{', '.join(map(str, protocol['cold_items']))}.",
        f"Every method is fitted on the training split, reads {protocol['read']} and may not recommend {protocol['mask']}; "
        f"ranking: {protocol['ranking']}.",
        f"Budget, the same for every method on every split: at most {budget['trials']} settings, or {budget['minutes']:g} minutes, "
        "after which no further setting is begun.",
        f"Settings and epochs are chosen by {protocol['chosen_by']}; the test split is ranked once, for the chosen one.",
        *metrics_in_words(protocol["metrics"]),
        *(f"{name_of(name)}: {VARIANTS[name].what}." for name in methods_of(metrics["results"]) if name in VARIANTS),
    ]


def _strata_table(kind: str, strata: Sequence[Mapping[str, Any]]) -> str:
    methods = methods_of(strata[0]["results"])
    header = [f"{strata[0]['metric']} by {kind}", *(f"{one['label']} ({one['users']:,} users)" for one in strata)]
    rows = [[name_of(method), *(with_interval(one["results"][method]) for one in strata)] for method in methods]
    return markdown_table(header, rows)


def _beside_table(beside: Mapping[str, Mapping[str, float]]) -> str:
    names = list(next(iter(beside.values())))
    rows = [[name_of(method), *(f"{beside[method][name]:.3f}" for name in names)] for method in methods_of(beside)]
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
        ["", "settings tried on each split", "minutes on each split", "minutes a setting", "peak memory"], rows
    )


def _chosen_table(chosen: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        [name_of(method), seed, ", ".join(f"{key} {value}" for key, value in params.items()) or "as configured"]
        for method in methods_of(chosen)
        for seed, params in chosen[method].items()
    ]
    return markdown_table(["", "split", "setting"], rows)


def _of_few(stratum: Mapping[str, Any]) -> StratumResult:
    """The main rows alone, or the first few: more cannot be distinguished in one plot."""
    results = stratum["results"]
    shown = [name for name in MAIN if name in results] or methods_of(results)[: len(MAIN)]
    return StratumResult(stratum["label"], stratum["users"], stratum["metric"], {name: results[name] for name in shown})


def plot_curves(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Validation by epoch: CLLM4Rec and its variants, and neural baselines, in a panel each where there are any."""
    known = [method for method in methods_of(curves) if curves[method]]
    parts = {
        "CLLM4Rec and its variants": [method for method in known if method in VARIANTS],
        "Baselines": [method for method in known if method not in VARIANTS],
    }
    parts = {title: methods for title, methods in parts.items() if methods} or {"Nothing has epochs": []}
    figure = Figure(figsize=(5.5 * len(parts), 4), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(parts), sharey=True))
    for axes, (title, methods) in zip(panels, parts.items(), strict=True):
        for method in methods:
            _curve(axes, method, curves[method], color_of(method, dict.fromkeys(methods)))
        axes.set_title(title, fontsize=11, color=INK)
        axes.set_xlabel("epoch (dotted: CLLM4Rec's finetuning begins)" if MODEL in methods else "epoch", color=INK)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        plain(axes, "y")
        if methods:
            axes.legend(frameon=False, fontsize=8)
    panels[0].set_ylabel(f"validation {VALIDATION_METRIC}", color=INK)
    return figure


def _curve(axes: Axes, method: str, curve: Sequence[Mapping[str, Any]], color: str) -> None:
    values = [entry[VALIDATION_METRIC] for entry in curve]
    axes.plot(range(1, len(values) + 1), values, color=color, label=name_of(method))
    changes = [place for place, entry in enumerate(curve) if entry["phase"] == "finetune"]
    if method == MODEL and changes:
        axes.axvline(changes[0] + 0.5, color=INK, linewidth=0.8, linestyle=":")


def plot_sweep(name: str, points: Sequence[Mapping[str, Any]], configured: Any) -> Figure:
    """A panel a metric: mean and interval at every value, numbers joined by a line, what is configured in a ring."""
    points = [point for point in points if "failed" not in point]
    places = places_of([point["value"] for point in points])
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    for axes, metric in zip(figure.subplots(1, len(SWEPT)), SWEPT, strict=True):
        _join(axes, points, places, metric)
        for point, place in zip(points, places, strict=True):
            dot(axes, point[metric], place, COLORS[MODEL], vertical=True)
            if point["value"] == configured:
                axes.plot([place], [point[metric]["mean"]], "o", markersize=15, fillstyle="none", color=INK)
        axes.set_xticks(places, [words_of(point["value"]) for point in points])
        axes.set_xlim(min(places, default=0) - 0.5, max(places, default=0) + 0.5)
        axes.margins(y=0.12)
        axes.set_xlabel(name, color=INK)
        axes.set_title(metric, fontsize=11, color=INK)
        plain(axes, "y")
    return figure


def _join(axes: Axes, points: Sequence[Mapping[str, Any]], places: Sequence[float], metric: str) -> None:
    """A line through the numbers; to a 0 that a logarithmic axis has no place for it is dotted."""
    numbers = sorted(
        (place, point["value"], point[metric]["mean"])
        for place, point in zip(places, points, strict=True)
        if is_number(point["value"])
    )
    is_apart = _is_logarithmic([value for _, value, _ in numbers])
    for (left, value, low), (right, _, high) in itertools.pairwise(numbers):
        style = ":" if value == 0 and is_apart else "-"
        axes.plot([left, right], [low, high], style, color=COLORS[MODEL], linewidth=1.2, alpha=0.6)


def places_of(values: Sequence[Any]) -> list[float]:
    """Where values stand along an axis, neighbors 1 apart on average.

    Numbers by their size, or by its logarithm where they span a decade, with a 0 one step left of the smallest; what is
    no number stands to their right in the order given.
    """
    numbers = sorted({float(value) for value in values if is_number(value)})
    place_of = dict(zip(numbers, _number_places(numbers), strict=True))
    last, places = max(place_of.values(), default=-1.0), []
    for value in values:
        last += 0 if is_number(value) else 1
        places.append(place_of[float(value)] if is_number(value) else last)
    return places


def _number_places(numbers: Sequence[float]) -> list[float]:
    is_logarithmic = _is_logarithmic(numbers)
    scaled = [math.log10(number) if is_logarithmic else number for number in numbers if number or not is_logarithmic]
    span = (scaled[-1] - scaled[0]) / (len(scaled) - 1) if len(scaled) > 1 else 1.0
    places = [(number - scaled[0]) / span for number in scaled]
    return [-1.0, *places] if len(places) < len(numbers) else places


def _is_logarithmic(numbers: Sequence[float]) -> bool:
    positive = [number for number in numbers if number > 0]
    return len(positive) > 1 and min(numbers) >= 0 and max(positive) >= 10 * min(positive)
