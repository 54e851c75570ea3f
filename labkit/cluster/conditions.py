"""When is an object as it should be, and how is it described until then? From its plain data alone."""

from __future__ import annotations

from typing import Any

Manifest = dict[str, Any]


class Hopeless(Exception):
    """What was waited for will not come. Says why."""


def condition(manifest: Manifest, kind: str) -> Manifest:
    """One of an object's conditions, empty where it has none of that type."""
    for each in manifest.get("status", {}).get("conditions") or []:
        if each.get("type") == kind:
            return dict(each)
    return {}


def holds(manifest: Manifest, until: str) -> bool:
    """Whether a condition is true, by what the object's controller has seen last.

    "Ready" also of a RayCluster (head and all workers), a RayJob (ended well), a claim (bound), a Deployment
    (available) and a Service, none of which has a condition of that name. Raises Hopeless where a job failed.
    """
    status, generation = manifest.get("status", {}), manifest["metadata"].get("generation", 0)
    if status.get("observedGeneration", generation) < generation:
        return False
    match (manifest["kind"], until):
        case ("RayService", "Ready"):
            # During an upgrade it is Ready too: with the old cluster.
            upgrading = condition(manifest, "UpgradeInProgress").get("status") == "True"
            return condition(manifest, "Ready").get("status") == "True" and not upgrading
        case ("RayCluster", "Ready"):
            wanted = status.get("desiredWorkerReplicas", 0)
            return status.get("state") == "ready" and status.get("readyWorkerReplicas", 0) >= wanted
        case ("RayJob", "Ready" | "Complete"):
            state = status.get("jobDeploymentStatus", "")
            if state in ("Failed", "ValidationFailed") or status.get("jobStatus") == "STOPPED":
                raise Hopeless(f"it ended: {describe(manifest)}")
            return state == "Complete"
        case ("RayJob", "Suspended"):
            return bool(status.get("jobDeploymentStatus") == "Suspended")
        case ("RayCluster", "Suspended"):
            # The state may say so a moment earlier, while the operator still has pods to end.
            known = condition(manifest, "RayClusterSuspended")
            return known["status"] == "True" if known else status.get("state") == "suspended"
        case ("PersistentVolumeClaim", "Ready"):
            return status.get("phase") == "Bound"
        case ("Deployment", "Ready"):
            return condition(manifest, "Available").get("status") == "True"
        case ("Service", "Ready"):
            return True
    return condition(manifest, until).get("status") == "True"


def describe(manifest: Manifest) -> str:
    """The object's state in a few words, as its controller gives it."""
    status = manifest.get("status", {})
    if not status:
        return "no status yet"
    match manifest["kind"]:
        case "RayService":
            ready = condition(manifest, "Ready")
            words = ["ready" if ready.get("status") == "True" else _said(ready) or "not ready"]
            if condition(manifest, "UpgradeInProgress").get("status") == "True":
                words.append("a new cluster is being made ready")
            return "; ".join(words)
        case "RayCluster":
            ready, wanted = status.get("readyWorkerReplicas", 0), status.get("desiredWorkerReplicas", 0)
            head = "ready" if condition(manifest, "HeadPodReady").get("status") == "True" else "not ready"
            return f"{status.get('state') or 'starting'}; head {head}; {ready} of {wanted} workers ready"
        case "RayJob":
            words = [status.get("jobDeploymentStatus") or "new", status.get("jobStatus") or ""]
            words += [status.get("reason") or "", _short(status.get("message") or "")]
            return ", ".join(word for word in words if word)
        case "Pod":
            return str(status.get("phase", "unknown"))
    return str(status.get("phase") or "") or _said(condition(manifest, "Ready")) or "not ready"


def _said(found: Manifest) -> str:
    return ": ".join(part for part in (found.get("reason", ""), _short(found.get("message", ""))) if part)


def _short(text: str, longest: int = 300) -> str:
    text = " ".join(text.split())
    return text if len(text) <= longest else f"...{text[-longest:]}"
