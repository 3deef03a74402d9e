"""The promotion gate: is the new model at least as good as the current one?

Both models rank for the same held-out users under the one protocol (`cllm4rec.metrics.protocol`), and the difference is
taken user by user, which cancels what users have in common. The new model passes if

    the 95 % interval of new - current does not reach below -promote.max_loss, and
    its mean is above that of popularity (promote.above_popularity), which every working model achieves.

The first model only has to pass the second test. The current model may have been trained on other data. It receives what
the new model receives, as far as it knows it: users it does not know are ranked from their history, and recommended items
that are no longer in the catalog are misses, as they would be for the user. If some held-out interactions may have been in
its training data, the comparison favors it, and a warning says so.
"""

from __future__ import annotations

import dataclasses
import logging
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow.compute as pc

from cllm4rec.arrays.ids import Catalog, remap_items
from cllm4rec.config import Config
from cllm4rec.data.prepared import load_histories
from cllm4rec.errors import ArtifactError, ConfigError, PromotionError
from cllm4rec.evaluation.stage import MODEL, evaluate_inputs, rank_with_scorer, reason_not_to_evaluate
from cllm4rec.metrics.intervals import interval
from cllm4rec.metrics.protocol import HeldOut
from cllm4rec.metrics.ranking import compute
from cllm4rec.scoring.scorer import Scorer
from cllm4rec.storage import artifacts, files
from cllm4rec.storage.artifacts import EXTENDED_FROM, read_manifest
from cllm4rec.storage.files import read_tables
from cllm4rec.storage.lease import hold
from cllm4rec.storage.registry import Pointer, current_model, promote_directory, read_pointer, rollback
from cllm4rec.typing import FloatArray

logger = logging.getLogger(__name__)

POPULARITY = "popularity"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The result of the gate. Differences are {mean, low, high}; `reasons` say why a model does not pass."""

    metric: str
    users: int
    candidate: float
    current: float | None
    difference: dict[str, float] | None
    popularity: float
    above_popularity: dict[str, float]
    reasons: tuple[str, ...]

    @property
    def passes(self) -> bool:
        return not self.reasons


def judge(candidate_B: FloatArray, current_B: FloatArray | None, popularity_B: FloatArray, config: Config) -> Verdict:
    """Compare values of `promote.metric`, one per user: the candidate with the current model and with popularity.

    current_B: None if no model was promoted yet.
    """
    samples, seed, limits = config.evaluate.bootstrap_samples, config.seed, config.promote
    above = interval(candidate_B - popularity_B, samples, seed)
    difference = None if current_B is None else interval(candidate_B - current_B, samples, seed)
    reasons = []
    if difference is not None and difference["low"] < -limits.max_loss:
        reasons.append(
            f"it differs from the current model by {_in_words(difference)} and may not reach below {-limits.max_loss:g} "
            "(promote.max_loss)"
        )
    if limits.above_popularity and above["mean"] <= 0:
        reasons.append(
            f"it differs from popularity by {_in_words(above)} and must be better (promote.above_popularity)"
        )
    return Verdict(
        metric=limits.metric,
        users=len(candidate_B),
        candidate=float(candidate_B.mean()),
        current=None if current_B is None else float(current_B.mean()),
        difference=difference,
        popularity=float(popularity_B.mean()),
        above_popularity=above,
        reasons=tuple(reasons),
    )


def promote(config: Config) -> dict[str, Any]:
    """Make `model/` current if it passes the gate; returns the result, which is also written to `models/report-*.json`.

    Does nothing if this model is current already. Raises PromotionError if the model does not pass (nothing changes),
    ArtifactError if `evaluation/` belongs to another model or other data, ConfigError if nothing is held out, ResourceError
    if another process promotes.
    """
    with hold(config.run.models, "a promotion"):
        digest = read_manifest(config.run.model, "model").digest
        before = read_pointer(config.output_dir)
        if before is not None and _trained_digest(current_model(config.output_dir)) == digest:
            return {"promoted": False, "already_current": True, "from": before.current, "to": before.current}
        verdict, warnings = measure(config, before)
        for warning in warnings:
            logger.warning("Note that %s", warning)
        result = {
            "promoted": verdict.passes,
            "from": before and before.current,
            "to": None,
            "warnings": warnings,
            **dataclasses.asdict(verdict),
        }
        if verdict.passes:
            pointer = promote_directory(config.output_dir, digest, _why(verdict), keep=config.promote.keep)
            result["to"] = pointer.current
        result["report"] = _write_report(config, result)
        if not verdict.passes:
            sentence = f"the model is not promoted: by {verdict.metric}, {' and '.join(verdict.reasons)}"
            raise PromotionError(f"{sentence}; see {result['report']}", result)
        return result


def _trained_digest(model_dir: str) -> str:
    """The digest of a model as it was trained, without the items that were added since (`cllm4rec extend`)."""
    manifest = read_manifest(model_dir, "model")
    return manifest.inputs.get(EXTENDED_FROM, manifest.digest)


def roll_back(config: Config) -> dict[str, Any]:
    """Make the previous model current again, without a gate. Raises like `registry.rollback` and `promote`."""
    with hold(config.run.models, "a rollback"):
        before, now = rollback(config.output_dir)
    return {"rolled_back": True, "from": before.current, "to": now.current, "from_promoted_at": before.promoted_at}


def measure(config: Config, before: Pointer | None) -> tuple[Verdict, list[str]]:
    """The verdict on `model/`, and warnings about how to read it."""
    reason = reason_not_to_evaluate(config)
    if reason is not None:
        raise ConfigError(
            f"the model cannot be compared: {reason}; without promoted models in {config.run.models}, score and serve use "
            "model/ as it is"
        )
    if not artifacts.is_current(config.run.evaluation, "evaluation", evaluate_inputs(config)):
        raise ArtifactError(
            f"{config.run.evaluation} belongs to another model, other data or settings; run cllm4rec evaluate first"
        )
    prepared_dir = config.run.prepared
    catalog = Catalog.load(prepared_dir)
    held_out = HeldOut.test(load_histories(prepared_dir), config.evaluate.read, config.evaluate.mask)
    candidate_B, popularity_B = (_measured(config, catalog, held_out, method) for method in (MODEL, POPULARITY))
    if before is None:
        return judge(candidate_B, None, popularity_B, config), []
    current_dir = current_model(config.output_dir)
    current_B = measure_with(Scorer.load(current_dir), catalog, held_out, config)
    return judge(candidate_B, current_B, popularity_B, config), _warnings(prepared_dir, current_dir)


def measure_with(scorer: Scorer, catalog: Catalog, held_out: HeldOut, config: Config) -> FloatArray:
    """`promote.metric` of a model for the users of `held_out`, whose indices are those of `catalog`."""
    theirs, metric = scorer.catalog, config.promote.metric
    item_of = theirs.item_map(catalog.item_ids)
    asked = dataclasses.replace(
        held_out,
        users=theirs.user_map(catalog.user_ids)[held_out.users],
        read=remap_items(held_out.read, item_of),
        masked=remap_items(held_out.masked, item_of),
    )
    item_BK = rank_with_scorer(scorer, asked, config.score.batch_users)
    # -1, an empty place, reads the last entry, which is -1 as well.
    ours = np.append(catalog.item_map(theirs.item_ids), -1)
    return compute(ours[item_BK], held_out.relevant, [metric])[metric]


def _measured(config: Config, catalog: Catalog, held_out: HeldOut, method: str) -> FloatArray:
    """The values of a method in `evaluation/`, in the order of `held_out`."""
    uri, metric = config.run.evaluation, config.promote.metric
    artifacts.verify_files(uri, read_manifest(uri, "evaluation"))
    rows = read_tables([files.join(uri, "per_user.parquet")], ["user_id", "method", metric])
    rows = rows.filter(pc.field("method") == method)
    if rows["user_id"].to_pylist() != catalog.user_ids[held_out.users].tolist():
        raise ArtifactError(f"{uri} has other users than the data; run cllm4rec evaluate --force")
    return np.asarray(rows[metric].to_numpy(), np.float64)


def _warnings(prepared_dir: str, current_dir: str) -> list[str]:
    trained_on = read_manifest(current_dir, "model").inputs.get("prepared")
    if trained_on == read_manifest(prepared_dir, "prepared").digest:
        return []
    return [
        "the current model was trained on other prepared data, which may contain held-out interactions; this favors it"
    ]


def _why(verdict: Verdict) -> str:
    if verdict.difference is None:
        return f"first model: {verdict.metric} {verdict.candidate:.4f}, popularity {verdict.popularity:.4f}"
    return f"{verdict.metric} {verdict.candidate:.4f}, {_in_words(verdict.difference)} compared with the previous model"


def _in_words(difference: dict[str, float]) -> str:
    return f"{difference['mean']:+.4f} ({difference['low']:+.4f} to {difference['high']:+.4f})"


def _write_report(config: Config, result: dict[str, Any]) -> str:
    now = datetime.now(UTC)
    uri = files.join(config.run.models, f"report-{now:%Y%m%dT%H%M%S%fZ}.json")
    files.write_json(uri, {**result, "at": now.isoformat(timespec="seconds")})
    return uri
