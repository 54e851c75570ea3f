"""What pods, RayJobs and the replicas of a RayService print, from wherever it is kept."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from labkit.cluster.conditions import describe
from labkit.cluster.objects import CALL_S, POLL_S, KubeRayError, passes

if TYPE_CHECKING:
    from labkit.cluster.kuberay import KubeRay

STARTED = ("RUNNING", "SUCCEEDED", "FAILED", "STOPPED")
ENDED = ("Complete", "Failed", "ValidationFailed")


# The kubelet's answer, with status 200, for a container that it removed while it was asked.
GONE = "unable to retrieve container logs for "


def pod_output(
    ray: KubeRay, name: str, *, follow: bool, container: str | None, tail: int | None, previous: bool
) -> Iterator[str]:
    """A pod's log as the kubelet keeps it. Raises KubeRayError."""
    wanted = {"follow": follow, "container": container, "tailLines": tail, "previous": previous}
    query = [(key, str(value).lower()) for key, value in wanted.items() if value]
    path = f"/api/v1/namespaces/{ray.namespace}/pods/{name}/log"
    for last in (False, False, True):
        with ray.errors("Pod", name):
            request = ray.client.param_serialize(
                "GET", path, query_params=query, auth_settings=["BearerToken"]
            )
            response = ray.client.call_api(*request, _request_timeout=(CALL_S[0], None))
            if not 200 <= response.status <= 299:
                response.read()
                ray.client.response_deserialize(response, {})
            pieces = _whole_lines(response.response.stream(amt=None if not follow else 4096))
            first = next(pieces, "")
            if not first.startswith(GONE):
                yield first
                yield from pieces
                return
        if not last:
            time.sleep(POLL_S)  # a pod that restarts has a newer container by then
    raise KubeRayError(
        "its container was removed, and the log with it; ask again", kind="Pod", name=name,
        namespace=ray.namespace, reason="Gone",
    )  # fmt: skip


def _whole_lines(chunks: Iterable[bytes]) -> Iterator[str]:
    rest = b""
    for chunk in chunks:
        lines, newline, rest = (rest + chunk).rpartition(b"\n")
        if newline:
            yield (lines + newline).decode(errors="replace")
    if rest:
        yield rest.decode(errors="replace")


def job_output(ray: KubeRay, name: str, *, follow: bool, timeout: float) -> Iterator[str]:
    """The job's output from Ray's own job API, whichever mode submitted it.

    Raises KubeRayError when the job fails (with ``follow``) or its cluster is gone; TimeoutError.
    """
    deadline, seen = time.monotonic() + timeout, 0
    while True:
        job = ray.get("RayJob", name)
        status = job.get("status", {})
        ended = status.get("jobDeploymentStatus") in ENDED or status.get("jobStatus") in STARTED[1:]
        if status.get("jobStatus") in STARTED:
            try:
                text = _whole(ray, status["rayClusterName"], status["jobId"])
                # Whole lines only, until there will be no more.
                end = len(text) if ended else text.rfind("\n") + 1
                if end > seen:
                    yield text[seen:end]
                    seen = end
            except KubeRayError as error:
                if ended and error.status == 404:
                    raise KubeRayError(
                        f"its Ray cluster is gone, and its output with it ({describe(job)})",
                        kind="RayJob", name=name, namespace=ray.namespace, status=404,
                    ) from None  # fmt: skip
                if not passes(error):
                    raise
        if not follow:
            return
        if ended:
            ray.wait("RayJob", name, "Complete", timeout=max(10, deadline - time.monotonic()))
            return
        if time.monotonic() > deadline:
            raise TimeoutError(f"RayJob {name} has not ended after {timeout:.0f} s: {describe(job)}")
        time.sleep(POLL_S)


def _whole(ray: KubeRay, cluster: str, job: str) -> str:
    """All that the job has printed so far. Asked for anew each time: a connection that is kept would be lost with the
    API server, and a lab's output is short.
    """
    import httpx

    try:
        with ray.dashboard(cluster) as dashboard:
            answer = dashboard.get(f"/api/jobs/{job}/logs").raise_for_status()
            return str(answer.json()["logs"])
    except httpx.HTTPStatusError as error:
        message, status = error.response.text.strip(), error.response.status_code
        raise KubeRayError(
            f"Ray answers {status}: {message[-300:]}", kind="RayJob", name=job, namespace=ray.namespace,
            status=status,
        ) from None  # fmt: skip
    except httpx.HTTPError as error:
        raise KubeRayError(
            f"Ray's dashboard does not answer: {error}", kind="RayJob", name=job, namespace=ray.namespace
        ) from error


def replica_output(ray: KubeRay, service: str, *, lines: int) -> Iterator[str]:
    """The last lines of each replica of a RayService, from the files that Ray keeps on its nodes.

    Raises KubeRayError where it has no Ray cluster that answers.
    """
    import httpx

    status = ray.get("RayService", service).get("status", {})
    clusters = [
        status.get(which, {}).get("rayClusterName")
        for which in ("activeServiceStatus", "pendingServiceStatus")
    ]
    for cluster in filter(None, clusters):
        try:
            with ray.dashboard(cluster) as dashboard:
                applications = (
                    dashboard.get("/api/serve/applications/").raise_for_status().json()["applications"]
                )
                for application in applications.values():
                    for deployment, state in application["deployments"].items():
                        for replica in state["replicas"]:
                            wanted = {
                                "node_id": replica["node_id"],
                                "filename": replica["log_file_path"].lstrip("/"),
                                "lines": lines,
                            }
                            text = dashboard.get("/api/v0/logs/file", params=wanted).raise_for_status().text
                            yield f"== {cluster}: {deployment} {replica['replica_id']} ({replica['state']})\n"
                            yield text if text.endswith("\n") else f"{text}\n"
        except httpx.HTTPError as error:
            raise KubeRayError(
                f"Ray does not give its logs: {error}",
                kind="RayCluster",
                name=cluster,
                namespace=ray.namespace,
            ) from error
