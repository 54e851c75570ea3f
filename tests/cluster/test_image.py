"""The model server's image: whose it runs as, what it carries from the machine that built it, whether it answers."""

from __future__ import annotations

import json
import os
import re
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from node import Node

from labkit.cluster.kuberay import KubeRay
from labkit.cluster.oci import Image, open_image
from labkit.settings import settings

pytestmark = pytest.mark.needs("server image")
ROOT = Path(__file__).resolve().parents[2]
MODEL = "smollm2-135m-instruct"
USER = 10001
CERTIFICATE = re.compile(rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)


@pytest.fixture(scope="module", params=["server", "redis"])
def each(request: pytest.FixtureRequest) -> Image:
    return open_image(settings().node / "images" / "oci", f"/{request.param}:dev")


@pytest.fixture(scope="module")
def server() -> Image:
    return open_image(settings().node / "images" / "oci", "/server:dev")


def contents(image: Image) -> Iterator[tuple[str, bytes]]:
    """The files of all layers, hidden ones too; of the large ones, libraries and weights, the first part."""
    for layer in image.layers:
        with tarfile.open(image.path / "blobs" / layer.digest.replace(":", "/")) as tar:
            for member in tar:
                file = tar.extractfile(member) if member.isreg() else None
                yield member.name, file.read(1 << 20) if file else b""


# ---- what it says of itself


def test_it_is_nobody_in_particular(each: Image) -> None:
    assert each.config["config"]["User"] == f"{USER}:{USER}"
    labels = each.config["config"]["Labels"]
    assert labels["org.opencontainers.image.title"].startswith("bits-to-pods/")
    assert labels["org.opencontainers.image.licenses"]


def test_it_says_which_labkit_it_is(server: Image) -> None:
    from importlib.metadata import version

    labels = server.config["config"]["Labels"]
    assert labels["org.opencontainers.image.version"] == version("labkit")
    assert re.fullmatch(r"[0-9a-f]{7,}\+?", labels["org.opencontainers.image.revision"])


def test_its_environment_is_known_by_heart(server: Image) -> None:
    environment = dict(line.split("=", 1) for line in server.config["config"]["Env"])
    path = environment.pop("PATH").split(":")
    assert path[0] == "/opt/lab/bin" and all(
        re.fullmatch(r"/(opt|usr)[\w/]*|/s?bin", each) for each in path
    )
    assert environment == {
        "HOME": "/home/lab", "PYTHONUNBUFFERED": "1", "LABKIT_SHARED_CACHE": "/opt/cache",
        "LABKIT_PROGRESS": "0", "RAY_USAGE_STATS_ENABLED": "0",
    }  # fmt: skip


def test_labkit_is_the_last_layer_and_a_small_one(server: Image) -> None:
    *below, last = server.layers
    package = re.compile(r"/labkit(-[^/]*)?/")
    assert last.bytes < 20 * 2**20 < max(layer.bytes for layer in below)
    assert any(package.search(member.name) for member in server.members(last))
    stray = {member.name for member in server.members(last) if not member.name.startswith("opt/lab")}
    assert stray <= {"opt", "opt/"}
    assert not [m.name for layer in below for m in server.members(layer) if package.search(m.name)]


# ---- what it carries


def test_nothing_of_the_machine_that_built_it(each: Image) -> None:
    """Neither a path nor a way to an index, in files, names or history; the build's mounts left empty folders."""
    network = [v for k, v in os.environ.items() if re.search("INDEX|PROXY", k.upper()) and "//" in v]
    traces = [str(ROOT), str(settings().cache), "/run/uv-cache", *network]
    words = [trace.encode() for trace in traces]
    assert [trace for trace in traces if trace in json.dumps(each.config)] == []
    found = [name for name, content in contents(each) if any(word in content for word in words)]
    assert found == []
    visible = each.visible()
    private = re.compile(
        r"root/\.(cache|config|ssh|netrc)/|run/secrets/|opt/uv/|tmp/.|var/lib/apt/lists/.*_|src/"
    )
    assert [name for name in visible if private.match(name)] == []
    for name in ("etc/hostname", "etc/resolv.conf", "etc/machine-id"):
        assert name not in visible or visible[name][0].size == 0


def test_it_trusts_whom_debian_trusts(each: Image) -> None:
    """The machine that builds may trust a proxy of its own; whoever runs the image must not."""
    files = dict(contents(each))
    debian = {
        certificate.replace(b"\r", b"")
        for name, content in files.items()
        if name.startswith("usr/share/ca-certificates/")
        for certificate in CERTIFICATE.findall(content)
    }
    trusted = set(CERTIFICATE.findall(files["etc/ssl/certs/ca-certificates.crt"]))
    assert len(trusted) > 100 and trusted <= debian


def test_users_can_change_nothing_in_it(server: Image) -> None:
    writable = {
        name
        for name, (member, _) in server.visible().items()
        if not member.issym() and (member.uid == USER or member.mode & 0o002)
    }
    assert {name.split("/")[0] for name in writable} <= {"tmp", "var", "home", "run", "dev"}
    assert {name for name in writable if name.startswith("var")} <= {"var/tmp", "var/lock"}


# ---- whether it works: on a read-only root, as the strictest pod security wants it


@pytest.fixture(scope="module")
def pod(image: str, module_namespace: str) -> str:
    """Its own command, in a pod that may write to three empty folders only."""
    places = {"tmp": "/tmp", "home": "/home/lab", "shm": "/dev/shm"}
    alive = ["wget", "--quiet", "--output-document=/dev/null", "http://127.0.0.1:8000/healthz"]
    ray = KubeRay(namespace=module_namespace)
    ray.create(
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "server"},
            "spec": {
                "automountServiceAccountToken": False,
                "enableServiceLinks": False,
                "securityContext": {
                    "runAsNonRoot": True, "fsGroup": USER, "seccompProfile": {"type": "RuntimeDefault"},
                },
                "containers": [
                    {
                        "name": "server",
                        "image": image,
                        "imagePullPolicy": "Never",
                        "env": [{"name": "OMP_NUM_THREADS", "value": "1"}],
                        "resources": {"requests": {"cpu": "100m", "memory": "1Gi"}},
                        "readinessProbe": {"exec": {"command": alive}, "periodSeconds": 1, "timeoutSeconds": 5},
                        "securityContext": {
                            "readOnlyRootFilesystem": True, "allowPrivilegeEscalation": False,
                            "capabilities": {"drop": ["ALL"]},
                        },
                        "volumeMounts": [{"name": n, "mountPath": path} for n, path in places.items()],
                    }
                ],
                "volumes": [
                    {"name": n, "emptyDir": {"medium": "Memory"} if n == "shm" else {}} for n in places
                ],
            },
        }
    )  # fmt: skip
    ray.wait("Pod", "server", until="Ready", timeout=240)
    return "server"


def inside(node: Node, namespace: str, pod: str, *command: str) -> str:
    return node.kubectl("exec", f"--namespace={namespace}", pod, "--", *command)


def test_it_answers_in_a_restricted_pod(node: Node, module_namespace: str, pod: str) -> None:
    request = json.dumps({"model": MODEL, "prompt": "The whale", "max_tokens": 4, "temperature": 0})
    ask = ["wget", "--quiet", "-O-", "--header=Content-Type: application/json", f"--post-data={request}"]
    began = time.monotonic()
    answer = json.loads(inside(node, module_namespace, pod, *ask, "http://127.0.0.1:8000/v1/completions"))
    print(f"an answer of four tokens in {time.monotonic() - began:.1f} s")
    assert answer["model"] == MODEL
    assert answer["usage"]["completion_tokens"] == 4 and answer["choices"][0]["text"].strip()


def test_it_runs_as_its_user_on_a_read_only_root(node: Node, module_namespace: str, pod: str) -> None:
    assert inside(node, module_namespace, pod, "id", "-u").strip() == str(USER)
    places = "/ /opt/lab /opt/cache /etc /home/lab /tmp /dev/shm"
    tries = f"for d in {places}; do touch $d/x 2>/dev/null && echo $d; done; true"
    written = inside(node, module_namespace, pod, "bash", "-c", tries).split()
    assert written == ["/home/lab", "/tmp", "/dev/shm"]


def test_its_packages_agree_and_the_doctor_finds_it_well(
    node: Node, module_namespace: str, pod: str
) -> None:
    check = "python3 -m venv /tmp/pip && /tmp/pip/bin/pip --python /opt/lab/bin/python check"
    assert "No broken requirements" in inside(
        node, module_namespace, pod, "bash", "-c", f"PATH=/usr/local/bin:/usr/bin:/bin; {check}"
    )
    found = json.loads(inside(node, module_namespace, pod, "labkit", "doctor", "--json"))
    assert found["ok"], found["checks"]


def test_its_modules_are_compiled(node: Node, module_namespace: str, pod: str) -> None:
    """On a read-only root they never would be: each process would compile all of torch and Ray for itself."""
    script = """if True:
        import os, sys, torch, ray, labkit.serving.app
        from importlib.util import cache_from_source
        files = [str(getattr(module, "__file__", "")) for module in list(sys.modules.values())]
        ours = [file for file in files if file.startswith("/opt/lab/") and file.endswith(".py")]
        print(len(ours) > 1000, [file for file in ours if not os.path.exists(cache_from_source(file))])
    """
    assert inside(node, module_namespace, pod, "python", "-c", script).splitlines()[-1] == "True []"


def test_the_health_check_of_plain_containers_is_the_pod_s_probe(
    node: Node, module_namespace: str, pod: str
) -> None:
    """Docker's format knows a health check and OCI's does not: it is read from the Containerfile."""
    text = (ROOT / "cluster" / "images" / "Containerfile").read_text()
    (command,) = re.findall(r"^HEALTHCHECK .*?CMD (\[.*?\])", text, re.MULTILINE | re.DOTALL)
    assert inside(node, module_namespace, pod, *json.loads(command)) == ""


def test_it_ends_when_it_is_asked_to(node: Node, module_namespace: str, pod: str) -> None:
    """A container that does not hear SIGTERM is killed 30 seconds later."""
    began = time.monotonic()
    node.kubectl("delete", "pod", pod, f"--namespace={module_namespace}", "--wait=true")
    assert time.monotonic() - began < 25
