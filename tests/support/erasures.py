"""An output_dir with a canary in everything that one may hold, and the slow searches for it."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable
from safetensors.numpy import load_file

from cllm4rec.arrays.histories import SPLITS
from cllm4rec.arrays.ids import Catalog
from cllm4rec.config import Config, parse_config
from cllm4rec.data.prepare import prepare_inputs
from cllm4rec.data.prepared import PromptTokens, bucket_name, bucket_of, load_documents, load_histories
from cllm4rec.data.world import parity_world
from cllm4rec.evaluation.stage import evaluate_inputs
from cllm4rec.nightly.audit import hashed
from cllm4rec.scoring.scorer import Scorer
from cllm4rec.storage import artifacts
from cllm4rec.storage.artifacts import is_current, read_manifest, verify_files, write_directory
from cllm4rec.storage.files import copy_file, list_files, read_json, write_json, write_table
from cllm4rec.storage.registry import promote_directory, promoted_directories
from cllm4rec.storage.table import SCHEMA, publish
from cllm4rec.training.fit import backbone_inputs, finetune_inputs, pretrain_inputs
from support.directories import NUM_WORDS, write_random_model
from support.parity import parity

CANARY, CANARY_TEXT = "canary-Q7X9ZZ", "xylophonequartz"
ROW, BUCKETS = 7, 4
WORLD = parity_world()
USER_IDS = [CANARY if user == ROW else user_id for user, user_id in enumerate(WORLD.catalog.user_ids)]
OTHERS = np.array([user for user in range(WORLD.num_users) if user != ROW])
STAGES = {
    "prepared": prepare_inputs,
    "backbone": backbone_inputs,
    "pretrained": pretrain_inputs,
    "model": finetune_inputs,
    "evaluation": evaluate_inputs,
}


def write_template(folder: Path) -> Path:
    """Everything an output_dir may hold, finished and interrupted, with the canary in all of it."""
    WORLD.write(str(folder / "raw"))
    write_output(config_of(folder, folder / "raw"), folder)
    return folder


def copy_of(template: Path, folder: Path) -> Config:
    """The same in a folder of its own, to erase from."""
    shutil.copytree(template / "out", folder / "out")
    return config_of(folder, template / "raw")


def config_of(folder: Path, raw: Path) -> Config:
    columns = {"user": "user", "item": "item", "rating": "rating", "text": "text", "timestamp": "timestamp"}
    interactions = {"path": str(raw / "interactions*.jsonl"), "columns": columns}
    return parse_config(
        {
            "output_dir": str(folder / "out"),
            "data": {"interactions": interactions},
            "model": {"backbone": {"vocab_size": 300}},
            "run_date": "2026-11-20",
        }
    )


def write_output(config: Config, folder: Path) -> None:
    write_prepared(config)
    write_random_model(folder / "random", config.run.prepared, seed=0)
    for name, source in (("backbone", "backbone"), ("pretrained", "model"), ("model", "model")):
        write_stage(config, name, str(folder / "random" / source))
    write_evaluation(config)
    promote_directory(
        config.output_dir, read_manifest(config.run.model, "model").digest, "first", keep=config.promote.keep
    )
    for run_id in ("first", "second"):
        publish(config.run.dump, stage(config, run_id), run_id, 1, {"run_date": "d", "model_version": "m"})
    stage(config, "interrupted")
    write_nightly(config)
    write_leftovers(config)


def write_prepared(config: Config) -> None:
    catalog, histories, documents = WORLD.catalog, WORLD.histories, parity().documents
    texts = [f"likes {CANARY_TEXT}" if user == ROW else text for user, text in enumerate(catalog.user_texts)]
    user_bucket = bucket_of(histories.user, WORLD.num_users, BUCKETS)
    with write_directory(config.run.prepared, kind="prepared", inputs=prepare_inputs(config), config={}) as draft:
        Catalog(USER_IDS, catalog.item_ids.tolist(), texts, catalog.item_texts, catalog.item_counts.tolist()).save(
            draft.uri
        )
        PromptTokens(parity().prompts, NUM_WORDS).save(draft.uri)
        splits = {name: getattr(histories, name).to_arrow() for name in SPLITS}
        rows = pa.table({"user": histories.user, "user_id": USER_IDS, **splits})
        together = histories.together(*SPLITS)
        facts = pa.table(
            {"user": histories.user[together.rows], "item": together.values, "split": ["train"] * len(together.values)}
        )
        for bucket in range(BUCKETS):
            mine = np.flatnonzero(user_bucket == bucket)
            write_table(rows.take(mine), draft.path("histories", bucket_name(bucket)))
            of_mine = np.isin(facts["user"].to_numpy(), mine)
            write_table(facts.filter(pa.array(of_mine)), draft.path("interactions", bucket_name(bucket)))
            about = np.isin(documents.user, mine) | ((documents.user < 0) & (bucket == 0))
            table = documents.take(np.flatnonzero(about)).to_arrow()
            write_table(table, draft.path("documents", bucket_name(bucket)))
        refused = {"source": ["interactions"], "file": ["a.jsonl"], "line": [3], "reason": ["not UTF-8"]}
        write_table(pa.table(refused), draft.path("quarantine", "refused.parquet"))
        draft.counts["users"] = WORLD.num_users


def write_stage(config: Config, name: str, source: str) -> None:
    inputs = STAGES[name](config)
    with write_directory(config.run.directory(name), kind=name, inputs=inputs, config={}) as draft:
        for file in list_files(source):
            if file != artifacts.MANIFEST:
                copy_file(f"{source}/{file}", draft.path(file))


def write_evaluation(config: Config) -> None:
    with write_directory(config.run.evaluation, kind="evaluation", inputs=evaluate_inputs(config), config={}) as draft:
        per_user = {"user_id": USER_IDS * 2, "method": ["cllm4rec"] * 60 + ["ease"] * (2 * len(USER_IDS) - 60)}
        write_table(pa.table(per_user), draft.path("per_user.parquet"))
        write_table(pa.table({"user_id": USER_IDS, "item_ids": [["x"]] * len(USER_IDS)}), draft.path("top100.parquet"))
        write_json(draft.path("metrics.json"), {"results": 1})


def lists(run_id: str, users: list[int]) -> pa.Table:
    columns = [
        [USER_IDS[user] for user in users],
        [[f"{run_id}-{user}"] for user in users],
        [[float(user)] for user in users],
    ]
    return pa.table([*columns, ["d"] * len(users), ["m"] * len(users)], schema=SCHEMA)


def stage(config: Config, run_id: str) -> list[str]:
    """Staged lists of everybody in two buckets; the canary is in the first."""
    half = WORLD.num_users // 2
    names = [f"run={run_id}-1/bucket=0000{bucket}/part.parquet" for bucket in (0, 1)]
    for name, users in zip(names, (range(half), range(half, WORLD.num_users)), strict=True):
        write_table(lists(run_id, list(users)), f"{config.run.dump}/{name}")
    return names


def write_nightly(config: Config) -> None:
    nightly = Path(config.run.nightly)
    with write_directory(str(nightly / "histories"), kind="histories", inputs={"erased": "x"}, config={}) as draft:
        write_table(pa.table({"user": [ROW], "user_id": [CANARY]}), draft.path("bucket-00000.parquet"))
    (nightly / "2026-11-19-first-1").mkdir()
    (nightly / "2026-11-19-first-1" / "report.md").write_text(
        f"refused: a list is too short (such as {hashed(CANARY)})"
    )
    write_table(
        pa.table({"user_id": ["anna", CANARY], "n": [1, 2]}), str(nightly / "2026-11-19-first-1" / "sample.parquet")
    )


def write_leftovers(config: Config) -> None:
    """What crashes leave: drafts, half a promotion, checkpoints of training and of scoring."""
    out = Path(config.output_dir)
    write_table(
        pa.table({"text": [f"{CANARY} {CANARY_TEXT}"]}), str(out / "prepared.partial" / "staging" / "x.parquet")
    )
    (out / "backbone.partial").mkdir()
    (out / "backbone.partial" / "texts.txt").write_text(CANARY_TEXT)
    shutil.copytree(out / "model", out / "evaluation.old")
    shutil.copytree(out / "model", out / "models" / "20260101T000000Z-0123456789ab")
    (out / "models" / "20260101T000000Z-0123456789ab" / "manifest.json").unlink()
    (out / "runs" / "finetune").mkdir(parents=True)
    (out / "runs" / "finetune" / "log.gz").write_bytes(gzip.compress(CANARY.encode()))
    write_table(pa.table({"user_id": [CANARY]}), str(out / "runs" / "score" / "interrupted-1" / "x.parquet"))


def files_with(folder: Path, *words: str) -> list[str]:
    """The slow and obvious search: bytes, unpacked bytes, and every value of every parquet file."""
    found = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        if path.suffix == ".gz":
            content += gzip.decompress(content)
        if path.suffix == ".parquet":
            content += str(pq.read_table(path).to_pylist()).encode()
        if any(word.encode() in content for word in words):
            found.append(str(path.relative_to(folder)))
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def state(config: Config) -> dict[str, Any]:
    """What everybody else has: lists, rows, documents, answers. The same before and after."""
    prepared, model = config.run.prepared, config.run.model
    histories, documents = load_histories(prepared), load_documents(prepared)
    rows = np.flatnonzero(histories.user != ROW)
    about = documents.take(np.flatnonzero(documents.user != ROW))
    frame = DeltaTable(config.run.dump).to_pandas().sort_values("user_id")
    frame = frame[frame["user_id"] != CANARY]
    catalog = Catalog.load(model)
    items, scores = Scorer.load(model).top_k(OTHERS, histories.take(rows).together(*SPLITS), 5)
    return {
        "lists": [[str(value) for value in row] for row in frame.to_numpy()],
        "histories": [histories.take(rows).together(*SPLITS).tolist(), histories.user[rows].tolist()],
        "documents": [getattr(about, name).tolist() for name in ("kind", "user", "item", "prompt", "main")],
        "users": [catalog.user_ids[OTHERS].tolist(), [catalog.user_texts[user] for user in OTHERS]],
        "items": [catalog.item_ids.tolist(), catalog.item_counts.tolist()],
        "answers": [items.tolist(), scores.tolist()],
        "tables": {
            name: {
                key: value[OTHERS if key.endswith("users") else slice(None)].tolist() for key, value in tables.items()
            }
            for name in ("pretrained", "model")
            for tables in [load_file(f"{config.run.directory(name)}/tables.safetensors")]
        },
        "evaluation": pq.read_table(f"{config.run.evaluation}/per_user.parquet")
        .filter(pa.compute.not_equal(pa.compute.field("user_id"), CANARY))
        .to_pydict(),
    }


def assert_current(config: Config) -> None:
    """Every stage's directory is what its manifest says, and what the stage would write."""
    for name, inputs in STAGES.items():
        verify_files(config.run.directory(name), read_manifest(config.run.directory(name), name))
        assert is_current(config.run.directory(name), name, inputs(config)), name


def assert_whole(config: Config) -> None:
    """The same, and every promoted model is whole."""
    assert_current(config)
    for uri in promoted_directories(config.output_dir):
        verify_files(uri, read_manifest(uri, "model"))


def receipts(config: Config) -> list[dict[str, Any]]:
    return [read_json(str(path)) for path in sorted(Path(config.output_dir, "erasures").glob("*.json"))]
