"""An erased user is gone from every byte below output_dir, nobody else notices, and a crash changes neither."""

from __future__ import annotations

import gzip
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from deltalake import DeltaTable
from directories import NUM_WORDS, write_random_model
from parity import parity
from safetensors.numpy import load_file

from cllm4rec import artifacts, erasure
from cllm4rec.artifacts import (
    copy_file,
    is_current,
    list_files,
    read_json,
    read_manifest,
    verify_files,
    write_directory,
    write_json,
)
from cllm4rec.catalog import Catalog
from cllm4rec.config import Config, parse_config
from cllm4rec.data.documents import Documents
from cllm4rec.data.prepare import prepare_inputs
from cllm4rec.data.prepared import (
    SPLITS,
    Histories,
    Language,
    bucket_name,
    bucket_of,
    load_documents,
    load_space,
    write_table,
)
from cllm4rec.data.world import parity_world
from cllm4rec.erasure import NOT_DONE, erase
from cllm4rec.errors import ArtifactError, AuditError, ConfigError, ResourceError
from cllm4rec.evaluation.protocol import HeldOut, Validation
from cllm4rec.evaluation.stage import evaluate_inputs
from cllm4rec.registry import promote_directory, promoted_directories
from cllm4rec.scoring.audit import hashed
from cllm4rec.scoring.lease import hold
from cllm4rec.scoring.plan import plan_score
from cllm4rec.scoring.publish import SCHEMA, current_run, publish
from cllm4rec.scoring.scorer import Scorer
from cllm4rec.tombstones import Tombstones
from cllm4rec.training.fits import backbone_inputs, finetune_inputs, pretrain_inputs
from jobs import cli
from jobs import erase as job
from serve.recommend import Recommender
from serve.schemas import RecommendRequest

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


class CrashError(Exception):
    pass


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything an output_dir may hold, finished and interrupted, with the canary in all of it."""
    folder = tmp_path_factory.mktemp("template")
    WORLD.write(str(folder / "raw"))
    write_output(config_of(folder, folder / "raw"), folder)
    return folder


@pytest.fixture
def config(template: Path, tmp_path: Path) -> Config:
    shutil.copytree(template / "out", tmp_path / "out")
    return config_of(tmp_path, template / "raw")


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
    write_random_model(folder / "random", config.directory("prepared"), seed=0)
    for name, source in (("backbone", "backbone"), ("pretrained", "model"), ("model", "model")):
        write_stage(config, name, str(folder / "random" / source))
    write_evaluation(config)
    promote_directory(config, read_manifest(config.directory("model"), "model").digest, "first")
    for run_id in ("first", "second"):
        publish(config.directory("dump"), stage(config, run_id), run_id, 1, {"run_date": "d", "model_version": "m"})
    stage(config, "interrupted")
    write_nightly(config)
    write_leftovers(config)


def write_prepared(config: Config) -> None:
    catalog, histories, documents = WORLD.catalog, WORLD.histories, parity().documents
    texts = [f"likes {CANARY_TEXT}" if user == ROW else text for user, text in enumerate(catalog.user_texts)]
    user_bucket = bucket_of(histories.user, WORLD.num_users, BUCKETS)
    with write_directory(
        config.directory("prepared"), kind="prepared", inputs=prepare_inputs(config), config={}
    ) as draft:
        Catalog(USER_IDS, catalog.item_ids.tolist(), texts, catalog.item_texts, catalog.item_counts.tolist()).save(
            draft.uri
        )
        Language(parity().prompts, NUM_WORDS).save(draft.uri)
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
    with write_directory(config.directory(name), kind=name, inputs=inputs, config={}) as draft:
        for file in list_files(source):
            if file != artifacts.MANIFEST:
                copy_file(f"{source}/{file}", draft.path(file))


def write_evaluation(config: Config) -> None:
    with write_directory(
        config.directory("evaluation"), kind="evaluation", inputs=evaluate_inputs(config), config={}
    ) as draft:
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
        write_table(lists(run_id, list(users)), f"{config.directory('dump')}/{name}")
    return names


def write_nightly(config: Config) -> None:
    nightly = Path(config.directory("nightly"))
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
    prepared, model = config.directory("prepared"), config.directory("model")
    histories, documents = Histories.load(prepared), load_documents(prepared)
    rows = np.flatnonzero(histories.user != ROW)
    about = documents.take(np.flatnonzero(documents.user != ROW))
    frame = DeltaTable(config.directory("dump")).to_pandas().sort_values("user_id")
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
            for tables in [load_file(f"{config.directory(name)}/tables.safetensors")]
        },
        "evaluation": pq.read_table(f"{config.directory('evaluation')}/per_user.parquet")
        .filter(pa.compute.not_equal(pa.compute.field("user_id"), CANARY))
        .to_pydict(),
    }


def assert_current(config: Config) -> None:
    """Every stage's directory is what its manifest says, and what the stage would write."""
    for name, inputs in STAGES.items():
        verify_files(config.directory(name), read_manifest(config.directory(name), name))
        assert is_current(config.directory(name), name, inputs(config)), name


def assert_whole(config: Config) -> None:
    """The same, and every promoted model is whole."""
    assert_current(config)
    for uri in promoted_directories(config.output_dir):
        verify_files(uri, read_manifest(uri, "model"))


def receipts(config: Config) -> list[dict[str, Any]]:
    return [read_json(str(path)) for path in sorted(Path(config.output_dir, "erasures").glob("*.json"))]


def test_the_template_has_the_canary_everywhere(config: Config) -> None:
    found = {
        name.partition("/")[0] for name in files_with(Path(config.output_dir), CANARY, CANARY_TEXT, hashed(CANARY))
    }
    everywhere = {"prepared", "pretrained", "model", "models", "evaluation", "dump", "runs", "nightly"}
    assert found == everywhere | {"prepared.partial", "backbone.partial", "evaluation.old"}
    assert_current(config)


def test_no_file_knows_the_user_or_their_text_afterwards(config: Config) -> None:
    told = erase(config, [CANARY])
    assert files_with(Path(config.output_dir), CANARY, CANARY_TEXT, hashed(CANARY)) == []
    assert (told["new_tombstones"], told["already_done"]) == (1, False)
    assert CANARY not in str(told)
    assert not list(Path(config.directory("runs")).iterdir())
    assert not list(Path(config.output_dir).glob("*.partial"))
    assert len(promoted_directories(config.output_dir)) == 1, "half a copy of a model is removed"
    assert ROW not in pq.read_table(f"{config.directory('prepared')}/interactions")["user"].to_pylist()
    assert ROW not in load_documents(config.directory("prepared")).user


def test_nobody_else_notices(config: Config) -> None:
    before = state(config)
    erase(config, [CANARY])
    after = state(config)
    for name in before:
        assert after[name] == before[name], name


def test_both_embeddings_of_the_user_are_zero_in_every_model(config: Config) -> None:
    erase(config, [CANARY])
    models = [config.directory("pretrained"), config.directory("model"), *promoted_directories(config.output_dir)]
    assert len(models) == 3
    for uri in models:
        tables = load_file(f"{uri}/tables.safetensors")
        assert not tables["collaborative_users"][ROW].any()
        assert not tables["content_users"][ROW].any()
        assert all(table.any(axis=1).sum() == len(table) - ("users" in name) for name, table in tables.items())


def test_no_stage_runs_again_and_scoring_finds_its_inputs_related(config: Config) -> None:
    erase(config, [CANARY])
    assert_whole(config)
    plan_score(config)
    counts = read_manifest(config.directory("prepared"), "prepared").counts
    assert counts["erased"]["users"] == counts["erased"]["histories"] == 1
    assert counts["users"] == WORLD.num_users, "everyone else keeps their index"


def test_every_reader_goes_on_with_what_is_left(config: Config) -> None:
    erase(config, [CANARY])
    prepared = config.directory("prepared")
    catalog, _, space = load_space(prepared)
    histories = Histories.load(prepared)
    assert (catalog.num_users, space.num_users, len(histories.user)) == (WORLD.num_users, WORLD.num_users, len(OTHERS))
    assert len(HeldOut.test(histories, config.evaluate).users) == len(Validation(histories).users) == len(OTHERS)
    assert isinstance(load_documents(prepared, rank=1, world_size=3), Documents)
    recommender = Recommender.load(config.directory("model"), prepared)
    erased, known = recommender.answer([RecommendRequest(user_id=CANARY), RecommendRequest(user_id=USER_IDS[0])])
    assert (erased.cold_start, known.cold_start) == (True, False)


def test_a_bucket_of_which_nobody_is_left_can_still_be_read(config: Config) -> None:
    first = USER_IDS[: WORLD.num_users // BUCKETS]
    erase(config, first)
    prepared = config.directory("prepared")
    assert pq.read_metadata(f"{prepared}/histories/{bucket_name(0)}").num_rows == 0
    assert len(Histories.load(prepared).user) == WORLD.num_users - len(first)
    assert load_documents(prepared, rank=1, world_size=BUCKETS).user.min() == len(first)
    answers = Recommender.load(config.directory("model"), prepared).answer([RecommendRequest(user_id=CANARY)])
    assert answers[0].cold_start
    assert_whole(config)


def test_the_table_keeps_its_run_and_its_schema_and_the_receipt_names_lost_versions(config: Config) -> None:
    dump = config.directory("dump")
    erase(config, [CANARY])
    table = DeltaTable(dump)
    assert current_run(dump) == "second"
    assert table.to_pyarrow_dataset().schema.equals(pa.schema(SCHEMA))
    assert len(table.to_pandas()) == len(OTHERS)
    commits = [commit for commit in table.history() if commit.get("erased_users") == "1"]
    assert [(commit["run_id"], commit["run_date"], commit["schema_version"]) for commit in commits] == [
        ("second", "d", "1")
    ]
    assert not list(Path(dump).glob("run=first*")), "an old version"
    assert not list(Path(dump).glob("run=interrupted*")), "never published"
    lost = [entry["lost_versions"] for entry in receipts(config)[0]["touched"] if "lost_versions" in entry]
    assert lost == [[1, 2]]


def test_the_receipt_tells_what_was_done_and_what_was_not(config: Config) -> None:
    before = read_manifest(config.directory("model"), "model").digest
    told = erase(config, [CANARY])
    (receipt,) = receipts(config)
    assert told["receipt"].endswith(".json")
    assert receipt["tombstones"] == sorted(Tombstones.load(config.output_dir).digests)
    touched = {entry["path"]: entry for entry in receipt["touched"]}
    (promoted,) = promoted_directories(config.output_dir)
    assert set(touched) >= {
        "prepared",
        "pretrained",
        "model",
        f"models/{promoted.rpartition('/')[2]}",
        "evaluation",
        "dump",
    }
    assert "backbone" not in touched, "it holds nobody"
    model = touched["model"]
    assert (model["before"], model["after"]) == (before, read_manifest(config.directory("model"), "model").digest)
    assert (model["rows"], model["zeroed_rows"]) == ({"users.parquet": 1}, 1)
    assert touched["evaluation"]["rows"] == {"per_user.parquet": 2, "top100.parquet": 1}
    assert touched["runs/finetune"]["removed"]
    assert touched["nightly/histories"]["removed"]
    assert receipt["not_done"] == list(NOT_DONE)
    assert receipt["raw_sources"] == [config.data.interactions.path]
    assert receipt["files_that_still_name_them"] == []


def test_a_second_run_says_that_it_was_done_and_changes_nothing(config: Config) -> None:
    first = erase(config, [CANARY])
    new_run = Path(config.directory("runs"), "finetune", "x")
    new_run.mkdir(parents=True)
    (new_run / "checkpoint").write_text("trained since")
    before = contents(Path(config.output_dir))
    second = erase(config, [CANARY])
    assert contents(Path(config.output_dir)) == before
    assert (second["already_done"], second["touched"], second["receipt"]) == (True, 0, first["receipt"])


def test_a_user_nobody_knows_gets_a_tombstone_and_nothing_is_touched(config: Config) -> None:
    for name in ("prepared.partial", "backbone.partial", "evaluation.old", "models/20260101T000000Z-0123456789ab"):
        shutil.rmtree(Path(config.output_dir, name))
    before = contents(Path(config.output_dir))
    told = erase(config, ["never-seen-1"])
    after = contents(Path(config.output_dir))
    new = {name for name in after if name not in before}
    assert new == {"erased.json", told["receipt"].removeprefix(f"{config.output_dir}/")}
    assert {name for name in before if after[name] != before[name]} == {"prepared/manifest.json"}, "its inputs"
    assert (receipts(config)[0]["found"], receipts(config)[0]["touched"]) == (False, [])
    assert Tombstones.load(config.output_dir).contains(["never-seen-1"]).all()
    assert_whole(config)


def crash_after(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, calls: int) -> None:
    """Let a function work so many times, then fail."""
    real: Callable[..., Any] = getattr(owner, name)
    done: list[str] = []

    def wrapped(*args: Any, **options: Any) -> Any:
        if len(done) >= calls:
            raise CrashError
        done.append(name)
        return real(*args, **options)

    monkeypatch.setattr(owner, name, wrapped)


@pytest.mark.parametrize(
    ("owner", "name", "calls"),
    [
        (erasure._Erasure, "run", 0),  # nothing but the tombstone
        (erasure, "copy_without", 5),  # in mid-directory
        (artifacts, "_move", 1),  # prepared/ is set aside and the new one has no name yet
        (erasure, "copy_zeroed", 1),  # pretrained/ is done and model/ is not
        (artifacts, "_move", 5),  # model/ is set aside
        (erasure, "replace_file", 0),
        (erasure, "_swap", 0),  # new files of the table lie there and no commit names them
        (erasure, "vacuum", 1),  # the commit is done and old versions are there
        (erasure._Erasure, "write_receipt", 0),
    ],
)
def test_an_interrupted_erasure_leaves_whole_directories_and_is_finished_by_the_same_command(
    config: Config, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, calls: int
) -> None:
    before = state(config)
    with monkeypatch.context() as patch:
        crash_after(patch, owner, name, calls)
        with pytest.raises(CrashError):
            erase(config, [CANARY])
    assert Tombstones.load(config.output_dir).contains([CANARY]).all()
    is_left = bool(files_with(Path(config.output_dir), CANARY))
    assert is_left is (name != "write_receipt"), "the crash came in mid-work"
    erase(config, [CANARY])
    assert files_with(Path(config.output_dir), CANARY, CANARY_TEXT, hashed(CANARY)) == []
    assert_whole(config)
    assert state(config) == before
    (receipt,) = receipts(config)
    assert {"prepared", "pretrained", "model", "evaluation", "dump"} <= {entry["path"] for entry in receipt["touched"]}
    assert all(entry["before"] != entry["after"] for entry in receipt["touched"] if "rows" in entry)


def test_what_another_erasure_did_not_finish_is_finished_too(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        crash_after(patch, erasure, "copy_without", 0)
        with pytest.raises(CrashError):
            erase(config, [CANARY])
    erase(config, [USER_IDS[3]])
    assert files_with(Path(config.output_dir), CANARY, USER_IDS[3]) == []
    assert len(receipts(config)[0]["tombstones"]) == 2
    assert_whole(config)


def test_while_a_scoring_run_holds_the_table_the_tombstone_is_written_and_the_rest_waits(config: Config) -> None:
    with hold(config.directory("dump"), "a night"), pytest.raises(ResourceError, match="a night is at work"):
        erase(config, [CANARY])
    assert Tombstones.load(config.output_dir).contains([CANARY]).all()
    assert files_with(Path(config.directory("model")), CANARY)
    erase(config)
    assert files_with(Path(config.output_dir), CANARY, CANARY_TEXT) == [], "also without the id"


def test_a_directory_brought_back_from_a_backup_is_cleaned_again(config: Config, tmp_path: Path) -> None:
    shutil.copytree(config.directory("evaluation"), tmp_path / "backup")
    erase(config, [CANARY])
    shutil.rmtree(config.directory("evaluation"))
    shutil.copytree(tmp_path / "backup", config.directory("evaluation"))
    told = erase(config)
    assert files_with(Path(config.output_dir), CANARY) == []
    assert (told["new_tombstones"], told["touched"]) == (0, 1)
    assert_whole(config)


def test_users_erased_one_after_the_other_leave_one_chain_of_inputs(config: Config) -> None:
    for user_id in (CANARY, USER_IDS[0], USER_IDS[-1]):
        erase(config, [user_id])
    assert files_with(Path(config.output_dir), CANARY, USER_IDS[0], USER_IDS[-1]) == []
    assert_whole(config)
    assert len(set(Catalog.load(config.directory("model")).user_ids)) == WORLD.num_users, "a row each"
    manifest = read_manifest(config.directory("prepared"), "prepared")
    assert (manifest.counts["erased"]["users"], len(manifest.counts["replaces"])) == (3, 3)
    assert not any(
        "erased=" in file.partition("erased=")[2] for file in DeltaTable(config.directory("dump")).file_uris()
    )


def test_an_id_in_another_users_text_is_told_and_not_hidden(config: Config) -> None:
    Path(config.output_dir, "notes.json").write_text(json.dumps({"text": f"as {CANARY} says"}))
    with pytest.raises(AuditError, match=r"an id still stands in 1 files .*notes\.json") as caught:
        erase(config, [CANARY])
    assert CANARY not in str(caught.value)
    assert receipts(config)[0]["files_that_still_name_them"] == ["notes.json"]
    assert files_with(Path(config.output_dir), CANARY) == ["notes.json"], "everything else was done"


def test_a_damaged_directory_is_refused_before_new_digests_would_hide_it(config: Config) -> None:
    path = Path(config.directory("model"), "tables.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ArtifactError, match=r"tables\.safetensors is damaged"):
        erase(config, [CANARY])


def test_lists_staged_for_a_first_publication_go(tmp_path: Path) -> None:
    config = config_of(tmp_path, tmp_path)
    stage(config, "first")
    erase(config, [CANARY])
    assert list_files(config.directory("dump")) == [], "who is left of them would be staged twice"


def test_an_empty_id_is_refused(config: Config) -> None:
    with pytest.raises(ConfigError, match="--user is empty"):
        erase(config, [CANARY, " "])
    assert len(Tombstones.load(config.output_dir)) == 0


def test_the_job_tells_the_receipt_and_never_the_id(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_defaults=True)))
    monkeypatch.setattr(cli, "connect", lambda _: pytest.fail("an erasure needs no Ray"))
    monkeypatch.setattr(
        sys, "argv", ["erase", "--config", str(tmp_path / "run.yaml"), "--user", CANARY, "--user", USER_IDS[3]]
    )
    with pytest.raises(SystemExit) as exited:
        cli.program("jobs.erase", job.__doc__, job.run, job.add_flags, needs_ray=False)
    output = capsys.readouterr()
    assert exited.value.code == 0
    assert CANARY not in output.out + output.err
    told = json.loads(output.out.splitlines()[-1])
    assert (told["ok"], told["new_tombstones"]) == (True, 2)
    assert Path(told["receipt"]).exists()
    assert files_with(Path(config.output_dir), CANARY, USER_IDS[3]) == []
