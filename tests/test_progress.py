"""The progress of a running stage: a bar on a terminal, log lines elsewhere."""

import json
import sys
import time

import pytest

from cllm4rec import progress
from cllm4rec.commands.cli import show_log
from cllm4rec.commands.console import say
from cllm4rec.training.loop import VALIDATION_METRIC


@pytest.fixture(autouse=True)
def shown():
    """Prints the library's log records on stdout, as a command does."""
    with show_log():
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


def wait_until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def lines_shown(capsys):
    return [line.strip() for line in capsys.readouterr().out.splitlines()]


def test_epochs_are_shown_as_lines_without_a_terminal(run_dir, tmp_path, capsys):
    with (run_dir / "metrics.jsonl").open("w") as file:
        file.write(epoch(1) + epoch(2))  # of an earlier, interrupted run that has shown them
        file.flush()
        with progress.show_training(str(run_dir)):
            measured = {"validation_recall@20": 0.5, f"validation_{VALIDATION_METRIC}": 0.25}
            file.write(STEP + epoch(3, **measured))
            file.flush()
            shown = []
            wait_until(lambda: shown.extend(lines_shown(capsys)) or shown)
    assert shown == [
        "pretrain 3/3: loss 1.250, validation ndcg@100 0.2500, recall@20 0.5000, 1,000 tokens/s, 10 users/s, "
        "at most 0 s left"
    ]


def test_a_partially_written_line_is_shown_once_it_is_complete(run_dir, capsys):
    follower = progress.RunFollower(str(run_dir))
    whole = epoch(1).encode()
    (run_dir / "metrics.jsonl").write_bytes(whole[:40])
    follower.show_new()
    assert lines_shown(capsys) == []
    (run_dir / "metrics.jsonl").write_bytes(whole)
    for _ in range(2):
        follower.show_new()
    assert len(lines_shown(capsys)) == 1


def test_the_last_epochs_are_shown_if_the_run_ends_before_the_next_poll(run_dir, monkeypatch, capsys):
    monkeypatch.setattr(progress, "_POLL_S", 60.0)
    with progress.show_training(str(run_dir)):
        (run_dir / "metrics.jsonl").write_text(epoch(1) + epoch(2) + epoch(3))
    assert [line[:12] for line in lines_shown(capsys)] == ["pretrain 1/3", "pretrain 2/3", "pretrain 3/3"]


def test_a_worker_failure_is_shown_with_its_cause_and_the_next_step(run_dir, capsys):
    entry = {"worker": 3, "cause": "the disk is full", "failure": 1, "max_failures": 1}
    with progress.show_training(str(run_dir)):
        (run_dir / "failures.jsonl").write_text(json.dumps(entry) + "\n" + json.dumps(entry | {"failure": 2}) + "\n")
    assert lines_shown(capsys) == [
        "warning: worker 3 failed (failure 1, cluster.max_failures 1): the disk is full; restarting",
        "warning: worker 3 failed (failure 2, cluster.max_failures 1): the disk is full; no more restarts are allowed",
    ]


def test_the_expected_time_is_shown_before_the_first_epoch(run_dir, capsys):
    entry = {"event": "expected", "phase": "pretrain", "epochs": 40, "seconds": 600.0}
    with progress.show_training(str(run_dir)):
        (run_dir / "metrics.jsonl").write_text(json.dumps(entry) + "\n")
    assert lines_shown(capsys) == ["pretrain: about 10 min for up to 40 epochs of 15 s each, start-up not included"]


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.31, "0.31 s"), (48.2, "48 s"), (125, "2 min"), (4000, "67 min"), (7300, "2.0 h")]
)
def test_durations_are_human_readable(seconds, words):
    assert progress.duration(seconds) == words


def test_a_resumed_run_is_shown_from_its_checkpoint_on(run_dir, capsys):
    path = run_dir / "metrics.jsonl"
    path.write_text(epoch(1) + epoch(2))
    follower = progress.RunFollower(str(run_dir))
    path.write_text(
        epoch(1) + json.dumps({"event": "resumed", "after": "pretrain epoch 1"}) + "\n"
    )  # truncated to the checkpoint of epoch 1
    follower.show_new()
    path.write_text(
        epoch(1)
        + json.dumps({"event": "resumed", "after": "pretrain epoch 1"})
        + "\n"
        + epoch(2)
        + epoch(3, stopped=True)
    )
    follower.show_new()
    shown = lines_shown(capsys)
    assert shown[0] == "resuming from the checkpoint after pretrain epoch 1"
    assert [line[:12] for line in shown[1:3]] == ["pretrain 2/3", "pretrain 3/3"]
    assert shown[3:] == ["pretrain: stopped early, the best validation ndcg@100 was in epoch 1"]


def test_a_file_that_is_removed_and_recreated_shows_no_line_twice(run_dir, capsys):
    path = run_dir / "metrics.jsonl"
    path.write_text(epoch(1))
    follower = progress.RunFollower(str(run_dir))
    path.unlink()
    follower.show_new()
    path.write_text(epoch(1) + epoch(2))
    follower.show_new()
    assert [line[:12] for line in lines_shown(capsys)] == ["pretrain 2/3"]


def test_on_a_terminal_a_line_does_not_break_the_bar(run_dir, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    path = run_dir / "metrics.jsonl"
    follower = progress.RunFollower(str(run_dir))
    path.write_text(epoch(1))
    follower.show_new()
    say("a line of the stage")
    path.write_text(epoch(1) + json.dumps({"event": "warning", "message": "checkpoint 2 is damaged"}) + "\n")
    follower.show_new()
    follower.stop()
    output = capsys.readouterr()
    assert output.out == "a line of the stage\nwarning: checkpoint 2 is damaged\n"
    assert "pretrain:" in output.err  # the bar


def test_counts_are_shown_as_lines_without_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(progress, "_COUNT_S", 0.02)
    numbers = iter([100, 150, 150, *[2000] * 10_000])
    shown = []
    with progress.show_count(lambda: next(numbers), 2000, "users"):
        wait_until(lambda: shown.extend(lines_shown(capsys)) or len(shown) >= 3)
    assert shown[0].startswith("150 of 2,000 users, ")
    assert shown[0].endswith(" s left")
    assert shown[2].startswith("2,000 of 2,000 users, ")
    assert shown[2].endswith(" users/s, 0 s left")
