"""Where tasks on tables run: on a Ray cluster (`RayExecutor`) or in this process (`LocalExecutor`).

    prepare(config)                                  # Ray Data on the connected cluster
    prepare(config, executor=LocalExecutor())        # one block after another, without Ray

This is the only file of `data/` that imports Ray, and it does so inside functions: importing it needs no Ray.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from cllm4rec.config import ClusterConfig
from cllm4rec.errors import Cllm4RecError
from cllm4rec.resources import wait_for_resources
from cllm4rec.typing import Array

BLOCK_BYTES = 8 << 20
"""Raw bytes that one task receives: small enough that a single file keeps many cores busy."""

Batch = dict[str, Array]
Read = Callable[[Batch], Iterator[pa.Table]]
Task = Callable[[pa.Table], Iterator[pa.Table]]
"""Pure apart from the files it writes: running it again with the same table must write the same files again."""


class Executor(Protocol):
    """Runs tasks. Results come in any order, as soon as they are ready, so that they need not fit in memory together."""

    @property
    def num_cpus(self) -> int:
        """How many tasks can run at the same time."""
        ...

    def session(self) -> contextlib.AbstractContextManager[None]:
        """Must be open while tasks run."""
        ...

    def map_files(self, files: Sequence[Mapping[str, Any]], read: Read, task: Task) -> Iterator[pa.Table]:
        """`read` each file (a batch with one row of `files`), and apply `task` to blocks of what was read.

        Raises the error of a task if it is one of this package or an OSError.
        """
        ...

    def map_tables(self, tables: Sequence[pa.Table], task: Task) -> Iterator[pa.Table]:
        """Apply `task` to each table. Raises like `map_files`."""
        ...


class LocalExecutor:
    """All tasks in this process, one after another."""

    num_cpus = 1

    def session(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def map_files(self, files: Sequence[Mapping[str, Any]], read: Read, task: Task) -> Iterator[pa.Table]:
        for file in files:
            for block in read({name: np.array([value]) for name, value in file.items()}):
                yield from task(block)

    def map_tables(self, tables: Sequence[pa.Table], task: Task) -> Iterator[pa.Table]:
        for table in tables:
            yield from task(table)


class RayExecutor:
    """Tasks as Ray Data pipelines. Ray must be connected."""

    @property
    def num_cpus(self) -> int:
        return _cluster_cpus()

    def session(self) -> contextlib.AbstractContextManager[None]:
        return quiet_data_context()

    def map_files(self, files: Sequence[Mapping[str, Any]], read: Read, task: Task) -> Iterator[pa.Table]:
        import ray.data

        num_readers = min(len(files), self.num_cpus) or 1
        # Readers wait for storage and gzip, so they reserve no CPU: tasks always find one. Ray Data would also fuse two
        # steps that reserve the same resources, and then one core would read and process a whole file.
        blocks = ray.data.from_items(list(files), override_num_blocks=len(files)).map_batches(
            read, batch_size=1, num_cpus=0, compute=ray.data.TaskPoolStrategy(size=num_readers)
        )
        yield from _results(blocks, task)

    def map_tables(self, tables: Sequence[pa.Table], task: Task) -> Iterator[pa.Table]:
        import ray.data

        if tables:
            yield from _results(ray.data.from_arrow(list(tables)), task)


def ray_map(inputs: Iterable[Any], task: Callable[[Any], Any]) -> Iterator[Any]:
    """The result of `task` for each input, computed on the cluster, in the order in which tasks finish.

    About as many tasks run at a time as there are CPUs, also while an autoscaler adds some: one task more than fit makes it
    do so. The driver never holds more results than that. Raises the
    error of a task if it is one of this package or an OSError. Ray must be connected.
    """
    import ray

    call, shared, waiting = ray.remote(num_cpus=1)(_call), ray.put(task), iter(inputs)
    running: list[Any] = []
    with _own_errors():
        while True:
            num_free = max(0, 1 + _cluster_cpus() - len(running))
            running += [call.remote(shared, value) for value in itertools.islice(waiting, num_free)]
            if not running:
                return
            ready, running = ray.wait(running)
            yield ray.get(ready[0])


@contextlib.contextmanager
def quiet_data_context() -> Iterator[None]:
    """Ray Data without progress bars and notes, with blocks of BLOCK_BYTES. Restores the previous settings at the end."""
    import ray.data

    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = BLOCK_BYTES
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # the error of a task is raised; logging it too would show it twice
    try:
        with ray.data.DataContext.current(context):
            yield
    finally:
        logger.setLevel(level)


def _results(blocks: Any, task: Task) -> Iterator[pa.Table]:
    with _own_errors():
        yield from blocks.map_batches(task, batch_size=None, batch_format="pyarrow").iter_batches(
            batch_size=None, batch_format="pyarrow"
        )


def _cluster_cpus() -> int:
    """At least one: a cluster of no CPUs is asked for one."""
    import ray

    if not int(ray.cluster_resources().get("CPU", 0)):
        wait_for_resources([{"CPU": 1.0}], ClusterConfig(), "Ray Data", "add nodes")
    return max(1, int(ray.cluster_resources().get("CPU", 0)))


def _call(task: Callable[[Any], Any], value: Any) -> Any:
    return task(value)


@contextlib.contextmanager
def _own_errors() -> Iterator[None]:
    """Replace Ray's wrapper around the error of a task by that error."""
    import ray

    try:
        yield
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, Cllm4RecError):  # Ray appends lines of advice that do not apply
            raise type(cause)(str(cause).partition("\n")[0]) from None
        if isinstance(cause, OSError):
            raise cause from error
        raise
