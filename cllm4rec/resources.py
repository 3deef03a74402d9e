"""What a stage asks of the cluster: the resources of its processes, and waiting until they are free.

    actors = processes(config.cluster, config.score.num_actors)
    wait_for_resources(actors.bundles(reading_cpus=1), config.cluster, "score", "lower score.num_actors")
    torch.set_num_threads(actors.threads)              # in each actor

Training workers, scoring actors, endpoint replicas and the tasks of Ray Data all ask here. The demand is a placement group:
an autoscaler sees it and adds nodes, and Ray takes it back when this process ends, however it ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import psutil  # type: ignore[import-untyped]

from cllm4rec.config import ClusterConfig
from cllm4rec.errors import ResourceError

logger = logging.getLogger(__name__)

WITH_AUTOSCALER_S = 900.0
"""How long a cloud may take to start nodes, unless `cluster.start_timeout_s` says otherwise."""
WITHOUT_AUTOSCALER_S = 45.0
RESTART_S = 900.0
"""How long the replacement of a lost node may take, with or without an autoscaler."""
_SAY_EVERY_S = 60.0
_POLL_S = 1
_PROBE_TIMEOUT_S = 30.0

Bundle = dict[str, float]
"""Resources that one node must have, by name, such as {"CPU": 4.0, "GPU": 1.0}."""


@dataclasses.dataclass(frozen=True)
class Processes:
    """`count` processes of one kind (training workers, scoring actors or replicas) and the resources of each."""

    count: int
    cpus: int
    gpus: int
    threads: int
    """The number of torch threads per process."""

    def bundles(self, reading_cpus: int = 0) -> list[Bundle]:
        """The resources of each process, and `reading_cpus` bundles of one CPU for reads by Ray Data."""
        gpus = {"GPU": float(self.gpus)} if self.gpus else {}
        return [{"CPU": float(self.cpus), **gpus}] * self.count + [{"CPU": 1.0}] * reading_cpus


def processes(cluster: ClusterConfig, count: int) -> Processes:
    """The resources of `count` processes. Ray must be connected.

    The number of threads is `cluster.threads_per_worker`. By default it is cores / `count` on a single node without GPUs,
    where reserved CPUs are logical, and otherwise the number of reserved CPUs.
    """
    import ray

    threads = cluster.threads_per_worker
    if threads is None:
        is_local = len(ray.nodes()) == 1 and not cluster.use_gpu
        threads = max(1, (os.cpu_count() or 1) // count) if is_local else cluster.cpus_per_worker
    return Processes(count, cluster.cpus_per_worker, int(cluster.use_gpu), threads)


def wait_for_resources(bundles: Sequence[Bundle], cluster: ClusterConfig, who: str, remedy: str) -> None:
    """Return once all bundles are free at the same time. While it waits, it says once a minute for what.

    who: names the caller. remedy: the end of an error, which says what to do.
    Raises ResourceError after `cluster.start_timeout_s` (by default 15 minutes if the cluster has an autoscaler, otherwise
    45 s), and at once if the autoscaler has no node type for a bundle or not enough nodes for all. Ray itself would wait
    forever.
    """
    import ray.util

    group = ray.util.placement_group([dict(bundle) for bundle in bundles])
    began = time.monotonic()
    try:
        if group.wait(_POLL_S):
            return
        autoscaler = find_autoscaler()
        if autoscaler is not None:
            autoscaler.refuse_impossible(bundles, who, remedy)
        timeout_s = cluster.start_timeout_s or (WITHOUT_AUTOSCALER_S if autoscaler is None else WITH_AUTOSCALER_S)
        next_line = began
        while not group.wait(_POLL_S):
            waited = time.monotonic() - began
            if waited > timeout_s:
                raise ResourceError(f"{who} {_shortage(bundles)}; {remedy}")
            # What others use now becomes free, also where no node can be added.
            if autoscaler is not None and _lacking(bundles) and autoscaler.refuses(group):
                raise ResourceError(f"{who} {_shortage(bundles)}, and the autoscaler cannot add it; {remedy}")
            if time.monotonic() >= next_line:
                source = "free resources" if autoscaler is None else "the autoscaler"
                logger.info("%s %s; waiting for %s, %.0f of %.0f s", who, _shortage(bundles), source, waited, timeout_s)
                next_line += _SAY_EVERY_S
        logger.info("%s has its resources after %.0f s", who, time.monotonic() - began)
    finally:
        ray.util.remove_placement_group(group)


@contextlib.contextmanager
def watch_nodes(bundles: Sequence[Bundle], who: str) -> Iterator[None]:
    """Say which nodes the cluster loses and gains until the block ends, and each minute what is missing for `bundles`."""
    done = threading.Event()
    thread = threading.Thread(target=_watch_nodes, args=(bundles, who, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _watch_nodes(bundles: Sequence[Bundle], who: str, done: threading.Event) -> None:
    import ray

    def alive() -> dict[str, Any]:
        return {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}

    known, next_line = alive(), 0.0
    while not done.wait(_POLL_S):
        try:
            now = alive()
        except ray.exceptions.RayError:  # the head does not answer for a moment
            continue
        for name in known.keys() - now.keys():
            logger.warning(
                "%s: lost the node %s with %s", who, _address(known[name]), _amounts(known[name]["Resources"])
            )
        for name in now.keys() - known.keys():
            logger.info("%s: the node %s joined with %s", who, _address(now[name]), _amounts(now[name]["Resources"]))
        if not _lacking(bundles):
            next_line = 0.0
        elif time.monotonic() >= next_line:
            logger.info("%s %s; waiting for a node", who, _shortage(bundles))
            next_line = time.monotonic() + _SAY_EVERY_S
        known = now


def _address(node: Mapping[str, Any]) -> str:
    return str(node["NodeManagerAddress"])


@dataclasses.dataclass(frozen=True)
class NodeType:
    """A type of node that an autoscaler can start."""

    name: str
    resources: Bundle
    max_nodes: int

    def fits(self, bundle: Bundle) -> bool:
        return all(self.resources.get(name, 0.0) >= amount for name, amount in bundle.items())


@dataclasses.dataclass(frozen=True)
class Autoscaler:
    """The autoscaler of a cluster.

    node_types: those with known resources; empty if the autoscaler runs outside of the head node, as on Kubernetes.
    max_nodes: the most nodes besides the head.
    """

    node_types: tuple[NodeType, ...] = ()
    max_nodes: int = 0

    def refuse_impossible(self, bundles: Sequence[Bundle], who: str, remedy: str) -> None:
        """Raise ResourceError if a bundle is larger than any node type, or all are more than the cluster may grow to."""
        if not self.node_types:
            return
        for bundle in bundles:
            if not any(node.fits(bundle) for node in self.node_types) and not _fits_a_node(bundle):
                largest = max(
                    self.node_types, key=lambda node: [node.resources.get(name, 0.0) for name in reversed(bundle)]
                )
                raise ResourceError(
                    f"{who} needs {_amounts(bundle)} on one node, but the largest node type of the autoscaler, {largest.name}, "
                    f"has {_amounts(largest.resources, bundle)}; {remedy}"
                )
        demand = _sum(bundles)
        most = {name: self._most(name) for name in demand}
        if any(most[name] < amount for name, amount in demand.items()):
            raise ResourceError(
                f"{who} needs {_amounts(demand)}, but the autoscaler can give the cluster at most {_amounts(most)}; {remedy}"
            )

    def _most(self, name: str) -> float:
        """The most of a resource that the cluster can have: now, or with as many of the largest nodes as are allowed."""
        import ray

        amounts = sorted(node.resources.get(name, 0.0) for node in self.node_types for _ in range(node.max_nodes))
        of_head = sum(node["Resources"].get(name, 0.0) for node in ray.nodes() if _is_head(node))
        most: float = of_head + sum(amounts[-self.max_nodes :])
        return max(most, float(ray.cluster_resources().get(name, 0.0)))

    def refuses(self, group: Any) -> bool:
        """Whether the autoscaler itself says that it cannot place this group. An old autoscaler (v1) never says so."""
        return any(request.details.startswith(group.id.hex()) for request in _state().infeasible_gang_resource_requests)


def find_autoscaler() -> Autoscaler | None:
    """The autoscaler of the connected cluster; None if nodes are added by hand."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    head = next((node["NodeID"] for node in ray.nodes() if _is_head(node)), None)
    if head is None:
        return None
    here = NodeAffinitySchedulingStrategy(head, soft=False)
    probe = ray.remote(num_cpus=0, scheduling_strategy=here)(_monitor_config)
    try:
        runs_on_head, config = ray.get(probe.remote(ray.get_runtime_context().gcs_address), timeout=_PROBE_TIMEOUT_S)
    except ray.exceptions.RayError as error:
        logger.info("the head node does not say whether the cluster has an autoscaler (%s)", type(error).__name__)
        return None
    if not runs_on_head:  # on Kubernetes it is a container beside the head's
        return Autoscaler() if _state().autoscaler_state_version else None
    if config is None:
        return None
    head_type = config.get("head_node_type")
    types = {name: found for name, found in config["available_node_types"].items() if name != head_type}
    most = int(config.get("max_workers", 2))
    known = all(found.get("resources") for found in types.values())  # some clouds look them up later
    return Autoscaler(
        tuple(
            NodeType(name, dict(found["resources"]), int(found.get("max_workers", most)))
            for name, found in types.items()
        )
        if known
        else (),
        most,
    )


def _monitor_config(gcs_address: str) -> tuple[bool, dict[str, Any] | None]:
    """On the head node: whether the autoscaler's process runs here, and the config it was given, if any.

    Without a config it only reports: nodes are added by hand.
    """
    import yaml

    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if f"--gcs-address={gcs_address}" in words and any(word.endswith("/monitor.py") for word in words):
            paths = [word.partition("=")[2] for word in words if word.startswith("--autoscaling-config=")]
            if not paths or not paths[0]:
                return True, None
            with open(os.path.expanduser(paths[0]), encoding="utf-8") as stream:
                return True, yaml.safe_load(stream)
    return False, None


def _state() -> Any:
    """What the autoscaler (v2) last reported; empty for an older one."""
    import ray
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

    reply = GetClusterStatusReply()
    client = GcsClient(address=ray.get_runtime_context().gcs_address)
    reply.ParseFromString(client.get_cluster_status(timeout_s=10))
    return reply.autoscaling_state


def _is_head(node: Mapping[str, Any]) -> bool:
    return node["Alive"] and "node:__internal_head__" in node["Resources"]


def _shortage(bundles: Sequence[Bundle]) -> str:
    """`needs 9 CPUs, but the cluster has 2 CPUs`: what is missing for the bundles."""
    import ray

    demand, existing = _sum(bundles), ray.cluster_resources()
    if _lacking(bundles):
        return f"needs {_amounts(demand)}, but the cluster has {_amounts(existing, demand)}"
    for bundle in bundles:
        if not _fits_a_node(bundle):
            return f"needs {_amounts(bundle)} on one node, but no node of the cluster has that"
    free = ray.available_resources()
    return f"needs {_amounts(demand)}, but of {_amounts(existing, demand)} only {_amounts(free, demand)} are free"


def _lacking(bundles: Sequence[Bundle]) -> bool:
    import ray

    existing = ray.cluster_resources()
    return any(existing.get(name, 0.0) < amount for name, amount in _sum(bundles).items())


def _fits_a_node(bundle: Bundle) -> bool:
    import ray

    return any(
        all(node["Resources"].get(name, 0.0) >= amount for name, amount in bundle.items())
        for node in ray.nodes()
        if node["Alive"]
    )


def _sum(bundles: Sequence[Bundle]) -> Bundle:
    names = sorted({name for bundle in bundles for name in bundle})
    return {name: sum(bundle.get(name, 0.0) for bundle in bundles) for name in names}


def _amounts(resources: Mapping[str, float], names: Mapping[str, float] | None = None) -> str:
    """`9 CPUs and 1 GPUs`; of the given names, by default of CPUs and GPUs."""
    shown = [name for name in ("CPU", "GPU") if resources.get(name)] or ["CPU"] if names is None else sorted(names)
    return " and ".join(f"{resources.get(name, 0.0):g} {name}s" for name in shown)
