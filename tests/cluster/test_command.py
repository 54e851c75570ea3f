"""`labkit cluster` as a person uses it, on the real node with the real image; and jobs, for which it needs the same."""

from __future__ import annotations

import json
import re
import secrets
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import httpx
import openai
import pytest
from node import Node

from labkit.cluster.context import current
from labkit.cluster.kuberay import KubeRay, KubeRayError
from labkit.cluster.render import rayjob

LABKIT = [str(Path(sys.executable).with_name("labkit")), "cluster"]
STAGES = ["context", "operator", "namespace", "checkpoint", "apply", "pods", "ray", "serve", "answer"]


def labkit(*args: str, code: int = 0) -> str:
    done = subprocess.run([*LABKIT, *args], capture_output=True, text=True, timeout=900)
    assert done.returncode == code, f"{args}\n{done.stdout}\n{done.stderr}"
    return done.stdout if code == 0 else done.stdout + done.stderr


@pytest.fixture(scope="module")
def space(node: Node, image: str) -> Iterator[str]:
    """A namespace that only the command makes and removes."""
    node.free_volumes()
    name = f"test-command-{secrets.token_hex(3)}"
    yield name
    labkit("down", "--all", "--yes", "-n", name)
    assert name not in node.kubectl("get", "namespaces", "-o", "name")


@pytest.fixture(scope="module")
def served(space: str) -> str:
    """The namespace in which the tiny model is served."""
    found = json.loads(labkit("up", "--checkpoint", "tiny", "-n", space, "--json"))
    assert [stage["name"] for stage in found["stages"]] == STAGES
    assert found["stages"][-1]["found"] == "lab is answered by lab@tiny"
    return space


@pytest.fixture
def forwarded(served: str) -> Iterator[str]:
    """The service's URL through `query --forward`, as another program would use it."""
    process = subprocess.Popen(
        [*LABKIT, "query", "--forward", "0", "-n", served],
        stdout=subprocess.PIPE,
        text=True,
        # A test run in the background hands down a Ctrl-C that is ignored.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        found = re.fullmatch(r"ready (http://127\.0\.0\.1:\d+/v1) \(lab@tiny\)\n", line)
        assert found, line
        yield found[1]
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0


def test_a_dry_run_makes_nothing(node: Node, image: str) -> None:
    name = f"test-dry-{secrets.token_hex(3)}"
    found = json.loads(labkit("up", "--dry-run", "-n", name, "--json"))
    said = [stage["found"] for stage in found["stages"]]
    assert f"Namespace {name}: the server takes it" in said
    assert any(text.startswith("RayService lab: valid") for text in said)
    assert name not in node.kubectl("get", "namespaces", "-o", "name")


def test_up_again_changes_nothing_and_is_quick(served: str) -> None:
    start = time.monotonic()
    lines = labkit("up", "--checkpoint", "tiny", "-n", served).splitlines()
    assert time.monotonic() - start < 30
    assert [line.split()[0] for line in lines[: len(STAGES)]] == STAGES
    assert "RayService lab unchanged" in lines[4]


def test_status_says_that_all_is_well(served: str) -> None:
    found = json.loads(labkit("status", "-n", served, "--json"))
    assert found["ready"], found
    assert any("serves lab@tiny from 1 pod" in line["found"] for line in found["lines"])


def test_an_answer_streams_to_the_openai_client(forwarded: str) -> None:
    with httpx.Client(trust_env=False) as direct:
        client = openai.OpenAI(base_url=forwarded, api_key="none", http_client=direct)
        stream = client.chat.completions.create(
            model="lab",
            messages=[{"role": "user", "content": "Call me"}],
            max_tokens=400,
            stream=True,
            temperature=0,
        )
        start, times, names = time.monotonic(), [], set()
        for chunk in stream:
            times.append(time.monotonic())
            names.add(chunk.model)
        whole = client.chat.completions.create(
            model="lab", messages=[{"role": "user", "content": "Call me"}], max_tokens=24, temperature=0
        )
    assert names == {"lab@tiny"}
    assert len(times) > 10
    assert times[0] - start < 0.8 * (times[-1] - start), "all pieces came at once"
    assert whole.model == "lab@tiny"


def test_query_prints_the_answer_and_who_gave_it(served: str) -> None:
    text = labkit("query", "Call me", "--max-tokens", "8", "-n", served)
    assert re.search(r"\n\nlab@tiny: first token after \d+\.\d\d s, \d+\.\d\d s in all\n$", text)
    found = json.loads(labkit("query", "Call me", "--max-tokens", "8", "-n", served, "--json"))
    assert found["model"] == "lab@tiny"
    assert found["usage"]["completion_tokens"] == 8
    assert found["text"].strip()


def test_query_for_a_model_that_is_not_served_gives_the_servers_words(served: str) -> None:
    said = labkit("query", "x", "--model", "gpt", "-n", served, code=1)
    assert "404" in said
    assert "gpt" in said


def test_the_replicas_logs_are_shown(served: str) -> None:
    text = labkit("logs", "lab", "-n", served)
    assert "model-lab" in text
    assert "Ingress" in text
    lines = [json.loads(line) for line in labkit("logs", "lab", "-n", served, "--json").splitlines()]
    assert [line["line"] for line in lines if line["line"].startswith("==")] and {
        (line["kind"], line["name"]) for line in lines
    } == {("RayService", "lab")}
    names = labkit("logs", "-n", served)
    pods = re.findall(r"^(\S+)\s+Pod$", names, re.MULTILINE)
    assert len(pods) == 2
    assert "nothing-of-this-name" in labkit("logs", "nothing-of-this-name", "-n", served, code=1)


def test_rendered_files_are_applied(served: str, tmp_path: Path) -> None:
    labkit("render", "--profile", "node", "--namespace", served, "--out", str(tmp_path))
    text = labkit("apply", str(tmp_path), "--dry-run")
    assert "RayService lab" in text
    (tmp_path / "rayservice.yaml").write_text(
        (tmp_path / "rayservice.yaml").read_text().replace("rayVersion", "rayVision")
    )
    assert "rayVision" in labkit("apply", str(tmp_path), code=1)


def test_a_checkpoint_of_this_machine_is_sent_and_served_without_a_failed_request(
    served: str, forwarded: str, tmp_path: Path
) -> None:
    from labkit import models

    models.save(
        models.quantize(models.load("tiny"), models.Recipe.load("w8a16-rtn-channel")), tmp_path / "mine"
    )
    before = set()
    with httpx.Client(trust_env=False, timeout=60) as client:
        process = subprocess.Popen(
            [*LABKIT, "up", "--checkpoint", str(tmp_path / "mine"), "-n", served, "--json"],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        while process.poll() is None:
            body = {"model": "lab", "prompt": "Call me", "max_tokens": 4}
            response = client.post(f"{forwarded}/completions", json=body)
            assert response.status_code == 200, response.text
            before.add(response.json()["model"])
        assert process.stdout is not None
        stages = json.loads(process.stdout.read())["stages"]
    assert process.returncode == 0
    assert " sent" in stages[3]["found"]
    assert stages[-1]["found"] == "lab is answered by lab@mine"
    assert before == {"lab@tiny", "lab@mine"}
    again = json.loads(labkit("up", "--checkpoint", str(tmp_path / "mine"), "-n", served, "--json"))
    assert "was there" in again["stages"][3]["found"]
    assert "unchanged" in again["stages"][4]["found"]


def test_a_checkpoint_that_the_cluster_lacks_is_said_and_not_waited_for(served: str) -> None:
    start, patience = time.monotonic(), 600
    said = labkit(
        "up", "--checkpoint", "/checkpoints/none", "--timeout", str(patience), "-n", served, code=1
    )
    assert "/checkpoints/none" in said
    assert "FileNotFoundError" in said
    assert time.monotonic() - start < patience
    # What served before serves on.
    assert "lab@" in labkit("query", "Call me", "--max-tokens", "2", "-n", served)


def test_down_keeps_the_checkpoints(served: str) -> None:
    text = labkit("down", "-n", served)
    assert "RayService lab" in text
    ray = KubeRay(current(), served)
    assert ray.list("RayCluster") == []
    deadline = time.monotonic() + 60
    while ray.list("Pod"):  # they may take their time to end
        assert time.monotonic() < deadline
        time.sleep(1)
    assert ray.get("PersistentVolumeClaim", "checkpoints")["status"]["phase"] == "Bound"
    assert "labkit cluster up" in labkit("status", "-n", served)
    labkit("down", "-n", served)


# Jobs

JOINS = """
import os, ray
from labkit.cluster.local import inside_ray, ray_session
with ray_session():
    import socket
    where = ray.remote(num_cpus=1)(lambda: socket.gethostname())
    print("inside", inside_ray(), "address", ray.get_runtime_context().gcs_address.split(":")[1])
    print("driver on", socket.gethostname(), "task on", ray.get(where.remote()))
    print("nodes", len(ray.nodes()))
print("still", ray.is_initialized())
"""


@pytest.fixture
def ray(space: str, image: str) -> KubeRay:
    from labkit.cluster.render import surroundings

    client = KubeRay(current(), space)
    client.ensure_namespace()
    for manifest in surroundings("node", namespace=space):
        client.apply(manifest)
    return client


def test_ray_session_in_a_job_joins_the_cluster_and_its_output_streams(ray: KubeRay) -> None:
    slow = JOINS + "import time\nfor i in range(6):\n    print('tick', i, flush=True); time.sleep(1)\n"
    job = rayjob(f"python -c {shlex.quote(slow)}", "node", name="joins", namespace=ray.namespace, workers=1)
    pieces = []
    for piece in ray.submit(job, timeout=300):
        pieces.append(piece)
        assert piece.endswith("\n")
    text = "".join(pieces)
    assert "inside True address 6379" in text
    places = re.search(r"driver on (\S+) task on (\S+)", text)
    assert places
    assert "-head-" in places[1]
    assert "-worker-" in places[2]
    assert "nodes 2" in text
    assert "still False" in text
    assert re.findall(r"tick (\d)", text) == list("012345"), "each line once"
    assert len(pieces) >= 3, "the output came in one piece"
    assert ray.job_status("joins")["jobStatus"] == "SUCCEEDED"
    ray.delete("RayJob", "joins")


@pytest.mark.parametrize("mode", ["HTTPMode", "K8sJobMode"])
def test_a_job_that_fails_shows_its_output_and_raises(ray: KubeRay, mode: str) -> None:
    job = rayjob(
        "bash -c 'echo before the end; exit 3'",  # K8sJobMode gives it to a shell of the submitter first
        "node", name="fails", namespace=ray.namespace, mode=mode, workers=0,
    )  # fmt: skip
    pieces: list[str] = []
    with pytest.raises(KubeRayError, match=r"RayJob fails .*exit code 3"):
        for piece in ray.submit(job, timeout=300):
            pieces.append(piece)
    assert "before the end" in "".join(pieces)
    assert "before the end" in "".join(ray.logs("fails", "RayJob"))
    said = labkit("status", "-n", ray.namespace, code=1)
    assert "exit code 3" in said
    ray.delete("RayJob", "fails")
