"""What a real cluster says of a manifest: its API server, and for Ray's kinds the operator too.

Nothing starts: a quota of no pods stands in each namespace, so that no node needs to be cordoned.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from kubernetes.client import ApiClient

PART_OF = {"app.kubernetes.io/part-of": "bits-to-pods"}
PATIENCE_S = 60  # for the operator's word on an object
SILENCE = "operator's silence"


@dataclass(frozen=True)
class Ruling:
    """accepted, by whom it was decided, and in what words."""

    accepted: bool
    by: str
    message: str = ""


class Referee:
    def __init__(self, client: ApiClient) -> None:
        self.client = client
        self._kinds: dict[str, dict[str, Any]] = {}

    def call(
        self, method: str, path: str, body: Any = None, content: str = "application/json", **query: str
    ) -> Any:
        """(status, answer) of one request."""
        headers = {"Accept": "application/json", "Content-Type": content}
        prepared = self.client.param_serialize(
            method,
            path,
            query_params=list(query.items()),
            header_params=headers,
            body=body,
            auth_settings=["BearerToken"],
        )
        response = self.client.rest_client.request(
            prepared[0], prepared[1], headers=prepared[2], body=prepared[3], _request_timeout=30
        )
        text = (response.read() or b"{}").decode()
        return response.status, json.loads(text)

    def place(self, manifest: dict[str, Any], namespace: str) -> str | None:
        """The address of an object, by the kind that the server knows it under; None where it knows none."""
        version, kind = manifest["apiVersion"], manifest["kind"]
        root = f"/apis/{version}" if "/" in version else f"/api/{version}"
        if root not in self._kinds:
            status, answer = self.call("GET", root)
            found = answer["resources"] if status == 200 else []
            self._kinds[root] = {r["kind"]: r for r in found if "/" not in r["name"]}
        resource = self._kinds[root].get(kind)
        if resource is None:
            return None
        middle = f"/namespaces/{namespace}" if resource["namespaced"] else ""
        return f"{root}{middle}/{resource['name']}"

    def create(self, manifest: dict[str, Any], namespace: str, dry_run: bool = True) -> Ruling | None:
        """The API server's ruling on making an object, with strict fields; None for a kind it does not know."""
        place = self.place(manifest, namespace)
        if place is None:
            return None
        query = {
            "fieldManager": "labkit",
            "fieldValidation": "Strict",
            **({"dryRun": "All"} if dry_run else {}),
        }
        status, answer = self.call("POST", place, manifest, **query)
        return Ruling(
            status < 300, "API server", "" if status < 300 else answer.get("message", str(answer))
        )

    @contextmanager
    def namespaces(self, dry: str, names: set[str]) -> Iterator[None]:
        """Namespaces of our own: ``dry`` for dry runs, the others with a quota of no pods."""
        names = {dry, *names}
        try:
            for name in sorted(names):
                self.call("POST", "/api/v1/namespaces", {"metadata": {"name": name, "labels": PART_OF}})
                if name != dry:
                    quota = {"metadata": {"name": "no-pods"}, "spec": {"hard": {"pods": "0"}}}
                    status, answer = self.call("POST", f"/api/v1/namespaces/{name}/resourcequotas", quota)
                    assert status < 300, answer
            account = f"/api/v1/namespaces/{dry}/serviceaccounts/default"  # without it, no pod is accepted
            end = time.monotonic() + PATIENCE_S
            while self.call("GET", account)[0] != 200 and time.monotonic() < end:
                time.sleep(0.5)
            yield
        finally:
            for name in names:
                self.call("DELETE", f"/api/v1/namespaces/{name}")
            end = time.monotonic() + 2 * PATIENCE_S
            while (names := {name for name in names if self._is_there(name)}) and time.monotonic() < end:
                time.sleep(1)

    def _is_there(self, namespace: str) -> bool:
        """Whether a namespace is still there. What waits in it for a clean-up by pods that cannot start is let go."""
        for kind in ("rayjobs", "rayservices", "rayclusters"):
            root = f"/apis/ray.io/v1/namespaces/{namespace}/{kind}"
            for item in self.call("GET", root)[1].get("items", []):
                if item["metadata"].get("finalizers"):
                    change = {"metadata": {"finalizers": None}}
                    self.call(
                        "PATCH",
                        f"{root}/{item['metadata']['name']}",
                        change,
                        "application/merge-patch+json",
                    )
        return bool(self.call("GET", f"/api/v1/namespaces/{namespace}")[0] == 200)

    def operator(self, manifests: list[tuple[str, dict[str, Any]]]) -> list[Ruling]:
        """The operator's ruling on Ray objects that were applied: (namespace, manifest) each.

        It refuses by an event `Invalid...`. It has accepted what it has given any other event. What it has
        nothing to say of within PATIENCE_S counts as accepted by silence; a test sees that this is the exception.
        """
        found: list[Ruling | None] = [None] * len(manifests)
        end = time.monotonic() + PATIENCE_S
        while None in found and time.monotonic() < end:
            time.sleep(2)
            events: dict[tuple[str, str, str], list[dict[str, Any]]] = defaultdict(list)
            for namespace in {namespace for namespace, _ in manifests}:
                for event in self.call("GET", f"/api/v1/namespaces/{namespace}/events")[1].get("items", []):
                    about = event["involvedObject"]
                    events[namespace, about["kind"], about["name"]].append(event)
            for i, (namespace, manifest) in enumerate(manifests):
                key = (namespace, manifest["kind"], manifest["metadata"]["name"])
                found[i] = found[i] or self._ruling(events[key])
        return [ruling or Ruling(True, SILENCE) for ruling in found]

    @staticmethod
    def _ruling(events: list[dict[str, Any]]) -> Ruling | None:
        for event in events:
            if event["reason"].startswith("Invalid"):
                return Ruling(False, "operator", event["message"])
        return Ruling(True, "operator", events[0]["reason"]) if events else None
