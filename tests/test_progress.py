"""What a person sees while a stage runs: a bar on a terminal, plain lines elsewhere."""

import json
import sys
import time

import pytest

from cllm4rec import progress
from cllm4rec.commands.cli import shown_log
from cllm4rec.commands.console import say
from cllm4rec.errors import TrainingError
from cllm4rec.storage import files


@pytest.fixture(autouse=True)
def shown():
    """The library's lines on stdout, as a command shows them."""
    with shown_log():
        yield


def epoch(number, of=3, stage="pretrain", stopped=False, **more):
    entry = {"event": "epoch", "phase": stage, "epoch": number, "epochs": of, "seconds": 2.0, "loss": 1.25,
             "users_per_s": 10.0, "tokens_per_s": 1000.0, "best_epoch": 1, "stopped": stopped}  # fmt: skip
    return json.dumps(entry | more) + "\n"


STEP = json.dumps({"event": "step", "loss": 1.0}) + "\n"


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "_POLL_S", 0.01)
    folder = tmp_path / "runs" / "pretrain"
    folder.mkdir(parents=True)
    return folder


def until(is_so):
    give_up = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < give_up
        time.sleep(0.01)


def lines_shown(capsys):
    return [line.strip() for line in capsys.readouterr().out.splitlines()]


def test_epochs_are_shown_as_plain_lines_where_there_is_no_terminal(run_dir, tmp_path, capsys):
    with (run_dir / "metrics.jsonl").open("w") as file:
        file.write(epoch(1) + epoch(2))  # an earlier, interrupted run: shown then
        file.flush()
        with progress.watched(str(run_dir), str(tmp_path / "final"), forget=False):
            file.write(STEP + epoch(3, **{"validation_recall@20": 0.5}))
            file.flush()
            shown = []
            until(lambda: shown.extend(lines_shown(capsys)) or shown)
    assert shown == [
        "pretrain 3/3: loss 1.250, validation recall@20 0.5000, 1,000 tokens/s, 10 users/s, at most 0 s left"
    ]


def test_a_half_written_line_is_shown_once_when_it_is_whole(run_dir, capsys):
    follower = progress._Follower(str(run_dir / "metrics.jsonl"))
    whole = epoch(1).encode()
    (run_dir / "metrics.jsonl").write_bytes(whole[:40])
    follower._show_new(str(run_dir / "metrics.jsonl"))
    assert lines_shown(capsys) == []
    (run_dir / "metrics.jsonl").write_bytes(whole)
    for _ in range(2):
        follower._show_new(str(run_dir / "metrics.jsonl"))
    assert len(lines_shown(capsys)) == 1


def test_the_last_epochs_are_shown_where_the_stage_was_faster_than_the_follower(run_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "_POLL_S", 60.0)
    with progress.watched(str(run_dir), str(tmp_path / "final"), forget=False):
        files.remove_directory(str(run_dir))
        files.write_bytes(str(tmp_path / "final" / "metrics.jsonl"), (epoch(1) + epoch(2) + epoch(3)).encode())
    assert [line[:12] for line in lines_shown(capsys)] == ["pretrain 1/3", "pretrain 2/3", "pretrain 3/3"]


def test_a_failed_run_does_not_show_an_older_runs_epochs(run_dir, tmp_path, capsys):
    files.write_bytes(str(tmp_path / "final" / "metrics.jsonl"), epoch(1).encode())
    with pytest.raises(TrainingError), progress.watched(str(run_dir), str(tmp_path / "final"), forget=False):
        raise TrainingError("nan")
    assert lines_shown(capsys) == []


def test_a_resumed_run_goes_on_after_its_checkpoint_and_says_so(run_dir, capsys):
    path = run_dir / "metrics.jsonl"
    path.write_text(epoch(1) + epoch(2))
    follower = progress._Follower(str(path))
    path.write_text(epoch(1) + json.dumps({"event": "resumed"}) + "\n")  # cut back to the checkpoint of epoch 1
    follower._show_new(str(path))
    path.write_text(epoch(1) + json.dumps({"event": "resumed"}) + "\n" + epoch(2) + epoch(3, stopped=True))
    follower._show_new(str(path))
    shown = lines_shown(capsys)
    assert shown[0] == "going on from the last checkpoint of an interrupted run"
    assert [line[:12] for line in shown[1:3]] == ["pretrain 2/3", "pretrain 3/3"]
    assert shown[3:] == ["pretrain: stopped, no better validation since epoch 1"]


def test_a_file_that_goes_away_and_comes_back_shows_nothing_twice(run_dir, capsys):
    path = run_dir / "metrics.jsonl"
    path.write_text(epoch(1))
    follower = progress._Follower(str(path))
    path.unlink()
    follower._show_new(str(path))
    path.write_text(epoch(1) + epoch(2))
    follower._show_new(str(path))
    assert [line[:12] for line in lines_shown(capsys)] == ["pretrain 2/3"]


def test_a_run_is_forgotten_where_it_is_forced(run_dir, tmp_path):
    (run_dir / "metrics.jsonl").write_text(epoch(1))
    with progress.watched(str(run_dir), str(tmp_path / "final"), forget=True):
        assert not run_dir.exists()


def test_on_a_terminal_a_line_does_not_tear_the_bar(run_dir, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    path = run_dir / "metrics.jsonl"
    follower = progress._Follower(str(path))
    path.write_text(epoch(1))
    follower._show_new(str(path))
    say("a line of the stage")
    path.write_text(epoch(1) + json.dumps({"event": "warning", "message": "checkpoint 2 is damaged"}) + "\n")
    follower._show_new(str(path))
    follower.stop()
    told = capsys.readouterr()
    assert told.out == "a line of the stage\n  warning: checkpoint 2 is damaged\n"
    assert "pretrain:" in told.err  # the bar


def test_users_are_counted_as_plain_lines_where_there_is_no_terminal(monkeypatch, capsys):
    monkeypatch.setattr(progress, "_COUNT_S", 0.02)
    numbers = iter([100, 150, 150, *[2000] * 10_000])
    shown = []
    with progress.counted(lambda: next(numbers), 2000, "users"):
        until(lambda: shown.extend(lines_shown(capsys)) or len(shown) >= 3)
    assert shown[0].startswith("150 of 2,000 users, ")
    assert shown[0].endswith(" s left")
    assert shown[2].startswith("2,000 of 2,000 users, ")
    assert shown[2].endswith(" users/s, 0 s left")
