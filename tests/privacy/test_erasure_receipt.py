"""The receipt of an erasure: what was done and what was not, and never the id."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
import yaml
from support.commands import run_command
from support.erasures import CANARY, USER_IDS, assert_whole, contents, copy_of, files_with, receipts

from cllm4rec.commands import cli
from cllm4rec.config import Config
from cllm4rec.errors import ArtifactError, AuditError, ConfigError
from cllm4rec.privacy.erasure import NOT_DONE, erase
from cllm4rec.storage.artifacts import read_manifest
from cllm4rec.storage.files import write_table
from cllm4rec.storage.registry import promoted_directories
from cllm4rec.storage.tombstones import Tombstones


@pytest.fixture
def config(erasure_template: Path, tmp_path: Path) -> Config:
    return copy_of(erasure_template, tmp_path)


def test_the_receipt_lists_what_was_done_and_what_was_not(config: Config) -> None:
    before = read_manifest(config.run.model, "model").digest
    result = erase(config, [CANARY])
    (receipt,) = receipts(config)
    assert result["receipt"].endswith(".json")
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
    assert (model["before"], model["after"]) == (before, read_manifest(config.run.model, "model").digest)
    assert (model["rows"], model["zeroed_rows"]) == ({"users.parquet": 1}, 1)
    assert touched["evaluation"]["rows"] == {"per_user.parquet": 2, "top100.parquet": 1}
    assert touched["runs/finetune"]["removed"]
    assert touched["nightly/histories"]["removed"]
    assert receipt["not_done"] == list(NOT_DONE)
    assert receipt["raw_sources"] == [config.data.interactions.path]
    assert receipt["files_that_still_name_them"] == []


def test_a_second_run_says_that_it_was_done_and_changes_nothing(config: Config) -> None:
    first = erase(config, [CANARY])
    new_run = Path(config.run.runs, "finetune", "x")
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
    result = erase(config, ["never-seen-1"])
    after = contents(Path(config.output_dir))
    new = {name for name in after if name not in before}
    assert new == {"erased.json", result["receipt"].removeprefix(f"{config.output_dir}/")}
    assert {name for name in before if after[name] != before[name]} == {"prepared/manifest.json"}, "its inputs"
    assert (receipts(config)[0]["found"], receipts(config)[0]["touched"]) == (False, [])
    assert Tombstones.load(config.output_dir).contains(["never-seen-1"]).all()
    assert_whole(config)


def test_an_id_in_another_users_text_is_told_and_not_hidden(config: Config) -> None:
    Path(config.output_dir, "notes.json").write_text(json.dumps({"text": f"as {CANARY} says"}))
    with pytest.raises(AuditError, match=r"an id is still found in 1 files .*notes\.json") as caught:
        erase(config, [CANARY])
    assert CANARY not in str(caught.value)
    assert receipts(config)[0]["files_that_still_name_them"] == ["notes.json"]
    assert files_with(Path(config.output_dir), CANARY) == ["notes.json"], "everything else was done"


def test_raw_files_below_the_output_dir_are_named_and_neither_changed_nor_a_failure(
    erasure_template: Path, config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(config.output_dir)
    shutil.copytree(erasure_template / "raw", out / "raw")
    write_table(pa.table({"user": [CANARY], "text": ["a biography"]}), str(out / "raw" / "users.parquet"))
    raw = config.model_dump(mode="json", exclude_defaults=True)
    raw["data"]["interactions"]["path"] = str(out / "raw" / "interactions*.jsonl")
    columns = {"user": "user", "text": "text"}
    raw["data"]["users"] = {"path": str(out / "raw" / "users.parquet"), "format": "parquet", "columns": columns}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw))
    before = contents(out / "raw")
    done = run_command(capsys, "erase", "--config", tmp_path / "run.yaml", "--user", CANARY)
    assert done.status == 0
    named = files_with(out, CANARY)
    assert named
    assert all(name.startswith("raw/") for name in named)
    assert contents(out / "raw") == before
    assert done.lines[-2] == (
        f"erase: raw files are not changed; remove the users from {', '.join(str(out / name) for name in named)}"
    )
    assert receipts(config)[0]["raw_files_that_name_them"] == named


def test_an_output_dir_without_a_run_is_refused_and_not_created(config: Config, tmp_path: Path) -> None:
    elsewhere = config.model_copy(update={"output_dir": str(tmp_path / "mistyped")})
    with pytest.raises(ArtifactError, match=r"there is no run at .*mistyped; check output_dir"):
        erase(elsewhere, [CANARY])
    assert not (tmp_path / "mistyped").exists()


def test_an_empty_id_is_refused(config: Config) -> None:
    with pytest.raises(ConfigError, match="--user is empty"):
        erase(config, [CANARY, " "])
    assert len(Tombstones.load(config.output_dir)) == 0


def test_the_command_prints_the_receipt_and_never_the_id(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_defaults=True)))
    monkeypatch.setattr(cli, "connect", lambda _: pytest.fail("an erasure needs no Ray"))
    done = run_command(capsys, "erase", "--config", tmp_path / "run.yaml", "--user", CANARY, "--user", USER_IDS[3])
    assert done.status == 0
    assert CANARY not in "\n".join([*done.lines, done.errors])
    result = {**done.last, **done.result}
    assert (result["ok"], result["new_tombstones"]) == (True, 2)
    assert Path(result["receipt"]).exists()
    assert files_with(Path(config.output_dir), CANARY, USER_IDS[3]) == []
