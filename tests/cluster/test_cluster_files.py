"""The files of cluster/ and cluster/serve.yaml, offline: Ray's schemas, KubeRay's field names, SECURITY.md's rules."""

from __future__ import annotations

import os
import re
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel
from ray.serve.config import AutoscalingConfig, BackpressureConfig
from ray.serve.schema import (
    DeploymentSchema,
    HTTPOptionsSchema,
    LoggingConfig,
    RayActorOptionsSchema,
    ServeApplicationSchema,
    ServeDeploySchema,
)

import cllm4rec
from cllm4rec.errors import AuditError, ConfigError
from cllm4rec.serving.app import ServeArgs, UserConfig

ROOT = Path(__file__).parents[2]
KUBERAY = sorted(set((ROOT / "cluster/kuberay").glob("*.yaml")) - {ROOT / "cluster/kuberay/kustomization.yaml"})
OVERLAYS = sorted((ROOT / "cluster/overlays").iterdir())
MANIFESTS = {path.stem: yaml.safe_load(path.read_text()) for path in KUBERAY}
RAY_VERSION = re.search(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(), re.M)[1]
IMAGE = f"REGISTRY/cllm4rec:{cllm4rec.__version__}"


def nodes(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value inside, with its path."""
    yield path, value
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from nodes(child, f"{path}.{key}")


def pods(manifest: dict[str, Any]) -> Iterator[dict[str, Any]]:
    return (value for _, value in nodes(manifest) if isinstance(value, dict) and "containers" in value)


def containers(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    return [container for pod in pods(manifest) for container in pod["containers"]]


WITH_PODS = {name: manifest for name, manifest in MANIFESTS.items() if containers(manifest)}


# Serve configs: Ray reads them without a word about keys it does not know

SCHEMAS: dict[str, type[BaseModel]] = {
    "http_options": HTTPOptionsSchema,
    "logging_config": LoggingConfig,
    "applications": ServeApplicationSchema,
    "deployments": DeploymentSchema,
    "ray_actor_options": RayActorOptionsSchema,
    "autoscaling_config": AutoscalingConfig,
    "backpressure_config": BackpressureConfig,
    "args": ServeArgs,
    "user_config": UserConfig,
}
SERVE_CONFIGS = {
    "cluster/serve.yaml": (ROOT / "cluster/serve.yaml").read_text(),
    "RayService": MANIFESTS["service"]["spec"]["serveConfigV2"],
}


def unknown_keys(config: Any, schema: type[BaseModel], path: str = "") -> list[str]:
    if isinstance(config, list):
        return [key for place, entry in enumerate(config) for key in unknown_keys(entry, schema, f"{path}[{place}]")]
    unknown = [f"{path}.{key}" for key in config if key not in schema.model_fields]
    for key, value in config.items():
        if key in SCHEMAS:
            unknown += unknown_keys(value, SCHEMAS[key], f"{path}.{key}")
    return unknown


def test_unknown_keys_are_found_at_every_depth():
    config = yaml.safe_load(SERVE_CONFIGS["RayService"])
    config["applications"][0]["deployments"][0]["num_replica"] = 2
    config["http_options"]["ports"] = 8000
    found = unknown_keys(config, ServeDeploySchema)
    assert found == [".http_options.ports", ".applications[0].deployments[0].num_replica"]


@pytest.mark.parametrize("name", SERVE_CONFIGS)
def test_serve_config_is_valid_and_has_no_key_that_serve_would_overlook(name):
    config = yaml.safe_load(SERVE_CONFIGS[name])
    ServeDeploySchema.model_validate(config)
    assert unknown_keys(config, ServeDeploySchema) == []
    (application,) = config["applications"]
    assert application["import_path"] == "cllm4rec.serving.app:build"
    ServeArgs.model_validate(application["args"])
    for deployment in application.get("deployments", []):
        assert deployment["name"] == "Recommend"
        UserConfig.model_validate(deployment["user_config"])


def test_served_to_a_network_only_with_keys():
    for text in SERVE_CONFIGS.values():
        config = yaml.safe_load(text)
        is_local = config["http_options"]["host"] == "127.0.0.1"
        assert is_local or config["applications"][0]["args"]["require_api_keys"]


# ray up


def test_ray_up_file_is_what_this_ray_accepts():
    private = pytest.importorskip("ray.autoscaler._private.util")
    config = yaml.safe_load((ROOT / "cluster/ray-up.yaml").read_text())
    prepared = private.prepare_config(config)
    private.validate_config(prepared)
    assert prepared["head_node_type"] in prepared["available_node_types"]


def test_ray_up_nodes_ask_for_a_token_and_show_the_dashboard_to_nobody():
    config = yaml.safe_load((ROOT / "cluster/ray-up.yaml").read_text())
    gpu = config["available_node_types"]["gpu_worker"]["docker"]
    for options in (config["docker"]["run_options"], gpu["worker_run_options"]):
        assert "--env RAY_AUTH_MODE=token" in options
    assert any(target.endswith("/.ray/auth_token") for target in config["file_mounts"])
    assert "--dashboard-host=127.0.0.1" in " ".join(config["head_start_ray_commands"])


# Kubernetes

# ray.io/v1 of KubeRay 1.7 and batch/v1, as far as used: a typing error here would be dropped or refused on the cluster.
FIELDS = {
    "RayClusterSpec": {
        "authOptions", "autoscalerOptions", "enableInTreeAutoscaling", "headGroupSpec", "rayVersion",
        "workerGroupSpecs",
    },
    "headGroupSpec": {"rayStartParams", "serviceType", "template"},
    "workerGroupSpecs": {"groupName", "maxReplicas", "minReplicas", "rayStartParams", "replicas", "template"},
    "RayJobSpec": {
        "activeDeadlineSeconds", "backoffLimit", "entrypoint", "entrypointNumCpus", "rayClusterSpec",
        "shutdownAfterJobFinishes", "submitterPodTemplate", "ttlSecondsAfterFinished",
    },
    "RayServiceSpec": {"rayClusterConfig", "serveConfigV2"},
    "CronJobSpec": {
        "concurrencyPolicy", "failedJobsHistoryLimit", "jobTemplate", "schedule", "startingDeadlineSeconds",
        "successfulJobsHistoryLimit", "timeZone",
    },
    "JobSpec": {"activeDeadlineSeconds", "backoffLimit", "podFailurePolicy", "template"},
    "PodSpec": {
        "automountServiceAccountToken", "containers", "restartPolicy", "securityContext",
        "terminationGracePeriodSeconds", "volumes",
    },
    "Container": {"args", "command", "env", "image", "name", "resources", "securityContext", "volumeMounts"},
}  # fmt: skip


def ray_clusters() -> list[dict[str, Any]]:
    return [
        MANIFESTS["cluster"]["spec"],
        MANIFESTS["pipeline-job"]["spec"]["rayClusterSpec"],
        MANIFESTS["service"]["spec"]["rayClusterConfig"],
    ]


def test_kinds_and_api_versions():
    assert {name: (manifest["apiVersion"], manifest["kind"]) for name, manifest in MANIFESTS.items()} == {
        "cluster": ("ray.io/v1", "RayCluster"),
        "network-policy": ("networking.k8s.io/v1", "NetworkPolicy"),
        "nightly": ("batch/v1", "CronJob"),
        "pipeline-job": ("ray.io/v1", "RayJob"),
        "service": ("ray.io/v1", "RayService"),
    }


def test_manifests_use_fields_that_exist():
    assert set(MANIFESTS["pipeline-job"]["spec"]) <= FIELDS["RayJobSpec"]
    assert set(MANIFESTS["service"]["spec"]) <= FIELDS["RayServiceSpec"]
    assert set(MANIFESTS["nightly"]["spec"]) <= FIELDS["CronJobSpec"]
    assert set(MANIFESTS["nightly"]["spec"]["jobTemplate"]["spec"]) <= FIELDS["JobSpec"]
    for spec in ray_clusters():
        assert set(spec) <= FIELDS["RayClusterSpec"]
        assert set(spec["headGroupSpec"]) <= FIELDS["headGroupSpec"]
        assert all(set(group) <= FIELDS["workerGroupSpecs"] for group in spec["workerGroupSpecs"])
    for manifest in WITH_PODS.values():
        assert all(set(pod) <= FIELDS["PodSpec"] for pod in pods(manifest))
        assert all(set(container) <= FIELDS["Container"] for container in containers(manifest))


def test_every_ray_cluster_and_every_container_has_the_token():
    for spec in ray_clusters():
        assert spec["authOptions"] == {"mode": "token", "secretName": "cllm4rec-ray"}
    for name, manifest in WITH_PODS.items():
        for container in containers(manifest):
            env = {entry["name"]: entry for entry in container["env"]}
            assert env["RAY_AUTH_MODE"]["value"] == "token", (name, container["name"])
            secret = env["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]
            assert secret == {"name": "cllm4rec-ray", "key": "auth_token"}, (name, container["name"])


def test_every_serving_container_has_the_api_keys():
    for container in containers(MANIFESTS["service"]):
        env = {entry["name"]: entry for entry in container["env"]}
        assert env["CLLM4REC_API_KEYS"]["valueFrom"]["secretKeyRef"] == {"name": "cllm4rec-api", "key": "keys"}


def test_no_secret_value_stands_in_a_file_and_nothing_is_opened_to_the_outside():
    assert all(spec["headGroupSpec"]["serviceType"] == "ClusterIP" for spec in ray_clusters())
    for path in [*KUBERAY, ROOT / "cluster/ray-up.yaml"]:
        for where, value in nodes(yaml.safe_load(path.read_text())):
            assert value not in ("LoadBalancer", "NodePort", "Secret"), (path.name, where)
            assert not where.endswith((".hostNetwork", ".hostPath", ".hostPort", ".privileged")), (path.name, where)


DOCKERFILE = (ROOT / "cluster/Dockerfile").read_text()
IMAGE_USER = int(re.findall(r"^USER (\S+)$", DOCKERFILE, re.M)[-1])
"""A number: a kubelet refuses runAsNonRoot for an image whose user is a name."""


def test_containers_run_without_rights_they_do_not_need():
    for manifest in WITH_PODS.values():
        for pod in pods(manifest):
            assert pod["securityContext"]["runAsNonRoot"] is True
            assert pod["securityContext"]["runAsUser"] == IMAGE_USER
        for container in containers(manifest):
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_replicas_fit_the_workers_that_carry_them():
    args = yaml.safe_load(SERVE_CONFIGS["RayService"])["applications"][0]["args"]
    (group,) = MANIFESTS["service"]["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    cpus = int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
    assert cpus // args["cpus_per_replica"] * group["maxReplicas"] >= args["max_replicas"]


def test_nightly_runs_do_not_overlap_and_reach_the_standing_cluster():
    spec = MANIFESTS["nightly"]["spec"]
    assert spec["concurrencyPolicy"] == "Forbid"
    (submitter,) = containers(MANIFESTS["nightly"])
    address = next(entry["value"] for entry in submitter["env"] if entry["name"] == "RAY_ADDRESS")
    assert address == f"http://{MANIFESTS['cluster']['metadata']['name']}-head-svc:8265"
    assert (ROOT / "cluster/submit.sh").stat().st_mode & stat.S_IXUSR
    assert "/app/cluster/submit.sh" in submitter["args"][0]


def test_a_night_that_is_refused_is_not_tried_again_and_each_job_has_a_name_of_its_own():
    spec = MANIFESTS["nightly"]["spec"]["jobTemplate"]["spec"]
    (submitter,) = containers(MANIFESTS["nightly"])
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert spec["template"]["spec"]["restartPolicy"] == "Never", "a failure policy needs it"
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"]["containerName"] == submitter["name"]
    assert {ConfigError.exit_status, AuditError.exit_status} == set(rule["onExitCodes"]["values"])
    env = {entry["name"]: entry for entry in submitter["env"]}
    assert "job-name" in env["JOB_NAME"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert 'submit.sh "$JOB_NAME"' in submitter["args"][0]


def test_the_image_takes_what_it_copies_and_torch_for_its_own_hardware():
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    kept = {line[1:] for line in lines if line.startswith("!")}
    copied = {
        word
        for line in DOCKERFILE.splitlines()
        if line.startswith("COPY")
        for word in line.split()[1:-1]
        if not word.startswith("--")
    }
    assert lines[0] == "*"
    assert kept == copied
    torch, package = DOCKERFILE.index("\"$(grep '^torch=='"), DOCKERFILE.index("-c constraints.txt")
    assert torch < package, "later, pip would have taken the torch of PyPI"
    assert "ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu" in DOCKERFILE


def test_network_policy_covers_every_pod_and_lets_others_ask_the_endpoint_only():
    policy = MANIFESTS["network-policy"]["spec"]
    label = policy["podSelector"]["matchLabels"]
    for manifest in WITH_PODS.values():
        templates = [
            value for _, value in nodes(manifest) if isinstance(value, dict) and "containers" in value.get("spec", {})
        ]
        assert templates
        assert all(template["metadata"]["labels"].items() >= label.items() for template in templates)
    for rule in policy["ingress"]:
        from_ours = {"podSelector": {"matchLabels": label}} in rule["from"]
        assert from_ours or [port["port"] for port in rule["ports"]] == [8000]


def test_versions_agree_with_the_environment_that_is_tested():
    assert all(spec["rayVersion"] == RAY_VERSION for spec in ray_clusters())
    dockerfile = (ROOT / "cluster/Dockerfile").read_text()
    assert f"rayproject/ray:{RAY_VERSION}-py311" in dockerfile
    images = {container["image"] for manifest in WITH_PODS.values() for container in containers(manifest)}
    images.add(yaml.safe_load((ROOT / "cluster/ray-up.yaml").read_text())["docker"]["image"])
    assert images <= {IMAGE, f"{IMAGE}-gpu"}


def test_image_copies_only_what_exists():
    for line in (ROOT / "cluster/Dockerfile").read_text().splitlines():
        if line.startswith("COPY"):
            *sources, _ = [word for word in line.split()[1:] if not word.startswith("--")]
            assert all((ROOT / source).exists() for source in sources), line


# kustomize


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)
def test_an_overlay_is_built_of_what_exists(overlay):
    """What kustomize reads, without kustomize: resources that are there, and patches of fields that are."""
    spec = yaml.safe_load((overlay / "kustomization.yaml").read_text())
    assert all((overlay / name / "kustomization.yaml").exists() for name in spec["resources"])
    for patch in spec["patches"]:
        (target,) = [manifest for manifest in MANIFESTS.values() if manifest["kind"] == patch["target"]["kind"]]
        assert target["metadata"]["name"] == patch["target"]["name"]
        for change in yaml.safe_load(patch["patch"]):
            *parents, last = change["path"].strip("/").split("/")
            place = target
            for key in parents:
                place = place[int(key) if isinstance(place, list) else key]
            assert change["op"] == "add" or (int(last) < len(place) if isinstance(place, list) else last in place)
            assert change["op"] != "test" or place[last] == change["value"]
            assert last in (*FIELDS["PodSpec"], "nodeSelector", "tolerations", "groupName", "1")


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)
def test_an_overlay_renders_with_the_registry_written_once(overlay, tmp_path):
    shutil.copytree(ROOT / "cluster", tmp_path / "cluster")
    for path in (tmp_path / "cluster/overlays").glob("*/kustomization.yaml"):
        path.write_text(path.read_text().replace("newName: REGISTRY/", "newName: registry.example.com/"))
    command = ["kubectl", "kustomize", str(tmp_path / "cluster/overlays" / overlay.name)]
    rendered = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    manifests = {manifest["kind"]: manifest for manifest in yaml.safe_load_all(rendered)}
    assert set(manifests) == {"RayCluster", "RayService", "CronJob", "NetworkPolicy"}
    images = {container["image"] for manifest in manifests.values() for container in containers(manifest)}
    own = IMAGE.replace("REGISTRY", "registry.example.com")
    assert images == ({own, f"{own}-gpu"} if overlay.name == "gpu" else {own})
    groups = manifests["RayCluster"]["spec"]["workerGroupSpecs"]
    assert [group["groupName"] for group in groups] == (["cpu", "gpu"] if overlay.name == "gpu" else ["cpu"])
    pods_on_spot = [pod for manifest in manifests.values() for pod in pods(manifest) if "nodeSelector" in pod]
    assert len(pods_on_spot) == (overlay.name == "spot")


# submit.sh, with a `ray` that remembers its jobs in a folder

FAKE_RAY = r"""#!/usr/bin/env bash
set -eu
shift  # job
command=$1; shift
echo "$command $*" >> "$FAKE/calls"
if [ "$command" = submit ]; then
    while [ "$1" != "--submission-id" ]; do shift; done
    [ ! -e "$FAKE/$2" ] || { echo "duplicate" >&2; exit 1; }
    cp "$FAKE/next" "$FAKE/$2"
    exit 0
fi
[ -e "$FAKE/$1" ] || { echo "Job $1 does not exist" >&2; exit 1; }
case "$command" in
delete) rm "$FAKE/$1" ;;
logs) echo "the job's last words" ;;
status)
    word=$(head -n 1 "$FAKE/$1")
    [ "$(wc -l < "$FAKE/$1")" = 1 ] || sed -i 1d "$FAKE/$1"
    case "$word" in
    SUCCEEDED) printf -- "------\nJob '%s' succeeded\n------\n" "$1" ;;
    FAILED) printf "Job '%s' failed\nStatus message: Job 'other' succeeded, it said\n" "$1" ;;
    REFUSED) printf "Job '%s' failed\nStatus message: Job entrypoint command failed with exit code 3, last\n" "$1" ;;
    STOPPED) echo "Job '$1' was stopped" ;;
    *) printf "Status for job '%s': %s\nStatus message: FAILED is only a word here\n" "$1" "$word" ;;
    esac ;;
esac
"""


@pytest.fixture
def submit(tmp_path):
    """Runs submit.sh for the job `night`; gives its exit status, what `ray` was asked, and what was printed."""
    ray = tmp_path / "bin/ray"
    ray.parent.mkdir()
    ray.write_text(FAKE_RAY)
    ray.chmod(0o755)
    environment = os.environ | {"PATH": f"{ray.parent}:{os.environ['PATH']}", "FAKE": str(tmp_path), "POLL_S": "0.01"}

    def run(*states: str, before: str | None = None) -> tuple[int, list[str], str]:
        (tmp_path / "calls").unlink(missing_ok=True)
        (tmp_path / "next").write_text("".join(f"{state}\n" for state in states))
        if before is not None:
            (tmp_path / "night").write_text(before + "\n")
        command = [
            ROOT / "cluster/submit.sh",
            "night",
            "--entrypoint-num-cpus",
            "1",
            "--",
            "python",
            "-m",
            "jobs.score",
        ]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)
        return done.returncode, (tmp_path / "calls").read_text().splitlines(), done.stdout

    return run


SUBMITTED = "submit --no-wait --submission-id night --entrypoint-num-cpus 1 -- python -m jobs.score"


def test_submission_waits_for_the_end_and_passes_it_on(submit):
    status, calls, printed = submit("PENDING", "RUNNING", "RUNNING", "SUCCEEDED")
    assert status == 0
    assert "last words" in printed
    assert calls.count(SUBMITTED) == 1
    status, _, printed = submit("RUNNING", "FAILED", before="STOPPED")
    assert status == 1
    assert "last words" in printed


def test_second_submission_of_a_night_waits_for_the_first(submit):
    status, calls, _ = submit("FAILED", before="SUCCEEDED")
    assert status == 0
    assert SUBMITTED not in calls


@pytest.mark.parametrize("ended", ["FAILED", "STOPPED"])
def test_failed_attempt_makes_room_for_another(submit, ended):
    status, calls, _ = submit("RUNNING", "SUCCEEDED", before=ended)
    assert status == 0
    assert calls.index("delete night") < calls.index(SUBMITTED)


def test_the_exit_status_of_the_job_is_passed_on(submit):
    assert submit("RUNNING", "REFUSED")[0] == 3


def test_a_submission_that_is_ended_stops_its_job(submit, tmp_path):
    (tmp_path / "night").write_text("RUNNING\n")
    environment = os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "FAKE": str(tmp_path), "POLL_S": "100"}
    waiting = subprocess.Popen([ROOT / "cluster/submit.sh", "night", "--", "true"], env=environment)
    calls = tmp_path / "calls"
    give_up = time.monotonic() + 30
    while not (calls.exists() and calls.read_text().count("status") >= 3):
        assert time.monotonic() < give_up
        time.sleep(0.05)
    waiting.send_signal(signal.SIGTERM)
    assert waiting.wait(timeout=30) == 143
    assert calls.read_text().splitlines()[-1] == "stop --no-wait night"


def test_cluster_that_cannot_be_reached_is_a_failure(tmp_path):
    ray = tmp_path / "ray"
    ray.write_text("#!/bin/sh\necho 'Connection refused' >&2\nexit 1\n")
    ray.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        [ROOT / "cluster/submit.sh", "night", "--", "true"], env=environment, capture_output=True, text=True, timeout=30
    )
    assert done.returncode != 0
    assert "Connection refused" in done.stderr
