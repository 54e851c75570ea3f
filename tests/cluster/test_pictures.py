"""Trouble made on purpose on the real node: does one screen say what it is and what helps?"""

from __future__ import annotations

import time
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
from node import Node

from labkit.cluster import status
from labkit.cluster.context import current
from labkit.cluster.kuberay import KubeRay, KubeRayError
from labkit.cluster.render import raycluster, surroundings

NOWHERE = "bits-to-pods/nowhere:0"
PAUSE = "bits-to-pods/pause:1"


@pytest.fixture
def ray(node: Node, namespace: str) -> KubeRay:
    client = KubeRay(current(), namespace)
    for manifest in surroundings("node", namespace=namespace):
        client.apply(manifest)
    return client


def cluster(ray: KubeRay, image: str = NOWHERE, **head: Any) -> dict[str, Any]:
    """A RayCluster of one head whose image is not there, with changes to its pod."""
    made = raycluster("node", name="sick", namespace=ray.namespace, workers=0)
    pod = made["spec"]["headGroupSpec"]["template"]["spec"]
    pod["containers"][0]["image"] = image
    for path, value in head.items():
        place: Any = pod
        *keys, last = path.split("__")
        for key in keys:
            place = place[int(key) if key.isdigit() else key]
        place[last] = value
    return made


def look(ray: KubeRay, good: Callable[[status.Line], bool], timeout: float = 60) -> status.Line:
    """The first problem that is the one looked for."""
    deadline = time.monotonic() + timeout
    while True:
        lines = status.judge(status.gather(ray))
        for line in lines:
            if good(line):
                return line
        assert time.monotonic() < deadline, [str(line) for line in lines]
        time.sleep(1)


def problem(*words: str) -> Callable[[status.Line], bool]:
    return lambda line: (
        line.state == "problem" and all(word in line.found for word in words) and bool(line.todo)
    )


def test_an_image_that_is_not_there(ray: KubeRay) -> None:
    ray.apply(cluster(ray))
    line = look(ray, problem(NOWHERE, "imagePullPolicy Never"))
    assert line.what.startswith("Pod sick-head")


def test_an_image_that_cannot_be_fetched(ray: KubeRay) -> None:
    ray.apply(cluster(ray, "registry.invalid/nowhere:0", containers__0__imagePullPolicy="IfNotPresent"))
    look(ray, problem("cannot fetch the image", "registry.invalid/nowhere:0"))


def test_more_cpu_than_any_node_has(ray: KubeRay) -> None:
    much = {"requests": {"cpu": "77", "memory": "1Gi"}, "limits": {"cpu": "77", "memory": "1Gi"}}
    ray.apply(cluster(ray, containers__0__resources=much))
    look(ray, problem("77 cpu", "Insufficient cpu"))


def test_a_quota_that_is_too_small(ray: KubeRay) -> None:
    ray.apply(
        {
            "apiVersion": "v1",
            "kind": "ResourceQuota",
            "metadata": {"name": "small"},
            "spec": {"hard": {"requests.cpu": "100m"}},
        }
    )
    ray.apply(cluster(ray))
    line = look(ray, problem("exceeded quota: small"))
    assert line.what == "RayCluster sick"


def test_pod_security_refuses(ray: KubeRay) -> None:
    ray.apply(cluster(ray, containers__0__securityContext={"allowPrivilegeEscalation": True}))
    look(ray, problem("restricted", "allowPrivilegeEscalation"))


def test_a_container_that_ends_again_and_again(ray: KubeRay, node: Node) -> None:
    """The node's own DNS server as user 10001, with an argument that it does not know."""
    pod = deepcopy(cluster(ray)["spec"]["headGroupSpec"]["template"]["spec"])
    pod["containers"][0] |= {
        "image": "bits-to-pods/coredns:1",
        "args": ["-no-such-argument"],
        "volumeMounts": [],
    }
    pod["volumes"] = []
    ray.create({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "ends"}, "spec": pod})
    # Of Ray something must be there, or the screen says how to begin.
    asleep = cluster(ray)
    asleep["spec"]["suspend"] = True
    ray.apply(asleep)
    line = look(ray, problem("ends again and again", "exit code"), timeout=90)
    assert "labkit cluster logs ends --previous" in line.todo
    said, deadline = "", time.monotonic() + 120
    while "no-such-argument" not in said:
        assert time.monotonic() < deadline, said
        try:
            said = "".join(ray.logs("ends", previous=True))
        except KubeRayError as error:  # the kubelet has cleared the last one away: the next will end, too
            assert error.reason == "Gone", error
            time.sleep(1)


def test_a_probe_that_fails(ray: KubeRay) -> None:
    pod = deepcopy(cluster(ray)["spec"]["headGroupSpec"]["template"]["spec"])
    probe = {"tcpSocket": {"port": 4444}, "periodSeconds": 1}
    pod["containers"][0] |= {"image": PAUSE, "volumeMounts": [], "ports": [], "readinessProbe": probe}
    pod["volumes"] = []
    ray.create({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "deaf"}, "spec": pod})
    asleep = cluster(ray)
    asleep["spec"]["suspend"] = True
    ray.apply(asleep)
    line = look(ray, lambda line: line.what == "Pod deaf" and "readiness probe" in line.found)
    assert "4444" in line.found
    assert line.state == "wait", "a container may take its time"


def test_a_claim_for_a_storage_class_that_is_not_there(ray: KubeRay, node: Node) -> None:
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "fast"},
        "spec": {
            "accessModes": ["ReadWriteOnce"],
            "resources": {"requests": {"storage": "1Gi"}},
            "storageClassName": "no-such-class",
        },
    }
    ray.apply(claim)
    asleep = cluster(ray)
    asleep["spec"]["suspend"] = True
    ray.apply(asleep)
    line = look(ray, problem("no-such-class"))
    assert line.what == "PersistentVolumeClaim fast"


def test_the_operator_does_not_run(ray: KubeRay, node: Node) -> None:
    asleep = cluster(ray)
    asleep["spec"]["suspend"] = True
    ray.apply(asleep)
    operator = ("--namespace", "kuberay-system", "deployment/kuberay-operator")
    node.kubectl("scale", "--replicas=0", *operator)
    try:
        line = look(ray, lambda line: line.what == "KubeRay operator" and line.state == "problem")
        assert "does not run" in line.found
    finally:
        node.kubectl("scale", "--replicas=1", *operator)
        node.kubectl("rollout", "status", "--timeout=120s", *operator)
    look(ray, lambda line: line.what == "KubeRay operator" and line.state == "ok")


def test_what_the_operator_refuses(ray: KubeRay) -> None:
    wrong = cluster(ray)
    wrong["spec"]["gcsFaultToleranceOptions"] = {"redisAddress": "redis:6379"}
    wrong["metadata"]["annotations"] = {"ray.io/ft-enabled": "false"}  # the older way to say it
    ray.apply(wrong)
    line = look(ray, problem("GcsFaultToleranceOptions are both set"))
    assert line.what == "RayCluster sick"
