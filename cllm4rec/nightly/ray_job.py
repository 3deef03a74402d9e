"""A list for every user: histories merged, scored by Ray Data actors into staging, audited, published in one commit.

    plan = plan_score(config, nightly=True)
    report = score(plan)

A run that was killed continues with the users that are not scored yet. Nothing is visible before the commit. This file
hands work to Ray; the work itself is in `histories`, `scorer`, `audit`, `drift` and `table`. The driver holds counts, the
items of the catalog and a sample of the lists, however many users there are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import ray.data
from ray.data.checkpoint import CheckpointConfig

from cllm4rec.arrays.ids import Catalog
from cllm4rec.arrays.ragged import Ragged, slices
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
from cllm4rec.nightly.report import Cost, NightReport, write_report
from cllm4rec.resources import processes
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


def score(plan: ScorePlan, progress: Progress | None = None, accept_drift: bool = False) -> NightReport:
    """Merge histories, score, audit, publish, write the report; returns it.

    Raises AuditError, and publishes nothing, if a check of the lists fails or the lists of a nightly run exceed a limit
    of `nightly.drift`; ArtifactError if the model is damaged; ResourceError if another run is at work on the same table.
    """
    with hold(plan.dump_dir, f"the scoring run {plan.run_id}"):
        run = ScoringRun(plan, accept_drift)
        try:
            run.run(progress)
        except AuditError as error:
            run.record(status="refused", reason=str(error))
            raise
        finally:
            if run.report.status != "interrupted":
                run.record(seconds={**run.report.seconds, "total": round(sum(run.report.seconds.values()), 3)})
                write_report(plan.report_dir, run.report, run.samples)
    return run.report


class ScoringRun:
    """One run of a plan. `report` holds what was measured so far, `samples` the old and the new lists of some users."""

    def __init__(self, plan: ScorePlan, accept_drift: bool) -> None:
        self.plan, self._accept_drift = plan, accept_drift
        self.samples: tuple[pa.Table, pa.Table] | None = None
        self.report = NightReport(
            run_id=plan.run_id,
            attempt=plan.attempt,
            run_date=str(plan.run_date),
            model_version=plan.model_version,
            model_dir=plan.model_dir,
            inputs=plan.inputs,
        )

    def run(self, progress: Progress | None) -> None:
        plan = self.plan
        # Checked here, where a failure is one sentence, before every actor loads the model.
        artifacts.verify_files(plan.model_dir, read_manifest(plan.model_dir, "model"))
        items = Catalog.load_items(plan.model_dir)
        rules = read_rules(plan.config.score.rules, items, plan.run_date)
        self.record(rules=rules.counts)
        with self._timed("histories"):
            histories = merge_histories(plan)
        self.record(histories=histories.counts)
        # The files of a published attempt belong to readers: they are audited, but never written again.
        is_written = published_attempt(plan.dump_dir, plan.run_id) >= plan.attempt
        if not is_written:
            self._score(histories, rules, progress)
        with self._timed("audit"):
            counts, sha256 = audit_staged(plan, histories, rules)
        self.record(**counts, sha256=sha256)
        if plan.is_nightly and not is_written:
            with self._timed("drift"):
                self._measure_drift(list(sha256), items, counts["users"])
        with self._timed("publish"):
            self._publish(list(sha256), counts["users"])

    def record(self, **fields: Any) -> None:
        """Set fields of the report."""
        self.report = dataclasses.replace(self.report, **fields)

    def _score(self, histories: Manifest, rules: Rules, progress: Progress | None) -> None:
        num_users, num_before = int(histories.counts["users"]), num_staged(self.plan)
        with self._timed("score"):
            shown = progress(functools.partial(num_staged, self.plan), num_users, "users") if progress else None
            with shown or contextlib.nullcontext():
                write_lists(self.plan, histories, rules)
        num_scored = max(num_users - num_before, 0)
        users_per_s = num_scored / max(self.report.seconds["score"], 1e-9)
        self.record(
            users_scored=num_users - num_before,
            users_per_s=round(users_per_s, 1),
            cost=_cost(self.plan, users_per_s),
        )

    def _measure_drift(self, staged: list[str], items: Catalog, num_users: int) -> None:
        """Compare with the lists that readers see; the first run has none to compare with."""
        plan, old_files = self.plan, current_files(self.plan.dump_dir)
        if not old_files:
            return
        limits = plan.config.nightly.drift
        old = _sampled(old_files, limits.sample_users, num_users)
        new = _sampled([join(plan.staging, name) for name in staged], limits.sample_users, num_users)
        self.samples = old, new
        measured = drift.compare(old, new, (items.item_ids, items.item_counts))
        breaches = drift.breaches(measured, limits)
        self.record(drift=measured, drift_breaches=breaches, users_gone_such_as=_missing_users(old, new))
        if breaches and not self._accept_drift:
            raise AuditError(
                f"the lists are too far from those published last: {' '.join(breaches)} Nothing was published; correct "
                "the cause, or run the same command with --accept-drift"
            )

    def _publish(self, staged: list[str], num_users: int) -> None:
        plan = self.plan
        if Tombstones.load(plan.config.output_dir).digest != plan.inputs["erased"]:
            raise ArtifactError(
                "users were erased while this run was at work, and its lists may contain them; run the same command again"
            )
        folder = plan.staging.rsplit("/", 1)[-1]
        properties = {"model_version": plan.model_version, "run_date": str(plan.run_date), "users": num_users}
        version = publish(plan.dump_dir, [f"{folder}/{name}" for name in staged], plan.run_id, plan.attempt, properties)
        files.remove_directory(plan.checkpoint_dir)
        self.record(status="published", table_version=version)

    @contextlib.contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.record(seconds={**self.report.seconds, part: round(time.monotonic() - began, 3)})


def _cost(plan: ScorePlan, users_per_s: float) -> Cost:
    cluster = plan.config.cluster
    units = plan.config.score.num_actors * (1 if cluster.use_gpu else cluster.cpus_per_worker)
    per_million_users = round(units * 1e6 / 3600 / users_per_s, 4) if users_per_s else None
    return Cost("GPU-hours" if cluster.use_gpu else "core-hours", per_million_users)


def _missing_users(old: pa.Table, new: pa.Table) -> list[str]:
    """Hashes of three users of the old sample who are not in the new one."""
    is_in_new = pc.is_in(old["user_id"], value_set=new["user_id"].combine_chunks())
    return [hashed(user_id) for user_id in pc.filter(old["user_id"], pc.invert(is_in_new)).slice(0, 3).to_pylist()]


def merge_histories(plan: ScorePlan) -> Manifest:
    """Write `nightly/histories`, unless it was made from these inputs already; returns its manifest.

    Raises DataError if an event file is empty, truncated or mostly invalid.
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
            raise DataError(f"{plan.prepared_dir} and nightly.events have no user to score; check both")
    return read_manifest(plan.histories_dir, "histories")


def _num_new(plan: ScorePlan) -> int:
    """The number of buckets for users who are not in `prepared/`."""
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
    """Score the users who have no staged list yet."""
    config = plan.config
    _silence_restart_warning()
    actors = processes(config.cluster, config.score.num_actors)
    if not files.exists(plan.staging):
        files.remove_directory(plan.checkpoint_dir)  # it lists files that no longer exist
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
        # Ray reads small files as one block: a single actor would score it, and stage nothing before its last user.
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
    """Few enough that every actor writes about 16 files and a lost file is soon scored again; at least one batch."""
    score = plan.config.score
    share = -(-num_users // (16 * score.num_actors))
    return max(score.batch_users, min(share, _MOST_USERS_PER_FILE))


@functools.cache
def _silence_restart_warning() -> None:
    """Use up a line that Ray's core prints once per process, at level error, for any actor pool of Ray Data.

    Ray Data passes its plan to the actors of a pool through the object store and lets them restart; the line warns of this
    combination, whatever the arguments of `ScoreUsers` are (ray-project/ray#57733). Without restarts, an actor that dies
    would end the run. The plan lives as long as the run, so restarts work. Here an actor that does nothing triggers the
    line while stderr is redirected.
    """
    idle = ray.remote(num_cpus=0, max_restarts=1)(_Idle)
    plan_in_object_store = ray.put(None)
    with _stderr_redirected():
        actor = idle.remote(plan_in_object_store)
    ray.kill(actor)


class _Idle:
    def __init__(self, _: None) -> None:
        pass


@contextlib.contextmanager
def _stderr_redirected() -> Iterator[None]:
    """Discard what the process writes to stderr, also from C++."""
    stderr = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


class ScoreUsers:
    """Ray Data actor: one Scorer per process, one call per batch of users."""

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
        return lists.append_column("bucket", users["bucket"])  # becomes a folder of staging, not a column of the table


def audit_staged(plan: ScorePlan, histories: Manifest, rules: Rules) -> tuple[dict[str, int], dict[str, str]]:
    """Audit every staged list; returns counts, and the sha256 of every file by its name in staging.

    Raises AuditError if a check fails.
    """
    names = [name for name in files.list_files(plan.staging) if name.endswith(".parquet")]
    by_bucket: dict[str, list[str]] = {bucket_name(number): [] for number in range(len(_history_files(plan)))}
    for name in names:
        folder = name.partition("/")[0].removeprefix("bucket=")
        file = bucket_name(int(folder)) if folder.isdigit() else ""
        if file not in by_bucket:
            raise AuditError(
                f"{plan.staging}/{name} belongs to no bucket of this run; run the same command with --force"
            )
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
            f"{counts['users']:,} users have a list, but the run has {histories.counts['users']:,} users; nothing was "
            "published, run the same command with --force"
        )
    return dict(counts), dict(sorted(sha256.items()))


def _sampled(files: Sequence[str], most: int, num_users: int) -> pa.Table:
    """The sample of the table with these files (`drift.sample`)."""
    parts = ray_map(files, functools.partial(drift.sample_file, most=most, num_users=num_users))
    return drift.sample(parts, most, num_users)


def _history_files(plan: ScorePlan) -> list[str]:
    names = [name for name in files.list_files(plan.histories_dir) if name.endswith(".parquet")]
    return [join(plan.histories_dir, name) for name in names]


def forget_staged(plan: ScorePlan) -> None:
    """Remove what an interrupted or refused run of this plan has staged, so that all users are scored again."""
    if published_attempt(plan.dump_dir, plan.run_id) < plan.attempt:
        for directory in (plan.staging, plan.checkpoint_dir, plan.histories_dir):
            files.remove_directory(directory)


def num_staged(plan: ScorePlan) -> int:
    """The number of staged lists so far."""
    fs, path = files.filesystem(plan.staging)
    num_rows = 0
    for file in fs.find(path) if fs.exists(path) else []:
        with contextlib.suppress(OSError, pa.ArrowInvalid), fs.open(file) as stream:  # the file is being written
            num_rows += pq.read_metadata(stream).num_rows
    return num_rows
