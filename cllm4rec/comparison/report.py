"""`metrics.json` of a comparison for people: `report.md` and its plots, made from its content alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cllm4rec.comparison.methods import MAIN, MODEL, VARIANTS
from cllm4rec.evaluation.report import (
    INK,
    colour_of,
    methods_of,
    metric_names,
    metrics_in_words,
    name_of,
    plain,
    plot_results,
    plot_strata,
    png,
    with_interval,
)

LEVEL = 0.05
STRATA_FILES = {"history length": "history_length.png", "item popularity": "item_popularity.png"}


def render(metrics: Mapping[str, Any]) -> dict[str, bytes]:
    """Files of the report by name."""
    plots = {"results.png": plot_results(metrics), "learning_curves.png": plot_curves(metrics["curves"])}
    for kind, file in STRATA_FILES.items():
        plots[file] = plot_strata(kind, [_of_few(stratum) for stratum in metrics["strata"][kind]])
    return {"report.md": markdown(metrics).encode(), **{name: png(figure) for name, figure in plots.items()}}


def markdown(metrics: Mapping[str, Any]) -> str:
    """`report.md`: the table, what is significant, the protocol, strata, learning curves and cost."""
    sections = [
        "# Comparison",
        _results_table(metrics),
        _legend(metrics),
        *_notes(metrics["protocol"]),
        "![Every method and metric with its interval](results.png)",
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
        "## Budget and cost",
        _cost_table(metrics),
        "Minutes of a split include reading, validating and every setting tried; all on one thread. A language model "
        "that several rows begin from is trained once a split and stands in a line of its own. Memory is the process's.",
        "## Chosen settings",
        _chosen_table(metrics["chosen"]),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _results_table(metrics: Mapping[str, Any]) -> str:
    results, columns = metrics["results"], metric_names(metrics)
    best = {name: max(row[name]["mean"] for row in results.values()) for name in columns}
    rows = []
    for method in methods_of(results):
        cells = [
            with_interval(results[method][name], bold=results[method][name]["mean"] == best[name])
            + _mark(metrics, method, name)
            for name in columns
        ]
        rows.append([name_of(method), *cells])
    return _table(["", *columns], rows)


def _mark(metrics: Mapping[str, Any], method: str, metric: str) -> str:
    """A dagger where the best other method is told apart from this one."""
    tests = metrics["significance"].get(metric, {}).get("against best other", {})
    return " †" if method in tests and tests[method]["p_holm"] < LEVEL else ""


def _legend(metrics: Mapping[str, Any]) -> str:
    protocol, tests = metrics["protocol"], metrics["significance"]
    return (
        f"Mean over {len(protocol['split']['seed'])} splits and {protocol['interval']['confidence']:.0%} bootstrap interval "
        f"over {protocol['users_evaluated']:,} users; a column's best mean is bold. † ({', '.join(tests)}): differs from the "
        f"best other method, paired randomisation test over users, Holm-corrected p < {LEVEL:g}."
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
    return _table(["metric", "other", "CLLM4Rec less the other", "p", "p (Holm)"], rows) if rows else ""


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
    return _table(header, rows)


def _beside_table(beside: Mapping[str, Mapping[str, float]]) -> str:
    names = list(next(iter(beside.values())))
    rows = [[name_of(method), *(f"{beside[method][name]:.3f}" for name in names)] for method in methods_of(beside)]
    return _table(["", *names], rows)


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
    return _table(
        ["", "settings tried on each split", "minutes on each split", "minutes a setting", "peak memory"], rows
    )


def _chosen_table(chosen: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        [name_of(method), seed, ", ".join(f"{key} {value}" for key, value in params.items()) or "as configured"]
        for method in methods_of(chosen)
        for seed, params in chosen[method].items()
    ]
    return _table(["", "split", "setting"], rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _of_few(stratum: Mapping[str, Any]) -> dict[str, Any]:
    """The main rows alone, or the first few: more are not told apart in one plot."""
    results = stratum["results"]
    shown = [name for name in MAIN if name in results] or methods_of(results)[: len(MAIN)]
    return {**stratum, "results": {name: results[name] for name in shown}}


def plot_curves(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Validation by epoch: CLLM4Rec and its variants on the left, neural baselines on the right."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    known = [method for method in methods_of(curves) if curves[method]]
    for axes, title, is_ours in zip(panels, ("CLLM4Rec and its variants", "Baselines"), (True, False), strict=True):
        for method in known:
            if (method in VARIANTS) != is_ours:
                continue
            values = [entry["ndcg@100"] for entry in curves[method]]
            axes.plot(range(1, len(values) + 1), values, color=colour_of(method, curves), label=name_of(method))
            changes = [place for place, entry in enumerate(curves[method]) if entry["stage"] == "finetune"]
            if method == MODEL and changes:
                axes.axvline(changes[0] + 0.5, color=INK, linewidth=0.8, linestyle=":")
        axes.set_title(title, fontsize=11, color=INK)
        axes.set_xlabel("epoch (dotted: CLLM4Rec's finetuning begins)" if is_ours else "epoch", color=INK)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        plain(axes, "y")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    panels[0].set_ylabel("validation ndcg@100", color=INK)
    return figure
