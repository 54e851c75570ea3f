"""The client against a real API server and operator. Nothing here needs the server's image: Ray is kept suspended, and
where something must answer, the node's own pods do.
"""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from node import Node

from labkit.cluster import conditions, deploy
from labkit.cluster.context import NODE, Context, current, reachable
from labkit.cluster.kuberay import KubeRay, KubeRayError
from labkit.cluster.render import raycluster, rayjob, surroundings

SMALL = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "small"}, "data": {"a": "1"}}


@pytest.fixture
def ray(node: Node, namespace: str) -> KubeRay:
    """A client for a namespace of this test's own."""
    return KubeRay(current(), namespace)


@pytest.fixture
def asleep(ray: KubeRay) -> str:
    """A suspended RayCluster."""
    cluster = raycluster("node", name="quiet", namespace=ray.namespace, workers=1)
    cluster["spec"]["suspend"] = True
    ray.apply(cluster)
    return "quiet"


def kubectl(node: Node, ray: KubeRay, *args: str) -> str:
    return node.kubectl("--namespace", ray.namespace, *args)


# Which cluster


def test_the_node_is_the_context_where_nothing_else_is_named(node: Node) -> None:
    found = current()
    assert found.is_node
    assert found.name == NODE
    assert reachable(found) is None


def test_a_user_whom_the_server_does_not_know_is_told_so(node: Node, tmp_path: Path) -> None:
    config = json.loads(node.kubectl("config", "view", "--raw", "-o", "json"))
    config["users"][0]["user"] = {"token": "nobody's"}
    (tmp_path / "kubeconfig").write_text(json.dumps(config))
    said = reachable(Context(NODE, current().server, tmp_path / "kubeconfig"))
    assert said is not None
    assert "refuses this user (401)" in said
    assert "nobody's" not in said


# Apply, and what the server says


def test_apply_makes_changes_and_removes_what_is_no_longer_there(ray: KubeRay) -> None:
    made = ray.apply(SMALL)
    again = ray.apply(SMALL)
    assert again["metadata"]["resourceVersion"] == made["metadata"]["resourceVersion"], "nothing changed"
    ray.apply({**SMALL, "data": {"b": "2"}})
    assert ray.get("ConfigMap", "small")["data"] == {"b": "2"}


def test_a_dry_run_changes_nothing(ray: KubeRay, node: Node) -> None:
    ray.apply(raycluster("node", name="dry", namespace=ray.namespace), dry_run=True)
    ray.create(SMALL, dry_run=True)
    assert not ray.exists("RayCluster", "dry")
    assert "small" not in kubectl(node, ray, "get", "configmap", "-o", "name")


def test_a_misspelt_field_is_an_error_that_names_it(ray: KubeRay) -> None:
    cluster = raycluster("node", name="typo", namespace=ray.namespace)
    cluster["spec"]["headGroupSpek"] = {}
    for attempt in (ray.apply, ray.create):
        with pytest.raises(KubeRayError, match="headGroupSpek") as error:
            attempt(cluster)
        assert (error.value.kind, error.value.name) == ("RayCluster", "typo")
        assert error.value.namespace == ray.namespace
        assert error.value.status in (400, 422, 500)


def test_fields_of_somebody_else_are_taken_over_only_by_force(
    ray: KubeRay, node: Node, tmp_path: Path
) -> None:
    theirs = tmp_path / "theirs.json"
    theirs.write_text(json.dumps({**SMALL, "data": {"a": "theirs"}}))
    kubectl(node, ray, "apply", "--server-side", "--field-manager=carol", "-f", str(theirs))
    with pytest.raises(KubeRayError, match=r"carol.*--force") as error:
        ray.apply(SMALL)
    assert error.value.status == 409
    assert ray.get("ConfigMap", "small")["data"] == {"a": "theirs"}
    ray.apply(SMALL, force=True)
    assert ray.get("ConfigMap", "small")["data"] == {"a": "1"}


def test_what_the_operator_added_is_no_conflict(ray: KubeRay, node: Node, tmp_path: Path) -> None:
    """KubeRay 1.6 writes defaults into a RayService when it first sees it, and owns the field then."""
    wanted = raycluster("node", name="quiet", namespace=ray.namespace, workers=1)
    ray.apply({**wanted, "spec": {**wanted["spec"], "suspend": True}})
    theirs = ray.wait("RayCluster", "quiet", "Suspended", timeout=60)
    for field in ("managedFields", "resourceVersion"):
        del theirs["metadata"][field]
    theirs["spec"]["workerGroupSpecs"][0]["scaleStrategy"] = {}
    (tmp_path / "theirs.json").write_text(json.dumps(theirs))
    kubectl(node, ray, "replace", "--field-manager=kuberay-operator", "-f", str(tmp_path / "theirs.json"))
    changed = {**wanted["spec"], "suspend": True, "rayVersion": "2.0.0"}
    assert ray.apply({**wanted, "spec": changed})["spec"]["rayVersion"] == "2.0.0"


def test_what_is_missing_or_there_already_is_raised(ray: KubeRay) -> None:
    for action in (ray.get, ray.delete):
        with pytest.raises(KubeRayError, match=r"RayService none in namespace .*not found") as error:
            action("RayService", "none")
        assert (error.value.status, error.value.reason) == (404, "NotFound")
    ray.create(SMALL)
    with pytest.raises(KubeRayError, match="ConfigMap small") as error:
        ray.create(SMALL)
    assert (error.value.status, error.value.reason) == (409, "AlreadyExists")


def test_a_manifest_for_another_namespace_is_refused(ray: KubeRay) -> None:
    with pytest.raises(ValueError, match="kube-system"):
        ray.apply({**SMALL, "metadata": {"name": "small", "namespace": "kube-system"}})


def test_a_kind_that_no_operator_brought_is_named(ray: KubeRay) -> None:
    with pytest.raises(KubeRayError, match="knows no such kind") as error:
        ray.apply({"apiVersion": "example.org/v1", "kind": "Unicorn", "metadata": {"name": "x"}})
    assert error.value.reason == "NoSuchKind"
    assert ray.knows("RayService")
    assert not ray.knows("Unicorn")


def test_a_server_that_is_away_is_an_error_and_not_a_traceback_of_a_library(ray: KubeRay) -> None:
    ray.client.configuration.host = "https://127.0.0.1:1"
    with pytest.raises(KubeRayError, match="does not answer") as error:
        ray.get("Pod", "x")
    assert error.value.status == 0


# Namespaces


def test_only_the_labs_own_namespaces_are_used_and_removed(node: Node, namespace: str) -> None:
    foreign = f"{namespace}-foreign"
    node.kubectl("create", "namespace", foreign)
    try:
        other = KubeRay(current(), foreign)
        for action in (other.ensure_namespace, other.delete_namespace):
            with pytest.raises(KubeRayError, match=r"app.kubernetes.io/part-of=bits-to-pods"):
                action()
        assert other.get_namespace()["status"]["phase"] == "Active"
    finally:
        node.kubectl("delete", "namespace", foreign)


def test_down_touches_only_the_labs_own_namespace(ray: KubeRay, asleep: str, node: Node) -> None:
    service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "lab-redis"}}
    ray.apply({**service, "spec": {"ports": [{"port": 6379}]}})

    def services() -> str:
        return kubectl(node, ray, "get", "service", "-o", "name")

    assert "Service lab-redis" in [stage.found for stage in deploy.down(ray, dry_run=True)]
    assert "lab-redis" in services()
    kubectl(node, ray, "label", "namespace", ray.namespace, "app.kubernetes.io/part-of-")
    try:
        for everything in (False, True):
            with pytest.raises(KubeRayError, match=r"not the lab's"):
                list(deploy.down(ray, everything=everything))
        assert "lab-redis" in services()
    finally:
        kubectl(node, ray, "label", "namespace", ray.namespace, "app.kubernetes.io/part-of=bits-to-pods")
    list(deploy.down(ray))
    assert "lab-redis" not in services()
    assert ray.exists("RayCluster", asleep)


def test_a_namespace_is_made_restricted_and_removed(node: Node, namespace: str) -> None:
    ray = KubeRay(current(), f"{namespace}-own")
    assert (
        ray.ensure_namespace()["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    )
    assert ray.ensure_namespace()["status"]["phase"] == "Active"
    ray.delete_namespace()
    with pytest.raises(KubeRayError) as error:
        ray.get_namespace()
    assert error.value.status == 404


# Ray's kinds


def test_a_suspended_cluster_is_listed_watched_scaled_and_removed(
    ray: KubeRay, asleep: str, node: Node
) -> None:
    said: list[str] = []
    found = ray.wait("RayCluster", asleep, "Suspended", timeout=60, progress=said.append)
    assert found["status"]["state"] == "suspended"
    assert [each["metadata"]["name"] for each in ray.list("RayCluster")] == [asleep]
    assert {each["kind"] for each in ray.list("RayCluster")} == {"RayCluster"}
    assert ray.list("RayCluster", "app.kubernetes.io/part-of=else") == []
    changes = ray.watch("RayCluster", asleep, timeout=30)
    kind, first = next(changes)
    assert (kind, first["metadata"]["name"]) == ("ADDED", asleep)
    ray.scale(asleep, "workers", 3)
    assert (
        next(each for each in changes if each[1]["spec"]["workerGroupSpecs"][0]["replicas"] == 3)[0]
        == "MODIFIED"
    )
    limits = "{.spec.workerGroupSpecs[0]['replicas','minReplicas','maxReplicas']}"
    assert kubectl(node, ray, "get", "raycluster", asleep, "-o", f"jsonpath={limits}") == "3 1 3"
    ray.delete("RayCluster", asleep)
    assert not ray.exists("RayCluster", asleep)


def test_scaling_what_is_not_there_names_what_is(ray: KubeRay, asleep: str) -> None:
    with pytest.raises(KubeRayError, match="'gpus'; there are workers"):
        ray.scale(asleep, "gpus", 1)
    with pytest.raises(ValueError, match="0 <= least <= replicas <= most"):
        ray.scale(asleep, "workers", 2, most=1)


def test_a_worker_group_is_doubled_and_removed(ray: KubeRay, asleep: str, node: Node) -> None:
    def groups() -> list[str]:
        names = "{.spec.workerGroupSpecs[*].groupName}"
        return kubectl(node, ray, "get", "raycluster", asleep, "-o", f"jsonpath={names}").split()

    made = ray.duplicate_worker_group(asleep, "workers", "more")
    first, second = made["spec"]["workerGroupSpecs"]
    assert groups() == ["workers", "more"]
    assert second == {**first, "groupName": "more"}
    with pytest.raises(KubeRayError, match="'more' already"):
        ray.duplicate_worker_group(asleep, "workers", "more")
    ray.scale(asleep, "more", 2)
    replicas = "{.spec.workerGroupSpecs[*].replicas}"
    assert kubectl(node, ray, "get", "raycluster", asleep, "-o", f"jsonpath={replicas}") == "1 2"
    ray.delete_worker_group(asleep, "workers")
    assert groups() == ["more"]
    with pytest.raises(KubeRayError, match="'workers'; there are more"):
        ray.delete_worker_group(asleep, "workers")


def test_a_worker_group_takes_its_pods_with_it(ray: KubeRay, node: Node) -> None:
    """With pods that find no node: the operator makes them all the same."""
    for manifest in surroundings("node", namespace=ray.namespace):
        ray.apply(manifest)
    cluster = raycluster("node", name="awake", namespace=ray.namespace, workers=1)
    groups = cluster["spec"]["workerGroupSpecs"]
    for spec in (cluster["spec"]["headGroupSpec"], *groups):
        spec["template"]["spec"]["nodeSelector"] = {"no-such": "node"}
    ray.apply(cluster)
    ray.wait("RayCluster", "awake", lambda _: bool(ray.list("Pod", "ray.io/group=workers")), timeout=60)
    ray.delete_worker_group("awake", "workers", timeout=60)
    pods = kubectl(node, ray, "get", "pods", "-l", "ray.io/cluster=awake", "-o", "name").split()
    assert len(pods) == 1
    assert "-head-" in pods[0]


def test_waiting_in_vain_says_for_what_and_what_stands_in_the_way(ray: KubeRay, asleep: str) -> None:
    with pytest.raises(
        TimeoutError, match=r"RayCluster quiet in namespace .* is not Ready after 3 s: suspended"
    ):
        ray.wait("RayCluster", asleep, timeout=3)
    with pytest.raises(TimeoutError, match="is not painted green after 1 s"):

        def painted_green(cluster: dict[str, object]) -> bool:
            return False

        ray.wait("RayCluster", asleep, painted_green, timeout=1)


def test_a_suspended_job_wakes_and_sleeps(ray: KubeRay) -> None:
    job = rayjob("python -c 1", "node", namespace=ray.namespace, workers=1)
    job["spec"]["suspend"] = True
    ray.create(job)
    ray.wait("RayJob", "job", "Suspended", timeout=60)
    assert ray.job_status("job")["jobDeploymentStatus"] == "Suspended"
    ray.suspend("RayJob", "job", on=False)
    ray.wait("RayJob", "job", lambda each: bool(each["status"].get("rayClusterName")), timeout=60)
    ray.suspend("RayJob", "job")
    ray.wait("RayJob", "job", "Suspended", timeout=90)
    assert ray.list("RayCluster") == []
    with pytest.raises(ValueError, match="RayService"):
        ray.suspend("RayService", "lab")


def test_a_job_that_the_operator_refuses_ends_the_wait_at_once(ray: KubeRay) -> None:
    job = rayjob("true", "node", namespace=ray.namespace)
    job["spec"]["shutdownAfterJobFinishes"] = False  # contradicts ttlSecondsAfterFinished
    start = time.monotonic()
    with pytest.raises(KubeRayError, match=r"TTLSecondsAfterFinished|ttlSecondsAfterFinished"):
        list(ray.submit(job))
    assert time.monotonic() - start < 60


# Logs and ports, of the node's own pods


@pytest.fixture
def operator(node: Node) -> KubeRay:
    """A client for the operator's namespace, to look at."""
    return KubeRay(current(), "kuberay-system")


def test_logs_of_a_pod_are_what_kubectl_shows(node: Node) -> None:
    system = KubeRay(current(), "kube-system")
    (pod,) = system.list("Pod", "k8s-app=kube-dns")
    name = pod["metadata"]["name"]
    whole = "".join(system.logs(name))
    assert len(whole) > 20
    assert whole.strip().splitlines() == kubectl(node, system, "logs", name).splitlines()
    assert "".join(system.logs(name, tail=1)) == whole.splitlines(keepends=True)[-1]
    with pytest.raises(KubeRayError, match="nobody"):
        list(system.logs("nobody"))


def test_logs_are_followed(ray: KubeRay, operator: KubeRay) -> None:
    (pod,) = operator.list("Pod")
    lines = operator.logs(pod["metadata"]["name"], follow=True, tail=1)
    next(lines)
    cluster = raycluster("node", name="a-cluster-to-look-for", namespace=ray.namespace)
    cluster["spec"]["suspend"] = True
    ray.apply(cluster)
    assert any("a-cluster-to-look-for" in piece for piece in lines)


def get(url: str) -> bytes:
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=20) as response:
        return bytes(response.read())


def test_a_service_is_reached_by_many_connections_at_once(operator: KubeRay) -> None:
    with operator.port_forward("service/kuberay-operator", 8080) as forward:
        with ThreadPoolExecutor(16) as pool:
            pages = list(pool.map(get, [f"{forward.url}/metrics"] * 32))
        assert all(page.endswith(b"\n") and b"go_goroutines" in page for page in pages)
        assert forward.trouble is None
    with pytest.raises(OSError):
        get(f"{forward.url}/metrics")


def test_a_pod_is_reached_by_name(node: Node) -> None:
    system = KubeRay(current(), "kube-system")
    (dns,) = system.list("Pod", "k8s-app=kube-dns")
    with system.port_forward(f"pod/{dns['metadata']['name']}", 8181) as forward:
        assert get(f"{forward.url}/ready") == b"OK"


def test_a_port_where_nobody_listens_says_so(operator: KubeRay) -> None:
    (pod,) = operator.list("Pod")
    with operator.port_forward(f"pod/{pod['metadata']['name']}", 4444) as forward:
        with pytest.raises(OSError):
            get(forward.url)
        deadline = time.monotonic() + 10
        while forward.trouble is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert "4444" in (forward.trouble or "")


def test_what_cannot_be_forwarded_is_said_at_once(operator: KubeRay) -> None:
    for target, port, said in (
        ("service/none", 80, "Service none"),
        ("pod/none", 80, "Pod none"),
        ("service/kuberay-operator", 81, "no port 81; there is 8080"),
    ):
        with pytest.raises(KubeRayError, match=said):
            operator.port_forward(target, port)
    with pytest.raises(ValueError, match="service/NAME or pod/NAME"):
        operator.port_forward("kuberay-operator", 8080)
    with (
        operator.port_forward("service/kuberay-operator", 8080) as first,
        pytest.raises(OSError, match="in use"),
    ):
        operator.port_forward("service/kuberay-operator", 8080, first.port)


# The role of the person who operates


@pytest.fixture
def person(ray: KubeRay, node: Node, tmp_path: Path) -> Iterator[KubeRay]:
    """A client as somebody who has the role `operator` of the manifests and nothing else."""
    for manifest in surroundings("node", namespace=ray.namespace)[1:]:
        ray.apply(manifest)
    kubectl(node, ray, "create", "serviceaccount", "person")
    kubectl(
        node,
        ray,
        "create",
        "rolebinding",
        "person",
        "--role=operator",
        f"--serviceaccount={ray.namespace}:person",
    )
    token = kubectl(node, ray, "create", "token", "person").strip()
    config = json.loads(node.kubectl("config", "view", "--raw", "-o", "json"))
    config["users"][0]["user"] = {"token": token}
    (tmp_path / "kubeconfig").write_text(json.dumps(config))
    yield KubeRay(Context(NODE, current().server, tmp_path / "kubeconfig", is_node=True), ray.namespace)


def test_the_role_is_enough_for_the_client_and_for_no_secret(person: KubeRay) -> None:
    from labkit.cluster import status

    cluster = raycluster("node", name="mine", namespace=person.namespace)
    cluster["spec"]["suspend"] = True
    person.apply(cluster)
    person.wait("RayCluster", "mine", "Suspended", timeout=60)
    lines = status.judge(status.gather(person))
    assert "RayCluster mine" in [line.what for line in lines]
    assert status.is_well([line for line in lines if line.what != "PersistentVolumeClaim checkpoints"])
    with pytest.raises(KubeRayError, match="forbidden") as error:
        person.list("Secret")
    assert error.value.status == 403
    person.delete("RayCluster", "mine")


def test_the_role_is_enough_to_forward_a_port(person: KubeRay, ray: KubeRay) -> None:
    from labkit.cluster.pods import CONTAINER_SECURITY, pod

    container = {
        "name": "deaf",
        "image": "bits-to-pods/pause:1",
        "imagePullPolicy": "Never",
        "securityContext": CONTAINER_SECURITY,
    }
    ray.create({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "deaf"}, "spec": pod(container)})
    ray.wait("Pod", "deaf", timeout=60)
    with person.port_forward("pod/deaf", 4444) as forward:
        with pytest.raises(OSError):
            get(forward.url)
        deadline = time.monotonic() + 15
        while forward.trouble is None and time.monotonic() < deadline:
            time.sleep(0.05)
    assert "orbidden" not in (forward.trouble or "")
    assert "4444" in (forward.trouble or ""), "the connection must have come as far as the pod"


def test_conditions_know_the_real_states(ray: KubeRay, asleep: str) -> None:
    """What `holds` reads is what the operator writes."""
    found = ray.wait("RayCluster", asleep, "Suspended", timeout=60)
    assert conditions.condition(found, "RayClusterSuspended")["status"] == "True"
    assert found["status"]["observedGeneration"] == found["metadata"]["generation"]


# Without the API server. At the end, and the operator renewed after the last: by itself it takes up to a minute to come
# back to its work.


def test_wait_outlives_an_api_server_that_is_away(ray: KubeRay, asleep: str, node: Node) -> None:
    ray.wait("RayCluster", asleep, "Suspended", timeout=60)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(
            ray.wait, "RayCluster", asleep, lambda each: "marked" in each["metadata"]["labels"]
        )
        node.stop_part("apiserver")
        try:
            time.sleep(4)
            assert not waiting.done()
        finally:
            node.start_part("apiserver")
        deadline = time.monotonic() + 60
        while reachable(ray.context) is not None and time.monotonic() < deadline:
            time.sleep(0.5)
        kubectl(node, ray, "label", "raycluster", asleep, "marked=yes")
        assert waiting.result(timeout=60)["metadata"]["labels"]["marked"] == "yes"


def test_a_forward_outlives_the_api_server_and_leaves_no_thread(operator: KubeRay, node: Node) -> None:
    before = threading.active_count()
    with operator.port_forward("service/kuberay-operator", 8080) as forward:
        get(f"{forward.url}/metrics")
        node.stop_part("apiserver")
        threading.Timer(3, node.start_part, ["apiserver"]).start()
        # A new connection waits until the API server is back.
        assert b"go_goroutines" in get(f"{forward.url}/metrics")
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threading.active_count() <= before
    node.renew_operator()
