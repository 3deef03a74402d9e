"""Work with the published table: every verb of `cllm4rec dump` on real Delta tables, and what must not happen."""

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from deltalake import DeltaTable
from support.commands import run_command
from support.publications import FACTS, seen, stage

from cllm4rec.arrays.ids import Catalog
from cllm4rec.commands import cli
from cllm4rec.errors import ArtifactError, ConfigError, ResourceError
from cllm4rec.storage import table_versions as dumps
from cllm4rec.storage.artifacts import write_directory
from cllm4rec.storage.lease import hold
from cllm4rec.storage.table import SCHEMA, current_run, publish
from cllm4rec.storage.table_export import FORMATS, export
from cllm4rec.storage.tombstones import Tombstones

ROOT = Path(__file__).parents[2]
USERS = [f"canary{user:03}" for user in range(60)]
NOBODY = Tombstones()


@pytest.fixture
def folder(tmp_path) -> Path:
    """An output_dir; with a space, as people have them."""
    return tmp_path / "my runs"


@pytest.fixture
def table(folder) -> str:
    """Three publications: versions 1 to 3, the runs first, second and third."""
    dump_dir = str(folder / "dump")
    for run in ("first", "second", "third"):
        publish(dump_dir, stage(dump_dir, run, USERS), run, 1, FACTS | {"model_version": f"model-{run}"})
    return dump_dir


@pytest.fixture
def varied(folder) -> str:
    """A table whose lists and scores differ from user to user, also in length; scores of many digits."""
    dump_dir = str(folder / "dump")
    lists = [[f'i"{place},é' for place in range(user % 5)] for user in range(len(USERS))]
    scores = [[float(1 / (user + place + 3)) for place in range(user % 5)] for user in range(len(USERS))]
    rows = pa.table([USERS, lists, scores, ["d"] * len(USERS), ["m"] * len(USERS)], schema=SCHEMA)
    for bucket in range(3):
        path = Path(dump_dir) / f"run=v-1/bucket={bucket:05}" / "part.parquet"
        path.parent.mkdir(parents=True)
        pq.write_table(rows.take(list(range(bucket, len(USERS), 3))), path, row_group_size=8)
    publish(dump_dir, [f"run=v-1/bucket={bucket:05}/part.parquet" for bucket in range(3)], "v", 1, FACTS)
    return dump_dir


@pytest.fixture
def call(folder, tmp_path, monkeypatch, capsys):
    """`cllm4rec dump` within this process: exit status, what a person reads, the last line, stderr."""
    monkeypatch.setattr(cli, "connect", lambda config: pytest.fail("this job needs no Ray"))
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump({"output_dir": str(folder), "data": {"interactions": {"path": "x.json"}}}))

    def run(*words):
        done = run_command(capsys, "dump", "--config", config, *words)
        last = {**done.last, **done.result} if done.last["ok"] else done.last
        return done.status, done.lines, last, done.errors

    return run


@pytest.fixture
def model(folder) -> None:
    """A model directory as far as this job reads it: its items."""
    with write_directory(str(folder / "model"), kind="model", inputs={}, config={}) as draft:
        Catalog([], ["first", "second", "x"], [], ["First of all", "Second", "An x"], [6, 3, 0]).save(draft.uri)


def content(rows) -> list[dict]:
    return sorted(rows, key=lambda row: row["user_id"])


def rows_of(dump_dir: str, version: int | None = None) -> list[dict]:
    return content(DeltaTable(dump_dir, version=version).to_pyarrow_table().to_pylist())


def erase(folder: Path, *user_ids: str) -> Tombstones:
    tombstones = Tombstones().with_users(user_ids)
    tombstones.save(str(folder))
    return tombstones


def log_bytes(dump_dir: str) -> bytes:
    return b"".join(file.read_bytes() for file in (Path(dump_dir) / "_delta_log").rglob("*") if file.is_file())


# versions


def test_versions_tell_who_published_what_and_what_can_be_read(table, call):
    (Path(table) / "run=second" / "part-0.parquet").unlink()
    status, lines, last, _ = call("versions")
    told = last["dump"]["versions"]
    assert [(one["version"], one["facts"]["run_id"], one["num_users"]) for one in told] == [
        (1, "first", 60), (2, "second", None), (3, "third", 60),
    ]  # fmt: skip
    assert told[0]["facts"] == {
        "run_id": "first", "run_date": "2026-11-20", "model_version": "model-first", "schema_version": "1",
    }  # fmt: skip
    assert (status, len(lines)) == (0, 5)
    assert "no longer readable" in lines[3]
    assert lines[2].split()[0] == "1"
    assert "2026-11-20" in lines[2]


def test_commits_that_change_no_list_are_no_versions_of_the_lists(table):
    dumps.vacuum(table, 0, dry_run=False)
    publish(table, stage(table, "fourth", USERS), "fourth", 1, FACTS)
    dumps.restore(table, 3, NOBODY)
    assert [(one.version, one.operation) for one in dumps.versions(table)] == [
        (1, "WRITE"), (2, "WRITE"), (3, "WRITE"), (6, "WRITE"), (7, "RESTORE"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "verb",
    [["versions"], ["compare", 1, 2], ["restore", 1], ["lookup", "a"], ["vacuum"], ["export", "--format", "csv"]],
)
def test_a_table_that_is_not_there_is_told_in_a_sentence(call, verb, tmp_path):
    target = ["--to", tmp_path / "x"] if verb[0] == "export" else []
    status, _, last, errors = call(*verb, *target)
    assert status == 1
    assert "dump is not a table yet; run cllm4rec nightly or cllm4rec score to publish one" in last["error"]
    assert errors == f"error: {last['error']}\n"


@pytest.mark.parametrize("verb", [["compare", 1, 9], ["restore", 9], ["lookup", "a", "--version", 9]])
def test_a_version_that_is_not_there_is_told_in_a_sentence(table, call, verb):
    status, _, last, _ = call(*verb)
    assert status == 1
    assert "dump has no version 9; " in last["error"]


# compare


def test_the_version_that_only_created_the_table_is_refused(table, call, model):
    status, _, last, _ = call("compare", 0, 1)
    assert status == 1
    assert "version 0 of " in last["error"]
    assert "holds no lists; " in last["error"]


def test_two_versions_are_compared(table, call, model):
    status, lines, last, _ = call("compare", 1, 3, "nightly.drift.max_top10_changed=0.5")
    drift = last["dump"]["drift"]
    assert status == 0
    assert (drift["users_compared"], drift["users_gone"], drift["top10_changed"]) == (60, 0, 1)
    # Items first and x, 6 and 0 times in training, over 3 in the mean; then third, which the model does not know, and x.
    assert (drift["lift_old"], drift["lift_new"]) == (1.0, 0.0)
    assert [breach.rpartition(" limit ")[2] for breach in last["dump"]["breaches"]] == [
        "nightly.drift.max_top10_changed is 50.00%.", "nightly.drift.max_lift_ratio is 2.",
    ]  # fmt: skip
    assert lines[0].split() == ["version", "1", "version", "3"]
    assert last["dump"]["breaches"] == lines[-2:]


def test_large_tables_are_compared_by_a_sample(table, call, model):
    _, _, last, _ = call("compare", 1, 2, "nightly.drift.sample_users=20")
    assert 5 < last["dump"]["drift"]["users_compared"] < 40


# restore


def test_a_restored_version_is_what_readers_see_and_the_newer_one_stays_readable(table, call):
    status, lines, last, _ = call("restore", 1)
    assert (status, last["dump"]["version"], last["dump"]["changed"]) == (0, 4, True)
    assert lines == ["dump: version 4 has the lists of version 1; version 3 stays readable"]
    assert seen(table) == dict.fromkeys(USERS, "first")
    assert seen(table, 3) == dict.fromkeys(USERS, "third")


def test_a_restored_version_names_the_run_whose_lists_it_holds(table):
    """Else a nightly run would take the lists readers see for those of the run before the restore."""
    dumps.restore(table, 1, NOBODY)
    assert current_run(table) == "first"
    assert dumps.versions(table)[-1].facts["model_version"] == "model-first"
    dumps.restore(table, 3, NOBODY)
    dumps.restore(table, 4, NOBODY)  # a version that was restored itself
    assert current_run(table) == "first"


def test_restoring_what_is_current_does_nothing(table, call):
    dumps.restore(table, 2, NOBODY)
    for version in (2, 4):
        status, lines, last, _ = call("restore", version)
        assert (status, last["dump"]["version"], last["dump"]["changed"]) == (0, 4, False)
        assert "nothing to do" in lines[0]
    assert DeltaTable(table).version() == 4


def test_the_next_publication_replaces_restored_lists(table):
    dumps.restore(table, 1, NOBODY)
    version = publish(table, stage(table, "fourth", USERS), "fourth", 1, FACTS)
    assert (version, seen(table)) == (5, dict.fromkeys(USERS, "fourth"))


def test_a_version_that_is_gone_empty_or_of_erased_users_is_not_restored(table, folder):
    (Path(table) / "run=second" / "part-0.parquet").unlink()
    with pytest.raises(ArtifactError, match=r"version 2 of .* is no longer readable"):
        dumps.restore(table, 2, NOBODY)
    with pytest.raises(ArtifactError, match=r"version 0 of .* has no lists"):
        dumps.restore(table, 0, NOBODY)
    with pytest.raises(ArtifactError, match="contains users who were erased since"):
        dumps.restore(table, 1, erase(folder, USERS[40]))
    assert DeltaTable(table).version() == 3


def test_a_publication_in_the_meantime_is_not_overwritten(table, monkeypatch):
    stale = DeltaTable(table)
    publish(table, stage(table, "fourth", USERS), "fourth", 1, FACTS)
    monkeypatch.setattr(dumps, "open_table", lambda _, version=None: DeltaTable(table, version=1) if version else stale)
    with pytest.raises(ResourceError, match="another process has just published"):
        dumps.restore(table, 1, NOBODY)
    assert seen(table) == dict.fromkeys(USERS, "fourth")


@pytest.mark.parametrize("verb", [["restore", 1], ["vacuum", "--keep-days", 0]])
def test_nothing_is_changed_while_a_run_is_staging(table, call, verb):
    stage(table, "at-work", USERS)
    with hold(table, "the scoring run at-work"):
        status, _, last, _ = call(*verb)
    assert status == 1
    assert "the scoring run at-work is at work" in last["error"]
    assert (DeltaTable(table).version(), len(list(Path(table).glob("run=at-work/*")))) == (3, 2)


# export


def read_back(path: Path, file_format: str) -> list[dict]:
    if file_format == "parquet":
        assert pq.read_schema(path).equals(SCHEMA)
        return content(pq.read_table(path).to_pylist())
    return content(json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize("file_format", ["parquet", "jsonl"])
def test_an_export_holds_the_table(varied, call, tmp_path, file_format):
    target = tmp_path / "out" / "lists"
    status, _, last, _ = call("export", "--format", file_format, "--to", target)
    assert (status, last["dump"]["users"], last["dump"]["version"]) == (0, 60, 1)
    assert read_back(target, file_format) == rows_of(varied)
    assert os.listdir(target.parent) == ["lists"]


def test_a_csv_export_has_a_row_for_every_recommended_item(varied, call, tmp_path):
    call("export", "--format", "csv", "--to", tmp_path / "lists.csv")
    with open(tmp_path / "lists.csv", newline="", encoding="utf-8") as stream:
        found = sorted(
            (row["user_id"], int(row["rank"]), row["item_id"], float(row["score"])) for row in csv.DictReader(stream)
        )
    expected = [
        (row["user_id"], rank, item, score)
        for row in rows_of(varied)
        for rank, (item, score) in enumerate(zip(row["item_ids"], row["scores"], strict=True), 1)
    ]
    assert [one[:3] for one in found] == [one[:3] for one in expected]
    assert [one[3] for one in found] == pytest.approx([one[3] for one in expected], rel=1e-7)


def test_batches_of_any_size_export_the_same(varied, tmp_path):
    for size in (1, 7, 1000):
        for name in FORMATS:
            export(varied, None, str(tmp_path / f"{name}-{size}"), name, NOBODY, batch_users=size)
    for name in ("csv", "jsonl"):
        assert len({(tmp_path / f"{name}-{size}").read_bytes() for size in (1, 7, 1000)}) == 1
    assert read_back(tmp_path / "parquet-1", "parquet") == rows_of(varied)


def test_an_old_version_can_be_exported(table, call, tmp_path):
    call("export", "--version", 1, "--format", "jsonl", "--to", tmp_path / "old.jsonl")
    assert read_back(tmp_path / "old.jsonl", "jsonl") == rows_of(table, 1)


def test_a_file_is_replaced_only_by_force(table, call, tmp_path):
    target = tmp_path / "lists.jsonl"
    target.write_text("precious")
    words = ["export", "--format", "jsonl", "--to", target]
    status, _, last, _ = call(*words)
    assert (status, target.read_text()) == (2, "precious")
    assert last["error"].endswith("lists.jsonl exists; --force replaces it")
    assert call(*words, "--force")[0] == 0
    assert read_back(target, "jsonl") == rows_of(table)


def test_a_folder_is_never_replaced(table, tmp_path):
    with pytest.raises(ConfigError, match="is a directory; name a file in it"):
        export(table, None, str(tmp_path), "csv", NOBODY, force=True)


def test_an_export_that_fails_leaves_nothing_and_the_old_file(varied, tmp_path):
    target = tmp_path / "out" / "lists"
    export(varied, None, str(target), "jsonl", NOBODY)
    before = target.read_bytes()

    class FullDisk(Tombstones):
        """Asked about the users of each batch; the third time it fails, when a part is written."""

        num_asked = 0

        def __len__(self) -> int:
            return 1

        def contains(self, user_ids):
            FullDisk.num_asked += 1
            if FullDisk.num_asked == 3:
                assert [name for name in os.listdir(target.parent) if name.endswith(".partial")]
                raise OSError(28, "No space left on device")
            return np.zeros(len(user_ids), bool)

    for name in FORMATS:
        FullDisk.num_asked = 0
        with pytest.raises(OSError, match="No space left"):
            export(varied, None, str(target), name, FullDisk(), force=True, batch_users=10)
    assert os.listdir(target.parent) == ["lists"]
    assert target.read_bytes() == before


def test_an_export_goes_to_any_fsspec_uri(table):
    import fsspec

    export(table, None, "memory://exports/lists.jsonl", "jsonl", NOBODY)
    fs = fsspec.filesystem("memory")
    assert fs.find("exports") == ["/exports/lists.jsonl"]
    assert len(fs.cat_file("/exports/lists.jsonl").splitlines()) == 60


@pytest.mark.parametrize("file_format", FORMATS)
def test_erased_users_are_in_no_export(table, folder, call, tmp_path, file_format):
    erase(folder, USERS[7], USERS[20])
    _, _, last, _ = call("export", "--format", file_format, "--to", tmp_path / "lists")
    exported = (tmp_path / "lists").read_bytes()
    if file_format == "parquet":  # it is compressed
        exported = str(pq.read_table(tmp_path / "lists").to_pylist()).encode()
    assert last["dump"]["users"] == 58
    assert [user for user in USERS if user.encode() not in exported] == [USERS[7], USERS[20]]


# lookup


def test_a_lookup_agrees_with_the_table(varied, call, model):
    for row in rows_of(varied):
        assert dumps.lookup(varied, None, row["user_id"], NOBODY) == row


def test_a_lookup_shows_the_list_with_texts(table, call, model):
    status, lines, last, _ = call("lookup", USERS[3], "--version", 1)
    assert status == 0
    assert last["dump"]["items"] == [
        {"rank": 1, "item_id": "first", "score": 1.0, "text": "First of all"},
        {"rank": 2, "item_id": "x", "score": 0.5, "text": "An x"},
    ]
    assert lines[0] == "version 1, run date d, model m"
    assert lines[1].split(maxsplit=3) == ["1", "1.000", "first", "First of all"]
    assert call("lookup", USERS[3])[2]["dump"]["items"][0] == {"rank": 1, "item_id": "third", "score": 1.0, "text": ""}


def test_a_lookup_opens_no_file_after_that_of_the_user(varied):
    (Path(varied) / "run=v-1/bucket=00002/part.parquet").write_bytes(b"never opened")
    assert dumps.lookup(varied, None, USERS[0], NOBODY)["user_id"] == USERS[0]


def test_unknown_and_erased_users_are_told_the_same(table, folder, call, model):
    unknown = call("lookup", "canary-unknown")
    erase(folder, USERS[3])
    erased = call("lookup", USERS[3])
    assert unknown == erased
    assert (unknown[0], unknown[2]["ok"]) == (1, False)
    assert unknown[2]["error"].startswith("this user has no list in version 3 of ")


def test_ids_of_users_are_in_no_output(table, folder, call, model, tmp_path):
    """What a job prints ends up in the logs of a scheduler."""
    for words in (["lookup", USERS[3]], ["lookup", "canary-unknown"], ["versions"], ["compare", 1, 2],
                  ["export", "--format", "csv", "--to", tmp_path / "x"], ["restore", 1]):  # fmt: skip
        assert "canary" not in str(call(*words))


# vacuum


def test_a_vacuum_leaves_the_current_version_and_removes_everything_else(table, call):
    stage(table, "leftover", USERS)
    Path(table, "run=dead-1", "bucket=00003").mkdir(parents=True)
    status, lines, last, _ = call("vacuum", "--keep-days", 0)
    assert (status, last["dump"]["num_files"], last["dump"]["versions"]) == (0, 6, [1, 2])
    assert lines[0].startswith("dump: 6 files (0.0 MB) are older than 0 days")
    assert lines[1:] == ["dump: without them these versions are no longer readable: 1, 2", "dump: removed"]
    assert seen(table) == dict.fromkeys(USERS, "third")
    # No empty folder either: a run's folder without its files would make a resumed run believe they are there.
    assert sorted(os.listdir(table)) == ["_delta_log", "run=third"]
    assert [one.num_users for one in dumps.versions(table)] == [None, None, 60]
    with pytest.raises(
        ArtifactError, match=r"version 2 of .* is no longer readable, because a vacuum removed its files"
    ):
        next(dumps.tables(table, 2))
    again = call("vacuum", "--keep-days", 0)[2]["dump"]
    assert (again["num_files"], again["num_bytes"], again["versions"]) == (0, 0, [])


def test_files_of_the_last_days_are_kept(table, call):
    for name, days in (("leftover", 6.5), ("old", 7.5)):
        for file in stage(table, name, USERS):
            os.utime(Path(table) / file, (time.time() - 86_400 * days,) * 2)
    _, _, last, _ = call("vacuum")
    assert (last["dump"]["num_files"], last["dump"]["versions"]) == (2, [])
    assert not (Path(table) / "run=old").exists()
    assert (Path(table) / "run=leftover" / "part-0.parquet").exists()
    assert seen(table, 1) == dict.fromkeys(USERS, "first")


def test_a_dry_run_tells_and_removes_nothing(table, call):
    _, lines, last, _ = call("vacuum", "--keep-days", 0, "--dry-run")
    assert (last["dump"]["num_files"], last["dump"]["versions"], last["dump"]["dry_run"]) == (4, [1, 2], True)
    assert last["dump"]["num_bytes"] == sum(
        file.stat().st_size for run in ("first", "second") for file in (Path(table) / f"run={run}").iterdir()
    )
    assert "dump: removed" not in lines
    assert DeltaTable(table).version() == 3
    assert seen(table, 1) == dict.fromkeys(USERS, "first")


def test_a_restored_version_survives_a_vacuum(table):
    dumps.restore(table, 1, NOBODY)
    assert dumps.vacuum(table, 0, dry_run=False).versions == [2, 3]
    assert seen(table) == seen(table, 1) == dict.fromkeys(USERS, "first")


def test_files_whose_names_are_encoded_in_the_log_are_cleaned_up(folder):
    dump_dir = str(folder / "dump")
    for run in ("a b%20é", "c d"):
        publish(dump_dir, stage(dump_dir, run, USERS), run, 1, FACTS)
    assert dumps.vacuum(dump_dir, 0, dry_run=False).versions == [1]
    assert [one.num_users for one in dumps.versions(dump_dir)] == [None, 60]


def test_no_id_of_a_user_gets_into_the_log(table, tmp_path):
    dumps.restore(table, 1, NOBODY)
    dumps.vacuum(table, 0, dry_run=False)
    DeltaTable(table).create_checkpoint()
    assert b"run=third" in log_bytes(table)
    assert b"canary" not in log_bytes(table)
    checkpoint = next((Path(table) / "_delta_log").glob("*.parquet"))
    assert "canary" not in str(pq.read_table(checkpoint).to_pylist())  # it is compressed


# The command line


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "the following arguments are required: verb"),
        (["publish"], "invalid choice: 'publish'"),
        (["restore"], "the following arguments are required: version"),
        (["restore", "last"], "invalid int value: 'last'"),
        (["vacuum", "--keep-days", -1], "-1 days is less than 0"),
        (["export", "--to", "x"], "the following arguments are required: --format"),
        (["versions", "--version", 3], "unrecognized arguments: --version"),
        (["versions", "typo"], "the override 'typo' is not of the form section.key=value"),
        (["versions", "score.k=0"], "score.k"),
    ],
)
def test_a_wrong_call_is_told_in_a_sentence(call, words, told):
    status, lines, last, _ = call(*words)
    assert (status, lines) == (2, [])
    assert told in last["error"]


def test_overrides_may_stand_anywhere_after_the_verb(table, call, tmp_path, folder):
    target = tmp_path / "x"
    wrong = f"output_dir={tmp_path / 'elsewhere'}"
    right = f"output_dir={folder}"
    for words in ([wrong, right, "--format", "csv", "--to", target], ["--format", "csv", wrong, "--to", target, right]):
        assert call("export", *words, "--force")[0] == 0


def test_the_job_runs_as_a_program_and_starts_no_ray(table, folder, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump({"output_dir": str(folder), "data": {"interactions": {"path": "x.json"}}}))
    program = [sys.executable, "-m", "jobs.dump", "--config", str(config), "versions"]
    # An address nobody answers at: a job that connects would fail.
    done = subprocess.run(
        program, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"RAY_ADDRESS": "127.0.0.1:1"}
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert len(json.loads((folder / "run.json").read_text())["result"]["dump"]["versions"]) == 3
