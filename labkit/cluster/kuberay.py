"""KubeRay from Python: Ray clusters, jobs and services of one namespace, over the official client.

    ray = KubeRay(namespace="bits-to-pods")
    ray.apply(rayservice([deployment]))
    ray.wait("RayService", "lab")
    with ray.port_forward("service/lab-serve-svc", 8000) as forward:
        ...forward.url

Objects are dicts, as Kubernetes gives them. What goes wrong is raised as KubeRayError, with the server's own message.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

from labkit.cluster.conditions import describe, holds
from labkit.cluster.forward import PortForward
from labkit.cluster.objects import POLL_S, KubeRayError, Manifests, Objects
from labkit.cluster.pods import PART_OF, Manifest
from labkit.cluster.surroundings import namespace_manifest

if TYPE_CHECKING:
    import httpx

__all__ = ["KubeRay", "KubeRayError"]

NAMESPACE_LABEL, NAMESPACE_VALUE = next(iter(PART_OF.items()))
DASHBOARD_PORT = 8265
GROUPS = "/spec/workerGroupSpecs"


class KubeRay(Objects):
    """Ray in one namespace of one cluster, and every other object there (``Objects``).

    context    None = the one that ``context.current()`` finds
    namespace  where everything is looked for and made; a manifest that names another is refused
    """

    # Ray

    def scale(
        self, cluster: str, group: str, replicas: int, *, least: int | None = None, most: int | None = None
    ) -> Manifest:
        """Give a worker group of a RayCluster so many pods. least, most: the autoscaler's limits; None = as they are,
        widened where ``replicas`` lies outside.
        """
        path, old, same = self._place(cluster, self._worker_groups(cluster), group)
        least = min(old.get("minReplicas", 0), replicas) if least is None else least
        most = max(old.get("maxReplicas", replicas), replicas) if most is None else most
        if not 0 <= least <= replicas <= most:
            raise ValueError(f"expected 0 <= least <= replicas <= most, found {least}, {replicas}, {most}")
        wanted = {"replicas": replicas, "minReplicas": least, "maxReplicas": most}
        change = [
            {"op": "add", "path": f"{path}/{field}", "value": value} for field, value in wanted.items()
        ]
        return self.patch("RayCluster", cluster, [same, *change])

    def duplicate_worker_group(self, cluster: str, group: str, new: str) -> Manifest:
        """Give a RayCluster one more worker group, named ``new``, that is like one it has."""
        groups = self._worker_groups(cluster)
        if new in groups:
            raise KubeRayError(
                f"has a worker group {new!r} already",
                kind="RayCluster",
                name=cluster,
                namespace=self.namespace,
            )
        _, old, same = self._place(cluster, groups, group)
        add = {"op": "add", "path": f"{GROUPS}/-", "value": {**old, "groupName": new}}
        return self.patch("RayCluster", cluster, [same, add])

    def delete_worker_group(self, cluster: str, group: str, *, timeout: float = 300) -> Manifest:
        """Remove a worker group of a RayCluster: its pods first, since the operator forgets them with their group and
        they would run for ever. With Ray's autoscaler its pods go when they are idle.

        Raises TimeoutError where pods are left after ``timeout`` seconds; the group is there then, with 0 replicas.
        """
        self.scale(cluster, group, 0, least=0, most=0)
        deadline = time.monotonic() + timeout
        while left := self.list("Pod", f"ray.io/cluster={cluster},ray.io/group={group}"):
            if time.monotonic() > deadline:
                names = ", ".join(each["metadata"]["name"] for each in left)
                raise TimeoutError(f"worker group {group} still has {names} after {timeout:.0f} s")
            time.sleep(POLL_S)
        path, _, same = self._place(cluster, self._worker_groups(cluster), group)
        return self.patch("RayCluster", cluster, [same, {"op": "remove", "path": path}])

    def suspend(self, kind: str, name: str, on: bool = True) -> Manifest:
        """Take the pods of a RayCluster away, or stop a RayJob, and keep the object; ``on=False`` starts it (again).

        A RayService cannot be suspended: delete it, or give it no replicas.
        """
        if kind not in ("RayCluster", "RayJob"):
            raise ValueError(f"only a RayCluster or a RayJob can be suspended, not a {kind}")
        return self.patch(kind, name, {"spec": {"suspend": on}})

    def submit(self, job: Mapping[str, Any], *, timeout: float = 3600) -> Iterator[str]:
        """Create a RayJob and yield its output as it comes, in pieces of whole lines.

        Raises KubeRayError when the job fails (while iterating), TimeoutError after ``timeout`` seconds.
        """
        self.create(job)
        return self.logs(job["metadata"]["name"], "RayJob", follow=True, timeout=timeout)

    def job_status(self, name: str) -> Manifest:
        """A RayJob's ``jobStatus`` (Ray's: PENDING, RUNNING, SUCCEEDED, FAILED, STOPPED or empty),
        ``jobDeploymentStatus`` (KubeRay's: Initializing, Running, Complete, Failed, ...), ``message`` and more.
        """
        status = self.get("RayJob", name).get("status", {})
        return {"jobStatus": "", "jobDeploymentStatus": "", "message": "", **status}

    def logs(
        self,
        name: str,
        kind: str = "Pod",
        *,
        follow: bool = False,
        container: str | None = None,
        tail: int | None = None,
        previous: bool = False,
        timeout: float = 3600,
    ) -> Iterator[str]:
        """A pod's or a RayJob's output, in pieces of whole lines.

        follow    go on until it ends; of a job, raise KubeRayError if it failed
        tail      so many last lines of a pod, None = all
        previous  of a pod's container that was restarted: what it said before
        """
        from labkit.cluster.logs import job_output, pod_output

        if kind == "RayJob":
            return job_output(self, name, follow=follow, timeout=timeout)
        if kind != "Pod":
            raise ValueError(
                f"logs of a Pod or a RayJob, not of a {kind}; its pods: list('Pod', 'ray.io/cluster=...')"
            )
        return pod_output(self, name, follow=follow, container=container, tail=tail, previous=previous)

    def port_forward(self, target: str, port: int, local: int | None = None) -> PortForward:
        """A local port that leads to a port of ``service/NAME`` or ``pod/NAME``; use it in a ``with`` block.

        Behind a service each new connection goes to the next pod that is ready then. Raises KubeRayError where there is
        no such object or port.
        """
        kind, _, name = target.rpartition("/")
        if kind not in ("service", "pod"):
            raise ValueError(f"expected service/NAME or pod/NAME, found {target!r}")
        if kind == "pod":
            self.get("Pod", name)
            return PortForward(self.client, lambda: (self.namespace, name, port), local)
        self._behind(name, port)
        turn = iter(range(1 << 62))
        return PortForward(self.client, lambda: self._ready_pod(name, port, next(turn)), local)

    @contextmanager
    def dashboard(self, cluster: str) -> Iterator[httpx.Client]:
        """An HTTP client for the dashboard of a Ray cluster (its jobs and Serve API), with the cluster's token."""
        import httpx

        found = self.get("RayCluster", cluster)
        head = found.get("status", {}).get("head", {}).get("podName")
        if not head:
            raise KubeRayError(
                f"it has no head pod yet: {describe(found)}", kind="RayCluster", name=cluster,
                namespace=self.namespace,
            )  # fmt: skip
        headers = {}
        auth = found["spec"].get("authOptions") or {}
        if auth.get("mode") == "token":
            headers["Authorization"] = f"Bearer {self._token(auth.get('secretName') or cluster)}"
        with (
            self.port_forward(f"pod/{head}", DASHBOARD_PORT) as forward,
            httpx.Client(base_url=forward.url, headers=headers, timeout=30, trust_env=False) as client,
        ):
            yield client

    # Namespace

    def ensure_namespace(self) -> Manifest:
        """Make the namespace, labelled as the lab's and with pod security ``restricted``, or see that it is.

        Raises KubeRayError where there is one that is not the lab's.
        """
        try:
            labels = self.get_namespace()["metadata"].get("labels") or {}
        except KubeRayError as error:
            if error.status != 404:
                raise
            labels = {NAMESPACE_LABEL: NAMESPACE_VALUE}
        if labels.get(NAMESPACE_LABEL) != NAMESPACE_VALUE:
            self._not_ours("give another name, or label it")
        return self.apply(namespace_manifest(self.namespace))

    def get_namespace(self) -> Manifest:
        """The namespace itself. Raises KubeRayError, status 404, where there is none."""
        return self._call("get", "Namespace", self.namespace, None)

    def check_namespace(self) -> None:
        """Raises KubeRayError where the namespace is not the lab's, or not there."""
        if (self.get_namespace()["metadata"].get("labels") or {}).get(NAMESPACE_LABEL) != NAMESPACE_VALUE:
            self._not_ours("it is left alone")

    def delete_namespace(self, *, wait: bool = True, timeout: float = 180) -> None:
        """Remove the namespace and all in it. Raises KubeRayError where it is not the lab's."""
        self.check_namespace()
        # Ray first: the operator clears what a cluster kept in Redis with a job, and a namespace that is going takes
        # none, so that it would wait for it for ever.
        for kind in ("RayService", "RayJob", "RayCluster"):
            for each in self.list(kind) if self.knows(kind) else []:
                self.delete(kind, each["metadata"]["name"], timeout=timeout)
        self.delete("Namespace", self.namespace, wait=wait, timeout=timeout)

    # Inside

    def _worker_groups(self, cluster: str) -> dict[str, Manifest]:
        groups = self.get("RayCluster", cluster)["spec"].get("workerGroupSpecs") or []
        return {each["groupName"]: each for each in groups}

    def _place(
        self, cluster: str, groups: dict[str, Manifest], group: str
    ) -> tuple[str, Manifest, Manifest]:
        """A worker group's path, what stands there, and the JSON patch operation that makes sure of it: the list has no
        keys, so somebody may have moved it meanwhile.
        """
        if group not in groups:
            raise KubeRayError(
                f"no worker group {group!r}; there are {', '.join(groups) or 'none'}",
                kind="RayCluster", name=cluster, namespace=self.namespace,
            )  # fmt: skip
        path = f"{GROUPS}/{list(groups).index(group)}"
        return path, groups[group], {"op": "test", "path": f"{path}/groupName", "value": group}

    def _not_ours(self, remedy: str) -> NoReturn:
        raise KubeRayError(
            f"lacks the label {NAMESPACE_LABEL}={NAMESPACE_VALUE}, so it is not the lab's; {remedy}",
            kind="Namespace", name=self.namespace,
        )  # fmt: skip

    def _behind(self, service: str, port: int) -> tuple[Manifests, int | str]:
        """The pods that a service selects, and which port of theirs. Raises KubeRayError."""
        spec = self.get("Service", service)["spec"]
        ports = {each["port"]: each.get("targetPort", each["port"]) for each in spec["ports"]}
        if port not in ports:
            raise KubeRayError(
                f"has no port {port}; there is {', '.join(map(str, ports))}",
                kind="Service", name=service, namespace=self.namespace,
            )  # fmt: skip
        selector = ",".join(f"{key}={value}" for key, value in (spec.get("selector") or {}).items())
        return self.list("Pod", selector), ports[port]

    def _ready_pod(self, service: str, port: int, turn: int) -> tuple[str, str, int]:
        pods, target = self._behind(service, port)
        ready = [pod for pod in pods if holds(pod, "Ready") and "deletionTimestamp" not in pod["metadata"]]
        if not ready:
            raise KubeRayError(
                f"none of its {len(pods)} pods is ready",
                kind="Service",
                name=service,
                namespace=self.namespace,
            )
        pod = sorted(ready, key=lambda each: each["metadata"]["name"])[turn % len(ready)]
        if isinstance(target, str):
            named = {
                each.get("name"): each["containerPort"]
                for container in pod["spec"]["containers"]
                for each in container.get("ports") or []
            }
            target = int(named[target])
        return self.namespace, pod["metadata"]["name"], target

    def _token(self, secret: str) -> str:
        import base64

        data = self.get("Secret", secret).get("data") or {}
        if "auth_token" not in data:
            raise KubeRayError(
                "has no key auth_token", kind="Secret", name=secret, namespace=self.namespace
            )
        return base64.b64decode(data["auth_token"]).decode()

    def _obstacles(self) -> str:
        """What ``labkit cluster status`` would say."""
        from labkit.cluster import status

        try:
            lines = [str(line) for line in status.judge(status.gather(self)) if line.state != "ok"]
        except KubeRayError:
            return ""
        return "".join(f"\n  {line}" for line in lines)
