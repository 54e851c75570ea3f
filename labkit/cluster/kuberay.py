"""KubeRay from Python: Ray clusters, jobs and services of one namespace, over the official client.

    ray = KubeRay(namespace="bits-to-pods")
    ray.apply(rayservice([deployment]))
    ray.wait("RayService", "lab")
    with ray.port_forward("service/lab-serve-svc", 8000) as forward:
        ...forward.url

Objects are dicts, as Kubernetes gives them. What goes wrong is raised as KubeRayError, with the server's own message.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from labkit.cluster.conditions import Hopeless, describe, holds
from labkit.cluster.context import Context, current
from labkit.cluster.forward import PortForward
from labkit.cluster.pods import NAMESPACE, PART_OF, Manifest
from labkit.cluster.surroundings import namespace_manifest

if TYPE_CHECKING:
    import httpx

Manifests = list[Manifest]
Progress = Callable[[str], None]

MANAGER = "labkit"
OPERATOR = "kuberay-operator"
PATCHER = "labkit-patch"  # so that a conflict with an earlier scale() or suspend() says what it was
NAMESPACE_LABEL, NAMESPACE_VALUE = next(iter(PART_OF.items()))
DASHBOARD_PORT = 8265
GROUPS = "/spec/workerGroupSpecs"
CALL_S = (5, 30)  # to connect, to answer
POLL_S = 1.0

# What a kind's name alone means. Everything else is looked for in the core group.
API = {
    **dict.fromkeys(("RayCluster", "RayJob", "RayService"), "ray.io/v1"),
    **dict.fromkeys(("Deployment", "ReplicaSet"), "apps/v1"),
    **dict.fromkeys(("Job",), "batch/v1"),
    **dict.fromkeys(
        ("Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding"), "rbac.authorization.k8s.io/v1"
    ),
    "StorageClass": "storage.k8s.io/v1",
    "CustomResourceDefinition": "apiextensions.k8s.io/v1",
}


class KubeRayError(RuntimeError):
    """What the cluster refused or could not do.

    kind, name, namespace  the object (namespace "" for what stands in none)
    status, reason         the HTTP status and Kubernetes' word for it; 0 where nothing answered
    message                the server's own
    """

    def __init__(
        self, message: str, *, kind: str, name: str, namespace: str = "", status: int = 0, reason: str = ""
    ) -> None:
        self.kind, self.name, self.namespace = kind, name, namespace
        self.status, self.reason, self.message = status, reason, message
        where = f" in namespace {namespace}" if namespace else ""
        super().__init__(f"{kind} {name}{where}: {message}")


class KubeRay:
    """One namespace of one cluster.

    context    None = the one that ``context.current()`` finds
    namespace  where everything is looked for and made; a manifest that names another is refused
    """

    def __init__(self, context: Context | None = None, namespace: str = NAMESPACE) -> None:
        self.context = context or current()
        self.namespace = namespace
        self.client = self.context.client()
        self._dynamic: Any = None

    # Objects

    def apply(self, manifest: Mapping[str, Any], *, dry_run: bool = False, force: bool = False) -> Manifest:
        """Make the object be so (server-side apply), and return what the server has now. Any kind.

        dry_run  only ask whether the server would take it
        force    take over fields that somebody else set

        A misspelt field is an error. Fields that were applied before and are missing now are removed.
        """
        kind, name, namespace = self._identity(manifest)
        call = partial(
            self._call, "server_side_apply", kind, name, namespace, body=dict(manifest),
            dry_run=_all(dry_run), api_version=manifest.get("apiVersion"),
        )  # fmt: skip
        try:
            return call(force_conflicts=force or None)
        except KubeRayError as error:
            # The operator writes defaults into what it is given, and owns them from then on.
            if set(re.findall(r'conflicts? with "([^"]+)"', error.message)) != {OPERATOR}:
                raise
            return call(force_conflicts=True)

    def create(self, manifest: Mapping[str, Any], *, dry_run: bool = False) -> Manifest:
        """Make a new object. Raises KubeRayError, status 409, where there is one of that name."""
        kind, name, namespace = self._identity(manifest)
        return self._call(
            "create", kind, name, namespace, body=dict(manifest), dry_run=_all(dry_run),
            api_version=manifest.get("apiVersion"),
        )  # fmt: skip

    def patch(self, kind: str, name: str, change: Mapping[str, Any] | Manifests) -> Manifest:
        """Change fields of an object: a dict is merged into it, a list holds JSON patch operations."""
        content = (
            "application/json-patch+json" if isinstance(change, list) else "application/merge-patch+json"
        )
        return self._call(
            "patch",
            kind,
            name,
            self.namespace,
            body=change,
            content_type=content,
            manager=PATCHER,
        )

    def get(self, kind: str, name: str) -> Manifest:
        """The object. Raises KubeRayError, status 404, where there is none."""
        return self._call("get", kind, name, self.namespace)

    def exists(self, kind: str, name: str) -> bool:
        """Whether there is such an object."""
        try:
            self.get(kind, name)
        except KubeRayError as error:
            if error.status != 404:
                raise
            return False
        return True

    def knows(self, kind: str) -> bool:
        """Whether the cluster has this kind of object: Ray's kinds come with the operator."""
        try:
            self._resource(kind)
        except KubeRayError as error:
            if error.reason != "NoSuchKind":
                raise
            return False
        return True

    def list(self, kind: str, selector: str | None = None, *, everywhere: bool = False) -> Manifests:
        """All objects of a kind. selector: by label, ``ray.io/cluster=lab``; everywhere: in all namespaces."""
        namespace = None if everywhere else self.namespace
        found = self._call("get", kind, "", namespace, label_selector=selector)
        # Lists leave out what all their items have in common.
        common = {"apiVersion": found["apiVersion"], "kind": found["kind"].removesuffix("List")}
        return [{**common, **item} for item in found["items"]]

    def watch(
        self, kind: str, name: str | None = None, *, selector: str | None = None, timeout: int = 60
    ) -> Iterator[tuple[str, Manifest]]:
        """("ADDED" | "MODIFIED" | "DELETED", object) as it happens, first of all that is there, for ``timeout``
        seconds.
        """
        resource = self._resource(kind)
        with self.errors(kind, name or selector or "", self.namespace):
            for event in self._dynamic.watch(
                resource, namespace=self.namespace, name=name, label_selector=selector, timeout=timeout
            ):
                yield event["type"], event["raw_object"]

    def delete(self, kind: str, name: str, *, wait: bool = True, timeout: float = 180) -> None:
        """Remove an object and what belongs to it; with ``wait`` return when it is gone.

        Raises KubeRayError, status 404, where there is none; TimeoutError after ``timeout`` seconds.
        """
        namespace = self.namespace if kind != "Namespace" else None
        uid = self._call("get", kind, name, namespace)["metadata"]["uid"]
        body = {"kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": "Foreground"}
        self._call("delete", kind, name, namespace, body=body)
        deadline = time.monotonic() + timeout
        left: Manifest = {}
        while wait:
            try:
                left = self._call("get", kind, name, namespace)
            except KubeRayError as error:
                if error.status == 404:
                    return
                if not _passes(error):
                    raise
            if left.get("metadata", {}).get("uid", uid) != uid:
                return  # somebody made another one of the same name
            if time.monotonic() > deadline:
                waits = (
                    ", ".join(left.get("metadata", {}).get("finalizers") or []) or "nothing that it names"
                )
                raise TimeoutError(f"{kind} {name} is not gone after {timeout:.0f} s; it waits for {waits}")
            time.sleep(POLL_S / 2)

    def wait(
        self,
        kind: str,
        name: str,
        until: str | Callable[[Manifest], bool] = "Ready",
        *,
        timeout: float = 300,
        progress: Progress | None = None,
    ) -> Manifest:
        """Wait until a condition holds, and return the object.

        until     a condition's type; "Ready" goes for each kind (see ``conditions.holds``); or a function of the object
        timeout   in seconds; an API server that is away for a while is waited for
        progress  called with a few words each time that the object's state changes

        Raises TimeoutError that says what stands in the way; KubeRayError where it cannot come any more, such as a job
        that failed.
        """
        said, found = "", None
        deadline = time.monotonic() + timeout
        while True:
            try:
                found = self.get(kind, name)
                state = describe(found)
                if until(found) if callable(until) else holds(found, until):
                    return found
            except Hopeless as error:
                raise KubeRayError(str(error), kind=kind, name=name, namespace=self.namespace) from None
            except KubeRayError as error:
                if not _passes(error) and not (error.status == 404 and found is None):
                    raise
                state = error.message
            if progress is not None and state != said:
                progress(state)
            said = state
            if time.monotonic() > deadline:
                what = until if isinstance(until, str) else until.__name__.strip("<>").replace("_", " ")
                raise TimeoutError(
                    f"{kind} {name} in namespace {self.namespace} is not {what} after {timeout:.0f} s: {state}"
                    f"{self._obstacles()}"
                )
            time.sleep(POLL_S)

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

    def _identity(self, manifest: Mapping[str, Any]) -> tuple[str, str, str | None]:
        """Kind, name and namespace. Raises ValueError for another namespace than this one."""
        kind, name = manifest["kind"], manifest["metadata"]["name"]
        if not self._resource(kind, manifest.get("apiVersion")).namespaced:
            return kind, name, None
        namespace = manifest["metadata"].get("namespace", self.namespace)
        if namespace != self.namespace:
            raise ValueError(
                f"{kind} {name} is for namespace {namespace}, this client for {self.namespace}"
            )
        return kind, name, namespace

    def _resource(self, kind: str, api_version: str | None = None) -> Any:
        from kubernetes.dynamic import DynamicClient
        from kubernetes.dynamic.exceptions import ResourceNotFoundError

        version = api_version or API.get(kind, "v1")
        with self.errors(kind, "", ""):
            if self._dynamic is None:
                # Its default cache is a file that all users of the machine share. This path cannot be one.
                self._dynamic = DynamicClient(self.client, cache_file=os.path.join(os.devnull, "none"))
            try:
                return self._dynamic.resources.get(api_version=version, kind=kind)
            except ResourceNotFoundError:
                remedy = (
                    "; install the KubeRay operator, which brings it"
                    if version.startswith("ray.io")
                    else ""
                )
                raise KubeRayError(
                    f"{self.context.server} knows no such kind ({version}){remedy}",
                    kind=kind, name="", status=404, reason="NoSuchKind",
                ) from None  # fmt: skip

    def _call(
        self,
        verb: str,
        kind: str,
        name: str,
        namespace: str | None,
        *,
        api_version: str | None = None,
        manager: str = MANAGER,
        **params: Any,
    ) -> Manifest:
        import urllib3

        resource = self._resource(kind, api_version)
        if name and verb != "create":
            params["name"] = name
        if verb in ("server_side_apply", "create", "patch"):
            params |= {"field_manager": manager, "query_params": [("fieldValidation", "Strict")]}
        with self.errors(kind, name, (namespace or "") if resource.namespaced else ""):
            call = partial(
                getattr(self._dynamic, verb),
                resource,
                namespace=namespace if resource.namespaced else None,
                serialize=False,
                _request_timeout=CALL_S,
                **params,
            )
            try:
                response = call()
            except urllib3.exceptions.HTTPError:
                if verb != "get":
                    raise
                response = call()  # the server may have closed a connection that was kept
            return dict(json.loads(response.data))

    @contextmanager
    def errors(self, kind: str, name: str, namespace: str | None = None) -> Iterator[None]:
        """What the libraries raise, as KubeRayError about this object. namespace: None = this client's."""
        import urllib3
        from kubernetes.client.exceptions import ApiException

        where = self.namespace if namespace is None else namespace

        def failed(message: str, status: int, reason: str) -> KubeRayError:
            return KubeRayError(
                message, kind=kind, name=name, namespace=where, status=status, reason=reason
            )

        try:
            yield
        except ApiException as error:
            reason, message = _explained(error)
            if error.status == 409 and "conflict with" in message:
                message += "; somebody else set this: force (--force) takes it over"
            raise failed(message, error.status or 0, reason) from None
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise failed(f"{self.context.server} does not answer: {error}", 0, "Unreachable") from error

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
        """What ``labkit cluster status`` would say, for the end of an error."""
        from labkit.cluster import status

        try:
            lines = [str(line) for line in status.judge(status.gather(self)) if line.state != "ok"]
        except KubeRayError:
            return ""
        return "".join(f"\n  {line}" for line in lines)


def _all(dry_run: bool) -> str | None:
    return "All" if dry_run else None


def _passes(error: KubeRayError) -> bool:
    """Whether it is worth asking again: the API server is away, or overloaded."""
    return error.status in (0, 429) or error.status >= 500


def _explained(error: Any) -> tuple[str, str]:
    """Kubernetes' reason and message, out of the answer's body."""
    try:
        body = json.loads(error.body)
        return str(body.get("reason", "")), str(body.get("message") or error.reason)
    except (TypeError, ValueError, AttributeError):
        return str(error.reason), str(error.body or error.reason or error.status)
