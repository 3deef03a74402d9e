"""A scoring run is named after all that its lists depend on, counts its publications and has places of its own."""

from __future__ import annotations

import datetime
import json
import shutil
from pathlib import Path

import pytest
from support.directories import write_prepared, write_random_model
from support.nights import config_of

from cllm4rec.errors import ArtifactError
from cllm4rec.nightly import plan as module
from cllm4rec.nightly.plan import is_published, plan_score
from cllm4rec.storage import artifacts, files
from cllm4rec.storage.registry import current_model
from cllm4rec.storage.table import publish
from cllm4rec.storage.tombstones import Tombstones

NUM_USERS = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plans")
    write_random_model(folder, write_prepared(folder / "prepared", num_buckets=10), seed=0)
    return folder


def events_of(path: Path, item: str) -> dict[str, object]:
    path.write_text(json.dumps({"reader": "user-00", "book": item}) + "\n")
    return {"path": str(path), "format": "jsonl", "columns": {"user": "reader", "item": "book"}}


def test_a_run_is_named_after_all_its_inputs(folder, tmp_path):
    config = config_of(folder, "plans")
    plan = plan_score(config)
    assert (plan.attempt, plan.num_known_users, is_published(config)) == (1, NUM_USERS, False)
    assert plan_score(config) == plan
    (tmp_path / "deny.txt").write_text("item-03\n")
    others = [
        config_of(folder, "plans", k=6),
        config_of(folder, "plans", run_date="2026-11-21"),
        config_of(folder, "plans", rules={"deny": str(tmp_path / "deny.txt")}),
    ]
    plans = [plan, *map(plan_score, others)]
    assert len({one.run_id for one in plans}) == len({one.checkpoint_dir for one in plans}) == 4
    assert plan_score(config_of(folder, "plans", num_actors=3, batch_users=1)).run_id == plan.run_id


def test_a_model_of_other_data_is_refused(folder, tmp_path):
    write_random_model(tmp_path, write_prepared(tmp_path / "prepared"), seed=1)
    config = config_of(folder, "foreign")
    (folder / "foreign" / "model").unlink()
    (folder / "foreign" / "model").symlink_to(tmp_path / "model")
    with pytest.raises(ArtifactError, match="was trained on other data than"):
        plan_score(config)


def test_what_happened_since_names_a_nightly_run_and_no_other(folder, tmp_path):
    without, events = config_of(folder, "events"), events_of(tmp_path / "events.jsonl", "item-01")
    config = config_of(folder, "events", nightly={"events": events})
    night, run = plan_score(config, nightly=True), plan_score(config)
    assert (night.events, run.events) == (config.nightly.events, None)
    assert plan_score(without, nightly=True).events is None
    assert run.run_id == plan_score(without).run_id != night.run_id
    events_of(tmp_path / "events.jsonl", "item-02")
    assert plan_score(config, nightly=True).run_id != night.run_id
    assert plan_score(config).run_id == run.run_id


def test_another_model_and_erased_users_are_another_run(folder, tmp_path):
    config = config_of(folder, "inputs")
    before = plan_score(config)
    Tombstones().with_users(["user-03"]).save(config.output_dir)
    erased = plan_score(config)
    other = write_random_model(tmp_path, str(folder / "prepared"), seed=1)
    (folder / "inputs" / "model").unlink()
    (folder / "inputs" / "model").symlink_to(other)
    changed = plan_score(config)
    assert len({before.run_id, erased.run_id, changed.run_id}) == 3
    digest = artifacts.read_manifest(other, "model").digest
    assert (changed.model_version, erased.model_version) == (digest[:12], before.model_version)


def test_a_promoted_model_may_be_of_older_data(folder, tmp_path):
    config = config_of(folder, "promoted")
    older = write_random_model(tmp_path, write_prepared(tmp_path / "prepared"), seed=3)
    manifest = json.loads(Path(older, "manifest.json").read_text())
    Path(older, "manifest.json").write_text(json.dumps(manifest | {"inputs": {"prepared": "older"}}))
    name = f"20261101T000000Z-{manifest['digest'][:12]}"
    shutil.copytree(older, folder / "promoted" / "models" / name)
    pointer = {"current": name, "previous": [], "promoted_at": "then", "why": "a test"}
    (folder / "promoted" / "models" / "current.json").write_text(json.dumps(pointer))
    plan = plan_score(config)
    assert plan.model_dir == files.absolute(current_model(config.output_dir))
    assert (Path(plan.model_dir).name, plan.model_version) == (name, manifest["digest"][:12])


def test_an_attempt_is_counted_when_its_lists_are_replaced_or_by_force(folder):
    config, other = config_of(folder, "attempts"), config_of(folder, "attempts", k=6)
    first, second = plan_score(config), plan_score(other)
    assert plan_score(config, force=True).attempt == 1, "nothing is published yet"
    publish(first.dump_dir, [], first.run_id, first.attempt, {})
    assert plan_score(config) == first
    assert (is_published(config), is_published(other)) == (True, False)
    assert plan_score(config, force=True).attempt == 2
    publish(second.dump_dir, [], second.run_id, second.attempt, {})
    assert [plan_score(one).attempt for one in (config, other)] == [2, 1]
    assert (is_published(config), is_published(other)) == (False, True)


def test_a_nightly_run_is_published_when_its_events_are_in_the_lists(folder, tmp_path):
    events = events_of(tmp_path / "events.jsonl", "item-01")
    config = config_of(folder, "nightly", nightly={"events": events})
    night = plan_score(config, nightly=True)
    publish(night.dump_dir, [], night.run_id, night.attempt, {})
    assert is_published(config, nightly=True)
    assert not is_published(config)


def test_every_attempt_works_in_places_of_its_own(folder):
    config = config_of(folder, "places")
    plan = plan_score(config)
    publish(plan.dump_dir, [], plan.run_id, plan.attempt, {})
    again = plan_score(config, force=True)
    for name in ("staging", "checkpoint_dir", "report_dir"):
        assert getattr(plan, name) != getattr(again, name), name
    assert Path(plan.staging).parent == Path(plan.dump_dir), "what is staged is published without a copy"
    assert Path(plan.report_dir).name == f"2026-11-20-{plan.run_id}-1"


def test_a_run_without_a_date_has_todays_in_utc(folder, monkeypatch):
    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2026, 11, 20 if tz is datetime.UTC else 19, 23, 59, tzinfo=tz)

    monkeypatch.setattr(module.datetime, "datetime", Clock)
    undated, dated = (config_of(folder, "undated", run_date=date) for date in (None, "2026-11-20"))
    assert str(plan_score(undated).run_date) == "2026-11-20"
    assert plan_score(undated).run_id == plan_score(dated).run_id
