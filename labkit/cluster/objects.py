"""Kubernetes objects of one namespace, of any kind, over the official client's dynamic half.

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
from typing import Any

from labkit.cluster.conditions import Hopeless, describe, holds
from labkit.cluster.context import Context, current
from labkit.cluster.pods import NAMESPACE, Manifest

Manifests = list[Manifest]
Progress = Callable[[str], None]

MANAGER = "labkit"
OPERATOR = "kuberay-operator"
PATCHER = "labkit-patch"  # so that a conflict with an earlier scale() or suspend() says what it was
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


class Objects:
    """One namespace of one cluster.

    context    None = the one that ``context.current()`` finds
    namespace  where everything is looked for and made; a manifest that names another is refused
    """

    def __init__(self, context: Context | None = None, namespace: str = NAMESPACE) -> None:
        self.context = context or current()
        self.namespace = namespace
        self.client = self.context.client()
        self._dynamic: Any = None

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
                if not passes(error):
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
                if not passes(error) and not (error.status == 404 and found is None):
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

    def _obstacles(self) -> str:
        """What stands in the way, for the end of an error: lines that begin with a line break."""
        return ""


def _all(dry_run: bool) -> str | None:
    return "All" if dry_run else None


def passes(error: KubeRayError) -> bool:
    """Whether it is worth asking again: the API server is away, or overloaded."""
    return error.status in (0, 429) or error.status >= 500


def _explained(error: Any) -> tuple[str, str]:
    """Kubernetes' reason and message, out of the answer's body."""
    try:
        body = json.loads(error.body)
        return str(body.get("reason", "")), str(body.get("message") or error.reason)
    except (TypeError, ValueError, AttributeError):
        return str(error.reason), str(error.body or error.reason or error.status)
