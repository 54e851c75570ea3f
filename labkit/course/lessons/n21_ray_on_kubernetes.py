"""Notebook 21: the model as a RayService on Kubernetes. What it asks, checks and draws."""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any

import plotly.graph_objects as go
import yaml

from labkit.cluster import status
from labkit.cluster.check import check_text
from labkit.cluster.conditions import holds
from labkit.cluster.context import confirm, current, reachable
from labkit.cluster.diagnose import NO_IMAGE
from labkit.cluster.kuberay import KubeRay
from labkit.cluster.pods import CONTAINER_SECURITY, HOME_FOLDER, PART_OF, pod
from labkit.cluster.profiles import PROFILES, Profile, Size
from labkit.course import Exercise, Question, plot
from labkit.course.check import Wrong, equal, number, require
from labkit.course.recorded import Steps
from labkit.course.workspace import notebooks

Manifest = dict[str, Any]
Requests = Mapping[str, str]

NAMESPACE = "notebook-21"
PROFILE = PROFILES["node"]

# What the job of this notebook runs: six roundings, as tasks on the cluster that serves.
JOB = """
import httpx, ray
from labkit.cluster.local import ray_session
from labkit.models import load
from labkit.quant import QuantSpec, rtn

@ray.remote(num_cpus=0.5)
def bits(spec):
    weight = next(iter(load("tiny").linears().values())).weight.detach()
    return rtn(weight, QuantSpec.parse(spec)).bits_per_weight, ray.get_runtime_context().get_node_id()

with ray_session():
    specs = ["int2 g32", "int3 g32", "int4 g32", "int4 g64", "int8 g64", "int8 channel"]
    found = ray.get([bits.remote(spec) for spec in specs])
    for spec, (size, _) in zip(specs, found):
        print(f"{spec:12} {size:.4g} bits per weight")
    print("nodes:", len({node for _, node in found}), "of", len(ray.nodes()))
answer = httpx.get("http://lab-serve-svc:8000/v1/models")
print("models:", [model["id"] for model in answer.json()["data"]])
"""
JOB_SAYS = ("int", "nodes:", "models:")


# --- the cluster ---


def start() -> Steps[KubeRay]:
    """The notebook's live steps, in a namespace of their own that is empty when they begin."""
    return Steps("21", _connect, _versions)


def _connect() -> KubeRay:
    context = current()
    if why := reachable(context):
        raise RuntimeError(why)
    ray = KubeRay(context, NAMESPACE)
    if not ray.knows("RayService"):
        raise RuntimeError(f"{context.name} has no KubeRay operator")
    there = {
        name
        for node in ray.list("Node")
        for image in node["status"].get("images") or []
        for name in image.get("names") or []
    }
    if not any(name.endswith(PROFILE.image) for name in there):
        raise RuntimeError(f"{context.name} has no image {PROFILE.image} (`make image`)")
    confirm(context, NAMESPACE, ask=input)
    if ray.exists("Namespace", NAMESPACE):
        ray.delete_namespace()
    return ray


def _versions(ray: KubeRay) -> dict[str, str]:
    node = ray.list("Node")[0]["status"]["nodeInfo"]
    if ray.context.is_node:  # whose images have no versions
        source = (notebooks().parent / "cluster/node/programs/kuberay-operator/go.mod").read_text()
    else:
        operators = ray.list("Pod", status.OPERATOR, everywhere=True)
        source = " ".join(each["spec"]["containers"][0]["image"] for each in operators)
    operator = re.search(r"operator[: ]v(\d[\w.]+)", source)
    return {
        "Kubernetes": node["kubeletVersion"].removeprefix("v"),
        "KubeRay": operator[1] if operator else "of an unknown version",
        "Ray": metadata.version("ray"),
    }


def idle(
    name: str, *, replicas: int = 1, cpu: str = "10m", image: str = "", profile: Profile = PROFILE
) -> Manifest:
    """A Kubernetes Deployment of pods that do nothing: for looking at pods without a model in them."""
    container = {
        "name": "idle",
        "image": image or profile.image,
        "imagePullPolicy": profile.pull,
        "command": ["sleep", "infinity"],
        "resources": Size(cpu, "32Mi", cpu if cpu == "1000" else "1", "64Mi").resources(),
        "securityContext": CONTAINER_SECURITY,
    }
    spec = pod(container, HOME_FOLDER)
    del spec["serviceAccountName"]
    spec["terminationGracePeriodSeconds"] = 0
    labels = {"app": name}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "namespace": NAMESPACE, "labels": dict(PART_OF)},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": {**labels, **PART_OF}}, "spec": spec},
        },
    }


def ready_pods(ray: KubeRay, app: str, count: int, timeout: float = 60) -> set[str]:
    """Wait until so many pods of an app are ready and no others are left; their names."""
    deadline = time.monotonic() + timeout
    while True:
        pods = ray.list("Pod", f"app={app}")
        if len(pods) == count and all(holds(each, "Ready") for each in pods):
            return {each["metadata"]["name"] for each in pods}
        if time.monotonic() > deadline:
            raise TimeoutError(f"expected {count} ready pods of {app}, found {len(pods)} pods")
        time.sleep(0.3)


def until_gone(ray: KubeRay, selector: str, timeout: float = 90) -> int:
    """Wait until no pod has these labels; how many are left."""
    deadline = time.monotonic() + timeout
    while left := ray.list("Pod", selector):
        if time.monotonic() > deadline:
            break
        time.sleep(1)
    return len(left)


def troubled(ray: KubeRay, apps: Sequence[str], timeout: float = 40) -> dict[str, Manifest]:
    """Wait until the status screen has a problem with each app's pod: the pod, its events, and what it says."""
    deadline = time.monotonic() + timeout
    while True:
        found = dict(_troubled(ray, apps))
        if len(found) == len(apps):
            return found
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"expected problems with {', '.join(apps)}; found {', '.join(found) or 'none'}"
            )
        time.sleep(1)


def _troubled(ray: KubeRay, apps: Sequence[str]) -> Iterator[tuple[str, Manifest]]:
    picture = status.gather(ray)
    problems = [line for line in status.judge(picture) if line.state == "problem"]
    for each in picture["objects"]["Pod"]:
        app, name = each["metadata"]["labels"].get("app"), each["metadata"]["name"]
        said = [line for line in problems if line.what == f"Pod {name}"]
        if app in apps and said:
            yield app, {"pod": _short(each), "events": _events(picture, each), "says": said[0].found}


def pod_and_events(ray: KubeRay, app: str) -> Manifest:
    """A pod of an app, and its events."""
    picture = status.gather(ray)
    [each, *_] = [p for p in picture["objects"]["Pod"] if p["metadata"]["labels"].get("app") == app]
    return {"pod": _short(each), "events": _events(picture, each)}


def _short(each: Manifest) -> Manifest:
    """A pod without what nobody reads."""
    return {
        "metadata": {"name": each["metadata"]["name"]},
        "status": {key: value for key, value in each["status"].items() if key not in ("podIPs", "hostIPs")},
    }


def _events(picture: Manifest, each: Manifest) -> list[Manifest]:
    uid = each["metadata"]["uid"]
    return [
        {key: event.get(key) for key in ("type", "reason", "message")}
        for event in picture["objects"]["Event"]
        if event["involvedObject"].get("uid") == uid
    ]


def job_command() -> str:
    """The command line of the notebook's job."""
    return f"python -c {shlex.quote(JOB)}"


def parsed(text: str) -> Manifest:
    """A manifest's text as data, for the notebook's namespace."""
    manifest: Manifest = yaml.safe_load(text)
    manifest["metadata"]["namespace"] = NAMESPACE
    return manifest


# --- exercises ---

BROKEN = """\
apiVersion: ray.io/v1
kind: RayCluster
metadata:
  name: Lab_1
spec:
  headGroupSpec:
    rayStartParams: {}
    template:
      spec:
        containers:
          - name: ray-head
            image: bits-to-pods/server:dev
  workerGroupSpecs:
    - groupName: workers
      replica: 2
      rayStartParams:
        num-cpus: 4
      template:
        spec:
          containers:
            - name: ray-worker
              image: bits-to-pods/server:dev
              resources:
                limits: {cpu: "2", memory: 2GB}
"""


def repaired(text: str) -> str:
    """The manifest as it was meant."""
    for wrong, right in {
        "Lab_1": "lab-1",
        "replica: 2": "replicas: 2",
        "num-cpus: 4": 'num-cpus: "4"',
        "2GB": "2Gi",
    }.items():
        text = text.replace(wrong, right)
    return text


def _check_repaired(fn):  # type: ignore[no-untyped-def]
    text = fn(BROKEN)
    require(isinstance(text, str), f"return the text of the manifest; this is a {type(text).__name__}")
    verdicts = check_text(text)
    require(len(verdicts) == 1, f"return one manifest; your text holds {len(verdicts)}")
    if errors := verdicts[0].errors:
        first = errors[0]
        left = f"{len(errors)} error{'s' * (len(errors) > 1)} left"
        raise Wrong(f"check refuses it, {left}: line {first.line}: {first.path}: {first.message}")
    require(verdicts[0].state == "valid" and verdicts[0].kind == "RayCluster", "a RayCluster is expected")
    spec = yaml.safe_load(text)["spec"]
    groups = spec.get("workerGroupSpecs") or []
    require(
        len(groups) == 1,
        "check accepts it, but the worker group is gone: correct what is wrong, do not remove it",
    )
    require(
        groups[0].get("replicas") == 2,
        f"check accepts it, but it asks for {groups[0].get('replicas', 'no number of')} workers; expected 2",
    )
    require(
        str((groups[0].get("rayStartParams") or {}).get("num-cpus")) == "4",
        "check accepts it, but Ray is no longer told of 4 cores (num-cpus)",
    )
    container = groups[0]["template"]["spec"]["containers"][0]
    memory = container.get("resources", {}).get("limits", {}).get("memory")
    require(memory is not None, "check accepts it, but the memory limit is gone")
    require(
        1.9e9 <= bytes_of(str(memory)) <= 2.2e9,
        f"check accepts it, but a memory limit of {memory} is not 2 gigabytes",
    )
    images = [container["image"], spec["headGroupSpec"]["template"]["spec"]["containers"][0]["image"]]
    equal(images, ["bits-to-pods/server:dev"] * 2, "the images of worker and head")


def bytes_of(quantity: str) -> float:
    """A quantity as Kubernetes writes it ("200m", "768Mi"), as a number."""
    from kubernetes.utils.quantity import parse_quantity

    return float(parse_quantity(quantity))


def why(pod: dict[str, Any], events: list[dict[str, Any]]) -> str:
    """Why a pod is not ready, in one or two words."""
    status = pod.get("status", {})
    conditions = {each["type"]: each["status"] for each in status.get("conditions", [])}
    if conditions.get("Ready") == "True":
        return "ready"
    if conditions.get("PodScheduled") == "False":
        return "no room"
    containers = [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]
    reasons = [(each["state"].get("waiting") or {}).get("reason", "") for each in containers]
    if any("Image" in reason for reason in reasons):
        return "no image"
    if "CrashLoopBackOff" in reasons:
        return "crashes"
    if any(event["reason"] == "Unhealthy" for event in events):
        return "probe"
    return "starting"


def _pod(scheduled: bool | None = True, ready: bool = False, **statuses: Any) -> Manifest:
    conditions = [] if scheduled is None else [{"type": "PodScheduled", "status": str(scheduled)}]
    if scheduled:
        conditions.append({"type": "Ready", "status": str(ready)})
    return {"metadata": {"name": "p"}, "status": {"phase": "Pending", "conditions": conditions, **statuses}}


def _container(reason: str = "") -> Manifest:
    return {"name": "c", "state": {"waiting": {"reason": reason}} if reason else {"running": {}}}


_UNHEALTHY = {"type": "Warning", "reason": "Unhealthy", "message": "Readiness probe failed: ..."}
_PULLED = {"type": "Normal", "reason": "Pulled", "message": "Container image already present"}
_PODS: list[tuple[str, str, Manifest, list[Manifest]]] = [
    ("ready", "a pod whose condition Ready is True", _pod(ready=True, containerStatuses=[_container()]), []),
    (
        "ready",
        "a pod that is ready now, whose probe failed while it started",
        _pod(ready=True, containerStatuses=[_container()]),
        [_UNHEALTHY],
    ),
    ("no room", "a pod that no node could take: PodScheduled is False", _pod(scheduled=False), []),
    *(
        (
            "no image",
            f"a container that waits with {reason}",
            _pod(containerStatuses=[_container(reason)]),
            [],
        )
        for reason in NO_IMAGE
    ),
    (
        "no image",
        "a pod whose second container has no image",
        _pod(containerStatuses=[_container(), _container("ImagePullBackOff")]),
        [_PULLED],
    ),
    (
        "no image",
        "a pod whose init container has no image (initContainerStatuses)",
        _pod(
            initContainerStatuses=[_container("ErrImagePull")],
            containerStatuses=[_container("PodInitializing")],
        ),
        [],
    ),
    (
        "crashes",
        "a container that waits with CrashLoopBackOff",
        _pod(containerStatuses=[_container("CrashLoopBackOff")]),
        [],
    ),
    (
        "crashes",
        "a container that crashes, and whose probe failed before that",
        _pod(containerStatuses=[_container("CrashLoopBackOff")]),
        [_PULLED, _UNHEALTHY],
    ),
    (
        "probe",
        "a container that runs while its probe fails (an event with the reason Unhealthy)",
        _pod(containerStatuses=[_container()]),
        [_PULLED, _UNHEALTHY],
    ),
    (
        "starting",
        "a container that is being made",
        _pod(containerStatuses=[_container("ContainerCreating")]),
        [],
    ),
    ("starting", "a container that runs, with nothing amiss yet", _pod(containerStatuses=[_container()]), [_PULLED]),
    ("starting", "a pod that was made this moment and has no conditions", _pod(scheduled=None), []),
    ("starting", "a pod without any status", {"metadata": {"name": "p"}}, []),
]  # fmt: skip
WORDS = ("ready", "no room", "no image", "crashes", "probe", "starting")


def _check_why(fn):  # type: ignore[no-untyped-def]
    for right, about, each, events in _PODS:
        try:
            found = fn(each, events)
        except Wrong as wrong:
            raise Wrong(f"{about}: {wrong}") from wrong
        require(
            found in WORDS, f"{about}: you return {found!r}; expected one of {', '.join(map(repr, WORDS))}"
        )
        require(found == right, f"{about}: you say {found!r}; expected {right!r}")


def clusters_that_fit(free: Requests, pods: list[Requests]) -> int:
    """How many copies of a Ray cluster with these pods fit into what is free on a node."""
    from kubernetes.utils.quantity import parse_quantity

    fits = []
    for resource in ("cpu", "memory"):
        one = sum(parse_quantity(requests[resource]) for requests in pods)
        fits.append(parse_quantity(free[resource]) // one)
    return int(min(fits))


def _check_fit(fn):  # type: ignore[no-untyped-def]
    head, worker = {"cpu": "200m", "memory": "768Mi"}, {"cpu": "300m", "memory": "768Mi"}
    cases: list[tuple[Requests, list[Requests]]] = [
        ({"cpu": "1200m", "memory": "20Gi"}, [head, worker]),  # cores decide
        ({"cpu": "16", "memory": "7Gi"}, [head, worker, worker]),  # memory decides
        ({"cpu": "1", "memory": "3Gi"}, [head, worker]),  # exactly two
        ({"cpu": "400m", "memory": "64Gi"}, [head, worker]),  # not one
        ({"cpu": "3", "memory": "5G"}, [{"cpu": "0.5", "memory": "1Gi"}]),  # 5 G are less than 5 Gi
    ]
    for free, pods in cases:
        cpu = [bytes_of(free["cpu"]), *(bytes_of(each["cpu"]) for each in pods)]
        memory = [bytes_of(free["memory"]), *(bytes_of(each["memory"]) for each in pods)]
        by_cpu, by_memory = (round(each[0] * 1000) // round(sum(each[1:]) * 1000) for each in (cpu, memory))
        right = min(by_cpu, by_memory)
        exact = min(cpu[0] / sum(cpu[1:]), memory[0] / sum(memory[1:]))
        in_gi = bytes_of(f"{free['memory'].removesuffix('i')}i")
        found = number(fn(free, pods), "your number of clusters")
        equal(
            found,
            right,
            "your number of clusters",
            mistakes={
                "5G are 5,000,000,000 bytes and 5Gi are more: G and Gi are different units": min(
                    by_cpu, in_gi // sum(memory[1:])
                ),
                "whole clusters only: part of one serves nobody": exact,
                "round down: a cluster that fits in part does not run": -int(-exact // 1),
                "the scarcer of cpu and memory decides; your number is what the other one allows": max(
                    by_cpu, by_memory
                ),
                "a cluster is all its pods together; you count pods, or the largest one": min(
                    cpu[0] // max(cpu[1:]), memory[0] // max(memory[1:])
                ),
                "this is one cluster less than fits": right - 1,
            },
        )


EXERCISES = [
    Exercise(
        "21.1",
        "Repair a manifest",
        difficulty=1,
        minutes=10,
        statement="""
            Somebody wants a Ray cluster named `lab-1` with two workers of 2 GiB, and tells Ray that each has 4 cores.
            The manifest has four mistakes. `check_text` has just named three; the fourth is a matter of the operator's
            own rules, which are asked once all keys and types are right. `text` is the manifest: return it repaired.
            Removing what is wrong is no repair.
        """,
        starter='''
            def my_repaired(text: str) -> str:
                """The manifest as it was meant."""
                raise NotImplementedError
        ''',
        solution=repaired,
        check=_check_repaired,
        hints=[
            "`text.replace('replica: 2', 'replicas: 2')` is one of the four.",
            'A name has small letters, digits and `-`. Ray\'s start parameters are texts: `"4"`, with quotes.',
            "`2GB` is no quantity of Kubernetes. `2Gi` is: 2 times 1024 times 1024 times 1024 bytes.",
        ],
    ),
    Exercise(
        "21.2",
        "Why is it not ready?",
        difficulty=2,
        minutes=15,
        statement="""
            `pod` is a pod as the API server gives it, `events` are its events. Say in one of six words how it is. The
            first that fits counts:

            - `"ready"`: the condition `Ready` is `"True"`
            - `"no room"`: the condition `PodScheduled` is `"False"`
            - `"no image"`: a container, or an init container, waits with a reason that has `Image` in it
            - `"crashes"`: one waits with the reason `CrashLoopBackOff`
            - `"probe"`: an event has the reason `Unhealthy`
            - `"starting"`: all else; a new pod may have no status at all

            Conditions stand in `pod["status"]["conditions"]`, containers in `containerStatuses` and
            `initContainerStatuses`; one that waits has `each["state"]["waiting"]["reason"]`.
        """,
        starter='''
            def my_why(pod: dict, events: list[dict]) -> str:
                """One of: ready, no room, no image, crashes, probe, starting."""
                raise NotImplementedError
        ''',
        solution=why,
        check=_check_why,
        hints=[
            "`conditions = {each['type']: each['status'] for each in ...}` makes them easy to ask.",
            "Use `.get(..., [])` and `.get(..., {})` everywhere: each part of the status may be missing.",
            "Collect the reasons of all containers in one list first; then ask the list, in the order above.",
        ],
    ),
    Exercise(
        "21.3",
        "Do two clusters fit?",
        difficulty=1,
        minutes=8,
        statement="""
            `free` is what a node has left, `pods` what each pod of one Ray cluster requests, both as Kubernetes writes
            it: `{"cpu": "300m", "memory": "768Mi"}`. Return how many such clusters fit on the node at once.
            `parse_quantity` makes numbers of the texts.
        """,
        starter='''
            def my_clusters_that_fit(free: dict[str, str], pods: list[dict[str, str]]) -> int:
                """Whole Ray clusters with these pods that fit into what is free."""
                raise NotImplementedError
        ''',
        solution=clusters_that_fit,
        check=_check_fit,
        hints=[
            "What does one cluster take? Add up its pods, for cpu and for memory.",
            "`parse_quantity('300m')` is 0.300, exactly. `//` divides and rounds down.",
            "The scarcer of the two decides: `min`.",
        ],
    ),
]

QUIZ = [
    Question(
        "You delete a pod that a Kubernetes Deployment made. What happens?",
        {
            "It is gone until you apply the manifest again": "The wish did not change: two pods. Only the world did.",
            "The API server refuses": "It lets you. Nobody promised that this pod lives.",
            "A new one is made": "A controller compares wish and world, again and again, and makes what is missing.",
        },
        answer="c",
    ),
    Question(
        "`check` finds a misspelt key in serveConfigV2. The API server takes the manifest. Who is right?",
        {
            "Check": "To the API server that field is a text. What is in it, Ray reads later, and passes over the key.",
            "The API server, since it is the real one": "It cannot look into the text.",
            "Both: the key has no effect": "The setting that was meant has none, and nobody says so.",
        },
        answer="a",
    ),
    Question(
        "An upgrade to a new Ray cluster hangs: its head pod is Pending, the old cluster serves. Why?",
        {
            "The new cluster waits for the old one to end": "The old one waits: it ends when the new one serves.",
            "The node has no room for both": "During such an upgrade all requests are there twice.",
            "The image is being pulled": "Then the pod is scheduled, and its container waits.",
        },
        answer="b",
    ),
]


# --- pictures ---


def stages_figure(stages: Sequence[Mapping[str, Any]], note: str = "") -> go.Figure:
    """Seconds of each stage of ``up``, one after another."""
    total = sum(stage["seconds"] for stage in stages)
    figure = plot.figure(
        f"{total:.0f} s from nothing to an answer{note}",
        "time since the start (s)",
        "",
        height=130 + 30 * len(stages),
    )
    began = 0.0
    for stage in stages:
        figure.add_bar(
            x=[stage["seconds"]],
            y=[stage["name"]],
            base=[began],
            orientation="h",
            text=[f"{stage['seconds']:.1f}"],
            textposition="outside",
            marker_color=plot.BLUE,
            showlegend=False,
        )
        began += stage["seconds"]
    return figure.update_yaxes(autorange="reversed").update_xaxes(range=[0, 1.08 * max(total, 1)])


class Fit:
    """The widget's function: how many pods with a request fit into what a node has left."""

    def __init__(self, cores: float, gigabytes: float) -> None:
        self.cores, self.gigabytes = cores, gigabytes
        self.__name__ = "pods_that_fit"

    def __call__(self, millicores: int = 300, megabytes: int = 768) -> go.Figure:
        by_cpu = int(self.cores * 1000 // millicores)
        by_memory = int(self.gigabytes * 1000 // megabytes)
        pods = min(by_cpu, by_memory)
        scarcer = "cores" if by_cpu <= by_memory else "memory"
        figure = plot.figure(
            f"{pods} pods fit; the {scarcer} decide{'s' * (scarcer == 'memory')}",
            "share of what is free (%)",
            "",
            height=260,
        )
        shares = [100 * millicores / 1000 / self.cores, 100 * megabytes / 1000 / self.gigabytes]
        used = [pods * share for share in shares]
        for name, values, color in (
            ("requested", used, plot.BLUE),
            ("left over", [100 - each for each in used], plot.SKY),
        ):
            figure.add_bar(
                x=values, y=["cores", "memory"], orientation="h", name=name, marker_color=color,
                text=[f"{name} {each:.0f} %" for each in values], textposition="inside",
            )  # fmt: skip
        return figure.update_layout(barmode="stack", showlegend=False)
