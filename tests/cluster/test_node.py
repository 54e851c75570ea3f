"""Does the test node come up whole, keep to itself, and leave nothing behind?"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import node as node_module
import pytest
from node import FIRST, NETWORK, SECOND, STOP_ORDER, Node, parts_of

from labkit.cluster.kuberay import KubeRay
from labkit.cluster.pods import CONTAINER_SECURITY, POD_SECURITY

ROOT = Path(__file__).resolve().parents[2]


def test_the_parts_run_and_the_node_is_ready(node: Node) -> None:
    status = dict(line.split()[:2] for line in node.status() if "running" in line)
    assert set(status) >= {"etcd", "apiserver", "kubelet", "containerd", "scheduler", "proxy"}
    nodes = json.loads(node.kubectl("get", "nodes", "-o", "json"))["items"]
    assert [item["metadata"]["name"] for item in nodes] == ["lab"]
    conditions = {item["type"]: item["status"] for item in nodes[0]["status"]["conditions"]}
    assert conditions["Ready"] == "True"
    assert nodes[0]["status"]["nodeInfo"]["kubeletVersion"] == "v1.37.2"


def test_at_least_1_8_cores_are_left_for_pods(node: Node) -> None:
    pods = json.loads(node.kubectl("get", "pods", "--all-namespaces", "-o", "json"))["items"]
    own = [pod for pod in pods if pod["metadata"]["namespace"] in ("kube-system", "kuberay-system")]
    asked = [
        container.get("resources", {}).get("requests", {}).get("cpu", "0m")
        for pod in own
        for container in pod["spec"]["containers"]
    ]
    assert len(asked) == 3
    assert sum(int(cpu.removesuffix("m")) for cpu in asked) <= 200  # thousandths, of two cores


def test_names_resolve_inside_the_network(node: Node) -> None:
    """The answer comes from CoreDNS: the address that the API server gave its own service."""
    expected = node.kubectl("get", "service", "kubernetes", "-o", "jsonpath={.spec.clusterIP}")
    # A DNS query by hand: this machine's resolver asks its own servers.
    program = (
        "import socket\n"
        "name = b''.join(bytes([len(p)]) + p for p in b'kubernetes.default.svc.cluster.local'.split(b'.'))\n"
        "query = b'\\x12\\x34\\x01\\x00\\x00\\x01' + bytes(6) + name + b'\\x00\\x00\\x01\\x00\\x01'\n"
        "s = socket.socket(type=socket.SOCK_DGRAM); s.settimeout(5)\n"
        "s.sendto(query, ('10.96.0.10', 53)); print(socket.inet_ntoa(s.recv(512)[-4:]))\n"
    )
    command = node.in_network([sys.executable, "-c", program])
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == expected


def test_metrics_of_the_node_are_measured(node: Node) -> None:
    deadline = time.monotonic() + 60
    while not (found := node.kubectl("top", "nodes", "--no-headers", check=False)):
        assert time.monotonic() < deadline
        time.sleep(1)
    name, cpu, *_ = found.split()
    assert name == "lab"
    assert int(cpu.removesuffix("m")) > 0


def test_the_operator_takes_up_what_is_given_to_it(node: Node, namespace: str) -> None:
    cluster = {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": {"name": "asleep", "namespace": namespace},
        "spec": {
            "suspend": True,
            "headGroupSpec": {
                "rayStartParams": {},
                "template": {"spec": {"containers": [{"name": "head", "image": "nobody/none:1"}]}},
            },
        },
    }
    subprocess.run(
        [node.bin / "kubectl", f"--kubeconfig={node.kubeconfig}", "apply", "-f", "-"],
        input=json.dumps(cluster), text=True, check=True, capture_output=True,
    )  # fmt: skip
    node.kubectl(
        "wait", "raycluster/asleep", f"--namespace={namespace}", "--timeout=30s",
        "--for=condition=RayClusterSuspended",
    )  # fmt: skip


# From the first connection on opens fifty a second, until its input ends: prints how many came about and how many did
# not.
CALLER = """
import select, socket, sys
good = bad = 0
while not select.select([sys.stdin], [], [], 0.02)[0]:
    try:
        socket.create_connection((sys.argv[1], 8000), 2).close()
        good += 1
    except OSError:
        bad += good > 0  # kube-proxy may not have heard of the service yet
print(good, bad)
"""


def test_a_second_kubelet_makes_spreading_and_draining_real(node: Node, image: str, namespace: str) -> None:
    container = {
        "name": "web",
        "image": image,
        "imagePullPolicy": "Never",
        "command": ["python", "-m", "http.server", "8000", "--directory", "/tmp"],
        "readinessProbe": {"tcpSocket": {"port": 8000}, "periodSeconds": 1},
        "lifecycle": {"preStop": {"exec": {"command": ["sleep", "2"]}}},  # kube-proxy hears of it meanwhile
        "resources": {"requests": {"cpu": "20m"}},
        "securityContext": CONTAINER_SECURITY,
    }
    spread = {
        "maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "DoNotSchedule",
        "labelSelector": {"matchLabels": {"app": "web"}}, "nodeTaintsPolicy": "Honor",
    }  # fmt: skip
    ray = KubeRay(namespace=namespace)
    items = [
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": "web"},
            "spec": {
                "replicas": 4,
                "selector": {"matchLabels": {"app": "web"}},
                "template": {
                    "metadata": {"labels": {"app": "web"}},
                    "spec": {
                        "securityContext": POD_SECURITY,
                        "containers": [container],
                        "topologySpreadConstraints": [spread],
                        "terminationGracePeriodSeconds": 5,
                    },
                },
            },
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "web"},
            "spec": {"selector": {"app": "web"}, "ports": [{"port": 8000}]},
        },
        {
            "apiVersion": "policy/v1",
            "kind": "PodDisruptionBudget",
            "metadata": {"name": "web"},
            "spec": {"selector": {"matchLabels": {"app": "web"}}, "minAvailable": 2},
        },
    ]

    def places() -> list[str]:
        pods = ray.list("Pod", "app=web")
        return sorted(pod["spec"]["nodeName"] for pod in pods if "deletionTimestamp" not in pod["metadata"])

    node.join()
    try:
        for item in items:
            ray.apply(item)
        node.kubectl("rollout", "status", "deployment/web", f"--namespace={namespace}", "--timeout=90s")
        assert places() == [FIRST.name, FIRST.name, SECOND.name, SECOND.name]
        address = ray.get("Service", "web")["spec"]["clusterIP"]
        caller = subprocess.Popen(
            node.in_network([sys.executable, "-c", CALLER, address]),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        node.kubectl("drain", SECOND.name, "--ignore-daemonsets", "--delete-emptydir-data", "--timeout=90s")
        node.kubectl("rollout", "status", "deployment/web", f"--namespace={namespace}", "--timeout=90s")
        good, bad = map(int, caller.communicate("", timeout=30)[0].split())
        print(f"drained: {good} connections, {bad} failed")
        assert bad == 0 and good > 50
        assert places() == [FIRST.name] * 4
    finally:
        node.leave()
    assert node.kubectl("get", "nodes", "-o", "name") == f"node/{FIRST.name}"
    assert not node.storage(SECOND).exists()
    states = dict(line.split()[:2] for line in node.status() if "running" in line)
    assert [states[part] for part in parts_of(SECOND)] == ["not"] * 4  # running


def test_a_folder_in_use_is_copied_anew_where_a_file_vanished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two, call, failures = tmp_path / "one", tmp_path / "two", node_module._call, [True, True]
    one.mkdir()
    (one / "layer").write_text("bytes")

    def gone(*command: str) -> str:
        done = call(*command)
        if failures and failures.pop():
            raise RuntimeError("cp: cannot stat 'snapshots/375'")
        return done

    monkeypatch.setattr(node_module, "_call", gone)
    node_module._linked(one, two)
    assert [path.name for path in two.iterdir()] == ["layer"] and (two / "layer").samefile(one / "layer")
    shutil.rmtree(two)
    failures += [True] * 9
    with pytest.raises(RuntimeError, match="snapshots/375"):
        node_module._linked(one, two, tries=3)
    assert not two.exists(), "nothing half copied"


def test_there_is_no_route_out(node: Node) -> None:
    """No default route, and no link that leads out of the namespace."""
    routes = subprocess.run(
        node.in_network(["ip", "-json", "route"]), capture_output=True, text=True, check=True
    )
    assert "default" not in [route["dst"] for route in json.loads(routes.stdout)]
    reach = (
        "import socket\ntry:\n    socket.create_connection(('198.51.100.1', 443), 2)\n"
        "except OSError as error:\n    print(error.errno)"
    )
    tried = subprocess.run(
        node.in_network([sys.executable, "-c", reach]), capture_output=True, text=True, check=True
    )
    assert int(tried.stdout) == 101  # ENETUNREACH


def test_only_the_forwarder_stands_on_this_machines_network(node: Node) -> None:
    """127.0.0.1 alone, and whoever has no certificate gets no answer."""
    server = json.loads(node.kubectl("config", "view", "-o", "json"))["clusters"][0]["cluster"]["server"]
    assert server.startswith("https://127.0.0.1:")
    anonymous = subprocess.run(
        [node.bin / "kubectl", "--server", server, "--insecure-skip-tls-verify", "--token=none",
         "get", "namespaces"],
        capture_output=True, text=True, env={"HOME": "/nonexistent", "PATH": os.environ["PATH"]},
    )  # fmt: skip
    assert anonymous.returncode != 0
    assert "Unauthorized" in anonymous.stderr or "must be logged in" in anonymous.stderr


@pytest.mark.parametrize("crashed", [(), ("kubelet", "containerd"), ("etcd", "apiserver", "mounts")])
def test_nothing_is_left_behind_and_it_starts_again(node: Node, crashed: tuple[str, ...]) -> None:
    """Stopped in an orderly way, or with its parts killed first: the same clean machine, and a new start."""
    if crashed and crashed[0] == "kubelet":
        node.join()
    for name in crashed:
        node.stop_part(name)
    assert node.leftovers()  # there is something to remove
    before = node.run
    node.down()
    assert node.leftovers() == []
    assert not Path("/run/netns", NETWORK).exists()
    assert not before.exists()
    assert not node.storage(SECOND).exists()
    assert not node.kubeconfig.exists()
    with open("/proc/mounts") as table:
        assert str(node.folder) not in table.read()
    for entry in Path("/proc").iterdir():  # counted apart from the launcher's own way of looking
        if entry.name.isdigit():
            try:
                executable = os.readlink(entry / "exe")
            except OSError:
                continue
            assert not executable.startswith(f"{node.bin}/"), executable
    node.up(say=lambda line: None)
    assert node.kubectl("get", "--raw", "/readyz") == "ok"


def test_a_launcher_killed_half_way_leaves_nothing_that_up_does_not_clear(node: Node) -> None:
    node.down()
    launcher = subprocess.Popen(
        [sys.executable, str(ROOT / "cluster" / "node"), "up"], stdout=subprocess.PIPE
    )
    assert launcher.stdout is not None
    launcher.stdout.readline()  # the network stands, the first parts are starting
    time.sleep(2)
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    assert node.leftovers()
    node.up(say=lambda line: None)
    assert set(STOP_ORDER) - {"tasks", "shims", *parts_of(SECOND)} <= {
        line.split()[0] for line in node.status() if " running" in line
    }
