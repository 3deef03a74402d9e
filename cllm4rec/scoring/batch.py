"""The nightly list for every user: scored by Ray Data actors into staging, audited, published in one commit.

    plan = plan_score(config); report = score(plan)

A run that was killed goes on with the users it has not scored. Nothing is visible before the commit.
"""

from __future__ import annotations

import dataclasses
import time
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
from ray.data.checkpoint import CheckpointConfig

from cllm4rec import artifacts
from cllm4rec.artifacts import digest_of, read_manifest
from cllm4rec.catalog import Catalog
from cllm4rec.config import Config
from cllm4rec.data.prepared import SPLITS, Histories, bucket_paths, read_tables
from cllm4rec.data.ragged import Ragged
from cllm4rec.errors import ArtifactError
from cllm4rec.scoring.audit import Audit
from cllm4rec.scoring.publish import SCHEMA, publish, published_attempt
from cllm4rec.scoring.rules import Rules, read_rules
from cllm4rec.scoring.scorer import Scorer


@dataclasses.dataclass(frozen=True)
class ScorePlan:
    """One scoring run. `run_id` names its inputs: model, data, rules, k and date."""

    config: Config
    run_id: str
    attempt: int
    run_date: str
    staging: str
    checkpoint_dir: str
    num_users: int


def plan_score(config: Config, force: bool = False) -> ScorePlan:
    """What `score` would do; with `force` a published run is planned once more. Raises ArtifactError where a stage is missing."""
    model = read_manifest(config.directory("model"), "model")
    prepared = read_manifest(config.directory("prepared"), "prepared")
    if model.inputs["prepared"] != prepared.digest:
        raise ArtifactError(
            f"{config.directory('model')} was trained on other data than {config.directory('prepared')} holds; run the "
            "training stages again"
        )
    run_date = config.score.run_date or datetime.now(UTC).date().isoformat()
    deny = artifacts.digest_of_file(config.score.deny_items) if config.score.deny_items else None
    run_id = digest_of([model.digest, prepared.digest, config.score.k, deny, run_date])[:16]
    attempt = published_attempt(config.directory("dump"), run_id)
    attempt = attempt + 1 if force or attempt == 0 else attempt
    name = f"{run_id}-{attempt}"
    return ScorePlan(
        config=config,
        run_id=run_id,
        attempt=attempt,
        run_date=run_date,
        staging=artifacts.join(config.directory("dump"), f"run={name}"),
        # Named after the run: a checkpoint left by another one would make this one write nothing and succeed.
        checkpoint_dir=artifacts.join(config.directory("runs"), "score", name),
        num_users=int(prepared.counts["users"]),
    )


def is_published(config: Config) -> bool:
    plan = plan_score(config)
    return published_attempt(config.directory("dump"), plan.run_id) > 0


def score(plan: ScorePlan) -> dict[str, Any]:
    """Score, audit, publish; returns the report. Raises AuditError, and publishes nothing, where a promise is broken."""
    config = plan.config
    started = time.monotonic()
    rules, num_unknown_denied = read_rules(config.score.deny_items, Catalog.load(config.directory("model")))
    _write_lists(plan, rules)
    scored_s = time.monotonic() - started
    staged = [name for name in artifacts.list_files(plan.staging) if name.endswith(".parquet")]
    counts = audit_staged(plan, staged, rules)
    version = publish(
        config.directory("dump"),
        [f"{plan.staging.rsplit('/', 1)[-1]}/{name}" for name in staged],
        plan.run_id,
        plan.attempt,
        {"run_id": plan.run_id, "model_version": model_version(config), "run_date": plan.run_date},
    )
    artifacts.remove_directory(plan.checkpoint_dir)
    return {
        **counts,
        "denied_items": len(rules.deny),
        "unknown_denied_items": num_unknown_denied,
        "table_version": version,
        "run_id": plan.run_id,
        "run_date": plan.run_date,
        "model_version": model_version(config),
        "users_per_s": round(counts["users"] / max(scored_s, 1e-9), 1),
        "sha256": {name: artifacts.digest_of_file(artifacts.join(plan.staging, name)) for name in staged},
    }


def num_staged(plan: ScorePlan) -> int:
    """Users whose lists are staged so far, for a progress line."""
    import pyarrow.parquet as pq

    fs, path = artifacts.filesystem(plan.staging)
    if not fs.exists(path):
        return 0
    return sum(pq.read_metadata(fs.open(file)).num_rows for file in fs.find(path) if file.endswith(".parquet"))


def model_version(config: Config) -> str:
    return read_manifest(config.directory("model"), "model").digest[:12]


class ScoreUsers:
    """Ray Data actor: one loaded Scorer per process, one call per block of users."""

    def __init__(self, model_dir: str, k: int, rules: Rules, run_date: str, num_threads: int) -> None:
        import torch

        torch.set_num_threads(num_threads)
        self.scorer, self.k, self.rules, self.run_date = Scorer.load(model_dir), k, rules, run_date

    def __call__(self, users: pa.Table) -> pa.Table:
        item_BK, score_BK = self.scorer.top_k(users["user"].to_numpy(), known_items(users), self.k, self.rules)
        lengths = (item_BK >= 0).sum(axis=1)
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
        item_ids = self.scorer.catalog.item_ids[item_BK[item_BK >= 0]]
        return pa.table(
            [
                users["user_id"].cast(pa.string()),
                pa.ListArray.from_arrays(offsets, pa.array(item_ids, pa.string())),
                pa.ListArray.from_arrays(offsets, pa.array(score_BK[item_BK >= 0], pa.float32())),
                pa.array([self.run_date] * len(users), pa.string()),
                pa.array([self.scorer.model_version] * len(users), pa.string()),
            ],
            schema=SCHEMA,
        )


def known_items(users: pa.Table) -> Ragged:
    """Everything a user has interacted with, whatever split it fell into: what a nightly list reads and leaves out."""
    return Ragged.interleave(*(Ragged.from_arrow(users[split]) for split in SPLITS))


def audit_staged(plan: ScorePlan, staged: list[str], rules: Rules) -> dict[str, int]:
    """Look at every staged list. Raises AuditError where one is not what was promised."""
    config = plan.config
    histories = Histories.load(config.directory("prepared"))
    audit = Audit(Catalog.load(config.directory("model")), histories.together(*SPLITS), rules, config.score.k)
    for name in staged:
        audit.add(read_tables([artifacts.join(plan.staging, name)]))
    return audit.finish()


def _write_lists(plan: ScorePlan, rules: Rules) -> None:
    config, cluster = plan.config, plan.config.cluster
    if not artifacts.exists(plan.staging):
        artifacts.remove_directory(plan.checkpoint_dir)  # it speaks of files that are gone
    for directory in (plan.staging, plan.checkpoint_dir):
        fs, path = artifacts.filesystem(directory)
        fs.makedirs(path, exist_ok=True)
    staging_fs, staging = artifacts.filesystem(plan.staging)
    paths = bucket_paths(config.directory("prepared"), "histories")
    source_fs, _ = artifacts.filesystem(paths[0])
    context = ray.data.DataContext.get_current()
    before, context.checkpoint_config = (
        context.checkpoint_config,
        CheckpointConfig(
            id_column="user_id",
            checkpoint_path=artifacts.absolute(plan.checkpoint_dir),
            delete_checkpoint_on_success=False,
        ),
    )
    try:
        ray.data.read_parquet([artifacts.filesystem(path)[1] for path in paths], filesystem=source_fs).map_batches(
            ScoreUsers,
            fn_constructor_args=(
                artifacts.absolute(config.directory("model")),
                config.score.k,
                rules,
                plan.run_date,
                cluster.threads_per_worker or cluster.cpus_per_worker,
            ),
            batch_format="pyarrow",
            batch_size=config.score.batch_users,
            compute=ray.data.ActorPoolStrategy(size=config.score.num_actors),
            num_cpus=cluster.cpus_per_worker,
            num_gpus=1 if cluster.use_gpu else 0,
        ).write_parquet(staging, filesystem=staging_fs)
    finally:
        context.checkpoint_config = before
