"""The nightly list for every user: scored by Ray Data actors into staging, audited, published in one commit.

    plan = plan_score(config); report = score(plan)

A run that was killed goes on with the users it has not scored. Nothing is visible before the commit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
from ray.data.checkpoint import CheckpointConfig

from cllm4rec import artifacts
from cllm4rec.artifacts import digest_of, read_manifest
from cllm4rec.catalog import Catalog
from cllm4rec.config import Config
from cllm4rec.data.prepared import SPLITS, Histories, bucket_paths, read_tables
from cllm4rec.data.ragged import Ragged
from cllm4rec.data.staging import quiet_data_context
from cllm4rec.errors import ArtifactError
from cllm4rec.scoring.audit import Audit
from cllm4rec.scoring.publish import SCHEMA, current_run, publish, published_attempt
from cllm4rec.scoring.rules import Rules, read_deny_list, read_rules
from cllm4rec.scoring.scorer import Scorer

_MOST_USERS_PER_FILE = 65_536


@dataclasses.dataclass(frozen=True)
class ScorePlan:
    """One scoring run. `run_id` names its inputs: model, data, rules, k and date; `attempt` counts its publications."""

    config: Config
    run_id: str
    attempt: int
    run_date: str
    staging: str
    checkpoint_dir: str
    num_users: int


def plan_score(config: Config, force: bool = False) -> ScorePlan:
    """What `score` would do: the run that readers see already; a new attempt with `force` or where they see another.

    Raises ArtifactError where a stage is missing, DataError where the deny list is.
    """
    model = read_manifest(config.directory("model"), "model")
    prepared = read_manifest(config.directory("prepared"), "prepared")
    if model.inputs.get("prepared") != prepared.digest:
        raise ArtifactError(
            f"{config.directory('model')} was trained on other data than {config.directory('prepared')} holds; run the "
            "training stages again"
        )
    run_date = str(config.run_date or datetime.now(UTC).date())
    deny = sorted(set(read_deny_list(config.score.rules.deny)))
    run_id = digest_of([model.digest, prepared.digest, config.score.k, deny, run_date])[:16]
    attempt = published_attempt(config.directory("dump"), run_id)
    if force or current_run(config.directory("dump")) != run_id:
        attempt += 1
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
    """Whether readers see the lists this config would give."""
    return current_run(config.directory("dump")) == plan_score(config).run_id


def score(plan: ScorePlan) -> dict[str, Any]:
    """Score, audit, publish; returns the report. Raises AuditError, and publishes nothing, where a promise is broken;
    ArtifactError where the model is damaged.
    """
    config = plan.config
    started = time.monotonic()
    # Here, where an error is one sentence, and not in every actor first.
    artifacts.verify_files(config.directory("model"), read_manifest(config.directory("model"), "model"))
    rules, num_unknown_denied = read_rules(config.score.rules.deny, Catalog.load(config.directory("model")))
    if published_attempt(config.directory("dump"), plan.run_id) < plan.attempt:  # else its files are read by others
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


def forget_staged(plan: ScorePlan) -> None:
    """Drop what an interrupted or refused run of this plan has staged, so that everybody is scored anew."""
    if published_attempt(plan.config.directory("dump"), plan.run_id) < plan.attempt:
        artifacts.remove_directory(plan.staging)
        artifacts.remove_directory(plan.checkpoint_dir)


def num_staged(plan: ScorePlan) -> int:
    """Users whose lists are staged so far, for a progress line."""
    fs, path = artifacts.filesystem(plan.staging)
    num_rows = 0
    for file in fs.find(path) if fs.exists(path) else []:
        with contextlib.suppress(OSError, pa.ArrowInvalid), fs.open(file) as stream:  # one that is being written
            num_rows += pq.read_metadata(stream).num_rows
    return num_rows


def model_version(config: Config) -> str:
    return read_manifest(config.directory("model"), "model").digest[:12]


class ScoreUsers:
    """Ray Data actor: one loaded Scorer per process, one call per block of users."""

    def __init__(self, model_dir: str, k: int, rules: Rules, run_date: str, num_threads: int) -> None:
        import torch

        torch.set_num_threads(num_threads)
        self.scorer, self.rules, self.run_date = Scorer.load(model_dir), rules, run_date
        self.k = min(k, self.scorer.catalog.num_items)

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


def _users_per_file(plan: ScorePlan) -> int:
    """At least a batch; so many that every actor gets some sixteen, and at most what is soon scored again."""
    score = plan.config.score
    share = -(-plan.num_users // (16 * score.num_actors))
    return max(score.batch_users, min(share, _MOST_USERS_PER_FILE))


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
    with quiet_data_context():
        ray.data.DataContext.get_current().checkpoint_config = CheckpointConfig(
            id_column="user_id",
            checkpoint_path=artifacts.absolute(plan.checkpoint_dir),
            delete_checkpoint_on_success=False,
        )
        users = ray.data.read_parquet([artifacts.filesystem(path)[1] for path in paths], filesystem=source_fs)
        # Ray reads small files as one block, which would be one actor's, and nothing staged until its last user.
        users.repartition(target_num_rows_per_block=_users_per_file(plan)).map_batches(
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
