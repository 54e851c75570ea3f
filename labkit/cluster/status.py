"""One screen: what is there, what is not ready and why, and what to do. ``gather`` asks, ``judge`` thinks."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import yaml

from labkit.cluster import diagnose
from labkit.cluster.conditions import Hopeless, describe, holds
from labkit.cluster.diagnose import Line
from labkit.serving.deployment import APP_NAME

if TYPE_CHECKING:
    from labkit.cluster.kuberay import KubeRay
    from labkit.cluster.objects import Manifests

Manifest = dict[str, Any]
OPERATOR = "app.kubernetes.io/component=kuberay-operator"
KINDS = ("RayService", "RayCluster", "RayJob")


def gather(ray: KubeRay) -> Manifest:
    """All that ``judge`` needs, as plain data that JSON can hold.

    Raises KubeRayError where the API server does not answer; what this user may not see is left out.
    """
    found = {kind: _seen(ray, kind) for kind in (*KINDS, "Pod", "Event", "PersistentVolumeClaim")}
    objects = {kind: each or [] for kind, each in found.items()}
    return {
        "context": str(ray.context),
        "on_node": ray.context.is_node,
        "namespace": ray.namespace,
        "now": datetime.now(UTC).isoformat(),
        **operator(ray),
        "objects": objects,
        "ray": {
            cluster["metadata"]["name"]: _ask_ray(ray, cluster["metadata"]["name"])
            for cluster in objects["RayCluster"]
            if diagnose.condition(cluster, "HeadPodReady").get("status") == "True"
        },
    }


def operator(ray: KubeRay) -> Manifest:
    """The part of the picture that is about the operator: whether Ray's kinds are known, and its pods."""
    return {
        "installed": ray.knows("RayService"),
        "operator": _seen(ray, "Pod", OPERATOR, everywhere=True),
    }


def judge(picture: Manifest) -> list[Line]:
    """What is to be said of a picture, most important first within each kind."""
    objects, now = picture["objects"], datetime.fromisoformat(picture["now"])
    lines = [diagnose.operator(picture["operator"], picture["installed"], picture["on_node"])]
    if not any(objects[kind] for kind in KINDS):
        nothing = f"nothing of Ray's in namespace {picture['namespace']}"
        return [*lines, Line("ok", "Ray", nothing, "`labkit cluster up` serves the default model")]
    for each in objects["RayService"]:
        lines += _service(each, picture)
    for each in objects["RayCluster"]:
        lines += _cluster(each, picture)
    for each in objects["RayJob"]:
        lines += _job(each, picture)
    for each in objects["PersistentVolumeClaim"]:
        if line := diagnose.claim(each, _events(picture, each)):
            lines.append(line)
    serving = any(_is_ready(each) for each in objects["RayService"])
    for each in objects["Pod"]:
        # A worker without a replica is not ready, which is right where another one answers.
        idle = serving and each["metadata"].get("labels", {}).get("ray.io/node-type") == "worker"
        lines += [
            line
            for line in diagnose.pod(each, _events(picture, each), now)
            if not (idle and "readiness probe" in line.found)
        ]
    return lines


def is_well(lines: list[Line]) -> bool:
    """Nothing is missing and nothing is awaited."""
    return all(line.state == "ok" for line in lines)


def models(service: Manifest) -> list[str]:
    """The names of the models that a RayService of the lab's is to serve; none where it is not the lab's."""
    try:
        config = yaml.safe_load(service["spec"].get("serveConfigV2", "")) or {}
        applications = {each["name"]: each for each in config["applications"]}
        return [each["name"] for each in applications[APP_NAME]["args"]["deployments"]]
    except (yaml.YAMLError, KeyError, TypeError):
        return []


def applications(service: Manifest, which: str) -> dict[str, Manifest]:
    """What Ray Serve said to the operator. which: "activeServiceStatus" or "pendingServiceStatus"."""
    return dict(service.get("status", {}).get(which, {}).get("applicationStatuses") or {})


def _service(service: Manifest, picture: Manifest) -> Iterator[Line]:
    what = f"RayService {service['metadata']['name']}"
    if "deletionTimestamp" in service["metadata"]:
        yield Line("wait", what, "is being removed")
        return
    if _is_ready(service):
        pods = service["status"].get("numServeEndpoints", 0)
        names = ", ".join(models(service)) or "its applications"
        yield Line("ok", what, f"serves {names} from {pods} pod{'s' if pods != 1 else ''}")
    else:
        invalid = [
            each for each in _events(picture, service) if str(each.get("reason")).startswith("Invalid")
        ]
        if invalid:
            yield Line(
                "problem",
                what,
                f"the operator refuses it: {invalid[-1]['message']}",
                "correct it and apply it again",
            )
            return
        yield Line("wait", what, describe(service))
    for which in ("activeServiceStatus", "pendingServiceStatus"):
        for name, application in applications(service, which).items():
            yield from _application(f"Serve application {name}", application)


def _application(what: str, application: Manifest) -> Iterator[Line]:
    state = application.get("status", "")
    said = [each.get("message", "") for each in (application.get("serveDeploymentStatuses") or {}).values()]
    why = "; ".join(dict.fromkeys(diagnose.last_line(text) for text in said if text))
    why = why or diagnose.last_line(application.get("message", ""))
    if state in ("DEPLOY_FAILED", "UNHEALTHY"):
        todo = (
            "correct the deployment (a checkpoint that is not there, a misspelt field) and apply it again"
        )
        yield Line("problem", what, f"{state}: {why or 'no reason given'}", todo)
    elif state != "RUNNING":
        yield Line("wait", what, f"{state or 'not started'}{f': {why}' if why else ''}")


def _cluster(cluster: Manifest, picture: Manifest) -> Iterator[Line]:
    name = cluster["metadata"]["name"]
    what = f"RayCluster {name}"
    if "deletionTimestamp" in cluster["metadata"]:
        yield Line("wait", what, "is being removed")
        return
    if cluster["spec"].get("suspend"):
        yield Line("ok", what, "is suspended, and has no pods")
        return
    if line := diagnose.token(name, picture["ray"].get(name, {})):
        yield line
    yield Line("ok" if _is_ready(cluster) else "wait", what, describe(cluster))
    pods = [
        each
        for each in picture["objects"]["Pod"]
        if each["metadata"].get("labels", {}).get("ray.io/cluster") == name
        and "ray.io/node-type" in each["metadata"].get("labels", {})
    ]
    wanted = 1 + sum(group.get("replicas", 0) for group in cluster["spec"].get("workerGroupSpecs") or [])
    if len(pods) < wanted and (line := diagnose.refused(what, _events(picture, cluster))):
        yield line


def _job(job: Manifest, picture: Manifest) -> Iterator[Line]:
    name = job["metadata"]["name"]
    what, found = f"RayJob {name}", describe(job)
    try:
        state = "ok" if holds(job, "Complete") or job["spec"].get("suspend") else "wait"
    except Hopeless:
        yield Line("problem", what, found, f"read `labkit cluster logs {name}`")
        return
    yield Line("ok" if state == "ok" else "wait", what, found)
    if state == "wait" and not any(
        each["metadata"].get("labels", {}).get("job-name") == name for each in picture["objects"]["Pod"]
    ):
        # The submitter of K8sJobMode is made by a Kubernetes Job of the same name.
        made = [
            event
            for event in picture["objects"]["Event"]
            if event.get("involvedObject", {}).get("kind") in ("Job", "RayJob")
            and event["involvedObject"].get("name") == name
        ]
        if line := diagnose.refused(what, sorted(made, key=_when)):
            yield line


def _is_ready(manifest: Manifest) -> bool:
    return holds(manifest, "Ready")


def _events(picture: Manifest, manifest: Manifest) -> list[Manifest]:
    """An object's events, the oldest first."""
    uid = manifest["metadata"].get("uid")
    found = [
        each for each in picture["objects"]["Event"] if each.get("involvedObject", {}).get("uid") == uid
    ]
    return sorted(found, key=_when)


def _when(event: Manifest) -> str:
    series = event.get("series") or {}
    return str(series.get("lastObservedTime") or event.get("lastTimestamp") or event.get("eventTime") or "")


def _seen(
    ray: KubeRay, kind: str, selector: str | None = None, everywhere: bool = False
) -> Manifests | None:
    """A list, or None where there is no such kind or this user may not see it."""
    from labkit.cluster.kuberay import KubeRayError

    try:
        return ray.list(kind, selector, everywhere=everywhere)
    except KubeRayError as error:
        if error.status in (403, 404):
            return None
        raise


def _ask_ray(ray: KubeRay, cluster: str) -> Manifest:
    """What Ray itself says of its Serve applications: ``status`` is HTTP's, 0 where it does not answer."""
    import httpx

    from labkit.cluster.kuberay import KubeRayError

    try:
        with ray.dashboard(cluster) as dashboard:
            answer = dashboard.get("/api/serve/applications/", timeout=10)
        return {"status": answer.status_code, "message": answer.text[:300] if answer.is_error else ""}
    except (httpx.HTTPError, KubeRayError) as error:
        return {"status": 0, "message": str(error)}
