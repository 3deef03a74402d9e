"""An erased user is gone from every byte below output_dir, and nobody else notices."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable
from safetensors.numpy import load_file
from support.erasures import (
    BUCKETS,
    CANARY,
    CANARY_TEXT,
    OTHERS,
    ROW,
    USER_IDS,
    WORLD,
    assert_current,
    assert_whole,
    config_of,
    copy_of,
    files_with,
    receipts,
    stage,
    state,
)

from cllm4rec.arrays.ids import Catalog
from cllm4rec.config import Config
from cllm4rec.data.documents import Documents
from cllm4rec.data.prepared import bucket_name, load_documents, load_histories, load_token_space
from cllm4rec.errors import ArtifactError
from cllm4rec.metrics.protocol import HeldOut, Validation
from cllm4rec.nightly.audit import hashed
from cllm4rec.nightly.plan import plan_score
from cllm4rec.privacy.erasure import erase
from cllm4rec.scoring.recommender import Query, Recommender
from cllm4rec.storage.artifacts import read_manifest, write_directory
from cllm4rec.storage.files import exists, list_files, write_bytes
from cllm4rec.storage.registry import promoted_directories
from cllm4rec.storage.table import SCHEMA, current_run


@pytest.fixture
def config(erasure_template: Path, tmp_path: Path) -> Config:
    return copy_of(erasure_template, tmp_path)


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
    assert not list(Path(config.run.runs).iterdir())
    assert not list(Path(config.output_dir).glob("*.partial"))
    assert len(promoted_directories(config.output_dir)) == 1, "half a copy of a model is removed"
    assert ROW not in pq.read_table(f"{config.run.prepared}/interactions")["user"].to_pylist()
    assert ROW not in load_documents(config.run.prepared).user


def test_nobody_else_notices(config: Config) -> None:
    before = state(config)
    erase(config, [CANARY])
    after = state(config)
    for name in before:
        assert after[name] == before[name], name


def test_both_embeddings_of_the_user_are_zero_in_every_model(config: Config) -> None:
    erase(config, [CANARY])
    models = [config.run.pretrained, config.run.model, *promoted_directories(config.output_dir)]
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
    counts = read_manifest(config.run.prepared, "prepared").counts
    assert counts["erased"]["users"] == counts["erased"]["histories"] == 1
    assert counts["users"] == WORLD.num_users, "everyone else keeps their index"


def test_every_reader_goes_on_with_what_is_left(config: Config) -> None:
    erase(config, [CANARY])
    prepared = config.run.prepared
    catalog, (_, space) = Catalog.load(prepared), load_token_space(prepared)
    histories = load_histories(prepared)
    assert (catalog.num_users, space.num_users, len(histories.user)) == (WORLD.num_users, WORLD.num_users, len(OTHERS))
    assert (
        len(HeldOut.test(histories, config.evaluate.read, config.evaluate.mask).users)
        == len(Validation(histories).users)
        == len(OTHERS)
    )
    assert isinstance(load_documents(prepared, rank=1, world_size=3), Documents)
    recommender = Recommender.from_pretrained(config.run.model, prepared)
    erased, known = recommender.answer([Query(user_id=CANARY), Query(user_id=USER_IDS[0])])
    assert (erased.cold_start, known.cold_start) == (True, False)


def test_a_bucket_of_which_nobody_is_left_can_still_be_read(config: Config) -> None:
    first = USER_IDS[: WORLD.num_users // BUCKETS]
    erase(config, first)
    prepared = config.run.prepared
    assert pq.read_metadata(f"{prepared}/histories/{bucket_name(0)}").num_rows == 0
    assert len(load_histories(prepared).user) == WORLD.num_users - len(first)
    assert load_documents(prepared, rank=1, world_size=BUCKETS).user.min() == len(first)
    answers = Recommender.from_pretrained(config.run.model, prepared).answer([Query(user_id=CANARY)])
    assert answers[0].cold_start
    assert_whole(config)


def test_the_table_keeps_its_run_and_its_schema_and_the_receipt_names_lost_versions(config: Config) -> None:
    dump = config.run.dump
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


def test_users_erased_one_after_the_other_leave_one_chain_of_inputs(config: Config) -> None:
    for user_id in (CANARY, USER_IDS[0], USER_IDS[-1]):
        erase(config, [user_id])
    assert files_with(Path(config.output_dir), CANARY, USER_IDS[0], USER_IDS[-1]) == []
    assert_whole(config)
    assert len(set(Catalog.load(config.run.model).user_ids)) == WORLD.num_users, "a row each"
    manifest = read_manifest(config.run.prepared, "prepared")
    assert (manifest.counts["erased"]["users"], len(manifest.counts["replaces"])) == (3, 3)
    assert not any("erased=" in file.partition("erased=")[2] for file in DeltaTable(config.run.dump).file_uris())


def test_lists_staged_for_a_first_publication_go(tmp_path: Path) -> None:
    config = config_of(tmp_path, tmp_path)
    stage(config, "first")
    erase(config, [CANARY])
    assert list_files(config.run.dump) == [], "who is left of them would be staged twice"


@pytest.mark.parametrize("knows_them", [True, False])
def test_examples_of_a_comparison_go_with_the_runs_that_knew_the_user(config: Config, knows_them: bool) -> None:
    evaluation, runs = config.run.evaluation, config.run.runs
    shutil.rmtree(runs, ignore_errors=True)
    if knows_them:
        shutil.copytree(config.run.prepared, f"{runs}/compare/0/prepared")
    with write_directory(evaluation, kind="evaluation", inputs={}, config={}) as draft:
        write_bytes(draft.path("examples.md"), b"what five users had")
    erase(config, [CANARY])
    assert exists(f"{evaluation}/examples.md") is not knows_them


def test_a_damaged_directory_is_refused_before_new_digests_would_hide_it(config: Config) -> None:
    path = Path(config.run.model, "tables.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ArtifactError, match=r"tables\.safetensors is damaged"):
        erase(config, [CANARY])
