"""From nothing to an answer, stage by stage, and back. Each stage can be repeated: what is there already stays."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from labkit.cluster import client, diagnose, render, status, upload
from labkit.cluster.conditions import condition, describe, holds
from labkit.cluster.context import Context, Unreachable, reachable
from labkit.cluster.kuberay import KubeRay, KubeRayError
from labkit.cluster.pods import CHECKPOINTS, NAME, PORT, Manifest
from labkit.cluster.profiles import PROFILES, Profile
from labkit.serving.deployment import Deployment, alias

Say = Callable[[str], None]
POLL_S = 1.0
LOOK_S = 5.0  # between two looks at what stands in the way
HOPELESS_S = 45.0  # a problem that stands for so long will not go by itself
OPERATOR_S = 60.0


@dataclass(frozen=True)
class Stage:
    """What was done in one stage, and how many seconds it took."""

    name: str
    seconds: float
    found: str


@dataclass(frozen=True)
class Plan:
    """What is to be served, and how.

    deployments  a checkpoint that is a folder of this machine is sent to the cluster
    profile      see ``labkit.cluster.profiles``
    name         of the RayService
    redis        keep Ray's state in a Redis, so that the head may die
    force        take over fields that somebody else set
    timeout      for each stage, in seconds
    """

    deployments: Sequence[Deployment] = (render.DEFAULT,)
    profile: Profile = field(default_factory=lambda: PROFILES["base"])
    name: str = NAME
    redis: bool = False
    force: bool = False
    timeout: float = 600


def profile_for(context: Context) -> Profile:
    """The profile that suits a cluster, by the context's name."""
    if context.is_node:
        return PROFILES["node"]
    return PROFILES["kind" if context.name.startswith("kind-") else "base"]


def up(ray: KubeRay, plan: Plan, say: Say = lambda text: None) -> Iterator[Stage]:
    """Serve the deployments and see that they answer; yields each stage when it is done.

    say  called with what is happening meanwhile

    Raises Unreachable, KubeRayError, TimeoutError, or RuntimeError that says what stands in the way.
    """
    clock = _Clock()
    for deployment in plan.deployments:
        _check(deployment)
    yield clock.stage("context", _reached(ray.context))
    yield clock.stage("operator", _operator(ray, say))
    ray.ensure_namespace()
    for manifest in render.surroundings(plan.profile, namespace=ray.namespace):
        ray.apply(manifest, force=plan.force)
    yield clock.stage("namespace", ray.namespace)
    deployments, found = _checkpoints(ray, plan, say)
    yield clock.stage("checkpoint", found)
    plan = dataclasses.replace(plan, deployments=deployments)
    yield clock.stage("apply", _apply(ray, plan))
    yield clock.stage("pods", _until(ray, plan, "pods that run", _pods, say))
    yield clock.stage("ray", _until(ray, plan, "Ray", _ray, say))
    yield clock.stage("serve", _until(ray, plan, "the models", _serve, say))
    yield clock.stage("answer", _answer(ray, plan, say))


def dry_run(ray: KubeRay, plan: Plan) -> Iterator[Stage]:
    """What the cluster says to all of it, without a change. Raises as ``up`` does."""
    clock = _Clock()
    yield clock.stage("context", _reached(ray.context))
    yield clock.stage("operator", _operator(ray, lambda text: None))
    there = _namespace_is_there(ray)
    for manifest in _manifests(ray, plan):
        what = f"{manifest['kind']} {manifest['metadata']['name']}"
        if there or manifest["kind"] == "Namespace":
            ray.apply(manifest, dry_run=True, force=plan.force)
            yield clock.stage("dry run", f"{what}: the server takes it")
        else:
            yield clock.stage("dry run", f"{what}: {_checked(manifest)}")


def down(
    ray: KubeRay, name: str = NAME, *, everything: bool = False, dry_run: bool = False
) -> Iterator[Stage]:
    """Remove a RayService and its pods, and keep the checkpoints; ``everything``: the namespace with all in it.

    dry_run  only say what would be removed

    What is not there is no error. Raises KubeRayError in a namespace that is not the lab's.
    """
    clock = _Clock()
    yield clock.stage("context", _reached(ray.context))
    there = _namespace_is_there(ray)
    if there:
        ray.check_namespace()
    stage = "dry run" if dry_run else "remove"
    if everything:
        if there and not dry_run:
            ray.delete_namespace()
        yield clock.stage(
            stage, f"namespace {ray.namespace} {'with all in it' if there else 'was not there'}"
        )
        return
    # In this order: the operator clears its keys in Redis before the RayService goes.
    for kind, each in (("RayService", name), ("Deployment", f"{name}-redis"), ("Service", f"{name}-redis")):
        if there and ray.exists(kind, each):
            if not dry_run:
                ray.delete(kind, each)
            yield clock.stage(stage, f"{kind} {each}")
    yield clock.stage(
        "done", f"namespace {ray.namespace}{' and its checkpoints stay' if there else ' was not there'}"
    )


def serving_service(name: str = NAME) -> str:
    """The Service that leads to the replicas of a RayService."""
    return f"service/{name}-serve-svc"


# Stages


class _Clock:
    def __init__(self) -> None:
        self._last = time.monotonic()

    def stage(self, name: str, found: str) -> Stage:
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        return Stage(name, seconds, found)


def _check(deployment: Deployment) -> None:
    """As far as it can be seen from here: a path below /checkpoints is the cluster's."""
    if not deployment.checkpoint.startswith(f"{CHECKPOINTS}/"):
        deployment.check()


def _reached(context: Context) -> str:
    why_not = reachable(context)
    if why_not is not None:
        raise Unreachable(why_not)
    return str(context)


def _operator(ray: KubeRay, say: Say) -> str:
    deadline = time.monotonic() + OPERATOR_S
    while True:
        picture = status.operator(ray)
        line = diagnose.operator(picture["operator"], picture["installed"], ray.context.is_node)
        if line.state == "ok":
            return line.found
        # A pod of it that is being started is waited for.
        if not picture["operator"] or time.monotonic() > deadline:
            raise RuntimeError(str(line))
        say(line.found)
        time.sleep(POLL_S)


def _checkpoints(ray: KubeRay, plan: Plan, say: Say) -> tuple[list[Deployment], str]:
    placed, found = [], []
    for deployment in plan.deployments:
        folder = Path(deployment.checkpoint).expanduser()
        if deployment.checkpoint.startswith(f"{CHECKPOINTS}/") or not folder.is_dir():
            placed.append(deployment)
            found.append(f"{deployment.checkpoint}, as the image has it")
            continue
        path = upload.place(folder)
        there = upload.is_there(ray, path)
        if not there:
            upload.upload(ray, folder, plan.profile, say, plan.timeout)
        placed.append(deployment.model_copy(update={"checkpoint": path}))
        found.append(f"{path}{' was there' if there else ' sent'}")
    return placed, "; ".join(found)


def _manifests(ray: KubeRay, plan: Plan) -> list[Manifest]:
    return render.manifests(
        plan.deployments, plan.profile, name=plan.name, namespace=ray.namespace, redis=plan.redis
    )


def _apply(ray: KubeRay, plan: Plan) -> str:
    before = ray.get("RayService", plan.name) if ray.exists("RayService", plan.name) else None
    if plan.redis and not ray.exists("Secret", f"{plan.name}-redis"):
        ray.create(render.redis_secret(name=plan.name, namespace=ray.namespace))
    for manifest in _manifests(ray, plan):
        after = ray.apply(manifest, force=plan.force)
    if before is None:
        return f"RayService {plan.name} made"
    changed = _without_empty(after["spec"]) != _without_empty(before["spec"])
    return f"RayService {plan.name} {'changed' if changed else 'unchanged'}"


def _until(
    ray: KubeRay,
    plan: Plan,
    what: str,
    look: Callable[[KubeRay, Manifest], tuple[bool, str]],
    say: Say,
) -> str:
    """Look until it is so. Raises RuntimeError where a problem stands for HOPELESS_S, TimeoutError."""
    start = looked = time.monotonic()
    problems: dict[str, float] = {}
    said = ""
    while True:
        try:
            done, found = look(ray, ray.get("RayService", plan.name))
            if done:
                return found
        except KubeRayError as error:
            # The service names its Ray cluster a moment before it makes it.
            coming = error.kind == "RayCluster" and error.status == 404
            if 0 < error.status < 500 and not coming:
                raise
            found = "the operator makes a Ray cluster" if coming else error.message
        now = time.monotonic()
        if now - looked > LOOK_S:
            looked = now
            problems = _problems(ray, problems, now)
        in_the_way = "".join(f"\n  {each}" for each in problems)
        if any(now - since > HOPELESS_S for since in problems.values()):
            raise RuntimeError(f"{what} will not come:{in_the_way}")
        if now - start > plan.timeout:
            raise TimeoutError(f"no sign of {what} after {plan.timeout:.0f} s: {found}{in_the_way}")
        text = "; ".join([found, *(each.partition(" -> ")[0] for each in problems)])
        if text != said:
            say(text)
        said = text
        time.sleep(POLL_S)


def _problems(ray: KubeRay, known: dict[str, float], now: float) -> dict[str, float]:
    """What stands in the way, with the time when it was first seen."""
    try:
        lines = status.judge(status.gather(ray))
    except KubeRayError:
        return known
    return {str(line): known.get(str(line), now) for line in lines if line.state == "problem"}


def _cluster_of(service: Manifest) -> str | None:
    """The Ray cluster that is being made ready, or the one that serves."""
    state = service.get("status", {})
    if state.get("observedGeneration", 0) < service["metadata"]["generation"]:
        return None
    for which in ("pendingServiceStatus", "activeServiceStatus"):
        if name := state.get(which, {}).get("rayClusterName"):
            return str(name)
    return None


def _pods(ray: KubeRay, service: Manifest) -> tuple[bool, str]:
    name = _cluster_of(service)
    if name is None:
        return False, "the operator makes a Ray cluster"
    cluster = ray.get("RayCluster", name)
    wanted = 1 + sum(group.get("replicas", 0) for group in cluster["spec"].get("workerGroupSpecs") or [])
    pods = ray.list("Pod", f"ray.io/cluster={name},ray.io/node-type")
    running = sum(pod.get("status", {}).get("phase") == "Running" for pod in pods)
    return running >= wanted, f"{running} of {wanted} pods run"


def _ray(ray: KubeRay, service: Manifest) -> tuple[bool, str]:
    name = _cluster_of(service)
    cluster = ray.get("RayCluster", name) if name else None
    if cluster is None:
        return False, "the operator makes a Ray cluster"
    head = condition(cluster, "HeadPodReady").get("status") == "True"
    return head, f"head of {name} {'ready' if head else 'not ready yet'}"


def _serve(ray: KubeRay, service: Manifest) -> tuple[bool, str]:
    applications = status.applications(service, "pendingServiceStatus") or status.applications(
        service, "activeServiceStatus"
    )
    states = {name: each.get("status", "") for name, each in applications.items()}
    words = ", ".join(f"{name} {state or 'not started'}" for name, state in states.items())
    ready = holds(service, "Ready") and bool(states) and set(states.values()) == {"RUNNING"}
    return ready, words if ready else f"{describe(service)}{f' ({words})' if words else ''}"


def _answer(ray: KubeRay, plan: Plan, say: Say) -> str:
    """Each alias must be answered by the checkpoint that was asked for: an update in place takes a while after the
    operator calls the service ready, and may fail after it.
    """
    with ray.port_forward(serving_service(plan.name), PORT) as forward:

        def look(_: KubeRay, __: Manifest) -> tuple[bool, str]:
            found = []
            for name in (deployment.name for deployment in plan.deployments):
                try:
                    by = client.one_token(forward.url, alias(name))
                except RuntimeError as error:
                    return False, f"{error}{f' ({forward.trouble})' if forward.trouble else ''}"
                found.append(f"{alias(name)} is answered by {by}")
                if by != name:
                    return False, f"{found[-1]}, not yet by {name}"
            return True, "; ".join(found)

        return _until(ray, plan, "an answer", look, say)


# Helpers


def _without_empty(value: Any) -> Any:
    """The operator writes empty fields into a specification; they mean nothing."""
    if isinstance(value, dict):
        inner = {key: _without_empty(each) for key, each in value.items()}
        return {key: each for key, each in inner.items() if each not in ({}, None)}
    return [_without_empty(each) for each in value] if isinstance(value, list) else value


def _namespace_is_there(ray: KubeRay) -> bool:
    try:
        ray.get_namespace()
    except KubeRayError as error:
        if error.status != 404:
            raise
        return False
    return True


def _checked(manifest: Manifest) -> str:
    from labkit.cluster.check import check

    (verdict,) = check(manifest)
    errors = "; ".join(f"{error.path}: {error.message}" for error in verdict.errors)
    return f"{verdict.state}{f': {errors}' if errors else ''}, by labkit's own check (the namespace is not there yet)"


def apply(
    ray: KubeRay, paths: Sequence[Path], *, dry_run: bool = False, force: bool = False
) -> Iterator[Stage]:
    """Apply all manifests of files and folders, namespaces first. Raises ValueError where ``check`` refuses one,
    before anything is applied.
    """
    from labkit.cluster.check import check
    from labkit.cluster.documents import documents

    clock = _Clock()
    wrong = [verdict for verdict in check(paths) if verdict.state == "invalid"]
    if wrong:
        raise ValueError("nothing was applied; first correct:\n" + "\n".join(map(str, wrong)))
    found = [
        document.data
        for path in paths
        for file in (sorted(path.rglob("*.y*ml")) if path.is_dir() else [path])
        for document in documents(file.read_text(encoding="utf-8"))
        if document.data and document.data["kind"] != "Kustomization"
    ]
    yield clock.stage("check", f"{len(found)} manifests")
    for manifest in sorted(found, key=lambda each: each["kind"] != "Namespace"):
        there = KubeRay(ray.context, manifest["metadata"].get("namespace", ray.namespace))
        after = there.apply(manifest, dry_run=dry_run, force=force)
        what = f"{manifest['kind']} {after['metadata']['name']}"
        yield clock.stage("dry run" if dry_run else "apply", what)
