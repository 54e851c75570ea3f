"""What does each fault cost, and each upgrade, while requests flow through the cluster's service?

One RayService for all of them, with the real model: the checkpoint of the bundled model in fp32, and the one that
notebook 06 makes of it. ``-s`` prints the figures; LABKIT_FIGURES=FILE keeps them as JSON, from five times as many
requests around each upgrade.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from load import Load
from node import Node

from labkit.cluster.kuberay import KubeRay
from labkit.cluster.pods import Manifest
from labkit.cluster.render import DEFAULT, manifests, rayservice, redis_secret
from labkit.course import checkpoint
from labkit.serving import Deployment

NAME = "lab"
FP32 = DEFAULT
INT4 = Deployment(checkpoint="/checkpoints/int4", name="lab@int4", threads=1)
ENOUGH = 500 if "LABKIT_FIGURES" in os.environ else 100  # answers from each side of an upgrade
figures: dict[str, dict[str, object]] = {}


class Service:
    """The RayService of these tests: its address, and the pods behind it."""

    def __init__(self, node: Node, ray: KubeRay) -> None:
        self.node, self.ray = node, ray
        address = ray.get("Service", f"{NAME}-serve-svc")["spec"]["clusterIP"]
        self.url = f"http://{address}:8000"

    def load(self, **options: int) -> Load:
        return Load(self.node, self.url, **options)

    def pods(self, kind: str) -> list[str]:
        """Of the Ray cluster that serves; one that it replaced may not be gone yet."""
        return [pod["metadata"]["name"] for pod in self._listed(kind)]

    def workers(self) -> dict[str, int]:
        """The workers that are ready, and how often each has started anew."""
        states = {
            pod["metadata"]["name"]: pod["status"].get("containerStatuses", [])
            for pod in self._listed("worker")
        }
        return {
            name: sum(state["restartCount"] for state in containers)
            for name, containers in states.items()
            if containers and all(state["ready"] for state in containers)
        }

    def _listed(self, kind: str) -> list[Manifest]:
        return self.ray.list("Pod", f"ray.io/node-type={kind},ray.io/cluster={self.cluster()}")

    def cluster(self) -> str:
        return str(self.ray.get("RayService", NAME)["status"]["activeServiceStatus"]["rayClusterName"])


def started(node: Node, namespace: str, *, redis: bool = False, deployment: Deployment = FP32) -> Service:
    ray = KubeRay(namespace=namespace)
    if redis:
        ray.create(redis_secret(name=NAME, namespace=namespace))
    for manifest in manifests([deployment], "node", name=NAME, namespace=namespace, redis=redis):
        ray.apply(manifest)
    ray.wait("RayService", NAME, timeout=240)
    service = Service(node, ray)
    with service.load(clients=1) as load:  # ready is one thing; that kube-proxy has heard of it, another
        load.wait_for(1)
    return service


@pytest.fixture(scope="module")
def service(node: Node, image: str, module_namespace: str) -> Iterator[Service]:
    found = started(node, module_namespace)
    claim = found.ray.get("PersistentVolumeClaim", "checkpoints")["spec"]["volumeName"]
    volume = Path(json.loads(node.kubectl("get", "pv", claim, "-o", "json"))["spec"]["hostPath"]["path"])
    shutil.copytree(checkpoint("w4a16-gptq-g64"), volume / "int4")
    yield found
    print(json.dumps(figures, indent=1))
    if os.environ.get("LABKIT_FIGURES"):
        Path(os.environ["LABKIT_FIGURES"]).write_text(json.dumps(figures, indent=1) + "\n")


def test_in_place_no_request_is_lost_between_two_checkpoints(service: Service) -> None:
    """A change of serveConfigV2: the same pods, the model's replica replaced."""
    before, peak = service.cluster(), Peak(service)
    with service.load() as load, peak:
        load.wait_for(ENOUGH, model="lab@fp32")
        service.ray.apply(rayservice([INT4], "node", name=NAME, namespace=service.ray.namespace))
        load.wait_for(ENOUGH, model="lab@int4")
        service.ray.apply(rayservice([FP32], "node", name=NAME, namespace=service.ray.namespace))
        load.wait_for(ENOUGH, model="lab@fp32")
    figures["in place"] = {**load.summary(), "pods_at_peak": peak.pods}
    assert load.summary()["failed"] == 0
    assert service.cluster() == before


def test_by_a_new_cluster_no_request_is_lost_either(service: Service) -> None:
    """A change below rayClusterConfig: a second Ray cluster, and the service moves when it is ready."""
    before, peak = service.cluster(), Peak(service)
    with service.load() as load, peak:
        load.wait_for(ENOUGH, model="lab@fp32")
        wanted = rayservice([INT4], "node", name=NAME, namespace=service.ray.namespace)
        head = wanted["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]
        head["spec"]["containers"][0]["env"].append({"name": "GENERATION", "value": "2"})
        service.ray.apply(wanted)
        load.wait_for(ENOUGH, model="lab@int4")
    figures["new cluster"] = {**load.summary(), "pods_at_peak": peak.pods}
    assert load.summary()["failed"] == 0
    assert service.cluster() != before


def test_an_operator_that_restarts_costs_nothing(service: Service) -> None:
    with service.load() as load:
        load.wait_for(20)
        service.node.renew_operator()
        load.wait_for(20)
    figures["operator restarted"] = load.summary()
    assert load.summary()["failed"] == 0


@pytest.mark.parametrize("kind", ["worker", "head"])
def test_a_pod_that_dies_is_replaced_and_the_service_heals_by_itself(service: Service, kind: str) -> None:
    """One worker and no memory outside the head: an outage either way; how long is what is reported.

    A worker whose head is gone serves on for half a minute before it starts anew, so what is waited for is a
    worker that has.
    """
    [pod] = service.pods(kind)
    before = service.workers()
    with service.load() as load:
        load.wait_for(20)
        killed = time.time()
        service.node.kubectl(
            "delete", "pod", pod, f"--namespace={service.ray.namespace}", "--grace-period=0", "--force"
        )
        until(lambda: service.workers() not in ({}, before), 180)
        load.wait_for(50)
    failures = [result.end for result in load.results if result.error]
    figures[f"{kind} killed"] = {
        **load.summary(),
        "first_failure_after_s": round(min(failures) - killed, 1),
        "last_failure_after_s": round(max(failures) - killed, 1),
    }
    print(figures[f"{kind} killed"])
    assert max(result.end for result in load.results if not result.error) > max(failures)
    service.ray.wait("RayService", NAME, timeout=120)


def test_with_redis_a_head_that_dies_costs_nothing(node: Node, image: str, namespace: str) -> None:
    """Ray's state outlives the head, and two workers go on with what they have."""
    deployment = Deployment(checkpoint="tiny", name="lab@tiny", threads=1, replicas=2)
    service = started(node, namespace, redis=True, deployment=deployment)
    [head] = service.pods("head")
    workers = sorted(service.pods("worker"))
    with service.load() as load:
        load.wait_for(50)
        killed = time.time()
        node.kubectl("delete", "pod", head, f"--namespace={namespace}", "--grace-period=0", "--force")
        until(lambda: head not in service.pods("head") and len(service.pods("head")) == 1)
        service.ray.wait("Pod", service.pods("head")[0], timeout=120)
        ready = time.time() - killed
        load.wait_for(50)
    figures["head killed, with Redis"] = {**load.summary(), "new_head_ready_after_s": round(ready, 1)}
    print(figures["head killed, with Redis"])
    assert load.summary()["failed"] == 0
    assert sorted(service.pods("worker")) == workers


def test_an_api_server_that_is_away_for_half_a_minute_costs_nothing(service: Service) -> None:
    with service.load() as load:
        load.wait_for(20)
        service.node.stop_part("apiserver")
        time.sleep(30)
        during = load.answered()
        service.node.start_part("apiserver")
        load.wait_for(20)
    figures["API server away for 30 s"] = {**load.summary(), "answered_meanwhile": during}
    assert load.summary()["failed"] == 0
    until(service.node.answers)
    assert service.ray.get("RayService", NAME)
    service.node.renew_operator()


class Peak:
    """The most Ray pods that there were at once in a ``with`` block."""

    def __init__(self, service: Service) -> None:
        self.service, self.pods = service, 0
        self.ended = threading.Event()

    def __enter__(self) -> None:
        self.thread = threading.Thread(target=self._count, daemon=True)
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()

    def _count(self) -> None:
        while not self.ended.wait(1):
            self.pods = max(self.pods, len(self.service.ray.list("Pod", "ray.io/node-type")))


def until(condition: object, patience_s: float = 120) -> None:
    deadline = time.monotonic() + patience_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.3)
