"""Shows the progress of a job: a progress bar on a terminal, log lines elsewhere.

Training workers write `metrics.jsonl`. The driver follows this file and needs no messages through Ray's logs.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from tqdm import tqdm

from cllm4rec.errors import ArtifactError
from cllm4rec.storage import files

logger = logging.getLogger(__name__)

_METRICS = "metrics.jsonl"
_SHOWN = ("ndcg@100", "recall@20")
"""Validation metrics of a line; the first one decides which epoch is best (`training.loop.VALIDATION_METRIC`)."""
FAILURES = "failures.jsonl"
"""In the directory of a training run: one line per worker failure, written by the controller that restarts workers."""
_POLL_S = 0.5
_COUNT_S = 5.0


@contextlib.contextmanager
def show_training(run_dir: str) -> Iterator[None]:
    """Show the epochs and worker failures of the training run in `run_dir` until the block ends."""
    follower = RunFollower(run_dir)
    follower.start()
    try:
        yield
    finally:
        follower.stop()


@contextlib.contextmanager
def show_count(count: Callable[[], int], total: int, unit: str, what: str = "score") -> Iterator[None]:
    """Show how many of `total` units are done until the block ends. `count` is called every few seconds."""
    done = threading.Event()
    thread = threading.Thread(target=_show_count, args=(count, total, unit, what, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _show_count(count: Callable[[], int], total: int, unit: str, what: str, done: threading.Event) -> None:
    started, first, is_terminal = time.monotonic(), count(), sys.stdout.isatty()
    with tqdm(total=total, initial=first, unit=unit, desc=f"  {what}", disable=not is_terminal) as bar:
        while not done.wait(_COUNT_S):
            number = count()
            bar.update(number - bar.n)
            rate = (number - first) / (time.monotonic() - started)
            if rate > 0 and not is_terminal:
                logger.info(
                    f"  {number:,} of {total:,} {unit}, {rate:,.0f} {unit}/s, {(total - number) / rate:.0f} s left"
                )


class RunFollower(threading.Thread):
    """Shows the lines that are appended to the JSON Lines files of a training run after its creation."""

    def __init__(self, run_dir: str) -> None:
        super().__init__(daemon=True)
        self._metrics = _Lines(files.join(run_dir, _METRICS))
        self._failures = _Lines(files.join(run_dir, FAILURES))
        self._done = threading.Event()
        self._bar: Any = None

    def stop(self) -> None:
        """Show the remaining lines and stop."""
        self._done.set()
        if self.is_alive():
            self.join()
        self.show_new()
        self._close()

    def run(self) -> None:
        while not self._done.wait(_POLL_S):
            self.show_new()

    def show_new(self) -> None:
        """Show the lines that were added since the last call."""
        for entry in self._failures.new():
            self._show_failure(entry)
        for entry in self._metrics.new():
            self._show(entry)

    def _show(self, entry: dict[str, Any]) -> None:
        if entry["event"] == "resumed" and entry["after"] is None:
            logger.info("  starting again from the beginning, because there is no checkpoint yet")
        elif entry["event"] == "resumed":
            logger.info("  resuming from the checkpoint after %s", entry["after"])
        if entry["event"] == "warning":
            logger.warning("%s", entry["message"])
        if entry["event"] == "expected":
            self._show_expected(entry)
        if entry["event"] == "epoch":
            self._show_epoch(entry)

    @staticmethod
    def _show_failure(entry: dict[str, Any]) -> None:
        is_last = entry["failure"] > entry["max_failures"]
        next_step = "no more restarts are allowed" if is_last else "restarting"
        logger.warning(
            "worker %d failed (failure %d, cluster.max_failures %d): %s; %s",
            entry["worker"], entry["failure"], entry["max_failures"], entry["cause"], next_step,
        )  # fmt: skip

    @staticmethod
    def _show_expected(entry: dict[str, Any]) -> None:
        logger.info(
            "  %s: about %s for up to %d epochs of %s each, start-up not included",
            entry["phase"], duration(entry["seconds"]), entry["epochs"], duration(entry["seconds"] / entry["epochs"]),
        )  # fmt: skip

    def _show_epoch(self, entry: dict[str, Any]) -> None:
        left_s = entry["seconds"] * (entry["epochs"] - entry["epoch"])
        values = [f"{name} {entry[f'validation_{name}']:.4f}" for name in _SHOWN if f"validation_{name}" in entry]
        metrics = f"loss {entry['loss']:.3f}" + (f", validation {', '.join(values)}" if values else "")
        rates = f"{entry['tokens_per_s']:,.0f} tokens/s, {entry['users_per_s']:,.0f} users/s"
        is_last = entry["stopped"] or entry["epoch"] == entry["epochs"]
        if not sys.stdout.isatty():
            logger.info(
                f"  {entry['phase']} {entry['epoch']}/{entry['epochs']}: {metrics}, {rates}, at most {left_s:.0f} s left"
            )
        else:
            if self._bar is None:
                self._bar = tqdm(
                    total=entry["epochs"], initial=entry["epoch"] - 1, desc=f"  {entry['phase']}", unit="epoch"
                )
            self._bar.set_postfix_str(f"{metrics}, {rates}")
            self._bar.update(entry["epoch"] - self._bar.n)
        if is_last:
            self._close()
            if entry["stopped"]:
                logger.info(
                    f"  {entry['phase']}: stopped early, the best validation {_SHOWN[0]} was in epoch {entry['best_epoch']}"
                )

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class _Lines:
    """Reads the new lines of a JSON Lines file. A resumed run truncates the file; the lines after that are new again."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        lines = self._whole_lines()
        self._num_read, self._last = len(lines), lines[-1] if lines else b""

    def new(self) -> list[dict[str, Any]]:
        lines: list[bytes] = []
        with contextlib.suppress(OSError, ArtifactError):  # the file is removed at the end of the stage
            lines = self._whole_lines()
        if not lines:
            return []
        is_truncated = self._num_read > 0 and lines[self._num_read - 1 : self._num_read] != [self._last]
        if is_truncated:
            self._num_read = max((n for n, line in enumerate(lines) if b'"resumed"' in line), default=0)
        new, self._num_read, self._last = lines[self._num_read :], len(lines), lines[-1]
        return [json.loads(line) for line in new]

    def _whole_lines(self) -> list[bytes]:
        """All lines except a partially written last one."""
        content = files.read_bytes(self._uri) if files.exists(self._uri) else b""
        return content[: content.rfind(b"\n") + 1].splitlines()


def duration(seconds: float) -> str:
    """A human-readable duration: 48 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
