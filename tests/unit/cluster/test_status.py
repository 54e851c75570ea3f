"""What a screen says of a cluster in trouble, from objects as an API server gives them."""

from __future__ import annotations

import json
from copy import deepcopy
from typing import Any

import pytest

from labkit.cluster.render import DEFAULT, rayservice
from labkit.cluster.status import Line, is_well, judge

NOW = "2026-11-25T20:00:00+00:00"
Manifest = dict[str, Any]


def metadata(name: str, **labels: str) -> Manifest:
    return {
        "name": name,
        "namespace": "bits-to-pods",
        "uid": f"uid-of-{name}",
        "generation": 1,
        "labels": labels,
    }


def true(kind: str, status: str = "True", **more: str) -> Manifest:
    return {"type": kind, "status": status, **more}


OPERATOR = {
    "kind": "Pod",
    "metadata": {"name": "kuberay-operator-7d9", "namespace": "kuberay-system", "uid": "op"},
    "spec": {"containers": [{"name": "kuberay-operator"}]},
    "status": {"phase": "Running", "conditions": [true("Ready")]},
}
SERVICE = {
    **rayservice([DEFAULT]),
    "status": {
        "observedGeneration": 1,
        "conditions": [true("Ready", "False", reason="Initializing", message="RayService is initializing")],
    },
}
SERVICE["metadata"] |= {"uid": "uid-of-lab", "generation": 1}
READY_SERVICE = deepcopy(SERVICE)
READY_SERVICE["status"] = {
    "observedGeneration": 1,
    "numServeEndpoints": 1,
    "conditions": [true("Ready"), true("UpgradeInProgress", "False")],
    "activeServiceStatus": {
        "rayClusterName": "lab-abc",
        "applicationStatuses": {"labkit": {"status": "RUNNING"}},
    },
}
CLUSTER = {
    "kind": "RayCluster",
    "metadata": metadata("lab-abc"),
    "spec": {
        "workerGroupSpecs": [{"groupName": "workers", "replicas": 1}],
        "authOptions": {"mode": "token"},
    },
    "status": {"observedGeneration": 1, "desiredWorkerReplicas": 1},
}
READY_CLUSTER = deepcopy(CLUSTER)
READY_CLUSTER["status"] |= {
    "state": "ready",
    "readyWorkerReplicas": 1,
    "conditions": [true("HeadPodReady")],
}


def pod(name: str = "lab-abc-head", kind: str = "head", **status: Any) -> Manifest:
    asks = {"cpu": "250m", "memory": "768Mi"}
    return {
        "kind": "Pod",
        "metadata": metadata(name, **{"ray.io/cluster": "lab-abc", "ray.io/node-type": kind}),
        "spec": {"containers": [{"name": "ray-head", "resources": {"requests": asks}}]},
        "status": {
            "phase": "Pending",
            "conditions": [true("PodScheduled"), true("Ready", "False")],
            **status,
        },
    }


def container(waiting: Manifest | None = None, **more: Any) -> Manifest:
    state = {"waiting": waiting} if waiting else {"running": {"startedAt": "2026-11-25T19:50:00Z"}}
    image = "bits-to-pods/server:dev"
    return {"name": "ray-head", "ready": False, "restartCount": 0, "image": image, "state": state, **more}


def event(
    of: str, reason: str, message: str, kind: str = "Warning", at: str = "2026-11-25T19:59:00Z"
) -> Manifest:
    return {
        "kind": "Event",
        "involvedObject": {"kind": "?", "name": of, "uid": f"uid-of-{of}"},
        "reason": reason,
        "message": message,
        "type": kind,
        "lastTimestamp": at,
    }


def picture(**changed: Any) -> Manifest:
    objects = {
        "RayService": [SERVICE],
        "RayCluster": [CLUSTER],
        "RayJob": [],
        "Pod": [],
        "Event": [],
        "PersistentVolumeClaim": [],
    }
    whole = {
        "context": "bits-to-pods-node (https://127.0.0.1:1)",
        "on_node": True,
        "namespace": "bits-to-pods",
        "now": NOW,
        "installed": True,
        "operator": [OPERATOR],
        "objects": {**objects, **{name: each for name, each in changed.items() if name in objects}},
        "ray": {},
        **{name: each for name, each in changed.items() if name not in objects},
    }
    return dict(json.loads(json.dumps(whole)))  # it must be plain data


def problem(found: Manifest) -> Line:
    """The one line that wants somebody to act."""
    lines = [line for line in judge(found) if line.state == "problem"]
    assert len(lines) == 1, lines
    assert lines[0].todo, "a problem says what helps"
    assert "\n" not in str(lines[0])
    return lines[0]


def test_what_is_well_says_so_and_no_more() -> None:
    running = pod(phase="Running", conditions=[true("Ready")], containerStatuses=[container(ready=True)])
    lines = judge(picture(RayService=[READY_SERVICE], RayCluster=[READY_CLUSTER], Pod=[running]))
    assert is_well(lines)
    assert [line.what for line in lines] == ["KubeRay operator", "RayService lab", "RayCluster lab-abc"]
    assert "lab@fp32" in lines[1].found
    assert "1 pod" in lines[1].found


def test_an_empty_namespace_says_how_to_begin() -> None:
    lines = judge(picture(RayService=[], RayCluster=[]))
    assert is_well(lines)
    assert "labkit cluster up" in lines[-1].todo


def test_the_image_is_not_there() -> None:
    status = [container({"reason": "ErrImageNeverPull", "message": "Container image is not present"})]
    line = problem(picture(Pod=[pod(containerStatuses=status)]))
    assert "bits-to-pods/server:dev" in line.found
    assert "Never" in line.found
    assert "make image" in line.todo


def test_the_image_cannot_be_fetched() -> None:
    said = 'failed to resolve reference "bits-to-pods/server:dev": not found'
    for reason in ("ErrImagePull", "ImagePullBackOff"):
        status = [container({"reason": reason, "message": said})]
        line = problem(picture(Pod=[pod(containerStatuses=status)]))
        assert said in line.found


def test_no_node_has_so_much_cpu() -> None:
    message = (
        "0/2 nodes are available: 1 Insufficient cpu, 1 node(s) had untolerated taint(s). no new claims to "
        "deallocate, preemption: 0/2 nodes are available: 2 Preemption is not helpful for scheduling."
    )
    conditions = [true("PodScheduled", "False", reason="Unschedulable", message=message)]
    line = problem(picture(Pod=[pod(conditions=conditions)]))
    assert "250m cpu" in line.found
    assert "untolerated taint" in line.found
    assert "Preemption" not in line.found
    assert "labkit cluster down" in line.todo


def test_the_only_node_has_not_so_much_cpu() -> None:
    """As the scheduler says it of one node: the resource ends a sentence."""
    message = (
        "0/1 nodes are available: 1 Insufficient cpu. no new claims to deallocate, preemption: 0/1 nodes are "
        "available: 1 No preemption victims found for incoming pod."
    )
    conditions = [true("PodScheduled", "False", reason="Unschedulable", message=message)]
    assert "250m cpu, and" in problem(picture(Pod=[pod(conditions=conditions)])).found


QUOTA = (
    'Failed to create head Pod bits-to-pods/lab-abc-head, pods "lab-abc-head" is forbidden: exceeded quota: small, '
    "requested: requests.cpu=200m, used: requests.cpu=0, limited: requests.cpu=100m"
)
SECURITY = (
    'Failed to create head Pod bits-to-pods/lab-abc-head, pods "lab-abc-head" is forbidden: violates PodSecurity '
    '"restricted:latest": allowPrivilegeEscalation != false (container "ray-head" must set '
    "securityContext.allowPrivilegeEscalation=false), runAsNonRoot != true"
)


def test_the_quota_is_used_up() -> None:
    line = problem(picture(Event=[event("lab-abc", "FailedToCreateHeadPod", QUOTA)]))
    assert line.what == "RayCluster lab-abc"
    assert "exceeded quota: small" in line.found
    assert "limited: requests.cpu=100m" in line.found
    assert "quota raised" in line.todo


def test_pod_security_refuses_the_pod() -> None:
    line = problem(picture(Event=[event("lab-abc", "FailedToCreateHeadPod", SECURITY)]))
    assert "restricted:latest" in line.found
    assert "runAsNonRoot != true" in line.found
    assert "securityContext" in line.todo


def test_an_old_refusal_does_not_count_once_the_pods_are_there() -> None:
    running = {
        "phase": "Running",
        "conditions": [true("Ready")],
        "containerStatuses": [container(ready=True)],
    }
    pods = [pod(**running), pod("lab-abc-worker", "worker", **running)]
    lines = judge(picture(Event=[event("lab-abc", "FailedToCreateHeadPod", QUOTA)], Pod=pods))
    assert not [line for line in lines if line.state == "problem"]


def test_of_two_refusals_the_later_counts() -> None:
    events = [
        event("lab-abc", "FailedToCreateHeadPod", SECURITY, at="2026-11-25T19:59:50Z"),
        event("lab-abc", "FailedToCreateHeadPod", QUOTA, at="2026-11-25T19:59:10Z"),
    ]
    assert "PodSecurity" not in problem(picture(Event=events)).todo
    assert "securityContext" in problem(picture(Event=events)).todo


def test_a_container_ends_again_and_again() -> None:
    ended = {"terminated": {"exitCode": 3, "reason": "Error"}}
    status = [container({"reason": "CrashLoopBackOff"}, restartCount=4, lastState=ended)]
    line = problem(picture(Pod=[pod(phase="Running", containerStatuses=status)]))
    assert "4 restarts" in line.found
    assert "exit code 3" in line.found
    assert "labkit cluster logs lab-abc-head --previous" in line.todo


def test_a_container_that_needs_more_memory_than_it_may() -> None:
    ended = {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}
    status = [container({"reason": "CrashLoopBackOff"}, restartCount=1, lastState=ended)]
    line = problem(picture(Pod=[pod(phase="Running", containerStatuses=status)]))
    assert "memory limit" in line.found


def test_a_probe_fails() -> None:
    said = event(
        "lab-abc-head", "Unhealthy", "Readiness probe failed: HTTP probe failed with statuscode: 503"
    )
    for start, state in (("2026-11-25T19:59:40Z", "wait"), ("2026-11-25T19:50:00Z", "problem")):
        running = pod(phase="Running", startTime=start, containerStatuses=[container()])
        lines = [
            line for line in judge(picture(Pod=[running], Event=[said])) if line.what == "Pod lab-abc-head"
        ]
        assert [line.state for line in lines] == [state]
        assert "readiness probe" in lines[0].found
        assert "503" in lines[0].found


def test_a_worker_without_a_replica_is_no_trouble_while_another_one_serves() -> None:
    said = event("idle", "Unhealthy", "Readiness probe failed: connection refused")
    idle = pod(
        "idle", "worker", phase="Running", startTime="2026-11-25T19:50:00Z", containerStatuses=[container()]
    )
    lines = judge(picture(RayService=[READY_SERVICE], RayCluster=[READY_CLUSTER], Pod=[idle], Event=[said]))
    assert is_well(lines)


def test_a_model_that_cannot_be_loaded() -> None:
    failed = deepcopy(SERVICE)
    error = (
        "The deployment failed to start 3 times in a row. Error:\n\x1b[36mray::ServeReplica.initialize()\x1b[39m\n"
        "  File ...\nFileNotFoundError: checkpoint '/checkpoints/int3' is not a folder\n"
    )
    failed["status"]["pendingServiceStatus"] = {
        "rayClusterName": "lab-abc",
        "applicationStatuses": {
            "labkit": {
                "status": "DEPLOY_FAILED",
                "message": "Failed to update the deployments ['model-lab'].",
                "serveDeploymentStatuses": {"model-lab": {"status": "DEPLOY_FAILED", "message": error}},
            }
        },
    }
    line = problem(picture(RayService=[failed], RayCluster=[READY_CLUSTER]))
    assert line.what == "Serve application labkit"
    assert line.found == "DEPLOY_FAILED: FileNotFoundError: checkpoint '/checkpoints/int3' is not a folder"


@pytest.mark.parametrize(
    ("pods", "said"),
    [
        ([], "no pod of it"),
        ([{**OPERATOR, "status": {"phase": "Pending", "conditions": []}}], "kuberay-operator-7d9 Pending"),
    ],
)
def test_the_operator_does_not_run(pods: list[Manifest], said: str) -> None:
    line = problem(picture(operator=pods))
    assert line.what == "KubeRay operator"
    assert said in line.found
    assert "make node-up" in line.todo


def test_the_operator_was_never_installed() -> None:
    line = problem(picture(operator=[], installed=False, on_node=False, RayService=[], RayCluster=[]))
    assert "not installed" in line.found
    assert "node-up" not in line.todo


def test_a_user_who_may_not_see_the_operator_hears_no_complaint() -> None:
    assert is_well(judge(picture(operator=None, RayService=[READY_SERVICE], RayCluster=[READY_CLUSTER])))


@pytest.mark.parametrize("status", [401, 403])
def test_ray_refuses_the_token(status: int) -> None:
    ray = {"lab-abc": {"status": status, "message": "Invalid token"}}
    line = problem(picture(RayService=[SERVICE], RayCluster=[READY_CLUSTER], ray=ray))
    assert "token" in line.found
    assert "ray.io/cluster=lab-abc" in line.todo


CLAIM = {
    "kind": "PersistentVolumeClaim",
    "metadata": metadata("checkpoints"),
    "spec": {
        "accessModes": ["ReadWriteMany"],
        "resources": {"requests": {"storage": "5Gi"}},
        "storageClassName": "fast",
    },
    "status": {"phase": "Pending"},
}


def test_a_claim_gets_no_volume() -> None:
    said = event("checkpoints", "ProvisioningFailed", 'storageclass.storage.k8s.io "fast" not found')
    waits = "0/1 nodes are available: pod has unbound immediate PersistentVolumeClaims. preemption: ..."
    conditions = [true("PodScheduled", "False", reason="Unschedulable", message=waits)]
    found = picture(PersistentVolumeClaim=[CLAIM], Event=[said], Pod=[pod(conditions=conditions)])
    line = problem(found)
    assert "5Gi, ReadWriteMany" in line.found
    assert 'storageclass.storage.k8s.io "fast" not found' in line.found
    waiting = [each for each in judge(found) if each.what == "Pod lab-abc-head"]
    assert "waits for a volume" in waiting[0].found


def test_a_claim_that_waits_for_its_first_pod_is_well() -> None:
    said = event("checkpoints", "WaitForFirstConsumer", "waiting for first consumer", kind="Normal")
    assert is_well(
        judge(
            picture(
                RayService=[READY_SERVICE],
                RayCluster=[READY_CLUSTER],
                PersistentVolumeClaim=[CLAIM],
                Event=[said],
            )
        )
    )


def test_the_operator_refuses_the_service() -> None:
    said = event(
        "lab",
        "InvalidRayServiceSpec",
        "The RayService spec is invalid: headGroupSpec should have a container",
    )
    found = picture(Event=[said], RayCluster=[])
    lines = [line for line in judge(found) if line.state == "problem"]
    assert ["headGroupSpec should have a container" in line.found for line in lines] == [True]


def test_a_job_that_failed() -> None:
    job = {
        "kind": "RayJob",
        "metadata": metadata("sweep"),
        "spec": {},
        "status": {
            "jobDeploymentStatus": "Failed",
            "jobStatus": "FAILED",
            "reason": "AppFailed",
            "message": "Job entrypoint command failed with exit code 1",
        },
    }
    line = problem(picture(RayService=[], RayCluster=[], RayJob=[job]))
    assert "exit code 1" in line.found
    assert "labkit cluster logs sweep" in line.todo


def test_the_submitter_of_a_job_is_refused() -> None:
    job = {
        "kind": "RayJob",
        "metadata": metadata("sweep"),
        "spec": {},
        "status": {"jobDeploymentStatus": "Running", "jobStatus": ""},
    }
    said = event("sweep", "FailedCreate", f"Error creating: {SECURITY}")
    said["involvedObject"] = {"kind": "Job", "name": "sweep", "uid": "another"}
    line = problem(picture(RayService=[], RayCluster=[], RayJob=[job], Event=[said]))
    assert "restricted" in line.found


def test_a_suspended_cluster_is_well() -> None:
    asleep = {**CLUSTER, "spec": {**CLUSTER["spec"], "suspend": True}, "status": {"state": "suspended"}}
    lines = judge(picture(RayService=[], RayCluster=[asleep]))
    assert is_well(lines)
    assert "suspended" in lines[-1].found
