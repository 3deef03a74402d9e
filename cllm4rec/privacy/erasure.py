"""Erase users from everything below an output_dir: at once for future results, file by file for existing ones.

    result = erase(config, ["the customer's id"])

    1. tombstone    `erased.json`: from now on the endpoint, `prepare` and the nightly run ignore these users
    2. directories  prepared/, pretrained/, model/, models/*, evaluation/: rewritten without them, with new manifests
    3. dump/        one Delta commit without them, then all older and staged files are removed (full vacuum)
    4. runs/        interrupted runs are removed: their checkpoints hold rows of the user tables
    5. search       all files are searched for the ids
                    (raw files of the config below output_dir are searched as well, and never changed)
    6. receipt      `erasures/<time>-<hash>.json`: what was changed, and what an erasure does not do

Every step handles all tombstones, not only the ids of one command. So an interrupted erasure is finished by the same
command, by the next one or by one without ids, and each of them cleans a directory that was restored from a backup. The
remaining work is found by looking at the files; `erasures/unfinished.json` only keeps what the receipt must list.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
from deltalake import CommitProperties, DeltaTable
from deltalake.exceptions import CommitFailedError
from deltalake.transaction import AddAction, RemoveAction
from fsspec.implementations.local import LocalFileSystem

from cllm4rec.arrays.ids import read_ids
from cllm4rec.config import Config
from cllm4rec.data.formats import ROLES
from cllm4rec.errors import ArtifactError, AuditError, ConfigError, ResourceError
from cllm4rec.nightly.audit import hashed
from cllm4rec.privacy.redact import (
    TABLES,
    USERS,
    ErasedUsers,
    copy_without,
    copy_zeroed,
    erased_indices,
    find_remaining_ids,
    link_or_copy,
    replace_file,
    rows_of,
)
from cllm4rec.storage import artifacts, files
from cllm4rec.storage.artifacts import MANIFEST, Manifest, read_manifest
from cllm4rec.storage.files import absolute, exists, filesystem, join, list_files, read_json
from cllm4rec.storage.lease import hold
from cllm4rec.storage.registry import MODELS, promoted_directories
from cllm4rec.storage.table import delta_files, open_current
from cllm4rec.storage.table_versions import open_table, vacuum
from cllm4rec.storage.tombstones import TOMBSTONES, Tombstones

RECEIPTS = "erasures"
_EXAMPLES = "examples.md"
"""A file that only the evaluation of a comparison has."""
UNFINISHED = "unfinished.json"
STAGES = ("prepared", "backbone", "pretrained", "model")
"""Directories in an order in which each comes after its inputs; promoted models and the evaluation follow."""

COMMIT_PROPERTIES = ("run_id", "run_date", "model_version", "schema_version", "users")
"""Properties of a commit that the erasure keeps; `users` is the number at publication."""

NOT_DONE = (
    "The raw source files were not changed; remove the users from those listed here.",
    "No unlearning is claimed: item embeddings, other users' embeddings, the tokenizer's vocabulary and a backbone or "
    "adapter trained here keep what they learned from these users. Run cllm4rec pipeline --force to train without them.",
    "Counts were not changed: num_train in items.parquet, metrics.json and the report of the evaluation, and the reports of "
    "past nightly runs.",
    "Copies outside the output_dir (exports, backups, results of other readers) were not changed.",
)


def erase(config: Config, user_ids: Sequence[str] = ()) -> dict[str, Any]:
    """Erase users from `config.output_dir`; returns a summary. No id is logged, returned or written.

    Without ids, an interrupted erasure is finished, and all users erased before are searched again. A user without any
    data gets a tombstone as well. Training must not run meanwhile. `raw_files` of the summary are the raw files below
    output_dir that still contain an id. They are the caller's, so they are no failure: raw files elsewhere are none either.
    Raises ConfigError for an empty id; ResourceError if a scoring run or a promotion is at work (the tombstones are written
    nevertheless; run it again afterwards); ArtifactError if there is no run or a directory is damaged; AuditError if an id
    is still found in another file at the end (the receipt is written).
    """
    if not exists(config.output_dir):
        raise ArtifactError(f"there is no run at {config.output_dir}; check output_dir")
    began, user_ids = time.monotonic(), [user_id.strip() for user_id in user_ids]
    tombstones, num_new = _write_tombstones(config, user_ids)
    with hold(config.run.dump, "an erasure"), hold(config.run.models, "an erasure"):
        erasure = Erasure(config, tombstones, _Journal.open(config.output_dir), tuple(user_ids))
        erasure.run()
        found = find_remaining_ids(config.output_dir, user_ids, _item_ids(config.output_dir))
        raw_files = [name for name in found if erasure.is_raw(name)]
        remaining = [name for name in found if not erasure.is_raw(name)]
        receipt = erasure.write_receipt(remaining, raw_files, round(time.monotonic() - began, 1))
    if remaining:
        raise AuditError(
            f"an id is still found in {len(remaining)} files below {config.output_dir} ({', '.join(remaining[:3])}); all "
            f"other steps of the erasure are done (see {receipt}): check whether a text of another user contains the id, "
            "correct the source and run cllm4rec erase again"
        )
    return {
        "new_tombstones": num_new,
        "touched": len(erasure.journal.entries),
        "receipt": receipt,
        "already_done": not num_new and not erasure.journal.entries,
        "raw_files": [join(config.output_dir, name) for name in raw_files],
    }


def _write_tombstones(config: Config, user_ids: Sequence[str]) -> tuple[Tombstones, int]:
    """Write the tombstones; returns all of them and the number of new ones."""
    if not all(user_ids):
        raise ConfigError("--user is empty; give the id as it is in the data")
    if not user_ids:
        return Tombstones.load(config.output_dir), 0
    with hold(join(config.output_dir, TOMBSTONES), "an erasure"):
        before = Tombstones.load(config.output_dir)
        after = before.with_users(user_ids)
        if len(after) > len(before):
            after.save(config.output_dir)
    return after, len(after) - len(before)


@dataclasses.dataclass
class _Journal:
    """What this erasure and earlier ones without a receipt have changed.

    An entry is written before its step, so that a crash loses none; a repeated step replaces the entry with the same
    `before`.
    """

    uri: str
    started: str
    entries: list[dict[str, Any]]

    @classmethod
    def open(cls, output_dir: str) -> _Journal:
        uri, now = join(output_dir, RECEIPTS, UNFINISHED), datetime.now(UTC).isoformat(timespec="seconds")
        if not exists(uri):
            return cls(uri, now, [])
        raw = read_json(uri)
        return cls(uri, raw["started"], raw["touched"])

    def note(self, path: str, before: str | None, **details: Any) -> None:
        kept = [entry for entry in self.entries if (entry["path"], entry["before"]) != (path, before)]
        self.entries = [*kept, {"path": path, "before": before, **details}]
        files.replace_json(self.uri, {"started": self.started, "touched": self.entries})


class Erasure:
    """One pass through an output_dir. Paths in the journal are relative to it."""

    def __init__(self, config: Config, tombstones: Tombstones, journal: _Journal, user_ids: tuple[str, ...]) -> None:
        self.config, self.output_dir = config, config.output_dir
        self.tombstones, self.journal, self.user_ids = tombstones, journal, user_ids
        self._by_tombstone = ErasedUsers(tombstones, np.empty(0, np.int64))
        self._raw = _raw_names(config)
        self._digest_now: dict[str, str] = {}
        """The digest of a directory before an erasure → its current digest."""

    def run(self) -> None:
        if not len(self.tombstones):
            return
        self._settle()
        for name in self._directories():
            self._erase_directory(name)
        self._erase_loose_files()
        self._erase_published()
        self._remove_staged_and_runs()

    def is_raw(self, name: str) -> bool:
        """Whether a path relative to the output_dir is a raw file of the config, or a file of a raw Delta table."""
        return any(name == raw or name.startswith(f"{raw}/") for raw in self._raw)

    def _settle(self) -> None:
        """Remove drafts and replaced directories of interrupted stages, and unfinished copies of models."""
        for parent in (self.output_dir, join(self.output_dir, MODELS), self.config.run.nightly):
            for name in _folders(parent):
                if name.endswith((".partial", ".old")):
                    artifacts.settle(join(parent, name.rpartition(".")[0]))
        for uri in promoted_directories(self.output_dir):
            if not exists(join(uri, MANIFEST)):
                files.remove_directory(uri)

    def _directories(self) -> list[str]:
        """Finished directories, each after its inputs."""
        promoted = [self._relative(uri) for uri in promoted_directories(self.output_dir)]
        nightly = [f"nightly/{name}" for name in _folders(self.config.run.nightly)]
        names = [*STAGES, *promoted, "evaluation", *nightly]
        return [name for name in names if exists(join(self.output_dir, name, MANIFEST))]

    def _erase_directory(self, name: str) -> None:
        """Rewrite a directory with erased users; in any case update the digests of its inputs."""
        uri = _real(join(self.output_dir, name))
        manifest = read_manifest(uri, read_json(join(uri, MANIFEST)).get("kind", ""))
        has_catalog = USERS in manifest.files
        index = erased_indices(join(uri, USERS), self.tombstones) if has_catalog else np.empty(0, np.int64)
        erased = ErasedUsers(self.tombstones, index)
        parquet = [file for file in manifest.files if file.endswith(".parquet")]
        rows = {file: count for file in parquet if (count := rows_of(join(uri, file), file, erased))}
        if rows and name.startswith("nightly/"):  # the next nightly run writes it again
            self.journal.note(name, manifest.digest, removed=True)
            files.remove_directory(uri)
            return
        if rows:
            artifacts.verify_files(uri, manifest)  # otherwise new digests would hide existing damage
            self._rewrite(name, uri, manifest, erased, rows)
            manifest = read_manifest(uri, manifest.kind)
        inputs = self._inputs_now(manifest)
        if inputs != manifest.inputs:
            files.replace_json(join(uri, MANIFEST), dataclasses.asdict(dataclasses.replace(manifest, inputs=inputs)))
        self._digest_now |= dict.fromkeys(manifest.counts.get("replaces", []), manifest.digest)

    def _rewrite(self, name: str, uri: str, manifest: Manifest, erased: ErasedUsers, rows: dict[str, int]) -> None:
        inputs = self._inputs_now(manifest)
        with artifacts.write_directory(uri, kind=manifest.kind, inputs=inputs, config=manifest.config) as draft:
            for file in manifest.files:
                source, target = join(uri, file), draft.path(file)
                if file in rows:
                    copy_without(source, target, file, erased)
                elif file == TABLES and len(erased.index):
                    copy_zeroed(source, target, erased.index)
                else:
                    link_or_copy(source, target)
            num_erased = Counter(manifest.counts.get("erased", {}))
            num_erased.update(_by_table(rows))
            # With the old digest, directories made from the old one are still recognized, also after a crash.
            replaces = [*manifest.counts.get("replaces", []), manifest.digest]
            draft.counts |= manifest.counts | {"erased": dict(num_erased), "replaces": replaces}
            num_zeroed = len(erased.index) if TABLES in manifest.files else 0
            self.journal.note(name, manifest.digest, rows=rows, zeroed_rows=num_zeroed)

    def _inputs_now(self, manifest: Manifest) -> dict[str, str]:
        """The inputs with their current digests, so that all stages stay up to date and scoring accepts the model."""
        inputs = {name: self._digest_now.get(digest, digest) for name, digest in manifest.inputs.items()}
        # As if `prepare` had left the users out, although the raw files still contain them.
        return inputs | ({"erased": self.tombstones.digest} if manifest.kind == "prepared" else {})

    def _erase_loose_files(self) -> None:
        """Parquet files outside the directories of stages and the raw data, and reports with hashes of the users."""
        inside = (*(f"{name}/" for name in self._directories()), "dump/", "runs/", f"{RECEIPTS}/")
        names = [name for name in list_files(self.output_dir) if not name.startswith(inside) and not self.is_raw(name)]
        for file in names:
            uri = join(self.output_dir, file)
            if file.endswith(".parquet"):
                if rows := self._rows(uri, file):
                    self.journal.note(file, files.digest_of_file(uri), rows=rows)
                    copy_without(uri, f"{uri}.draft", file, self._by_tombstone)
                    replace_file(uri, f"{uri}.draft")
            elif file.startswith("nightly/") and file.endswith((".json", ".md")):
                self._erase_hashes(file, uri)

    def _erase_hashes(self, file: str, uri: str) -> None:
        content = before = files.read_bytes(uri)
        for user_id in self.user_ids:
            content = content.replace(hashed(user_id).encode(), b"erased")
        if content != before:
            self.journal.note(file, files.digest_of_file(uri))
            files.write_bytes(f"{uri}.draft", content)
            replace_file(uri, f"{uri}.draft")

    def _erase_published(self) -> None:
        """Rewrite the files of the current version of the table that contain erased users, and replace them in one commit."""
        dump_dir = self.config.run.dump
        table = open_current(dump_dir)
        live = [] if table is None else delta_files(table)
        rows = {name: count for name in live if (count := self._rows(join(dump_dir, name), name))}
        if not rows:
            return
        self.journal.note("dump", f"version {open_table(dump_dir).version()}", rows=rows)
        folder = f"erased={datetime.now(UTC):%Y%m%dT%H%M%S%f}"
        replacements = {name: f"{folder}/{_without_folder(name)}" for name in rows}
        for name, new_name in replacements.items():
            copy_without(join(dump_dir, name), join(dump_dir, new_name), name, self._by_tombstone)
        _replace_files(dump_dir, replacements, sum(rows.values()))

    def _remove_staged_and_runs(self) -> None:
        """Remove old versions, staged lists and interrupted runs, if any file contained an erased user."""
        dump_dir, runs_dir = self.config.run.dump, self.config.run.runs
        if not (self.journal.entries or self._files_with_users(dump_dir) or self._files_with_users(runs_dir)):
            return
        self._clean_dump(dump_dir)
        evaluation = self.config.run.evaluation
        if self._files_with_users(runs_dir) and exists(join(evaluation, _EXAMPLES)):
            # A comparison shows the items of a few users; without its runs it is unknown of which. It must be run again.
            self.journal.note("evaluation", None, removed=True)
            files.remove_directory(evaluation)
        for run in _folders(runs_dir):
            self.journal.note(f"runs/{run}", None, removed=True)
            files.remove_directory(join(runs_dir, run))

    def _clean_dump(self, dump_dir: str) -> None:
        if exists(join(dump_dir, "_delta_log")):
            doomed = vacuum(dump_dir, keep_days=0, dry_run=True)
            if doomed.num_files:
                self.journal.note(
                    "dump/_delta_log", None, removed_files=doomed.num_files, lost_versions=doomed.versions
                )
                vacuum(dump_dir, keep_days=0, dry_run=False)
        else:  # all files were staged for a first publication
            for folder in _folders(dump_dir):
                self.journal.note(f"dump/{folder}", None, removed=True)
                files.remove_directory(join(dump_dir, folder))
        for name in self._files_with_users(dump_dir):  # a vacuum skips names that begin with an underscore
            self.journal.note(f"dump/{name}", None, removed=True)
            files.remove_file(join(dump_dir, name))

    def _files_with_users(self, directory: str) -> list[str]:
        """Parquet files below a directory that contain erased users, or that cannot be read."""
        names = [name for name in list_files(directory) if name.endswith(".parquet")] if exists(directory) else []
        return [
            name for name in names if not name.startswith("_delta_log/") and self._may_hold(join(directory, name), name)
        ]

    def _may_hold(self, uri: str, name: str) -> bool:
        try:
            return self._rows(uri, name) > 0
        except ArtifactError:
            return True

    def _rows(self, uri: str, name: str) -> int:
        return rows_of(uri, name, self._by_tombstone)

    def _relative(self, uri: str) -> str:
        return uri[len(self.output_dir.rstrip("/")) + 1 :]

    def write_receipt(self, remaining: list[str], raw_files: list[str], seconds: float) -> str | None:
        """Write the receipt and remove the journal. If nothing is new, return the latest receipt about these users."""
        receipt_of = {
            digest: uri for uri, receipt in _receipts(self.output_dir).items() for digest in receipt["tombstones"]
        }
        requested = {self.tombstones.hash_of(user_id) for user_id in self.user_ids}
        users = sorted(requested | (self.tombstones.digests - set(receipt_of)))
        if not self.journal.entries and not remaining and all(user in receipt_of for user in users):
            return max((receipt_of[user] for user in users), default=None)
        for entry in self.journal.entries:
            entry["after"] = _state(join(self.output_dir, entry["path"]))
        now = datetime.now(UTC)
        name = f"{now:%Y%m%dT%H%M%SZ}-{files.digest_of(users)[:12]}.json"
        uri = join(self.output_dir, RECEIPTS, name)
        content = {
            "schema_version": 1,
            "started": self.journal.started,
            "finished": now.isoformat(timespec="seconds"),
            "seconds": seconds,
            "tombstones": users,
            "found": bool(self.journal.entries),
            "touched": self.journal.entries,
            "files_that_still_name_them": remaining,
            "raw_files_that_name_them": raw_files,
            "searched_ids": len(self.user_ids),
            "not_done": list(NOT_DONE),
            "raw_sources": _raw_sources(self.config),
        }
        files.replace_json(uri, content)
        files.remove_file(self.journal.uri)
        return uri


def _real(uri: str) -> str:
    """The target of a link: a rewritten directory is moved to its name, which would replace the link, not the data."""
    fs, path = filesystem(uri)
    return os.path.realpath(path) if isinstance(fs, LocalFileSystem) else uri


def _folders(uri: str) -> list[str]:
    fs, path = filesystem(uri)
    if not fs.exists(path):
        return []
    found = [str(entry["name"]).rstrip("/") for entry in fs.ls(path, detail=True) if fs.isdir(entry["name"])]
    return sorted(name.rpartition("/")[2] for name in found)


def _by_table(rows: dict[str, int]) -> Counter[str]:
    """Rows by table, over all buckets."""
    counts: Counter[str] = Counter()
    for file, count in rows.items():
        counts[file.partition("/")[0].removesuffix(".parquet")] += count
    return counts


def _without_folder(name: str) -> str:
    """The name of a file without the folder of an earlier erasure."""
    return name.partition("/")[2] if name.startswith("erased=") else name


def _replace_files(dump_dir: str, replacements: dict[str, str], num_erased: int) -> None:
    """Replace files (old name → new name) in one commit.

    Not with `DeltaTable.delete`, which would write its predicate, and thus the id, to the log. Without statistics, which
    contain the smallest and the largest id of a file.
    """
    table, (fs, root), now_ms = open_table(dump_dir), filesystem(dump_dir), int(time.time() * 1000)
    actions: list[Any] = [RemoveAction(name, data_change=True, deletion_timestamp=now_ms) for name in replacements]
    sizes = {name: int(fs.size(f"{root}/{name}")) for name in replacements.values()}
    actions += [AddAction(name, size, {}, now_ms, True, "{}") for name, size in sizes.items()]
    properties = CommitProperties(custom_metadata=_properties(table, num_erased))
    try:
        table.create_write_transaction(actions, mode="append", schema=table.schema(), commit_properties=properties)
    except CommitFailedError:
        raise ResourceError(f"another process published to {dump_dir} meanwhile; run the same command again") from None


def _properties(table: DeltaTable, num_erased: int) -> dict[str, str]:
    """Those of the last publication, whose lists these still are."""
    published: dict[str, Any] = next((commit for commit in table.history() if "run_id" in commit), {})
    properties = {name: str(published[name]) for name in COMMIT_PROPERTIES if name in published}
    return properties | {"erased_users": str(num_erased)}


def _state(uri: str) -> str | None:
    """The digest of a directory, the sha256 of a file, or the version of a table; None if there is nothing."""
    if not exists(uri):
        return None
    if exists(join(uri, MANIFEST)):
        return str(read_json(join(uri, MANIFEST))["digest"])
    fs, path = filesystem(uri)
    if fs.isfile(path):
        return files.digest_of_file(uri)
    return f"version {open_table(uri).version()}" if exists(join(uri, "_delta_log")) else None


def _receipts(output_dir: str) -> dict[str, dict[str, Any]]:
    folder = join(output_dir, RECEIPTS)
    names = list_files(folder) if exists(folder) else []
    uris = [join(folder, name) for name in names if name.endswith(".json") and name != UNFINISHED]
    return {uri: read_json(uri) for uri in uris}


def _item_ids(output_dir: str) -> list[str]:
    prepared_dir = join(output_dir, "prepared")
    ids: list[str] = read_ids(prepared_dir, "items").to_pylist() if exists(join(prepared_dir, MANIFEST)) else []
    return ids


def _raw_names(config: Config) -> list[str]:
    """The raw files and Delta tables of the config that lie below its output_dir, relative to it."""
    root = absolute(config.output_dir).rstrip("/") + "/"
    found = []
    for pattern in _raw_sources(config):
        fs, path = filesystem(pattern)
        is_glob = any(character in pattern for character in "*?[")
        found += (
            [absolute(str(fs.unstrip_protocol(file))) for file in fs.glob(path)] if is_glob else [absolute(pattern)]
        )
    return [uri.removeprefix(root) for uri in found if uri.startswith(root)]


def _raw_sources(config: Config) -> list[str]:
    sources = [getattr(config.data, role) for role in ROLES] + [config.nightly.events]
    paths = [source.path for source in sources if source is not None]
    return [file for path in paths for file in ([path] if isinstance(path, str) else path)]
