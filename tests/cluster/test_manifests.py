"""Does a real API server take the manifests, and do the overlays give what render gives?"""

from __future__ import annotations

import base64
import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest
import yaml
from node import Node

from labkit.cluster import annotate, render
from labkit.serving import Deployment
from labkit.settings import settings

CLUSTER = Path(__file__).parents[2] / "cluster"
FOLDERS = {
    "base": CLUSTER / "base",
    **{name: CLUSTER / "overlays" / name for name in ("node", "kind", "gpu")},
}
JOBS: dict[str, Literal["HTTPMode", "K8sJobMode"]] = {"by-operator": "HTTPMode", "by-pod": "K8sJobMode"}
PERSON = ["--as", "jo", "--as-group", "bits-to-pods-operators"]
TINY = Deployment(checkpoint="tiny", name="lab@fp32", threads=1)


def kubectl(*words: str | Path, given: str | None = None) -> str:
    done = _kubectl(*words, given=given)
    assert done.returncode == 0, done.stderr
    return done.stdout


def kubectl_fails(*words: str | Path, given: str | None = None) -> subprocess.CompletedProcess[str]:
    done = _kubectl(*words, given=given)
    assert done.returncode != 0, done.stdout
    return done


def _kubectl(*words: str | Path, given: str | None) -> subprocess.CompletedProcess[str]:
    node = settings().node
    command = [node / "bin" / "kubectl", "--kubeconfig", node / "kubeconfig", *words]
    return subprocess.run(command, input=given, capture_output=True, text=True, timeout=400)


def kustomized(folder: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(kubectl("kustomize", folder)))


def by_name(documents: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(document["kind"], document["metadata"]["name"]): document for document in documents}


def moved(documents: list[dict[str, Any]], namespace: str) -> str:
    """The same for another namespace, without the namespace itself."""
    kept = [document for document in documents if document["kind"] != "Namespace"]
    for document in kept:
        document["metadata"]["namespace"] = namespace
    return yaml.safe_dump_all(kept)


def dry_run(text: str) -> str:
    strict = ["--server-side", "--dry-run=server", "--validate=strict", "--warnings-as-errors"]
    return kubectl("apply", *strict, "-f", "-", given=text)


@pytest.mark.parametrize("profile", FOLDERS)
def test_an_overlay_is_what_render_gives(node: Node, profile: str) -> None:
    expected = by_name(render.manifests(profile=profile))
    assert len(expected) == 6
    assert by_name(kustomized(FOLDERS[profile])) == expected


def test_another_image_is_one_line_in_an_overlay(node: Node, tmp_path: Path) -> None:
    annotate.write(tmp_path / "base", render.manifests())
    overlay = {
        "resources": ["../base"],
        "images": [{"name": "bits-to-pods/server", "newName": "example.org/me/server", "newTag": "1"}],
    }
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "kustomization.yaml").write_text(yaml.safe_dump(overlay))
    text = kubectl("kustomize", tmp_path / "mine")
    assert text.count("image: example.org/me/server:1") == 2 and "bits-to-pods/server" not in text


@pytest.mark.parametrize("profile", FOLDERS)
def test_the_server_takes_the_overlay_strictly(node: Node, namespace: str, profile: str) -> None:
    said = dry_run(moved(kustomized(FOLDERS[profile]), namespace))
    assert said.count("serverside-applied (server dry run)") == 5


@pytest.mark.parametrize("profile", FOLDERS)
def test_the_server_takes_every_option_strictly(node: Node, namespace: str, profile: str) -> None:
    documents = [
        *render.manifests([TINY], profile, namespace=namespace, redis=True),
        render.redis_secret(namespace=namespace),
        render.rayservice([TINY], profile, name="scaled", namespace=namespace, most_workers=3),
        render.raycluster(profile, namespace=namespace, most_workers=3),
        render.rayjob("true", profile, namespace=namespace),
        render.rayjob(
            "true", profile, name="by-pod", namespace=namespace, mode="K8sJobMode", cluster="lab"
        ),
    ]
    said = dry_run(moved(documents, namespace))
    assert said.count("serverside-applied (server dry run)") == 12


def test_a_misspelt_field_would_have_been_refused(node: Node, namespace: str) -> None:
    cluster = render.raycluster("node", namespace=namespace)
    cluster["spec"]["authOption"] = cluster["spec"].pop("authOptions")
    strict = ["--server-side", "--dry-run=server", "--validate=strict"]
    said = kubectl_fails("apply", *strict, "-f", "-", given=yaml.safe_dump(cluster)).stderr
    assert "authOption" in said


def test_the_operator_may_what_the_role_says_and_the_pods_may_nothing(node: Node, namespace: str) -> None:
    documents = render.surroundings("node", namespace=namespace)
    kubectl("apply", "--server-side", "-f", "-", given=moved(documents, namespace))
    person = [*PERSON, "-n", namespace]
    pods = ["--as", f"system:serviceaccount:{namespace}:ray", "-n", namespace]
    for verb, what in [
        ("create", "rayjobs.ray.io"),
        ("patch", "rayservices.ray.io"),
        ("delete", "rayclusters.ray.io"),
        ("get", "pods --subresource=log"),
        ("create", "pods --subresource=portforward"),
        ("delete", "pods"),
        ("list", "events"),
    ]:
        assert kubectl("auth", "can-i", verb, *what.split(), *person) == "yes\n", (verb, what)
        assert "no" in refused(verb, *what.split(), *pods)
    for verb, what in [
        ("get", "secrets"),
        ("create", "pods"),
        ("create", "pods --subresource=exec"),
        ("patch", "roles.rbac.authorization.k8s.io"),
        ("delete", "namespaces"),
        ("patch", "serviceaccounts"),
    ]:
        assert "no" in refused(verb, *what.split(), *person), (verb, what)
    assert "no" in refused("list", "pods", *PERSON, "-n", "default")


def refused(*words: str) -> str:
    """``can-i`` ends with 1 where the answer is no."""
    return kubectl_fails("auth", "can-i", *words).stdout


# For real


def test_the_overlay_serves(node: Node, namespace: str, image: str) -> None:
    """What `kubectl apply -k` makes of it answers, from pods that reserve what the unit test adds up."""
    documents = kustomized(FOLDERS["node"])
    kubectl("apply", "--server-side", "-f", "-", given=moved(documents, namespace))
    wait = ["--for=condition=Ready", "--timeout=300s", "-n", namespace]
    kubectl("wait", "rayservice/lab", *wait)
    ask = {"model": "lab", "prompt": "Call me", "max_tokens": 4}
    with forwarded(namespace, "service/lab-serve-svc", 8000, *PERSON) as url:
        answer = httpx.post(f"{url}/v1/completions", json=ask, timeout=60).raise_for_status().json()
    assert answer["model"] == "lab@fp32" and answer["usage"]["completion_tokens"] == 4

    pods = json.loads(kubectl("get", "pods", "-n", namespace, "-o", "json"))["items"]
    assert sorted(pod["metadata"]["labels"]["ray.io/node-type"] for pod in pods) == ["head", "worker"]
    # What the scheduler counts, by its own account of the node's pods: 200m for the head, 300m for the worker.
    described = kubectl("describe", "node")
    for pod in pods:
        [line] = [line for line in described.splitlines() if pod["metadata"]["name"] in line]
        kind = pod["metadata"]["labels"]["ray.io/node-type"]
        assert line.split()[2] == {"head": "200m", "worker": "300m"}[kind], line
        assert not any("serviceAccountToken" in str(volume) for volume in pod["spec"]["volumes"])


def test_jobs_by_both_roads_on_a_cluster_that_grows_for_them(
    node: Node, namespace: str, image: str
) -> None:
    """Under `restricted`, with Ray's token: the autoscaler makes the only worker when the first job wants one."""
    script = "import ray; ray.init(); print(ray.get(ray.remote(num_cpus=1)(lambda: 6 * 7).remote()))"
    documents = [
        *render.surroundings("node", namespace=namespace),
        render.raycluster("node", namespace=namespace, workers=0, most_workers=1),
        *(
            render.rayjob(
                f'python -c "{script}"', "node", name=name, namespace=namespace, mode=mode, cluster="lab"
            )
            for name, mode in JOBS.items()
        ),
    ]
    kubectl("apply", "--server-side", "-f", "-", given=moved(documents, namespace))
    for name in JOBS:
        # Not jobStatus: Ray says SUCCEEDED a moment before the pod that waits for it has printed the end.
        done = ["--for=jsonpath={.status.jobDeploymentStatus}=Complete", "--timeout=300s", "-n", namespace]
        kubectl("wait", f"rayjob/{name}", *done)
    assert "42" in kubectl("logs", "-n", namespace, "-l", "job-name=by-pod", "--tail=-1").split()
    workers = kubectl("get", "pods", "-n", namespace, "-l", "ray.io/node-type=worker", "-o", "name")
    assert len(workers.splitlines()) == 1
    # The dashboard runs code for whoever may talk to it.
    secret = kubectl("get", "secret", "lab", "-n", namespace, "-o", "jsonpath={.data.auth_token}")
    token = base64.b64decode(secret).decode()
    assert len(token) >= 32
    with forwarded(namespace, "service/lab-head-svc", 8265) as url:
        for given, status in [({}, 401), ({"Authorization": "Bearer wrong"}, 403)]:
            assert httpx.get(f"{url}/api/jobs/", headers=given).status_code == status
        jobs = httpx.get(f"{url}/api/jobs/", headers={"Authorization": f"Bearer {token}"}).json()
    assert [job["status"] for job in jobs] == ["SUCCEEDED"] * 2


@contextmanager
def forwarded(namespace: str, target: str, port: int, *options: str) -> Iterator[str]:
    node = settings().node
    command = [node / "bin" / "kubectl", "--kubeconfig", node / "kubeconfig", "port-forward"]
    words = ["-n", namespace, target, f":{port}", *options]
    with subprocess.Popen([*command, *words], stdout=subprocess.PIPE, text=True) as forwarding:
        try:
            assert forwarding.stdout is not None
            # Forwarding from 127.0.0.1:40000 -> 8000
            yield "http://" + forwarding.stdout.readline().split()[2]
        finally:
            forwarding.terminate()
