"""What the KubeRay operator refuses by its validation.go, one rule at a time, and what is one step inside each rule."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from labkit.cluster import structural
from labkit.cluster.check import check

CONTAINER = {"name": "ray", "image": "bits-to-pods/server:dev"}
GROUP = {"template": {"spec": {"containers": [CONTAINER]}}}
SPEC: dict[str, Any] = {
    "rayVersion": "2.60.0",
    "headGroupSpec": GROUP,
    "workerGroupSpecs": [{"groupName": "workers", "minReplicas": 1, "maxReplicas": 2, **GROUP}],
}
PROGRAMS = Path(__file__).resolve().parents[3] / "cluster" / "node" / "programs"


def paths(kind: str, spec: dict[str, Any], **metadata: Any) -> list[str]:
    manifest = {
        "apiVersion": "ray.io/v1",
        "kind": kind,
        "metadata": {"name": "lab", **metadata},
        "spec": spec,
    }
    (verdict,) = check(manifest)
    return [error.path for error in verdict.errors]


def merged(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """``base`` with ``change`` put in, dict by dict; a key ``0`` goes into the first of a list."""
    result = copy.deepcopy(base)
    for key, value in change.items():
        if isinstance(result.get(key), list) and isinstance(value, dict):
            result[key][0] = merged(result[key][0], value[0])
        elif isinstance(result.get(key), dict) and isinstance(value, dict):
            result[key] = merged(result[key], value)
        else:
            result[key] = value
    return result


def head(**container: Any) -> dict[str, Any]:
    return {"headGroupSpec": {"template": {"spec": {"containers": {0: container}}}}}


def worker(**group: Any) -> dict[str, Any]:
    return {"workerGroupSpecs": {0: group}}


def env(name: str, value: str = "x") -> dict[str, Any]:
    return head(env=[{"name": name, "value": value}])


V2 = {"enableInTreeAutoscaling": True, "autoscalerOptions": {"version": "v2"}}
FT = {"gcsFaultToleranceOptions": {"redisAddress": "redis:6379"}}
HEAD, WORKERS = "headGroupSpec", "workerGroupSpecs[0]"
ENV = f"{HEAD}.template.spec.containers[0].env"
TOKEN = {"authOptions": {"mode": "token"}}
K8S = {"authOptions": {"mode": "token", "enableK8sTokenAuth": True}}

# a change, and the paths (under spec) of what is then wrong; none = the operator takes it
OF_A_CLUSTER: list[tuple[dict[str, Any], list[str]]] = [
    ({}, []),
    (worker(minReplicas=2), []),
    (worker(minReplicas=3), [f"{WORKERS}.minReplicas"]),
    (worker(minReplicas=-1), [f"{WORKERS}.minReplicas"]),
    (worker(minReplicas=None, maxReplicas=None), []),  # the schema's defaults: 0 and 2147483647
    (worker(suspend=True), []),
    (worker(suspend=True) | {"enableInTreeAutoscaling": True}, [f"{WORKERS}.suspend"]),
    (worker(resources={"CPU": "1"}), []),
    (worker(resources={"CPU": "1"}, rayStartParams={"num-cpus": "1"}), [f"{WORKERS}.rayStartParams.num-cpus"]),
    (worker(rayStartParams={"num-cpus": "1"}), []),
    (worker(labels={"a/b/c": "d"}), [f"{WORKERS}.labels[a/b/c]"]),
    (worker(rayStartParams={"labels": "a=b"}), [f"{WORKERS}.rayStartParams.labels"]),
    (worker(template={"spec": {"containers": []}}), [f"{WORKERS}.template.spec.containers"]),
    (worker(idleTimeoutSeconds=10), [f"{WORKERS}.idleTimeoutSeconds"]),
    (worker(idleTimeoutSeconds=10) | V2, []),
    ({"autoscalerOptions": {"idleTimeoutSeconds": -1}}, ["autoscalerOptions.idleTimeoutSeconds"]),
    (env("RAY_enable_autoscaler_v2", "true"), [ENV]),
    (env("RAY_enable_autoscaler_v2", "0"), []),
    (env("RAY_enable_autoscaler_v2", "1") | {"enableInTreeAutoscaling": True}, []),
    (env("RAY_enable_autoscaler_v2", "1") | V2, [ENV]),
    ({"headGroupSpec": {"template": {"spec": {"restartPolicy": "Always"}}}}, []),
    ({"headGroupSpec": {"template": {"spec": {"restartPolicy": "Always"}}}} | V2,
     [f"{HEAD}.template.spec.restartPolicy"]),
    ({"headGroupSpec": {"template": {"spec": {"restartPolicy": "Never"}}}} | V2, []),
    (FT, []),
    (env("RAY_REDIS_ADDRESS"), [ENV]),
    (env("RAY_REDIS_ADDRESS") | FT, [ENV]),
    (env("REDIS_PASSWORD"), []),
    (env("REDIS_PASSWORD") | FT, [ENV]),
    (env("REDIS_USERNAME"), [ENV]),
    ({"headGroupSpec": {"rayStartParams": {"redis-password": "x"}}}, []),
    ({"headGroupSpec": {"rayStartParams": {"redis-password": "x"}}} | FT, [f"{HEAD}.rayStartParams.redis-password"]),
    ({"headGroupSpec": {"rayStartParams": {"redis-username": "x"}}}, [f"{HEAD}.rayStartParams.redis-username"]),
    (TOKEN, []),
    (TOKEN | {"rayVersion": "2.52.0"}, []),
    (TOKEN | {"rayVersion": "2.51.9"}, ["rayVersion"]),
    (TOKEN | {"rayVersion": None}, ["rayVersion"]),
    (TOKEN | {"rayVersion": "nightly"}, ["rayVersion"]),
    (K8S, []),
    (K8S | {"rayVersion": "2.54.0"}, ["rayVersion"]),
    ({"authOptions": {**K8S["authOptions"], "secretName": "x"}}, ["authOptions.secretName"]),
    ({"authOptions": {"enableK8sTokenAuth": True}}, ["authOptions.enableK8sTokenAuth"]),
    (head(env=[{"name": "A"}, {"name": "A"}]), [f"{ENV}[1]"]),
    (head(ports=[{"containerPort": 1}, {"containerPort": 1, "protocol": "UDP"}]), []),
    (head(ports=[{"containerPort": 1}, {"containerPort": 1, "protocol": "TCP"}]),
     [f"{HEAD}.template.spec.containers[0].ports[1]"]),
]  # fmt: skip


@pytest.mark.parametrize(("change", "wrong"), OF_A_CLUSTER)
def test_clusters(change: dict[str, Any], wrong: list[str]) -> None:
    assert paths("RayCluster", merged(SPEC, change)) == [f"spec.{path}" for path in wrong]


@pytest.mark.parametrize(
    ("change", "wrong"), [case for case in OF_A_CLUSTER if "authOptions" not in case[0]]
)
def test_the_cluster_inside_a_service_and_a_job(change: dict[str, Any], wrong: list[str]) -> None:
    spec = merged(SPEC, change)
    for kind, key in (("RayService", "rayClusterConfig"), ("RayJob", "rayClusterSpec")):
        assert paths(kind, {key: spec}) == [f"spec.{key}.{path}" for path in wrong]


JOB: dict[str, Any] = {"entrypoint": "true", "rayClusterSpec": SPEC}
DONE = {"jobStatus": "SUCCEEDED"}


def rules(*given: tuple[str, int]) -> dict[str, Any]:
    found = [{"policy": policy, "condition": {**DONE, "ttlSeconds": after}} for policy, after in given]
    return {"deletionStrategy": {"deletionRules": found}}


ELSEWHERE = {"rayClusterSpec": None, "clusterSelector": {"ray.io/cluster": "lab"}}
OF_A_JOB: list[tuple[dict[str, Any], list[str]]] = [
    ({}, []),
    ({"suspend": True}, ["suspend"]),
    ({"suspend": True, "shutdownAfterJobFinishes": True}, []),
    ({"ttlSecondsAfterFinished": 5}, ["ttlSecondsAfterFinished"]),
    ({"ttlSecondsAfterFinished": 5, "shutdownAfterJobFinishes": True}, []),
    ({"rayClusterSpec": None}, [""]),
    (ELSEWHERE, []),
    (ELSEWHERE | {"clusterSelector": {"other": "lab"}}, ["clusterSelector"]),
    (ELSEWHERE | {"backoffLimit": 1}, ["backoffLimit"]),
    (ELSEWHERE | {"submissionMode": "SidecarMode"}, ["submissionMode"]),
    ({"backoffLimit": 2}, []),
    ({"backoffLimit": 2, "submissionMode": "InteractiveMode"}, ["backoffLimit"]),
    ({"submissionMode": "SidecarMode"}, []),
    ({"submissionMode": "SidecarMode", "submitterConfig": {}}, ["submitterConfig"]),
    ({"activeDeadlineSeconds": 1}, []),
    ({"preRunningDeadlineSeconds": 0}, ["preRunningDeadlineSeconds"]),
    ({"rayClusterSpec": {**SPEC, **K8S}}, ["rayClusterSpec.authOptions.enableK8sTokenAuth"]),
    (rules(("DeleteWorkers", 5), ("DeleteCluster", 5), ("DeleteSelf", 9)), []),
    (rules(("DeleteSelf", 5), ("DeleteCluster", 6)), ["deletionStrategy.deletionRules"]),
    (rules(("DeleteSelf", 5), ("DeleteSelf", 6)), ["deletionStrategy.deletionRules[1]"]),
    (rules(("DeleteSelf", -5)), ["deletionStrategy.deletionRules[0].condition.ttlSeconds"]),
    (rules(("DeleteCluster", 5)) | ELSEWHERE, ["deletionStrategy.deletionRules[0].policy"]),
    (rules(("DeleteSelf", 5)) | {"shutdownAfterJobFinishes": True}, ["deletionStrategy.deletionRules"]),
    ({"deletionStrategy": {"onSuccess": {"policy": "DeleteSelf"}, "onFailure": {"policy": "DeleteNone"}}}, []),
    ({"deletionStrategy": {"onSuccess": {"policy": "DeleteSelf"}, "onFailure": {"policy": "DeleteNone"}},
      "shutdownAfterJobFinishes": True}, ["deletionStrategy.onFailure.policy"]),
    ({"deletionStrategy": {"onSuccess": {"policy": "DeleteSelf"}}}, ["deletionStrategy"]),  # a CEL rule of the schema
]  # fmt: skip


@pytest.mark.parametrize(("change", "wrong"), OF_A_JOB)
def test_jobs(change: dict[str, Any], wrong: list[str]) -> None:
    expected = [f"spec.{path}".rstrip(".") for path in wrong]
    assert paths("RayJob", JOB | change) == expected
    inner = [path.replace("spec", "spec.jobTemplate", 1) for path in expected]
    assert paths("RayCronJob", {"schedule": "0 * * * *", "jobTemplate": JOB | change}) == inner


SERVICE = {"rayClusterConfig": SPEC}


GOOD_TIMES, BAD_TIMES = ("5m", "1h30m", "1.5h", "300", ""), ("0", "0s", "-5m", "soon", "5 m")


@pytest.mark.parametrize("time", GOOD_TIMES + BAD_TIMES)
def test_the_time_a_service_may_take(time: str) -> None:
    wrong = [] if time in GOOD_TIMES else ["metadata.annotations[ray.io/initializing-timeout]"]
    assert paths("RayService", SERVICE, annotations={"ray.io/initializing-timeout": time}) == wrong


def test_services() -> None:
    service = {"headGroupSpec": {"headService": {"metadata": {"name": "mine"}}}}
    assert paths("RayService", {"rayClusterConfig": merged(SPEC, service)}) == [
        "spec.rayClusterConfig.headGroupSpec.headService.metadata.name"
    ]
    assert paths("RayCluster", merged(SPEC, service)) == []
    assert paths("RayService", {**SERVICE, "rayClusterDeletionDelaySeconds": -1}) == [
        "spec.rayClusterDeletionDelaySeconds"
    ]


@pytest.mark.parametrize(
    ("kind", "spec", "longest"),
    [("RayCluster", SPEC, 53), ("RayJob", JOB, 47), ("RayService", SERVICE, 47)],
)
def test_names(kind: str, spec: dict[str, Any], longest: int) -> None:
    assert paths(kind, spec, name="x" * longest) == []
    assert paths(kind, spec, name="x" * (longest + 1)) == ["metadata.name"]
    assert paths(kind, spec, name="1st") == ["metadata.name"]


def test_what_kueue_manages_is_not_looked_at_by_the_operator() -> None:
    broken = merged(SPEC, worker(minReplicas=3))
    assert paths("RayCluster", {**broken, "managedBy": "kueue.x-k8s.io/multikueue"}) == []


@pytest.mark.parametrize(
    ("schemas", "program"), [("kubernetes", "kubernetes"), ("kuberay", "kuberay-operator")]
)
def test_the_schemas_are_of_the_versions_that_the_test_node_runs(schemas: str, program: str) -> None:
    content = structural.load(schemas)
    module = content["source"].removeprefix("Go module ")
    assert f"{module} {content['version']}" in (PROGRAMS / program / "go.mod").read_text()
