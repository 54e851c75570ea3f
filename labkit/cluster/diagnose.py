"""What is wrong with one object, and what helps: from its plain data and its events, in words for a newcomer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from labkit.cluster.conditions import condition, describe

Manifest = dict[str, Any]
State = Literal["ok", "wait", "problem"]

NO_IMAGE = ("ErrImageNeverPull", "ErrImagePull", "ImagePullBackOff", "InvalidImageName")
PATIENCE_S = 90  # a probe may fail for so long while a container starts


@dataclass(frozen=True)
class Line:
    """One line of ``labkit cluster status``.

    state  ok; wait: it will probably come by itself; problem: somebody has to do something
    what   the object, ``Pod lab-x7k2p-head``
    found  how it is
    todo   what helps, empty where nothing is to be done
    """

    state: State
    what: str
    found: str
    todo: str = ""

    def __str__(self) -> str:
        return f"{self.what}: {self.found}{f' -> {self.todo}' if self.todo else ''}"


def pod(manifest: Manifest, events: Iterable[Manifest], now: datetime) -> Iterator[Line]:
    """What keeps a pod from running and being ready; nothing where it is well or has ended well."""
    what = f"Pod {manifest['metadata']['name']}"
    status = manifest.get("status", {})
    if "deletionTimestamp" in manifest["metadata"]:
        yield Line("wait", what, "is being removed")
        return
    if status.get("phase") == "Succeeded":
        return
    if status.get("phase") == "Failed":
        found = ": ".join(part for part in (status.get("reason"), status.get("message")) if part)
        yield Line("problem", what, f"failed: {found or _last_exit(manifest)}", _logs(manifest))
        return
    scheduled = condition(manifest, "PodScheduled")
    if scheduled.get("status") == "False":
        yield _unscheduled(what, manifest, scheduled.get("message", ""))
        return
    troubled = False
    for container in [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]:
        for line in _container(what, manifest, container):
            troubled = True
            yield line
    if troubled or condition(manifest, "Ready").get("status") == "True":
        return
    yield _not_ready(what, manifest, list(events), now)


def _unscheduled(what: str, manifest: Manifest, message: str) -> Line:
    why = message.split(" preemption:")[0].split(" no new claims")[0].rstrip(". ")
    if "unbound immediate PersistentVolumeClaims" in message or "persistentvolumeclaim" in message:
        return Line(
            "wait", what, f"waits for a volume ({why})", "see its claim in this list, or `up` again"
        )
    lacking = re.findall(r"Insufficient ([\w./-]*\w)", message)
    if lacking:
        asked = {name: _requests(manifest, name) for name in dict.fromkeys(lacking)}
        wants = ", ".join(f"{amount} {name}" for name, amount in asked.items())
        return Line(
            "problem",
            what,
            f"fits on no node: it asks for {wants}, and so much is not free ({why})",
            "remove what is not needed (`labkit cluster down`, other namespaces), ask for less (a smaller profile, "
            "fewer workers), or add a node",
        )
    return Line(
        "problem", what, f"fits on no node: {why}", "read what each node lacks, between the brackets"
    )


def _container(what: str, manifest: Manifest, status: Manifest) -> Iterator[Line]:
    waiting = status.get("state", {}).get("waiting") or {}
    reason, message = waiting.get("reason", ""), waiting.get("message", "")
    last = (
        (status.get("lastState") or {}).get("terminated") or status.get("state", {}).get("terminated") or {}
    )
    if reason in NO_IMAGE:
        image = status.get("image") or "its image"
        if reason == "ErrImageNeverPull":
            found = f"its node has no image {image}, and is told not to fetch it (imagePullPolicy Never)"
        else:
            found = f"its node cannot fetch the image {image}: {message or reason}"
        yield Line(
            "problem",
            what,
            found,
            "build it (`make image`) and give it to the cluster: `make node-up` loads it into the test node, "
            f"`kind load docker-image {image}` into kind, elsewhere push it to a registry and name it with --image",
        )
    elif last.get("reason") == "OOMKilled":
        yield Line(
            "problem",
            what,
            f"container {status['name']} was ended because it needed more than its memory limit "
            f"({status.get('restartCount', 0)} restarts)",
            "a higher memory limit, a smaller model, or fewer requests at once (max_batch)",
        )
    elif reason == "CrashLoopBackOff" or (status.get("restartCount", 0) > 1 and not status.get("ready")):
        yield Line(
            "problem",
            what,
            f"container {status['name']} ends again and again ({status.get('restartCount', 0)} restarts), last "
            f"with exit code {last.get('exitCode', '?')}",
            _logs(manifest, " --previous"),
        )
    elif reason in ("CreateContainerConfigError", "CreateContainerError", "RunContainerError"):
        yield Line(
            "problem",
            what,
            f"container {status['name']} cannot be made: {message or reason}",
            "correct what it names, or make it",
        )


def _not_ready(what: str, manifest: Manifest, events: list[Manifest], now: datetime) -> Line:
    started = manifest.get("status", {}).get("startTime")
    age = (now - _time(started)).total_seconds() if started else 0.0
    for event in reversed(events):
        if event.get("reason") == "Unhealthy":
            probe, _, said = event.get("message", "").partition(" failed: ")
            return Line(
                "problem" if age > PATIENCE_S else "wait",
                what,
                f"its {probe.lower() or 'probe'} fails, {age:.0f} s after the start: {_line(said)}",
                _logs(manifest) if age > PATIENCE_S else "",
            )
        if event.get("reason") in ("FailedMount", "FailedAttachVolume", "FailedCreatePodSandBox"):
            return Line("problem" if age > PATIENCE_S else "wait", what, _line(event.get("message", "")))
    return Line("wait", what, f"is starting, for {age:.0f} s")


def refused(what: str, events: Iterable[Manifest]) -> Line | None:
    """Why the pods of a Ray cluster or job do not appear: the last word of who was to make them."""
    for event in reversed(list(events)):
        message = _line(event.get("message", ""))
        if event.get("type") != "Warning":
            continue
        if "violates PodSecurity" in message:
            level = re.search(r'violates PodSecurity "([^"]+)": (.*)', message)
            found = f"{level[1]}: {level[2]}" if level else message
            return Line(
                "problem",
                what,
                f"its pod is refused by the namespace's pod security, {found}",
                "set the fields that are named in the pod's securityContext, as `labkit cluster render` does",
            )
        if "exceeded quota" in message:
            return Line(
                "problem",
                what,
                f"its pod is refused: {message[message.index('exceeded quota') :]}",
                "ask for less, remove what is not needed, or have the quota raised",
            )
        todo = "correct what it names and apply it again; `labkit cluster check` looks at a file"
        return Line("problem", what, f"{event.get('reason', 'Warning')}: {message}", todo)
    return None


def claim(manifest: Manifest, events: Iterable[Manifest]) -> Line | None:
    """What a claim waits for; None where it has its volume."""
    what = f"PersistentVolumeClaim {manifest['metadata']['name']}"
    phase = manifest.get("status", {}).get("phase")
    if phase == "Bound":
        return None
    if phase == "Lost":
        return Line("problem", what, "its volume is gone", "delete the claim and run `up` again")
    last = next((event for event in reversed(list(events)) if event.get("message")), None)
    if last and last.get("reason") == "WaitForFirstConsumer":
        return Line("ok", what, "gets its volume with the first pod that uses it")
    spec = manifest["spec"]
    wants = f"{spec['resources']['requests']['storage']}, {'/'.join(spec.get('accessModes', []))}"
    of = (
        f"storage class {spec['storageClassName']!r}"
        if spec.get("storageClassName")
        else "no storage class"
    )
    said = f": {_line(last['message'])}" if last else ""
    return Line(
        "problem"
        if (last and last.get("type") == "Warning") or "no persistent volumes" in said
        else "wait",
        what,
        f"has no volume yet ({wants}, {of}){said}",
        "give it a storage class that the cluster has (`kubectl get storageclass`), or make a volume",
    )


def operator(pods: list[Manifest] | None, installed: bool, on_node: bool) -> Line:
    """Whether somebody is there who makes pods of Ray's kinds. pods: None = this user may not look."""
    what = "KubeRay operator"
    start = "`make node-up` starts it" if on_node else "see cluster/README.md for how to install it"
    if not installed:
        return Line("problem", what, "is not installed: the cluster knows no RayService", start)
    if pods is None:
        return Line("ok", what, "is installed (whether it runs, this user may not see)")
    if any(condition(each, "Ready").get("status") == "True" for each in pods):
        return Line("ok", what, "runs")
    if not pods:
        return Line(
            "problem", what, "does not run: no pod of it, so nothing that is asked for happens", start
        )
    states = ", ".join(f"{each['metadata']['name']} {describe(each)}" for each in pods)
    namespace = pods[0]["metadata"].get("namespace", "")
    return Line(
        "problem",
        what,
        f"does not run ({states}), so nothing that is asked for happens",
        f"`kubectl -n {namespace} describe pod`, or {start}",
    )


def token(cluster: str, answer: Manifest) -> Line | None:
    """Whether Ray takes the token of the cluster's Secret."""
    if answer.get("status") not in (401, 403):
        return None
    return Line(
        "problem",
        f"RayCluster {cluster}",
        f"Ray refuses the token of its Secret ({answer['status']}): the pods were started with another one",
        f"start them anew with `kubectl delete pod -l ray.io/cluster={cluster}`, or put the old Secret back",
    )


def last_line(text: str) -> str:
    """The error itself, under Ray's account of it, without its colours."""
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _requests(manifest: Manifest, resource: str) -> str:
    asked = [
        container.get("resources", {}).get("requests", {}).get(resource)
        for container in manifest["spec"]["containers"]
    ]
    return " + ".join(str(amount) for amount in asked if amount) or "some"


def _last_exit(manifest: Manifest) -> str:
    for container in manifest.get("status", {}).get("containerStatuses", []):
        ended = container.get("state", {}).get("terminated")
        if ended:
            return f"container {container['name']} ended with exit code {ended.get('exitCode')}"
    return "no reason given"


def _logs(manifest: Manifest, options: str = "") -> str:
    return f"read `labkit cluster logs {manifest['metadata']['name']}{options}`"


def _line(text: str) -> str:
    return " ".join(text.split())


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text.replace("Z", "+00:00"))
