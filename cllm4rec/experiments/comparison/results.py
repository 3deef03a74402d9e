"""Finished method runs of all splits → the content of `evaluation/metrics.json`.

Shapes: B (user, split) pairs with test items, split after split; R some of these rows; I users, S splits, K list length.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cllm4rec.arrays.ids import Catalog
from cllm4rec.arrays.ragged import Ragged
from cllm4rec.config import Config, Sweep
from cllm4rec.data.prepared import load_histories
from cllm4rec.errors import DataError
from cllm4rec.evaluation.stage import DEFINITIONS, HEADLINE, describe, published_figures
from cllm4rec.experiments.comparison.methods import MODEL, VARIANTS
from cllm4rec.experiments.comparison.sweeps import describe_sweeps, runs_of_value
from cllm4rec.experiments.comparison.trial import MethodRun, Result, of_split, read_result
from cllm4rec.metrics.intervals import (
    DRAWS,
    against_best_other,
    compared_with,
    interval,
    mean_over_splits,
    summarize,
)
from cllm4rec.metrics.lists import coverage, popularity_lift
from cllm4rec.metrics.protocol import HeldOut
from cllm4rec.metrics.ranking import compute, parse_metric
from cllm4rec.metrics.strata import Stratum, history_strata, popularity_strata
from cllm4rec.storage.artifacts import read_manifest
from cllm4rec.training.loop import VALIDATION_METRIC
from cllm4rec.typing import FloatArray, IntArray

METRICS = ("recall@10", "recall@20", "recall@40", "ndcg@10", "ndcg@100")
TESTED = (HEADLINE, "ndcg@100")
"""The metrics of the significance tests."""
LIST_LENGTH = parse_metric(HEADLINE)[1]
"""The list length of coverage and popularity lift."""


@dataclasses.dataclass(frozen=True)
class Splits:
    """The test splits of all seeds: `held_out` has one row per user and split."""

    seeds: list[int]
    catalogs: list[Catalog]
    held_out: HeldOut
    split_B: IntArray

    @classmethod
    def load(cls, config: Config, seeds: list[int]) -> Splits:
        """Raises DataError if a split has no user with a test item."""
        prepared = [of_split(config, seed).run.prepared for seed in seeds]
        parts = [
            HeldOut.test(load_histories(directory), config.evaluate.read, config.evaluate.mask)
            for directory in prepared
        ]
        if not all(len(part.users) for part in parts):
            raise DataError("a split has no user with a test item; raise data.split.test")
        split_B = np.repeat(np.arange(len(parts)), [len(part.users) for part in parts])
        return cls(seeds, [Catalog.load(directory) for directory in prepared], _joined(parts), split_B)

    def spread(self, value_R: FloatArray, rows: IntArray) -> FloatArray:
        """Values of some rows as value_IS, NaN elsewhere. Splits without any of the rows are left out."""
        value_IS = np.full((self.catalogs[0].num_users, len(self.seeds)), np.nan)
        value_IS[self.held_out.users[rows], self.split_B[rows]] = value_R
        spread: FloatArray = value_IS[:, ~np.isnan(value_IS).all(axis=0)]
        return spread

    def strata(self) -> dict[str, list[Stratum]]:
        """Users grouped by history length, and test items grouped by popularity, with cold items last."""
        return {"history length": history_strata(self.held_out), "item popularity": self._by_popularity()}

    def _by_popularity(self) -> list[Stratum]:
        relevant = self.held_out.relevant
        named: dict[str, npt.NDArray[np.bool_]] = {}
        for split, catalog in enumerate(self.catalogs):
            rows = np.flatnonzero(self.split_B == split)
            part = dataclasses.replace(self.held_out, relevant=relevant.take(rows))
            for stratum in popularity_strata(part, catalog.item_counts):
                keys = named.setdefault(stratum.label.partition(" (")[0], np.zeros(len(relevant.values), np.bool_))
                keys |= relevant.isin(stratum.relevant.scatter(rows[stratum.rows], len(relevant)))
            is_cold = (catalog.item_counts == 0)[relevant.values] & (self.split_B == split)[relevant.rows]
            named["cold"] = named.get("cold", np.zeros(len(relevant.values), np.bool_)) | is_cold
        labels = [label for label in ("head", "middle", "tail", "cold") if label in named]
        strata = [Stratum.of(label, relevant.where(named[label])) for label in labels]
        return [stratum for stratum in strata if len(stratum.rows)]


def _joined(parts: Sequence[HeldOut]) -> HeldOut:
    return HeldOut(
        users=np.concatenate([part.users for part in parts]),
        num_train=np.concatenate([part.num_train for part in parts]),
        read=Ragged.concat([part.read for part in parts]),
        masked=Ragged.concat([part.masked for part in parts]),
        relevant=Ragged.concat([part.relevant for part in parts]),
        num_dropped=sum(part.num_dropped for part in parts),
    )


def collect(config: Config, names: Sequence[str]) -> dict[str, Any]:
    """`metrics.json` of the finished method runs. Raises ArtifactError if a run is not finished."""
    splits = Splits.load(config, config.compare.seeds)
    runs = {name: [read_result(MethodRun(of_split(config, seed), name)) for seed in splits.seeds] for name in names}
    reasons = {name: [result.summary["skipped"] for result in results] for name, results in runs.items()}
    skipped = {name: max(reason) for name, reason in reasons.items() if any(reason)}
    runs = {name: results for name, results in runs.items() if name not in skipped}
    ranked = {name: np.concatenate([result.ranked for result in results]) for name, results in runs.items()}
    values = _values(splits, ranked)
    samples, seed = config.evaluate.bootstrap_samples, config.seed
    return {
        "protocol": _protocol(config, splits, skipped),
        "results": {name: summarize(by_metric, samples, seed) for name, by_metric in values.items()},
        "significance": {
            metric: _tests({name: by_metric[metric] for name, by_metric in values.items()}, samples, seed)
            for metric in TESTED
        },
        "beyond accuracy": {name: _beyond_accuracy(splits, item_BK) for name, item_BK in ranked.items()},
        "strata": {kind: _strata(splits, strata, ranked, samples, seed) for kind, strata in splits.strata().items()},
        "budget": {
            "trials": config.compare.trials,
            "minutes": config.compare.minutes,
            "used": {name: _used(results) for name, results in runs.items()},
        },
        "cost": {name: _cost(results) for name, results in runs.items()} | _backbone_cost(config, list(runs)),
        "chosen": {name: _chosen(splits.seeds, results) for name, results in runs.items()},
        "curves": {name: results[0].summary["curve"] for name, results in runs.items()},
        "sensitivity": _sensitivity(config),
        **published_figures(config),
    }


def _sensitivity(config: Config) -> dict[str, list[dict[str, Any]]]:
    """For each sweep its values with all metrics, or with the reason why the value could not be trained."""
    if not config.compare.sweeps:
        return {}
    splits = Splits.load(config, config.compare.seeds_of_sweeps)
    return {
        sweep.name: [{"value": value, **_metrics_of_value(config, splits, sweep, value)} for value in sweep.values]
        for sweep in config.compare.sweeps
    }


def _metrics_of_value(config: Config, splits: Splits, sweep: Sweep, value: Any) -> dict[str, Any]:
    results = [read_result(run) for run in runs_of_value(config, sweep, value)]
    reason = max(result.summary["skipped"] for result in results)
    if reason:
        return {"failed": reason}
    (by_metric,) = _values(splits, {MODEL: np.concatenate([result.ranked for result in results])}).values()
    return summarize(by_metric, config.evaluate.bootstrap_samples, config.seed)


def _values(splits: Splits, ranked: Mapping[str, IntArray]) -> dict[str, dict[str, FloatArray]]:
    all_rows = np.arange(len(splits.held_out.users))
    return {
        name: {
            metric: splits.spread(value_B, all_rows)
            for metric, value_B in compute(item_BK, splits.held_out.relevant, METRICS).items()
        }
        for name, item_BK in ranked.items()
    }


def _tests(values: Mapping[str, FloatArray], samples: int, seed: int) -> dict[str, Any]:
    against_model = compared_with(MODEL, values, samples, seed) if MODEL in values else {}
    return {
        "best": max(values, key=lambda name: mean_over_splits(values[name])),
        "against best other": against_best_other(values, samples, seed),
        "against cllm4rec": against_model,
    }


def _beyond_accuracy(splits: Splits, item_BK: IntArray) -> dict[str, float]:
    """Coverage and popularity lift of the lists, as means over the splits."""
    tops = [item_BK[splits.split_B == split, :LIST_LENGTH] for split in range(len(splits.seeds))]
    parts = [(top_BK[top_BK >= 0], catalog) for top_BK, catalog in zip(tops, splits.catalogs, strict=True)]
    lifts = [popularity_lift(catalog.item_counts[item_E], catalog.item_counts) for item_E, catalog in parts]
    return {
        f"coverage@{LIST_LENGTH}": float(np.mean([coverage(item_E, catalog.num_items) for item_E, catalog in parts])),
        f"popularity lift@{LIST_LENGTH}": float(np.mean(lifts)),
    }


def _strata(
    splits: Splits, strata: Sequence[Stratum], ranked: Mapping[str, IntArray], samples: int, seed: int
) -> list[dict[str, Any]]:
    """The headline metric of all methods in each stratum."""
    summaries = []
    for stratum in strata:
        values = {
            name: compute(item_BK[stratum.rows], stratum.relevant, [HEADLINE])[HEADLINE]
            for name, item_BK in ranked.items()
        }
        summaries.append(
            {
                "label": stratum.label,
                "users": len(np.unique(splits.held_out.users[stratum.rows])),
                "test_items": len(stratum.relevant.values),
                "metric": HEADLINE,
                "results": {
                    name: interval(splits.spread(value_R, stratum.rows), samples, seed)
                    for name, value_R in values.items()
                },
            }
        )
    return summaries


def _protocol(config: Config, splits: Splits, skipped: Mapping[str, str]) -> dict[str, Any]:
    described = describe(config, splits.held_out, splits.catalogs[0].num_items)
    cold = [int((catalog.item_counts == 0).sum()) for catalog in splits.catalogs]
    return described | {
        "metrics": {name: DEFINITIONS[parse_metric(name)[0]] for name in METRICS},
        "split": {**described["split"], "seed": splits.seeds},
        "users": splits.catalogs[0].num_users,
        "users_evaluated": len(np.unique(splits.held_out.users)),
        "users_dropped": splits.held_out.num_dropped,
        "cold_items": cold,
        "chosen_by": f"{VALIDATION_METRIC} on the validation items, separately for each split",
        "test": {"kind": "paired randomization over users, two-sided", "draws": DRAWS, "correction": "Holm"},
        "interval": {**described["interval"], "unit": "users, each with all splits"},
        "skipped": dict(skipped),
        "sweeps": describe_sweeps(config),
    }


def _used(results: Sequence[Result]) -> dict[str, list[float]]:
    """Settings tried, settings failed and minutes, one value per split."""
    return {
        "trials": [len(result.summary["tried"]) for result in results],
        "failed": [sum("failed" in trial for trial in result.summary["tried"]) for result in results],
        "minutes": [round(result.summary["seconds"] / 60, 2) for result in results],
    }


def _cost(results: Sequence[Result]) -> dict[str, float]:
    """Minutes to train and validate one setting on one thread, and the peak memory over all processes."""
    seconds = [trial["seconds"] for result in results for trial in result.summary["tried"] if "seconds" in trial]
    memory = max(result.summary["peak_memory_mb"] for result in results)
    return {"minutes_per_setting": float(np.mean(seconds)) / 60, "peak_memory_mb": memory}


def _backbone_cost(config: Config, names: Sequence[str]) -> dict[str, Any]:
    """Minutes to train each language model that several method runs share."""
    split = of_split(config, config.compare.seeds[0])
    directories = {MethodRun(split, name).backbone for name in names if name in VARIANTS} - {None}
    return {
        str(directory).rpartition("/")[2]: {
            "minutes_per_setting": read_manifest(str(directory), "backbone").counts["seconds"] / 60
        }
        for directory in sorted(map(str, directories))
    }


def _chosen(seeds: Sequence[int], results: Sequence[Result]) -> dict[str, Any]:
    return {str(seed): result.summary["chosen"] for seed, result in zip(seeds, results, strict=True)}
