"""When an object counts as ready, from the states that KubeRay's documentation and types name."""

from __future__ import annotations

from typing import Any

import pytest

from labkit.cluster.conditions import Hopeless, describe, holds


def thing(kind: str, generation: int = 1, **status: Any) -> dict[str, Any]:
    return {"kind": kind, "metadata": {"name": "x", "generation": generation}, "status": status}


def conditions(**states: str) -> list[dict[str, str]]:
    return [{"type": kind, "status": state} for kind, state in states.items()]


@pytest.mark.parametrize(
    ("manifest", "ready"),
    [
        (thing("RayService", conditions=conditions(Ready="True"), observedGeneration=1), True),
        (thing("RayService", conditions=conditions(Ready="False"), observedGeneration=1), False),
        (
            thing(
                "RayService",
                conditions=conditions(Ready="True", UpgradeInProgress="True"),
                observedGeneration=1,
            ),
            False,
        ),
        # The operator has not seen the change yet: what it says is about what was there before.
        (thing("RayService", 2, conditions=conditions(Ready="True"), observedGeneration=1), False),
        (thing("RayService"), False),
        (thing("RayCluster", state="ready", readyWorkerReplicas=2, desiredWorkerReplicas=2), True),
        (thing("RayCluster", state="ready", readyWorkerReplicas=1, desiredWorkerReplicas=2), False),
        (thing("RayCluster", state="suspended"), False),
        (thing("RayJob", jobDeploymentStatus="Running", jobStatus="RUNNING"), False),
        (thing("RayJob", jobDeploymentStatus="Complete", jobStatus="SUCCEEDED"), True),
        (thing("RayJob"), False),
        (thing("Pod", phase="Running", conditions=conditions(Ready="False")), False),
        (thing("Pod", phase="Running", conditions=conditions(Ready="True")), True),
        (thing("PersistentVolumeClaim", phase="Bound"), True),
        (thing("PersistentVolumeClaim", phase="Pending"), False),
        (thing("Deployment", conditions=conditions(Available="True")), True),
        (thing("Service"), True),
    ],
)
def test_ready(manifest: dict[str, Any], ready: bool) -> None:
    assert holds(manifest, "Ready") is ready


@pytest.mark.parametrize(
    "status",
    [
        {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "message": "exit code 1"},
        {"jobDeploymentStatus": "Failed", "reason": "DeadlineExceeded", "message": "exit code 1"},
        {"jobDeploymentStatus": "ValidationFailed", "message": "exit code 1"},
        {"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED", "message": "exit code 1"},
    ],
)
def test_a_job_that_failed_will_never_be_complete(status: dict[str, str]) -> None:
    with pytest.raises(Hopeless, match="exit code 1"):
        holds(thing("RayJob", **status), "Complete")


def test_any_condition_by_its_type() -> None:
    found = thing("RayCluster", conditions=conditions(HeadPodReady="True", RayClusterProvisioned="False"))
    assert holds(found, "HeadPodReady")
    assert not holds(found, "RayClusterProvisioned")
    assert not holds(found, "NoSuchCondition")


@pytest.mark.parametrize(
    ("manifest", "suspended"),
    [
        (thing("RayCluster", state="suspended"), True),
        (
            thing(
                "RayCluster",
                state="suspended",
                conditions=[{"type": "RayClusterSuspended", "status": "False"}],
            ),
            False,
        ),
        (thing("RayCluster", conditions=[{"type": "RayClusterSuspended", "status": "True"}]), True),
        (thing("RayCluster", state="ready"), False),
        (thing("RayJob", jobDeploymentStatus="Suspended"), True),
        (thing("RayJob", jobDeploymentStatus="Suspending"), False),
    ],
)
def test_suspended(manifest: dict[str, Any], suspended: bool) -> None:
    assert holds(manifest, "Suspended") is suspended


def test_descriptions_are_short_and_on_one_line() -> None:
    long = thing("RayJob", jobDeploymentStatus="Failed", message="trace\n" * 1000 + "the last word")
    assert len(describe(long)) < 400
    assert "\n" not in describe(long)
    assert describe(long).endswith("the last word")
    assert describe(thing("RayCluster")) == "no status yet"
    seen = describe(thing("RayCluster", state="", desiredWorkerReplicas=2, readyWorkerReplicas=1))
    assert "1 of 2 workers" in seen
