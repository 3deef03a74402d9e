"""The Ray cluster: connecting to it, waiting for its resources, and what each long-running process is given.

    connect(config)
    actors = processes(config.cluster, config.score.num_actors)
    wait_for_resources(actors.demand(reading_cpus=1), config.cluster.start_timeout_s, "score", "add nodes")
    torch.set_num_threads(actors.threads)              # in each of the actors

`processes` is the one rule for trainers, scoring actors and replicas.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import socket
import time
from collections.abc import Mapping

from cllm4rec import allocator
from cllm4rec.config import ClusterConfig, Config
from cllm4rec.errors import ResourceError

logger = logging.getLogger(__name__)

ENVIRONMENT = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Ray Data starts 32 processes to read the footers of Parquet files, of which there are a few hundred here.
    "RAY_DATA_PARQUET_FOOTER_NUM_ACTORS": "1",
    # Output that a reader of a job's log can do nothing about.
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_DEDUP_LOGS_SKIP_REGEX": "worker processes have been started|ServeController.graceful_shutdown failed",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}
"""What Ray and transformers read from the environment once: for a command's process and for all its workers."""

_CONNECT_TIMEOUT_S = 20.0
_POLL_S = 0.5


def set_default_environment() -> None:
    """Set every variable of ENVIRONMENT that is not set yet. Called by programs, before Ray is imported."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def connect(config: Config) -> None:
    """Join the cluster this job was submitted to (RAY_ADDRESS), or start a local Ray with what the config needs.

    Raises ResourceError if the cluster at RAY_ADDRESS does not answer.
    """
    import ray

    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS")
    if address:
        _refuse_a_silent_cluster(address)
    # "local": without an address Ray would join any cluster that happens to run on this machine.
    local = {"address": "local", "num_cpus": local_cpus(config), "include_dashboard": False}
    workers_env = {name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()} | allocator.environment()
    if not config.cluster.use_gpu:
        workers_env["DS_ACCELERATOR"] = "cpu"  # DeepSpeed would look for a GPU of the node
    try:
        ray.init(
            **({"address": address} if address else local),
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": workers_env},
        )
    except ConnectionError as error:
        raise _no_cluster(address, error) from None
    found = ray.cluster_resources()
    where = f"cluster {address}" if address else "local"
    logger.info("ray: %s, %g CPUs, %g GPUs", where, found.get("CPU", 0), found.get("GPU", 0))


@dataclasses.dataclass(frozen=True)
class Processes:
    """Long-running processes of one kind (trainers, scoring actors or replicas), and what each of them is given."""

    count: int
    cpus: int
    gpus: int
    threads: int
    """Torch threads of one process."""

    def demand(self, reading_cpus: int = 0) -> dict[str, float]:
        """What Ray must have for all of them, as resource → amount. `reading_cpus`: more, for Ray Data to read with."""
        gpus = {"GPU": float(self.count * self.gpus)} if self.gpus else {}
        return {"CPU": float(self.count * self.cpus + reading_cpus), **gpus}


def processes(cluster: ClusterConfig, count: int) -> Processes:
    """What each of `count` processes gets. Ray must be connected.

    Threads: `cluster.threads_per_worker`; by default the machine's cores / `count` where Ray has one node and no GPU is
    used (the reserved CPUs are logical there), else as many as the reserved CPUs.
    """
    import ray

    threads = cluster.threads_per_worker
    if threads is None:
        is_local = len(ray.nodes()) == 1 and not cluster.use_gpu
        threads = max(1, (os.cpu_count() or 1) // count) if is_local else cluster.cpus_per_worker
    return Processes(count, cluster.cpus_per_worker, int(cluster.use_gpu), threads)


def wait_for_resources(demand: Mapping[str, float], timeout_s: float, who: str, remedy: str) -> None:
    """Return when the cluster has `demand` (resource → amount), which may take an autoscaler a while.

    Ray itself would wait without end. Raises ResourceError after `timeout_s`, naming what was asked and what exists.
    """
    import ray

    deadline = time.monotonic() + timeout_s
    while True:
        existing = ray.cluster_resources()
        if all(existing.get(name, 0.0) >= amount for name, amount in demand.items()):
            return
        if time.monotonic() > deadline:
            asked = " and ".join(f"{amount:g} {name}s" for name, amount in demand.items())
            exists = " and ".join(f"{existing.get(name, 0.0):g} {name}s" for name in demand)
            raise ResourceError(f"{who} asks for {asked} and the cluster has {exists}; {remedy}")
        time.sleep(_POLL_S)


def local_cpus(config: Config) -> int:
    """Logical CPUs of a local Ray: this machine's, and two more where the workers take all of them.

    Workers hold theirs for a whole stage, and Ray Data needs some to read with meanwhile.
    """
    cores = os.cpu_count() or 1
    most = max(config.cluster.num_workers, config.score.num_actors, config.serve.min_replicas)
    return max(cores, min(cores, most * config.cluster.cpus_per_worker) + 2)


def _refuse_a_silent_cluster(address: str) -> None:
    """Ray itself would try for minutes."""
    host, _, port = address.rpartition("/")[2].rpartition(":")
    if host and port.isdigit():  # else "auto" or the like, which Ray looks up
        try:
            socket.create_connection((host, int(port)), timeout=_CONNECT_TIMEOUT_S).close()
        except OSError as error:
            raise _no_cluster(address, error) from None


def _no_cluster(address: str | None, error: OSError) -> ResourceError:
    reason = str(error).partition("\n")[0]
    return ResourceError(f"no Ray cluster answers at {address} ({reason}); correct RAY_ADDRESS or unset it")
