"""Work with the published table: versions, comparison, restore, export, lookup and vacuum.

    cllm4rec dump --config demo versions
    cllm4rec dump --config demo compare 3 4
    cllm4rec dump --config demo restore 3
    cllm4rec dump --config demo export --format csv --to lists.csv
    cllm4rec dump --config demo lookup A000000000
    cllm4rec dump --config demo vacuum --keep-days 7

Takes seconds and does not start Ray. `restore` creates a new version with the old content; the version that was current
stays readable by its number until a vacuum. A later erasure does not reach files from `export`.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from cllm4rec.arrays.ids import Catalog
from cllm4rec.commands.cli import AddVerb, Command
from cllm4rec.commands.console import say
from cllm4rec.config import Config
from cllm4rec.errors import ArtifactError
from cllm4rec.nightly import drift
from cllm4rec.nightly.drift import Drift
from cllm4rec.reporting import text_table
from cllm4rec.storage import table_export, table_versions
from cllm4rec.storage.lease import hold
from cllm4rec.storage.registry import current_model
from cllm4rec.storage.table_versions import Version
from cllm4rec.storage.tombstones import Tombstones


def add_verbs(add: AddVerb) -> None:
    add("versions", "list every version in the log, and whether it is still readable")
    compare = add("compare", "measure the drift between two versions")
    compare.add_argument("old", type=int)
    compare.add_argument("new", type=int)
    restore = add("restore", "make the lists of a version current again")
    restore.add_argument("number", type=int, metavar="version")
    export = add("export", "write the lists to one file; CSV has one row per recommended item")
    export.add_argument("--format", choices=table_export.FORMATS, required=True)
    export.add_argument("--to", required=True, metavar="FILE", help="a path or any fsspec URI")
    export.add_argument("--force", action="store_true", help="replace an existing file")
    lookup = add("lookup", "show the list of one user")
    lookup.add_argument("user_id")
    for verb in (export, lookup):
        verb.add_argument("--version", type=int, help="default: the current version")
    vacuum = add("vacuum", "remove files that the current version does not need")
    vacuum.add_argument(
        "--keep-days", type=_days, default=7, help="keep files that were replaced or staged in the last N days (7)"
    )
    vacuum.add_argument("--dry-run", action="store_true", help="only report what would be removed")


def run(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    verbs = {
        "versions": _versions,
        "compare": _compare,
        "restore": _restore,
        "export": _export,
        "lookup": _lookup,
        "vacuum": _vacuum,
    }
    return {"dump": {"verb": args.verb, "directory": config.run.dump, **verbs[args.verb](config, args)}}


def _versions(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    found = table_versions.versions(config.run.dump)
    header = ["version", "time", "run date", "run", "model", "users", "by"]
    say(text_table(header, [_version_row(version) for version in found]))
    return {"versions": [dataclasses.asdict(version) for version in found]}


def _version_row(version: Version) -> list[str]:
    run = [version.facts.get(name, "–") for name in ("run_date", "run_id", "model_version")]
    users = "no longer readable" if version.num_users is None else f"{version.num_users:,}"
    return [str(version.version), version.time, *run, users, version.operation.lower()]


def _compare(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    dump_dir, most = config.run.dump, config.nightly.drift.sample_users
    counts = {version: table_versions.num_users(dump_dir, version) for version in (args.old, args.new)}
    for version, count in counts.items():
        if not count:
            raise ArtifactError(
                f"version {version} of {dump_dir} holds no lists; cllm4rec dump --config FILE versions lists all that do"
            )
    num_users = max(counts.values())
    old, new = (
        drift.sample(table_versions.tables(dump_dir, version, drift.COLUMNS), most, num_users)
        for version in (args.old, args.new)
    )
    items = Catalog.load_items(current_model(config.output_dir))
    found = drift.compare(old, new, (items.item_ids, items.item_counts))
    breaches = drift.breaches(found, config.nightly.drift)
    say(text_table(["", f"version {args.old}", f"version {args.new}"], _drift_rows(found)))
    for breach in breaches:
        say(breach)
    return {"drift": dataclasses.asdict(found), "breaches": breaches}


def _restore(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    dump_dir = config.run.dump
    with hold(dump_dir, f"a restore of version {args.number}"):
        before = int(table_versions.open_table(dump_dir).version())
        after = table_versions.restore(dump_dir, args.number, Tombstones.load(config.output_dir))
    if after == before:
        say(f"dump: the lists of version {args.number} are already current; nothing to do")
    else:
        say(f"dump: version {after} has the lists of version {args.number}; version {before} stays readable")
    return {"restored": args.number, "version": after, "changed": after != before}


def _export(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    dump_dir = config.run.dump
    # Pinned, so that a publication meanwhile changes neither the file nor the reported version.
    version = int(table_versions.open_table(dump_dir, args.version).version())
    num_users = table_export.export(
        dump_dir, version, args.to, args.format, Tombstones.load(config.output_dir), force=args.force
    )
    say(f"dump: {num_users:,} users of version {version} in {args.to}")
    return {"version": version, "file": args.to, "format": args.format, "users": num_users}


def _lookup(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    dump_dir = config.run.dump
    version = int(table_versions.open_table(dump_dir, args.version).version())
    row = table_versions.lookup(dump_dir, version, args.user_id, Tombstones.load(config.output_dir))
    catalog = Catalog.load_items(current_model(config.output_dir))
    items = [
        {"rank": rank, "item_id": item_id, "score": score, "text": _text(catalog, item_id)}
        for rank, (item_id, score) in enumerate(zip(row["item_ids"], row["scores"], strict=True), 1)
    ]
    say(f"version {version}, run date {row['run_date']}, model {row['model_version']}")
    for item in items:
        say(f"  {item['rank']:>3}  {item['score']:8.3f}  {item['item_id']:<12} {item['text'][:90]}".rstrip())
    run = {name: row[name] for name in ("run_date", "model_version")}
    return {"version": version, **run, "items": items}  # without the user id, because this ends up in logs


def _vacuum(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    dump_dir = config.run.dump
    with hold(dump_dir, "a vacuum"):
        planned = table_versions.vacuum(dump_dir, args.keep_days, dry_run=True)
        say(
            f"dump: {planned.num_files:,} files ({planned.num_bytes / 1e6:,.1f} MB) are older than {args.keep_days} days "
            "and not part of the current version"
        )
        if planned.versions:
            say(f"dump: without them these versions are no longer readable: {', '.join(map(str, planned.versions))}")
        if planned.num_files and not args.dry_run:
            table_versions.vacuum(dump_dir, args.keep_days, dry_run=False)
            say("dump: removed")
    return {**dataclasses.asdict(planned), "dry_run": args.dry_run}


def _text(catalog: Catalog, item_id: str) -> str:
    """Empty for an item that the current model does not know."""
    index = catalog.item_index(item_id)
    return catalog.item_texts[index] if index >= 0 else ""


def _drift_rows(found: Drift) -> list[list[str]]:
    quantiles = zip(drift.QUANTILES, found.score_quantiles_old, found.score_quantiles_new, strict=False)
    return [
        ["users sampled", f"{found.old_users:,}", f"{found.new_users:,}"],
        ["not in the other version", f"{found.users_gone:.2%}", f"{found.users_added:.2%}"],
        ["distinct items", f"{found.coverage_old:,}", f"{found.coverage_new:,}"],
        ["popularity lift", f"{found.lift_old:.3f}", f"{found.lift_new:.3f}"],
        *([f"{quantile:.0%} quantile of the scores", f"{old:.3f}", f"{new:.3f}"] for quantile, old, new in quantiles),
        ["Kolmogorov-Smirnov distance of the scores", "", f"{found.score_shift:.3f}"],
        [f"users with another top {drift.TOP}", "", f"{found.top10_changed:.2%}"],
        [f"overlap of the top {drift.TOP}", "", f"{found.top10_overlap:.2%}"],
    ]


def _days(word: str) -> int:
    days = int(word)
    if days < 0:
        raise argparse.ArgumentTypeError(f"{days} days is less than 0")
    return days


COMMAND = Command(run, __doc__ or "", add_verbs=add_verbs, needs_ray=False, writes=False, has_force=False)
