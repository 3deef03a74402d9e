"""Connecting to a Ray cluster, or starting a local one, with the environment that all our processes need."""

from __future__ import annotations

import json
import logging
import os
import socket

from cllm4rec import allocator
from cllm4rec.config import Config
from cllm4rec.errors import ResourceError

logger = logging.getLogger(__name__)

ENVIRONMENT = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Ray Data would start 32 processes to read the footers of a few hundred Parquet files.
    "RAY_DATA_PARQUET_FOOTER_NUM_ACTORS": "1",
    # Serve's proxies refuse what replicas cannot answer in time.
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "cllm4rec.serving.gate:middlewares",
    # Fewer changes of thread for each request; with both, 1.5 times as many requests were answered on 2 cores.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    # Output that is of no use to the reader of a job's log.
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_DEDUP_LOGS_SKIP_REGEX": "worker processes have been started|ServeController.graceful_shutdown failed",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Settings that Ray and transformers read from the environment at startup, for a command and for its workers."""

_CONNECT_TIMEOUT_S = 20.0


def set_default_environment() -> None:
    """Set every variable of ENVIRONMENT that is not set. A program must call this before it imports Ray."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def connect(config: Config) -> None:
    """Connect to the cluster at RAY_ADDRESS, which Ray sets in submitted jobs, or start a local Ray for the config.

    Environment variables in the runtime_env of a submitted job stay as the submitter set them.
    Raises ResourceError if the cluster at RAY_ADDRESS does not answer, or if the local Ray does not start.
    """
    import ray

    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS")
    if address:
        _check_that_cluster_answers(address)
    # "local": without an address Ray would connect to any cluster that runs on this machine.
    local = {"address": "local", "num_cpus": local_cpus(config), "include_dashboard": False}
    workers_env = {name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()} | allocator.environment()
    if not config.cluster.use_gpu:
        workers_env["DS_ACCELERATOR"] = "cpu"  # otherwise DeepSpeed uses a GPU if the node has one
    try:
        ray.init(
            **({"address": address} if address else local),
            log_to_driver=False,
            logging_level=logging.ERROR,
            # Ray refuses a variable that the submitted job's runtime_env has too.
            runtime_env={"env_vars": {name: workers_env[name] for name in workers_env.keys() - _submitted_variables()}},
        )
    except Exception as error:  # Ray raises many kinds, also bare exceptions
        if address is None:
            raise ResourceError(
                f"Ray does not start on this machine ({_first_line(error)}); if the machine is busy, wait and run the same "
                "command again; the logs are in /tmp/ray/session_latest/logs"
            ) from error
        if isinstance(error, ConnectionError):
            raise _no_cluster(address, error) from None
        raise
    resources = ray.cluster_resources()
    num_cpus, num_gpus = resources.get("CPU", 0), resources.get("GPU", 0)
    # Of a local Ray, `local_cpus` may have asked for more CPUs than the machine has.
    where = f"cluster {address}, {num_cpus:g} CPUs" if address else f"local, {_cores()} ({num_cpus:g} logical CPUs)"
    logger.info("ray: %s, %g GPUs", where, num_gpus)


def _submitted_variables() -> set[str]:
    """The names of the environment variables in the runtime_env of the submitted job that this process is, if it is one."""
    submitted = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    return set(((submitted.get("runtime_env") or {}).get("env_vars")) or {})


def local_cpus(config: Config) -> int:
    """The number of logical CPUs of a local Ray: those of the machine, and up to two more if the workers reserve all.

    Workers reserve their CPUs for a whole stage, during which Ray Data needs CPUs for reading.
    """
    cores = os.cpu_count() or 1
    max_processes = max(config.cluster.num_workers, config.score.num_actors, config.serve.min_replicas)
    return max(cores, min(cores, max_processes * config.cluster.cpus_per_worker) + 2)


def _cores() -> str:
    cores = os.cpu_count() or 1
    return f"{cores} core{'s' * (cores > 1)}"


def _check_that_cluster_answers(address: str) -> None:
    """Raise ResourceError if nothing listens at the address. Ray itself would retry for minutes."""
    host, _, port = address.rpartition("/")[2].rpartition(":")
    if host and port.isdigit():  # otherwise a name such as "auto", which Ray resolves
        try:
            socket.create_connection((host, int(port)), timeout=_CONNECT_TIMEOUT_S).close()
        except OSError as error:
            raise _no_cluster(address, error) from None


def _no_cluster(address: str | None, error: OSError) -> ResourceError:
    return ResourceError(f"no Ray cluster answers at {address} ({_first_line(error)}); correct RAY_ADDRESS or unset it")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
