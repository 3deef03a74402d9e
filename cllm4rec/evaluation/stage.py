"""The evaluate stage: reads `prepared/` and `model/`, writes `evaluation/`. CLLM4Rec and baselines under one protocol.

    evaluation/
      metrics.json      protocol (every choice), results (method → metric → mean, low, high), comparison, strata
      per_user.parquet  user_id, num_train, num_test, method, and every metric
      top100.parquet    user_id, item_ids: CLLM4Rec's lists
      report.md, *.png  the same content for people

Shapes: B users, K places of a ranked list.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from cllm4rec.arrays.histories import Histories
from cllm4rec.arrays.ids import Catalog
from cllm4rec.arrays.ragged import chunks, offsets_of
from cllm4rec.config import Config
from cllm4rec.data.prepared import load_histories
from cllm4rec.errors import ArtifactError, DataError
from cllm4rec.evaluation.baseline import TrainingData
from cllm4rec.evaluation.ease import MAX_ITEMS, TUNED_ON, tune_ease
from cllm4rec.evaluation.popularity import Popularity
from cllm4rec.evaluation.report import render
from cllm4rec.evaluation.results import EvaluationProtocol, EvaluationReport, PairedComparison, StratumResult
from cllm4rec.metrics.intervals import CONFIDENCE, interval, summarize
from cllm4rec.metrics.protocol import HeldOut, Recommender, rank_with
from cllm4rec.metrics.ranking import METRICS, compute, depth, parse_metric
from cllm4rec.metrics.strata import Stratum, history_strata, popularity_strata
from cllm4rec.scoring.scorer import Scorer
from cllm4rec.staleness import settings_digest
from cllm4rec.storage.artifacts import Manifest, read_manifest, write_directory
from cllm4rec.storage.files import join, write_bytes, write_table
from cllm4rec.typing import FloatArray, IntArray

logger = logging.getLogger(__name__)

MODEL = "cllm4rec"
CONTROL = "without_lm"
"""The same model with the part of its language model set to zero: what the language model adds."""
DEFINITIONS = {
    "recall": "hits among the first k over min(k, number of test items), mean over users",
    "ndcg": "binary relevance, gain 1 / log2(rank + 1), over the gain of an ideal list of length k, mean over users",
}
HEADLINE = "recall@20"
"""The metric of the paired comparison and of the strata."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Everything the stage writes. Row r of a ranked list or of a metric's values belongs to row r of `held_out`.

    ranked: method → item_BK. per_user: method → metric → value_B. report: the content of `metrics.json`.
    """

    held_out: HeldOut
    ranked: dict[str, IntArray]
    per_user: dict[str, dict[str, FloatArray]]
    report: EvaluationReport


def evaluate_inputs(config: Config) -> dict[str, str]:
    """Digests of everything the result depends on; while they are equal, the stage can be skipped."""
    return {
        "prepared": read_manifest(config.run.prepared, "prepared").digest,
        "model": read_manifest(config.run.model, "model").digest,
        "settings": settings_digest(config, "evaluate"),
    }


def evaluate(config: Config) -> Manifest:
    """Rank the whole catalog for every user with test items, write `evaluation/` and return its manifest.

    Raises ArtifactError if `prepared/` or `model/` is missing or they do not belong together, DataError if no user has a
    test item.
    """
    inputs, uri = evaluate_inputs(config), config.run.evaluation
    prepared_dir, model_dir = config.run.prepared, config.run.model
    catalog, scorer = Catalog.load(prepared_dir), Scorer.load(model_dir)
    if not _same_catalog(catalog, scorer.catalog):
        raise ArtifactError(
            f"{model_dir} was trained on other users or items than {prepared_dir} holds; "
            "run cllm4rec pretrain and cllm4rec finetune again"
        )
    evaluation = evaluate_methods(load_histories(prepared_dir), catalog, scorer, config)
    with write_directory(uri, kind="evaluation", inputs=inputs, config=config.model_dump(mode="json")) as draft:
        write_evaluation(draft.uri, evaluation, catalog)
        draft.counts.update(users=len(evaluation.held_out.users), methods=len(evaluation.ranked))
    return read_manifest(uri, "evaluation")


def reason_not_to_evaluate(config: Config) -> str | None:
    """Why the config leaves nothing to evaluate on, or None."""
    return None if config.data.split.has_test else "data.split.test is 0, so no item is held out to measure with"


def evaluate_methods(histories: Histories, catalog: Catalog, scorer: Scorer, config: Config) -> Evaluation:
    """Rank with every method and measure, without files. Raises DataError if no user has a test item."""
    held_out = HeldOut.test(histories, config.evaluate.read, config.evaluate.mask)
    if not len(held_out.users):
        raise DataError("no user has a test item to evaluate on; raise data.split.test and run cllm4rec prepare again")
    with _timed(MODEL, held_out):
        ranked = {MODEL: rank_with_scorer(scorer, held_out, config.score.batch_users)}
    control = scorer.without_language_model()
    if control is not None:
        ranked[CONTROL] = rank_with_scorer(control, held_out, config.score.batch_users)
    baselines = fit_baselines(TrainingData.of(histories, catalog))
    for name, baseline in baselines.fitted.items():
        with _timed(name, held_out):
            ranked[name] = rank_with(
                baseline, held_out.users, held_out.read, held_out.masked, catalog.num_items, depth()
            )
    per_user = {method: compute(item_BK, held_out.relevant) for method, item_BK in ranked.items()}
    samples, seed = config.evaluate.bootstrap_samples, config.seed
    report = EvaluationReport(
        protocol=EvaluationProtocol(
            **describe(config, held_out, catalog.num_items),
            model_version=scorer.model_version,
            baselines=baselines.choices,
            skipped=baselines.skipped,
        ),
        results={method: summarize(values, samples, seed) for method, values in per_user.items()},
        comparison=compare({method: values[HEADLINE] for method, values in per_user.items()}, samples, seed),
        strata={
            "history length": summarize_strata(history_strata(held_out), ranked, samples, seed),
            "item popularity": summarize_strata(
                popularity_strata(held_out, catalog.item_counts), ranked, samples, seed
            ),
        },
        **published_figures(config),
    )
    return Evaluation(held_out, ranked, per_user, report)


def rank_with_scorer(scorer: Scorer, held_out: HeldOut, batch_users: int) -> IntArray:
    """The Scorer's ranked lists (item_BK), in chunks of users. Raises ArtifactError if a score is not finite."""
    parts = []
    for rows in tqdm(list(chunks(len(held_out.users), batch_users)), desc=MODEL, unit="batch", disable=None):
        read, masked = held_out.read.take(rows), held_out.masked.take(rows)
        item_BK, score_BK = scorer.top_k(held_out.users[rows], read, depth(), exclude=masked)
        if not np.isfinite(score_BK[item_BK >= 0]).all():
            raise ArtifactError(
                f"model {scorer.model_version} gives scores that are not finite; "
                "run cllm4rec finetune --force and look at its losses"
            )
        parts.append(item_BK)
    return np.concatenate(parts)


@dataclasses.dataclass(frozen=True)
class Baselines:
    """Fitted recommenders by name, the settings chosen for each, and why others were skipped."""

    fitted: dict[str, Recommender]
    choices: dict[str, dict[str, Any]]
    skipped: dict[str, str]


def fit_baselines(training: TrainingData) -> Baselines:
    """Fit on the training split alone, like CLLM4Rec's tables. If EASE cannot run, it is skipped with a warning."""
    baselines = Baselines({"popularity": Popularity().fit(training)}, {"popularity": {"fitted_on": "train"}}, {})
    reason = _reason_against_ease(training.num_items, len(training.validation.users))
    if reason:
        logger.warning("EASE is skipped: %s", reason)
        baselines.skipped["ease"] = reason
        return baselines
    ease, reached = tune_ease(training)
    baselines.fitted["ease"] = ease
    baselines.choices["ease"] = {
        "fitted_on": "train",
        "regularization": ease.regularization,
        "tuned_on": f"{TUNED_ON} of the validation split",
        "grid": {f"{regularization:g}": value for regularization, value in reached.items()},
    }
    return baselines


def _reason_against_ease(num_items: int, num_validation_users: int) -> str:
    if num_items > MAX_ITEMS:
        return f"its dense {num_items:,} × {num_items:,} matrices need too much memory above {MAX_ITEMS:,} items"
    return "" if num_validation_users else "no user has a validation item to tune it on"


def describe(config: Config, held_out: HeldOut, num_items: int) -> dict[str, Any]:
    """The choices of the protocol that an evaluation and a comparison share, for `metrics.json`."""
    return {
        "split": config.data.split.model_dump(),
        "read": config.evaluate.read,
        "mask": config.evaluate.mask,
        "metrics": {name: DEFINITIONS[parse_metric(name)[0]] for name in METRICS},
        "ranking": "the whole catalog; equal scores by lower item index",
        "items_ranked": num_items,
        "users_evaluated": len(held_out.users),
        "users_dropped": held_out.num_dropped,
        "test_items": len(held_out.relevant.values),
        "interval": {
            "kind": "percentile bootstrap over users",
            "confidence": CONFIDENCE,
            "samples": config.evaluate.bootstrap_samples,
            "seed": config.seed,
        },
    }


def published_figures(config: Config) -> dict[str, Any]:
    """The entry of `metrics.json` for figures of others; empty if the config names none."""
    published = config.evaluate.published
    return {} if published is None else {"published": published.model_dump(mode="json")}


def compare(headline: Mapping[str, FloatArray], samples: int, seed: int) -> PairedComparison:
    """HEADLINE of every method minus that of the best baseline, user by user: pairs cancel what users have in common.

    The model without its language model is no baseline: it is a part of the model.
    """
    baseline = max(
        (method for method in headline if method not in (MODEL, CONTROL)),
        key=lambda method: float(headline[method].mean()),
    )
    differences = {
        method: interval(values_B - headline[baseline], samples, seed)
        for method, values_B in headline.items()
        if method != baseline
    }
    return PairedComparison(HEADLINE, baseline, differences)


def summarize_strata(
    strata: Sequence[Stratum], ranked: Mapping[str, IntArray], samples: int, seed: int
) -> list[StratumResult]:
    """HEADLINE of every method in every stratum."""
    summaries = []
    for stratum in strata:
        values = {
            name: compute(item_BK[stratum.rows], stratum.relevant, [HEADLINE]) for name, item_BK in ranked.items()
        }
        results = {name: interval(value[HEADLINE], samples, seed) for name, value in values.items()}
        summaries.append(StratumResult(stratum.label, len(stratum.rows), HEADLINE, results))
    return summaries


def write_evaluation(uri: str, evaluation: Evaluation, catalog: Catalog) -> None:
    """Write the files named at the top of this module below `uri`."""
    evaluation.report.save(uri)
    write_table(per_user_table(evaluation, catalog), join(uri, "per_user.parquet"))
    write_table(top_table(evaluation, catalog), join(uri, "top100.parquet"))
    for name, content in render(evaluation.report).items():
        write_bytes(join(uri, name), content)


def per_user_table(evaluation: Evaluation, catalog: Catalog) -> pa.Table:
    """One row per method and user."""
    held_out, methods = evaluation.held_out, list(evaluation.per_user)
    times, user_ids = len(methods), catalog.user_ids[held_out.users]
    columns = {
        "user_id": pa.array(np.tile(user_ids, times), pa.string()),
        "num_train": pa.array(np.tile(held_out.num_train, times)),
        "num_test": pa.array(np.tile(held_out.relevant.lengths, times)),
        "method": pa.array(np.repeat(methods, len(user_ids)).astype(object), pa.string()),
    }
    metrics = {
        name: pa.array(np.concatenate([evaluation.per_user[method][name] for method in methods])) for name in METRICS
    }
    return pa.table({**columns, **metrics})


def top_table(evaluation: Evaluation, catalog: Catalog) -> pa.Table:
    """CLLM4Rec's list for each user, as original ids."""
    item_BK = evaluation.ranked[MODEL]
    placed_BK = item_BK >= 0
    item_ids = pa.array(catalog.item_ids, pa.string()).take(pa.array(item_BK[placed_BK]))
    lists = pa.LargeListArray.from_arrays(pa.array(offsets_of(placed_BK.sum(axis=1))), item_ids)
    user_ids = pa.array(catalog.user_ids[evaluation.held_out.users], pa.string())
    return pa.table({"user_id": user_ids, "item_ids": lists})


def _same_catalog(one: Catalog, other: Catalog) -> bool:
    return np.array_equal(one.user_ids, other.user_ids) and np.array_equal(one.item_ids, other.item_ids)


@contextlib.contextmanager
def _timed(method: str, held_out: HeldOut) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds, num_users = time.perf_counter() - start, len(held_out.users)
    logger.info(
        "%s ranked the catalog for %d users in %.1f s (%.0f users/s)", method, num_users, seconds, num_users / seconds
    )
