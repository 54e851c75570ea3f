"""Which Kubernetes cluster is meant: the one that was named, never the default context."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from labkit.files import whole_file
from labkit.settings import settings

if TYPE_CHECKING:
    from kubernetes.client import ApiClient

NODE = "bits-to-pods-node"
IN_CLUSTER = "in-cluster"
ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
TIMEOUT_S = 5


class Unreachable(RuntimeError):
    """No cluster was named, or the one that was does not answer. Says what to do."""


@dataclass(frozen=True)
class Context:
    """A cluster, and as whom it is talked to.

    name        the context's name in its kubeconfig
    server      its address, ``https://...``
    kubeconfig  the file (or files, as KUBECONFIG lists them); None in a pod
    is_node     it is the project's own test node, on which faults are allowed
    """

    name: str
    server: str
    kubeconfig: Path | None
    is_node: bool = False

    def client(self) -> ApiClient:
        """A client of its own. Raises Unreachable where the configuration cannot be used."""
        from kubernetes import client, config

        loaded = client.Configuration()
        loaded.retries = False  # each would be remarked on, on the screen
        try:
            if self.kubeconfig is None:
                config.load_incluster_config(loaded)
            else:
                config.load_kube_config(
                    str(self.kubeconfig),
                    context=self.name,
                    client_configuration=loaded,
                    persist_config=False,
                )
        except (config.ConfigException, OSError) as error:
            raise Unreachable(f"context {self.name!r} cannot be used: {error}") from error
        if self.is_node:
            loaded.proxy = None  # loopback
        return client.ApiClient(loaded)

    def __str__(self) -> str:
        return f"{self.name} ({self.server})"


def current() -> Context:
    """The context that LABKIT_KUBE_CONTEXT names; in a pod the cluster around it; else the test node.

    Raises Unreachable where none of them is there.
    """
    wanted = os.environ.get("LABKIT_KUBE_CONTEXT")
    node = settings().node / "kubeconfig"
    if wanted:
        known = {**_contexts(node), **_contexts(_users())}
        if wanted not in known:
            there = ", ".join(sorted(known)) or "none"
            raise Unreachable(
                f"LABKIT_KUBE_CONTEXT={wanted}: no such context in {_users()}; there is {there}"
            )
        return known[wanted]
    if os.environ.get("KUBERNETES_SERVICE_HOST") and (ACCOUNT / "token").exists():
        host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ.get("KUBERNETES_SERVICE_PORT", "443")
        return Context(IN_CLUSTER, f"https://{host}:{port}", None)
    if NODE in (contexts := _contexts(node)):
        return contexts[NODE]
    there = ", ".join(sorted(_contexts(_users()))) or "none yet"
    raise Unreachable(
        f"no cluster was named: set LABKIT_KUBE_CONTEXT to a context of {_users()} (there: {there}), or make the "
        "project's own test node with `make node` and `make node-up`"
    )


def reachable(context: Context) -> str | None:
    """None where the API server answers and is ready, else why not, in one line."""
    import urllib3
    from kubernetes.client.exceptions import ApiException

    try:
        api = context.client()
        response = api.call_api(
            *api.param_serialize("GET", "/readyz", auth_settings=["BearerToken"]),
            _request_timeout=TIMEOUT_S,
        )
        status, text = response.status, (response.read() or b"").decode(errors="replace").strip()
    except Unreachable as error:
        return str(error)
    except ApiException as error:
        status, text = error.status, error.reason or ""
    except (urllib3.exceptions.HTTPError, OSError) as error:
        return f"{context} does not answer: {_why(error)}{_remedy(context)}"
    if status in (401, 403):
        return f"{context} refuses this user ({status}): log in again, or choose another context"
    return None if status == 200 else f"{context} is not ready ({status}): {text[-200:]}"


def confirm(
    context: Context, namespace: str, yes: bool = False, ask: Callable[[str], str] | None = None
) -> None:
    """Before the first write to a context that was not written to yet: ask, and remember the answer.

    The test node and the cluster around a pod need no question. Raises RuntimeError where the answer is not yes, or
    where nobody can be asked.
    """
    if context.is_node or context.kubeconfig is None:
        return
    book = settings().cache / "kube-contexts.json"
    seen = json.loads(book.read_text()) if book.exists() else []
    entry = [context.name, context.server]
    if entry in seen:
        return
    if not yes:
        if ask is None and not sys.stdin.isatty():
            raise RuntimeError(f"nothing was written to {context}: not used before; add --yes to go on")
        answer = (ask or input)(f"First write to {context}, namespace {namespace}. Go on? [y/N] ")
        if answer.strip().lower() not in ("y", "yes"):
            raise RuntimeError(f"nothing was written to {context}")
    with whole_file(book, mode=0o600) as part:
        part.write_text(json.dumps([*seen, entry]))


def _users() -> Path:
    return Path(os.environ.get("KUBECONFIG") or "~/.kube/config")


def _contexts(kubeconfig: Path) -> dict[str, Context]:
    """The contexts of a kubeconfig, by name; none where there is no such file."""
    content: dict[str, dict[str, Any]] = {"contexts": {}, "clusters": {}}
    for path in str(kubeconfig).split(os.pathsep):
        file = Path(path).expanduser()
        if not path or not file.is_file():
            continue
        try:
            read = yaml.safe_load(file.read_text()) or {}
            for part, known in content.items():  # of equal names the first counts, as for kubectl
                for entry in read.get(part) or []:
                    known.setdefault(entry["name"], entry[part.removesuffix("s")])
        except (yaml.YAMLError, OSError, AttributeError, TypeError, KeyError) as error:
            raise Unreachable(f"{file} is no kubeconfig: {error}") from error
    is_node = kubeconfig == settings().node / "kubeconfig"
    return {
        name: Context(
            name,
            content["clusters"].get(entry.get("cluster"), {}).get("server", "unknown"),
            kubeconfig,
            is_node,
        )
        for name, entry in content["contexts"].items()
    }


def _why(error: Exception) -> str:
    """What is behind urllib3's account of it."""
    reason = getattr(error, "reason", None)
    text = str(reason or error)
    return text.split(": ", 1)[-1] if "object at 0x" in text else text


def _remedy(context: Context) -> str:
    return "; start it with `make node-up`" if context.is_node else ""
