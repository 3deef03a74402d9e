"""Take users out of everything below an output_dir, at once for the future and file by file for the past.

    told = erase(config, ["the customer's id"])

    1. tombstone    `erased.json`: from here on the endpoint, `prepare` and the nightly job know these users no more
    2. directories  prepared/, pretrained/, model/, models/*, evaluation/: rewritten whole without them, re-manifested
    3. dump/        one Delta commit without them, then every older or staged file goes (full vacuum)
    4. runs/        interrupted runs go whole: their checkpoints hold rows of the user tables
    5. search       every file is read for the ids once more
    6. receipt      `erasures/<time>-<hash>.json`: what was touched, and what an erasure does not do

Every step looks for all tombstones, not for the ids of one command. So an interrupted erasure is finished by the same
command, by the next one or by one without ids, and a directory brought back from a backup is cleaned by any of them.
What is left to do is found by looking: `erasures/unfinished.json` only remembers for the receipt what was done.
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
    Gone,
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
from cllm4rec.storage.files import exists, filesystem, join, list_files, read_json
from cllm4rec.storage.lease import hold
from cllm4rec.storage.registry import MODELS, promoted_directories
from cllm4rec.storage.table import delta_files, open_current
from cllm4rec.storage.table_versions import open_table, vacuum
from cllm4rec.storage.tombstones import TOMBSTONES, Tombstones

RECEIPTS = "erasures"
_EXAMPLES = "examples.md"
"""What tells the evaluation of a comparison from that of one model."""
UNFINISHED = "unfinished.json"
STAGES = ("prepared", "backbone", "pretrained", "model")
"""Directories in the order in which one's digest is another's input; promoted models and the evaluation follow."""

FACTS = ("run_id", "run_date", "model_version", "schema_version", "users")
"""What a commit of the table says; `users` is the number when it was published."""

NOT_DONE = (
    "The raw source files are the owner's and were not touched; take the users out of those listed here.",
    "No unlearning is claimed: the item embeddings, other users' embeddings, the tokenizer's vocabulary and a backbone "
    "that was trained here keep what they learned from these users. To be rid of that, run cllm4rec pipeline --force.",
    "Counts stay as they were: num_train of items.parquet, metrics.json and the report of the evaluation, and the "
    "reports of nights past.",
    "Copies outside of the output_dir (exports, backups, what others read from the table) were not touched.",
)


def erase(config: Config, user_ids: Sequence[str] = ()) -> dict[str, Any]:
    """Erase users from `config.output_dir`; returns what to tell. No id is logged, returned or written anywhere.

    Without ids: finish what was begun, and look again for everybody erased before. A user of whom nothing is found gets
    a tombstone all the same. Training may not run meanwhile. Raises ConfigError for an empty id, ResourceError where a
    scoring run or a promotion is at work (the tombstones are written all the same; run it again afterwards),
    ArtifactError where a directory is damaged, AuditError where an id is still found at the end (the receipt is written).
    """
    began, user_ids = time.monotonic(), [user_id.strip() for user_id in user_ids]
    tombstones, num_new = _write_tombstones(config, user_ids)
    with hold(config.run.dump, "an erasure"), hold(config.run.models, "an erasure"):
        work = _Erasure(config, tombstones, _Journal.open(config.output_dir), tuple(user_ids))
        work.run()
        left = find_remaining_ids(config.output_dir, user_ids, _item_ids(config.output_dir))
        receipt = work.write_receipt(left, round(time.monotonic() - began, 1))
    if left:
        raise AuditError(
            f"an id still stands in {len(left)} files below {config.output_dir} ({', '.join(left[:3])}); all that the "
            f"erasure knows of is done (see {receipt}): look whether another's text names the user, and correct the source"
        )
    return {
        "new_tombstones": num_new,
        "touched": len(work.journal.entries),
        "receipt": receipt,
        "already_done": not num_new and not work.journal.entries,
    }


def _write_tombstones(config: Config, user_ids: Sequence[str]) -> tuple[Tombstones, int]:
    """Write the tombstones; returns all of them, and how many are new."""
    if not all(user_ids):
        raise ConfigError("--user is empty; give the id as it stands in the data")
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
    """What this erasure, and those before it that never came to their receipts, have touched.

    An entry is written before its step, which a crash may undo; done again, it replaces the entry with the same state
    before.
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

    def note(self, path: str, before: str | None, **facts: Any) -> None:
        kept = [entry for entry in self.entries if (entry["path"], entry["before"]) != (path, before)]
        self.entries = [*kept, {"path": path, "before": before, **facts}]
        files.replace_json(self.uri, {"started": self.started, "touched": self.entries})


class _Erasure:
    """One sweep through an output_dir. Paths in the journal are relative to it."""

    def __init__(self, config: Config, tombstones: Tombstones, journal: _Journal, user_ids: tuple[str, ...]) -> None:
        self.config, self.output_dir = config, config.output_dir
        self.tombstones, self.journal, self.user_ids = tombstones, journal, user_ids
        self._by_tombstone = Gone(tombstones, np.empty(0, np.int64))
        self._digest_now: dict[str, str] = {}
        """Digest of a directory before an erasure → its digest now."""

    def run(self) -> None:
        if not len(self.tombstones):
            return
        self._settle()
        for name in self._directories():
            self._erase_directory(name)
        self._erase_loose_files()
        self._erase_published()
        self._remove_staged_and_runs()

    def _settle(self) -> None:
        """Remove drafts and set-aside directories of interrupted stages, and unfinished copies of models."""
        for parent in (self.output_dir, join(self.output_dir, MODELS), self.config.run.nightly):
            for name in _folders(parent):
                if name.endswith((".partial", ".old")):
                    artifacts.settle(join(parent, name.rpartition(".")[0]))
        for uri in promoted_directories(self.output_dir):
            if not exists(join(uri, MANIFEST)):
                files.remove_directory(uri)

    def _directories(self) -> list[str]:
        """Finished directories, each after those it was made from."""
        promoted = [self._relative(uri) for uri in promoted_directories(self.output_dir)]
        nightly = [f"nightly/{name}" for name in _folders(self.config.run.nightly)]
        names = [*STAGES, *promoted, "evaluation", *nightly]
        return [name for name in names if exists(join(self.output_dir, name, MANIFEST))]

    def _erase_directory(self, name: str) -> None:
        """Rewrite a directory that holds somebody; in any case let its inputs name what the others have become."""
        uri = _real(join(self.output_dir, name))
        manifest = read_manifest(uri, read_json(join(uri, MANIFEST)).get("kind", ""))
        has_catalog = USERS in manifest.files
        index = erased_indices(join(uri, USERS), self.tombstones) if has_catalog else np.empty(0, np.int64)
        gone = Gone(self.tombstones, index)
        parquet = [file for file in manifest.files if file.endswith(".parquet")]
        rows = {file: count for file in parquet if (count := rows_of(join(uri, file), file, gone))}
        if rows and name.startswith("nightly/"):  # made anew by the next night from what is prepared
            self.journal.note(name, manifest.digest, removed=True)
            files.remove_directory(uri)
            return
        if rows:
            artifacts.verify_files(uri, manifest)  # or new digests would hide old damage
            self._rewrite(name, uri, manifest, gone, rows)
            manifest = read_manifest(uri, manifest.kind)
        inputs = self._inputs_now(manifest)
        if inputs != manifest.inputs:
            files.replace_json(join(uri, MANIFEST), dataclasses.asdict(dataclasses.replace(manifest, inputs=inputs)))
        self._digest_now |= dict.fromkeys(manifest.counts.get("replaces", []), manifest.digest)

    def _rewrite(self, name: str, uri: str, manifest: Manifest, gone: Gone, rows: dict[str, int]) -> None:
        inputs = self._inputs_now(manifest)
        with artifacts.write_directory(uri, kind=manifest.kind, inputs=inputs, config=manifest.config) as draft:
            for file in manifest.files:
                source, target = join(uri, file), draft.path(file)
                if file in rows:
                    copy_without(source, target, file, gone)
                elif file == TABLES and len(gone.index):
                    copy_zeroed(source, target, gone.index)
                else:
                    link_or_copy(source, target)
            erased = Counter(manifest.counts.get("erased", {}))
            erased.update(_by_table(rows))
            # The old digest finds the way from what was made of the old directory to the new one, after a crash too.
            replaces = [*manifest.counts.get("replaces", []), manifest.digest]
            draft.counts |= manifest.counts | {"erased": dict(erased), "replaces": replaces}
            self.journal.note(
                name, manifest.digest, rows=rows, zeroed_rows=len(gone.index) if TABLES in manifest.files else 0
            )

    def _inputs_now(self, manifest: Manifest) -> dict[str, str]:
        """The inputs by the digests that these have now, so that no stage runs again and scoring finds them related."""
        inputs = {name: self._digest_now.get(digest, digest) for name, digest in manifest.inputs.items()}
        # What it was made from has the users still; what it is has not, as if `prepare` had left them out.
        return inputs | ({"erased": self.tombstones.digest} if manifest.kind == "prepared" else {})

    def _erase_loose_files(self) -> None:
        """Parquet files that belong to no directory of a stage, and reports that name the users by hash."""
        inside = (*(f"{name}/" for name in self._directories()), "dump/", "runs/", f"{RECEIPTS}/")
        for file in [name for name in list_files(self.output_dir) if not name.startswith(inside)]:
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
        """Rewrite the files of the table's current version that hold somebody, and swap them in one commit."""
        dump_dir = self.config.run.dump
        table = open_current(dump_dir)
        live = [] if table is None else delta_files(table)
        rows = {name: count for name in live if (count := self._rows(join(dump_dir, name), name))}
        if not rows:
            return
        self.journal.note("dump", f"version {open_table(dump_dir).version()}", rows=rows)
        folder = f"erased={datetime.now(UTC):%Y%m%dT%H%M%S%f}"
        swapped = {name: f"{folder}/{_without_folder(name)}" for name in rows}
        for name, new_name in swapped.items():
            copy_without(join(dump_dir, name), join(dump_dir, new_name), name, self._by_tombstone)
        _swap(dump_dir, swapped, sum(rows.values()))

    def _remove_staged_and_runs(self) -> None:
        """Old versions, staged lists and interrupted runs go whole, if anything held somebody."""
        dump_dir, runs_dir = self.config.run.dump, self.config.run.runs
        if not (self.journal.entries or self._holding(dump_dir) or self._holding(runs_dir)):
            return
        self._clean_dump(dump_dir)
        evaluation = self.config.run.evaluation
        if self._holding(runs_dir) and exists(join(evaluation, _EXAMPLES)):
            # A comparison shows what a few users had and liked; without its runs nobody can say whom. It is made anew.
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
        else:  # whatever is there was staged for a first publication
            for folder in _folders(dump_dir):
                self.journal.note(f"dump/{folder}", None, removed=True)
                files.remove_directory(join(dump_dir, folder))
        for name in self._holding(dump_dir):  # a vacuum passes over names that begin with an underscore
            self.journal.note(f"dump/{name}", None, removed=True)
            files.remove_file(join(dump_dir, name))

    def _holding(self, directory: str) -> list[str]:
        """Parquet files below a directory with somebody in them; one that cannot be read may have."""
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

    def write_receipt(self, left: list[str], seconds: float) -> str | None:
        """Write the receipt and forget the journal; where nothing is new, the receipt that tells of these users."""
        receipts = _receipts(self.output_dir)
        told = {digest: uri for uri, receipt in receipts.items() for digest in receipt["tombstones"]}
        asked = {self.tombstones.hash_of(user_id) for user_id in self.user_ids}
        users = sorted(asked | (self.tombstones.digests - set(told)))
        if not self.journal.entries and not left and all(user in told for user in users):
            return max((told[user] for user in users), default=None)
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
            "files_that_still_name_them": left,
            "searched_ids": len(self.user_ids),
            "not_done": list(NOT_DONE),
            "raw_sources": _raw_sources(self.config),
        }
        files.replace_json(uri, content)
        files.remove_file(self.journal.uri)
        return uri


def _real(uri: str) -> str:
    """The directory behind a link: a rewritten one is moved to its name, and the link would go instead of the data."""
    fs, path = filesystem(uri)
    return os.path.realpath(path) if isinstance(fs, LocalFileSystem) else uri


def _folders(uri: str) -> list[str]:
    fs, path = filesystem(uri)
    if not fs.exists(path):
        return []
    found = [str(one["name"]).rstrip("/") for one in fs.ls(path, detail=True) if fs.isdir(one["name"])]
    return sorted(name.rpartition("/")[2] for name in found)


def _by_table(rows: dict[str, int]) -> Counter[str]:
    """Rows by table: those of all buckets together."""
    counts: Counter[str] = Counter()
    for file, count in rows.items():
        counts[file.partition("/")[0].removesuffix(".parquet")] += count
    return counts


def _without_folder(name: str) -> str:
    """A file's name without the folder that an earlier erasure gave it."""
    return name.partition("/")[2] if name.startswith("erased=") else name


def _swap(dump_dir: str, swapped: dict[str, str], num_erased: int) -> None:
    """Put files in place of others (old name → new name) in one commit.

    By name, not by `DeltaTable.delete`: its predicate would stand in the log, id and all. Without statistics, which hold
    the least and the greatest id of a file.
    """
    table, (fs, root), now_ms = open_table(dump_dir), filesystem(dump_dir), int(time.time() * 1000)
    actions: list[Any] = [RemoveAction(name, data_change=True, deletion_timestamp=now_ms) for name in swapped]
    sizes = {name: int(fs.size(f"{root}/{name}")) for name in swapped.values()}
    actions += [AddAction(name, size, {}, now_ms, True, "{}") for name, size in sizes.items()]
    facts = CommitProperties(custom_metadata=_facts(table, num_erased))
    try:
        table.create_write_transaction(actions, mode="append", schema=table.schema(), commit_properties=facts)
    except CommitFailedError:
        raise ResourceError(f"{dump_dir} was published to meanwhile; run the same command again") from None


def _facts(table: DeltaTable, num_erased: int) -> dict[str, str]:
    """What the last publication says of itself: these are its lists still, without a few."""
    published: dict[str, Any] = next((commit for commit in table.history() if "run_id" in commit), {})
    facts = {name: str(published[name]) for name in FACTS if name in published}
    return facts | {"erased_users": str(num_erased)}


def _state(uri: str) -> str | None:
    """The digest of a directory of ours, the sha256 of a file, the version of a table; None where nothing is there."""
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


def _raw_sources(config: Config) -> list[str]:
    sources = [getattr(config.data, role) for role in ROLES] + [config.nightly.events]
    paths = [source.path for source in sources if source is not None]
    return [one for path in paths for one in ([path] if isinstance(path, str) else path)]
