"""The list for every user: histories merged, scored by Ray Data actors into staging, audited, published in one commit.

    plan = plan_score(config, nightly=True); facts = score(plan)

A run that was killed goes on with the users it has not scored. Nothing is visible before the commit. This file hands
work to Ray; what is done is in `histories`, `scorer`, `audit`, `drift` and `publish`. The driver keeps counts, the
catalog's items and a sample of the lists, however many users there are.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray.data
from ray.data.checkpoint import CheckpointConfig

from cllm4rec.arrays.ids import Catalog
from cllm4rec.arrays.ragged import Ragged, slices
from cllm4rec.cluster import processes
from cllm4rec.config import Source
from cllm4rec.data.prepared import bucket_name, bucket_paths
from cllm4rec.data.ray_data import quiet_data_context, ray_map
from cllm4rec.data.records import Limits
from cllm4rec.errors import ArtifactError, AuditError, DataError
from cllm4rec.nightly import drift
from cllm4rec.nightly.audit import audit_files, hashed
from cllm4rec.nightly.events import BucketMap, events_digest, events_of, inspect_events, num_bytes, stage_events
from cllm4rec.nightly.histories import Bucket, files_per_bucket, write_bucket
from cllm4rec.nightly.plan import ScorePlan
from cllm4rec.nightly.report import DriftReport, write_report
from cllm4rec.scoring.rules import Rules, read_rules
from cllm4rec.scoring.scorer import Scorer
from cllm4rec.storage import artifacts, files
from cllm4rec.storage.artifacts import Manifest, is_current, read_manifest
from cllm4rec.storage.files import join
from cllm4rec.storage.lease import hold
from cllm4rec.storage.table import SCHEMA, current_files, publish, published_attempt
from cllm4rec.storage.tombstones import Tombstones

_MOST_USERS_PER_FILE = 65_536
_BYTES_PER_NEW_BUCKET = 64 << 20
_COUNTED = ("users", "short_lists", "capped_lists")

Progress = Callable[[Callable[[], int], int, str], contextlib.AbstractContextManager[None]]
"""Shows how many of a total are done while a block runs."""


def score(plan: ScorePlan, progress: Progress | None = None, accept_drift: bool = False) -> dict[str, Any]:
    """Merge histories, score, audit, publish, report; returns the facts of `report.json`.

    Raises AuditError, and publishes nothing, where a promise is broken or where a nightly run's lists are further from
    the last ones than `nightly.drift` allows; ArtifactError where the model is damaged; ResourceError where another run
    is at work on the same table.
    """
    with hold(plan.dump_dir, f"the scoring run {plan.run_id}"):
        night = ScoringRun(plan, accept_drift)
        try:
            night.run(progress)
        except AuditError as error:
            night.facts |= {"status": "refused", "reason": str(error)}
            raise
        finally:
            if night.facts["status"] != "interrupted":
                write_report(plan.report_dir, night.finished(), night.drift)
    return night.facts


class ScoringRun:
    """One run of a plan, from the top: what it did so far is in `facts`."""

    def __init__(self, plan: ScorePlan, accept_drift: bool) -> None:
        self.plan, self._accept_drift = plan, accept_drift
        self.drift: DriftReport | None = None
        self._seconds: dict[str, float] = {}
        self.facts: dict[str, Any] = {
            "status": "interrupted",
            "run_id": plan.run_id,
            "attempt": plan.attempt,
            "run_date": str(plan.run_date),
            "model_version": plan.model_version,
            "model_dir": plan.model_dir,
            "inputs": plan.inputs,
            "seconds": self._seconds,
        }

    def run(self, progress: Progress | None) -> None:
        plan = self.plan
        # Here, where an error is one sentence, and not in every actor first.
        artifacts.verify_files(plan.model_dir, read_manifest(plan.model_dir, "model"))
        items = Catalog.load_items(plan.model_dir)
        rules = read_rules(plan.config.score.rules, items, plan.run_date)
        self.facts["rules"] = rules.counts
        with self._timed("histories"):
            histories = merge_histories(plan)
        self.facts["histories"] = histories.counts
        is_written = published_attempt(plan.dump_dir, plan.run_id) >= plan.attempt  # then its files are read by others
        if not is_written:
            self._score(histories, rules, progress)
        with self._timed("audit"):
            counts, sha256 = audit_staged(plan, histories, rules)
        self.facts |= {**counts, "sha256": sha256}
        if plan.is_nightly and not is_written:
            with self._timed("drift"):
                self._compare(list(sha256), items)
        with self._timed("publish"):
            self._publish(list(sha256))

    def finished(self) -> dict[str, Any]:
        self._seconds["total"] = round(sum(self._seconds.values()), 3)
        return self.facts

    def _score(self, histories: Manifest, rules: Rules, progress: Progress | None) -> None:
        num_users, already = int(histories.counts["users"]), num_staged(self.plan)
        with self._timed("score"):
            shown = progress(functools.partial(num_staged, self.plan), num_users, "users") if progress else None
            with shown or contextlib.nullcontext():
                write_lists(self.plan, histories, rules)
        config, seconds = self.plan.config, max(self._seconds["score"], 1e-9)
        users_per_s = max(num_users - already, 0) / seconds
        units = config.score.num_actors * (1 if config.cluster.use_gpu else config.cluster.cpus_per_worker)
        self.facts |= {"users_scored": num_users - already, "users_per_s": round(users_per_s, 1)}
        self.facts["cost"] = {
            "unit": "GPU-hours" if config.cluster.use_gpu else "core-hours",
            "per_million_users": round(units * 1e6 / 3600 / users_per_s, 4) if users_per_s else None,
        }

    def _compare(self, staged: list[str], items: Catalog) -> None:
        """Against the lists readers see; a first night has none."""
        plan, old_files = self.plan, current_files(self.plan.dump_dir)
        if not old_files:
            return
        most, num_users = plan.config.nightly.drift.sample_users, int(self.facts["users"])
        old = _sampled(old_files, most, num_users)
        new = _sampled([join(plan.staging, name) for name in staged], most, num_users)
        self.drift = DriftReport(drift.compare(old, new, (items.item_ids, items.item_counts)), old, new)
        breaches = drift.breaches(self.drift.drift, plan.config.nightly.drift)
        gone = pc.filter(old["user_id"], pc.invert(pc.is_in(old["user_id"], value_set=new["user_id"].combine_chunks())))
        examples = [hashed(user_id) for user_id in gone.slice(0, 3).to_pylist()]
        self.facts |= {"drift": self.drift.facts(), "drift_breaches": breaches, "users_gone_such_as": examples}
        if breaches and not self._accept_drift:
            raise AuditError(
                f"the lists are too far from those published last: {' '.join(breaches)} Nothing was published; correct "
                "the cause, or run the same command with --accept-drift"
            )

    def _publish(self, staged: list[str]) -> None:
        plan = self.plan
        if Tombstones.load(plan.config.output_dir).digest != plan.inputs["erased"]:
            raise ArtifactError(
                "users were erased while this run was at work, and its lists may hold them; run the same command again"
            )
        folder = plan.staging.rsplit("/", 1)[-1]
        facts = {"model_version": plan.model_version, "run_date": str(plan.run_date), "users": self.facts["users"]}
        version = publish(plan.dump_dir, [f"{folder}/{name}" for name in staged], plan.run_id, plan.attempt, facts)
        files.remove_directory(plan.checkpoint_dir)
        self.facts |= {"status": "published", "table_version": version}

    @contextlib.contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self._seconds[part] = round(time.monotonic() - began, 3)


def merge_histories(plan: ScorePlan) -> Manifest:
    """Write `nightly/histories` unless it holds these inputs already; returns its manifest.

    Raises DataError where an event file is empty, cut short or mostly refused.
    """
    if is_current(plan.histories_dir, "histories", plan.inputs):
        return read_manifest(plan.histories_dir, "histories")
    sources = bucket_paths(plan.prepared_dir, "histories")
    size = files_per_bucket(len(sources), plan.num_known_users)
    groups = [tuple(sources[part]) for part in slices(len(sources), size)]
    bucket_map = BucketMap(
        files.absolute(plan.prepared_dir), plan.model_dir, plan.num_known_users, len(sources), size, _num_new(plan)
    )
    with (
        quiet_data_context(),
        artifacts.write_directory(plan.histories_dir, kind="histories", inputs=plan.inputs, config={}) as draft,
    ):
        staged = files.absolute(draft.path("events"))
        if plan.events is not None:
            draft.counts["events"] = _stage_events(plan, plan.events, bucket_map, staged)
        groups += [()] * bucket_map.num_new
        buckets = [Bucket(number, group, events_of(staged, number)) for number, group in enumerate(groups)]
        draft.counts |= _merge(plan, buckets, files.absolute(draft.uri))
        files.remove_directory(staged)
        if not draft.counts["users"]:
            raise DataError(f"{plan.prepared_dir} and nightly.events hold no user to score; check the inputs")
    return read_manifest(plan.histories_dir, "histories")


def _num_new(plan: ScorePlan) -> int:
    """How many buckets there are for users of events alone."""
    if plan.events is None:
        return 0
    return 1 + num_bytes(plan.events) // _BYTES_PER_NEW_BUCKET


def _stage_events(plan: ScorePlan, source: Source, bucket_map: BucketMap, target: str) -> dict[str, int]:
    data = plan.config.data
    layout = inspect_events(source, data.min_rating)
    counts = stage_events(layout, Limits.of(data), data.min_rating, bucket_map, target, data.max_bad_fraction)
    if events_digest(source, data.min_rating) != plan.inputs["events"]:
        raise DataError("the files of nightly.events changed while they were read; run the same command again")
    return counts


def _merge(plan: ScorePlan, buckets: Sequence[Bucket], target: str) -> dict[str, int]:
    merge = functools.partial(
        write_bucket,
        prepared_dir=files.absolute(plan.prepared_dir),
        model_dir=plan.model_dir,
        tombstones=Tombstones.load(plan.config.output_dir),
        target=target,
    )
    counts: Counter[str] = Counter()
    for row in ray_map(buckets, merge):
        counts.update(row)
    return dict(counts)


def write_lists(plan: ScorePlan, histories: Manifest, rules: Rules) -> None:
    """Score everybody who is not in staging yet."""
    config = plan.config
    actors = processes(config.cluster, config.score.num_actors)
    if not files.exists(plan.staging):
        files.remove_directory(plan.checkpoint_dir)  # it speaks of files that are gone
    for directory in (plan.staging, plan.checkpoint_dir):
        fs, path = files.filesystem(directory)
        fs.makedirs(path, exist_ok=True)
    staging_fs, staging = files.filesystem(plan.staging)
    source_fs, _ = files.filesystem(plan.histories_dir)
    paths = [files.filesystem(path)[1] for path in _history_files(plan)]
    with quiet_data_context():
        ray.data.DataContext.get_current().checkpoint_config = CheckpointConfig(
            id_column="user_id",
            checkpoint_path=files.absolute(plan.checkpoint_dir),
            delete_checkpoint_on_success=False,
        )
        users = ray.data.read_parquet(paths, filesystem=source_fs)
        # Ray reads small files as one block, which would be one actor's, and nothing staged until its last user.
        users.repartition(target_num_rows_per_block=users_per_file(plan, int(histories.counts["users"]))).map_batches(
            ScoreUsers,
            fn_constructor_args=(
                plan.model_dir,
                config.score.k,
                rules,
                str(plan.run_date),
                actors.threads,
            ),
            batch_format="pyarrow",
            batch_size=config.score.batch_users,
            compute=ray.data.ActorPoolStrategy(size=actors.count),
            num_cpus=actors.cpus,
            num_gpus=actors.gpus,
        ).write_parquet(staging, filesystem=staging_fs, partition_cols=["bucket"])


def users_per_file(plan: ScorePlan, num_users: int) -> int:
    """At least a batch; so many that every actor gets some sixteen, and at most what is soon scored again."""
    score = plan.config.score
    share = -(-num_users // (16 * score.num_actors))
    return max(score.batch_users, min(share, _MOST_USERS_PER_FILE))


class ScoreUsers:
    """Ray Data actor: one loaded Scorer per process, one call per block of users."""

    def __init__(self, model_dir: str, k: int, rules: Rules, run_date: str, num_threads: int) -> None:
        import torch

        torch.set_num_threads(num_threads)
        self.scorer, self.rules, self.run_date = Scorer.load(model_dir), rules, run_date
        self.k = min(k, self.scorer.catalog.num_items)

    def __call__(self, users: pa.Table) -> pa.Table:
        item_BK, score_BK = self.scorer.top_k(
            users["user"].to_numpy(), Ragged.from_arrow(users["items"]), self.k, self.rules
        )
        lengths = (item_BK >= 0).sum(axis=1)
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
        item_ids = self.scorer.catalog.item_ids[item_BK[item_BK >= 0]]
        lists = pa.table(
            [
                users["user_id"].cast(pa.string()),
                pa.ListArray.from_arrays(offsets, pa.array(item_ids, pa.string())),
                pa.ListArray.from_arrays(offsets, pa.array(score_BK[item_BK >= 0], pa.float32())),
                pa.array([self.run_date] * len(users), pa.string()),
                pa.array([self.scorer.model_version] * len(users), pa.string()),
            ],
            schema=SCHEMA,
        )
        return lists.append_column("bucket", users["bucket"])  # a folder of staging, no column of the table


def audit_staged(plan: ScorePlan, histories: Manifest, rules: Rules) -> tuple[dict[str, int], dict[str, str]]:
    """Look at every staged list; returns what was counted, and the sha256 of every file by its name in staging.

    Raises AuditError where a list is not what was promised.
    """
    names = [name for name in files.list_files(plan.staging) if name.endswith(".parquet")]
    by_bucket: dict[str, list[str]] = {bucket_name(number): [] for number in range(len(_history_files(plan)))}
    for name in names:
        folder = name.partition("/")[0].removeprefix("bucket=")
        file = bucket_name(int(folder)) if folder.isdigit() else ""
        if file not in by_bucket:
            raise AuditError(f"{plan.staging}/{name} is of no bucket of this run; run the same command with --force")
        by_bucket[file].append(name)
    audit = functools.partial(
        audit_files,
        histories_dir=files.absolute(plan.histories_dir),
        staging=files.absolute(plan.staging),
        model_dir=plan.model_dir,
        rules=rules,
        k=plan.config.score.k,
    )
    counts: Counter[str] = Counter(dict.fromkeys(_COUNTED, 0))
    sha256: dict[str, str] = {}
    for found, digests in ray_map(by_bucket.items(), audit):
        counts.update(found)
        sha256 |= digests
    if counts["users"] != histories.counts["users"]:
        raise AuditError(
            f"{counts['users']:,} users have lists and {histories.counts['users']:,} were to be scored; nothing was "
            "published: run the same command with --force"
        )
    return dict(counts), dict(sorted(sha256.items()))


def _sampled(files: Sequence[str], most: int, num_users: int) -> pa.Table:
    """The lists of the same users in any table of these files (`drift.sample`)."""
    parts = ray_map(files, functools.partial(drift.sample_file, most=most, num_users=num_users))
    return drift.sample(parts, most, num_users)


def _history_files(plan: ScorePlan) -> list[str]:
    names = [name for name in files.list_files(plan.histories_dir) if name.endswith(".parquet")]
    return [join(plan.histories_dir, name) for name in names]


def forget_staged(plan: ScorePlan) -> None:
    """Drop what an interrupted or refused run of this plan has staged, so that everybody is scored anew."""
    if published_attempt(plan.dump_dir, plan.run_id) < plan.attempt:
        for directory in (plan.staging, plan.checkpoint_dir, plan.histories_dir):
            files.remove_directory(directory)


def num_staged(plan: ScorePlan) -> int:
    """Users whose lists are staged so far, for a progress line."""
    fs, path = files.filesystem(plan.staging)
    num_rows = 0
    for file in fs.find(path) if fs.exists(path) else []:
        with contextlib.suppress(OSError, pa.ArrowInvalid), fs.open(file) as stream:  # one that is being written
            num_rows += pq.read_metadata(stream).num_rows
    return num_rows
