"""The published table, for people: its versions, what changed, going back, handing it on, one user, cleaning up.

    cllm4rec dump --config demo versions
    cllm4rec dump --config demo compare 3 4
    cllm4rec dump --config demo restore 3
    cllm4rec dump --config demo export --format csv --to lists.csv
    cllm4rec dump --config demo lookup u00001
    cllm4rec dump --config demo vacuum --keep-days 7

Takes seconds and starts no Ray. `restore` makes a new version with the old content; the one that was current stays
readable by its number until a vacuum. Files from `export` are copies that no later erasure reaches.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

from cllm4rec.arrays.ids import Catalog
from cllm4rec.commands.cli import AddVerb, Command
from cllm4rec.commands.console import say
from cllm4rec.config import Config
from cllm4rec.nightly import drift
from cllm4rec.nightly.drift import Drift
from cllm4rec.storage import table_versions as dumps
from cllm4rec.storage.lease import hold
from cllm4rec.storage.registry import current_model
from cllm4rec.storage.tombstones import Tombstones


def add_verbs(add: AddVerb) -> None:
    add("versions", "every version of the lists that the log knows, and whether it can still be read")
    compare = add("compare", "how far the lists of one version are from those of another")
    compare.add_argument("old", type=int)
    compare.add_argument("new", type=int)
    restore = add("restore", "make the lists of a version current again")
    restore.add_argument("number", type=int, metavar="version")
    export = add("export", "write the lists to one file; CSV has a row for every recommended item")
    export.add_argument("--format", choices=dumps.FORMATS, required=True)
    export.add_argument("--to", required=True, metavar="FILE", help="a path or any fsspec URI")
    export.add_argument("--force", action="store_true", default=argparse.SUPPRESS, help="replace a file")
    lookup = add("lookup", "the list of one user")
    lookup.add_argument("user_id")
    for verb in (export, lookup):
        verb.add_argument("--version", type=int, help="else the current one")
    vacuum = add("vacuum", "remove files that the current version does not need")
    vacuum.add_argument("--keep-days", type=_days, default=7, help="spare what was replaced or staged since (7)")
    vacuum.add_argument("--dry-run", action="store_true", help="only tell what would be removed")


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
    found = dumps.versions(config.run.dump)
    rows = [["version", "time", "run date", "run", "model", "users", "by"]]
    for one in found:
        facts = [one.facts.get(name, "–") for name in ("run_date", "run_id", "model_version")]
        users = "not readable any more" if one.num_users is None else f"{one.num_users:,}"
        rows.append([str(one.version), one.time, *facts, users, one.operation.lower()])
    say(_aligned(rows))
    return {"versions": [dataclasses.asdict(one) for one in found]}


def _compare(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    dump_dir, most = config.run.dump, config.nightly.drift.sample_users
    num_users = max(dumps.num_users(dump_dir, version) for version in (args.old, args.new))
    old, new = (
        drift.sample(dumps.tables(dump_dir, version, drift.COLUMNS), most, num_users)
        for version in (args.old, args.new)
    )
    items = Catalog.load_items(current_model(config.output_dir))
    found = drift.compare(old, new, (items.item_ids, items.item_counts))
    breaches = drift.breaches(found, config.nightly.drift)
    say(_aligned(_drift_rows(found, args.old, args.new)))
    for breach in breaches:
        say(breach)
    return {"drift": dataclasses.asdict(found), "breaches": breaches}


def _restore(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    dump_dir = config.run.dump
    with hold(dump_dir, f"the restoring of version {args.number}"):
        before = int(dumps.open_table(dump_dir).version())
        after = dumps.restore(dump_dir, args.number, Tombstones.load(config.output_dir))
    if after == before:
        say(f"dump: the lists of version {args.number} are current already; nothing to do")
    else:
        say(f"dump: version {after} has the lists of version {args.number}; version {before} stays readable")
    return {"restored": args.number, "version": after, "changed": after != before}


def _export(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    dump_dir = config.run.dump
    # Pinned here, so that a publication meanwhile changes neither the file nor what is told of it.
    version = int(dumps.open_table(dump_dir, args.version).version())
    num_users = dumps.export(
        dump_dir, version, args.to, args.format, Tombstones.load(config.output_dir), force=args.force
    )
    say(f"dump: {num_users:,} users of version {version} in {args.to}")
    return {"version": version, "file": args.to, "format": args.format, "users": num_users}


def _lookup(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    dump_dir = config.run.dump
    version = int(dumps.open_table(dump_dir, args.version).version())
    row = dumps.lookup(dump_dir, version, args.user_id, Tombstones.load(config.output_dir))
    catalog = Catalog.load_items(current_model(config.output_dir))
    items = [
        {"rank": rank, "item_id": item_id, "score": score, "text": _text(catalog, item_id)}
        for rank, (item_id, score) in enumerate(zip(row["item_ids"], row["scores"], strict=True), 1)
    ]
    say(f"version {version}, run date {row['run_date']}, model {row['model_version']}")
    for item in items:
        say(f"  {item['rank']:>3}  {item['score']:8.3f}  {item['item_id']:<12} {item['text'][:90]}".rstrip())
    facts = {name: row[name] for name in ("run_date", "model_version")}
    return {"version": version, **facts, "items": items}  # without the user's id: this line ends up in logs


def _vacuum(config: Config, args: argparse.Namespace) -> dict[str, Any]:
    dump_dir = config.run.dump
    with hold(dump_dir, "a vacuum"):
        planned = dumps.vacuum(dump_dir, args.keep_days, dry_run=True)
        say(
            f"dump: {planned.num_files:,} files ({planned.num_bytes / 1e6:,.1f} MB) are older than {args.keep_days} days "
            "and not of the current version"
        )
        if planned.versions:
            say(f"dump: without them these versions can be read no more: {', '.join(map(str, planned.versions))}")
        if planned.num_files and not args.dry_run:
            dumps.vacuum(dump_dir, args.keep_days, dry_run=False)
            say("dump: removed")
    return {**dataclasses.asdict(planned), "dry_run": args.dry_run}


def _text(catalog: Catalog, item_id: str) -> str:
    """Empty for an item the present model does not know."""
    index = catalog.item_index(item_id)
    return catalog.item_texts[index] if index >= 0 else ""


def _drift_rows(found: Drift, old: int, new: int) -> list[list[str]]:
    return [
        ["", f"version {old}", f"version {new}"],
        ["users looked at", f"{found.old_users:,}", f"{found.new_users:,}"],
        ["of them not in the other", f"{found.users_gone:.2%}", f"{found.users_added:.2%}"],
        ["different items", f"{found.coverage_old:,}", f"{found.coverage_new:,}"],
        ["popularity lift", f"{found.lift_old:.3f}", f"{found.lift_new:.3f}"],
        *(
            [f"score, {quantile:.0%} are below", f"{before:.3f}", f"{after:.3f}"]
            for quantile, before, after in zip(
                drift.QUANTILES, found.score_quantiles_old, found.score_quantiles_new, strict=False
            )
        ),
        ["distance of the scores", "", f"{found.score_shift:.3f}"],
        [f"other top {drift.TOP}", "", f"{found.top10_changed:.2%}"],
        [f"shared of the top {drift.TOP}", "", f"{found.top10_overlap:.2%}"],
    ]


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _days(word: str) -> int:
    days = int(word)
    if days < 0:
        raise argparse.ArgumentTypeError(f"{days} days are fewer than none")
    return days


COMMAND = Command(run, __doc__ or "", add_verbs=add_verbs, needs_ray=False)
