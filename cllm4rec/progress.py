"""What a person sees while a job runs: a progress bar on a terminal, plain lines elsewhere.

Workers write `metrics.jsonl`; the driver follows the file, so nothing has to travel through Ray's logs.
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
_POLL_S = 0.5
_COUNT_S = 5.0


@contextlib.contextmanager
def watched(run_dir: str, final_dir: str, forget: bool) -> Iterator[None]:
    """Show the epochs of a training run in `run_dir` until the block ends; `forget` drops an interrupted run first.

    `final_dir` is where the file lies once the stage is done: the last epochs are read there.
    """
    if forget:
        files.remove_directory(run_dir)
    follower = _Follower(files.join(run_dir, _METRICS))
    follower.start()
    try:
        yield
        follower.stop(files.join(final_dir, _METRICS))
    finally:
        follower.stop()


@contextlib.contextmanager
def counted(count: Callable[[], int], total: int, unit: str) -> Iterator[None]:
    """Show how many of `total` are done until the block ends; `count` is asked every few seconds."""
    done = threading.Event()
    thread = threading.Thread(target=_show_count, args=(count, total, unit, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _show_count(count: Callable[[], int], total: int, unit: str, done: threading.Event) -> None:
    started, first, is_terminal = time.monotonic(), count(), sys.stdout.isatty()
    with tqdm(total=total, initial=first, unit=unit, desc="  score", disable=not is_terminal) as bar:
        while not done.wait(_COUNT_S):
            number = count()
            bar.update(number - bar.n)
            rate = (number - first) / (time.monotonic() - started)
            if rate > 0 and not is_terminal:
                logger.info(
                    f"  {number:,} of {total:,} {unit}, {rate:,.0f} {unit}/s, {(total - number) / rate:.0f} s left"
                )


class _Follower(threading.Thread):
    """Shows what is added to a file of JSON lines from now on; a run that is resumed cuts the file and goes on."""

    def __init__(self, uri: str) -> None:
        super().__init__(daemon=True)
        self._uri = uri
        self._done = threading.Event()
        self._bar: Any = None
        lines = self._read(uri)
        self._num_read, self._last = len(lines), lines[-1] if lines else b""

    def stop(self, final_uri: str | None = None) -> None:
        """End; with `final_uri`, show first what came last and was moved there."""
        self._done.set()
        if self.is_alive():
            self.join()
        if final_uri is not None:
            self._show_new(final_uri)
        self._close()

    def run(self) -> None:
        while not self._done.wait(_POLL_S):
            self._show_new(self._uri)

    @staticmethod
    def _read(uri: str) -> list[bytes]:
        """Whole lines: the last may be half written."""
        content = files.read_bytes(uri) if files.exists(uri) else b""
        return content[: content.rfind(b"\n") + 1].splitlines()

    def _show_new(self, uri: str) -> None:
        lines: list[bytes] = []
        with contextlib.suppress(OSError, ArtifactError):  # the file is moved away when the stage is done
            lines = self._read(uri)
        if not lines:
            return
        is_cut = self._num_read > 0 and lines[self._num_read - 1 : self._num_read] != [self._last]
        if is_cut:
            self._num_read = max((n for n, line in enumerate(lines) if b'"resumed"' in line), default=0)
        for line in lines[self._num_read :]:
            self._show(json.loads(line))
        self._num_read, self._last = len(lines), lines[-1]

    def _show(self, entry: dict[str, Any]) -> None:
        if entry["event"] == "resumed":
            logger.info("  going on from the last checkpoint of an interrupted run")
        if entry["event"] == "warning":
            logger.info(f"  warning: {entry['message']}")
        if entry["event"] == "epoch":
            self._show_epoch(entry)

    def _show_epoch(self, entry: dict[str, Any]) -> None:
        left_s = entry["seconds"] * (entry["epochs"] - entry["epoch"])
        found = entry.get("validation_recall@20")
        facts = f"loss {entry['loss']:.3f}" + ("" if found is None else f", validation recall@20 {found:.4f}")
        rates = f"{entry['tokens_per_s']:,.0f} tokens/s, {entry['users_per_s']:,.0f} users/s"
        is_last = entry["stopped"] or entry["epoch"] == entry["epochs"]
        if not sys.stdout.isatty():
            logger.info(
                f"  {entry['phase']} {entry['epoch']}/{entry['epochs']}: {facts}, {rates}, at most {left_s:.0f} s left"
            )
        else:
            if self._bar is None:
                self._bar = tqdm(
                    total=entry["epochs"], initial=entry["epoch"] - 1, desc=f"  {entry['phase']}", unit="epoch"
                )
            self._bar.set_postfix_str(f"{facts}, {rates}")
            self._bar.update(entry["epoch"] - self._bar.n)
        if is_last:
            self._close()
            if entry["stopped"]:
                logger.info(f"  {entry['phase']}: stopped, no better validation since epoch {entry['best_epoch']}")

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
