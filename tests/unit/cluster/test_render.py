"""The manifests: the files, what the operator adds to them, and what `restricted` and Ray Serve say of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes.utils.quantity import parse_quantity
from ray.serve._private.build_app import build_app
from ray.serve.schema import ServeDeploySchema

from labkit.cluster import annotate, render
from labkit.cluster.check import check
from labkit.cluster.surroundings import redis_manifests
from labkit.serving import Deployment
from labkit.serving.app import build
from labkit.serving.deployment import APP_NAME

CLUSTER = Path(__file__).parents[3] / "cluster"
FP32 = Deployment(checkpoint="smollm2-135m-instruct", name="lab@fp32", threads=1)
INT4 = Deployment(
    checkpoint="/checkpoints/w4a16-gptq-g64", name="lab@int4", threads=1, replicas=2, max_batch=4
)


def everything(profile: str) -> list[render.Manifest]:
    """Every manifest that the profile can give."""
    return [
        *render.manifests([FP32], profile),
        *render.manifests([INT4, Deployment(checkpoint="tiny", threads=1)], profile, redis=True),
        render.redis_secret(),
        render.rayservice([FP32], profile, most_workers=3),
        render.raycluster(profile, workers=2),
        render.raycluster(profile, workers=0, most_workers=2),
        render.rayjob("python -c 'print(1)'", profile),
        render.rayjob("python -c 'print(1)'", profile, mode="K8sJobMode"),
        render.rayjob("python -c 'print(1)'", profile, mode="K8sJobMode", cluster="lab"),
    ]


def pods(manifest: Any) -> Iterator[dict[str, Any]]:
    """Every pod specification in it."""
    if isinstance(manifest, dict):
        if "containers" in manifest:
            yield manifest
        for value in manifest.values():
            yield from pods(value)
    elif isinstance(manifest, list):
        for value in manifest:
            yield from pods(value)


# The files


def test_the_base_is_what_render_writes() -> None:
    files = annotate.files(render.manifests())
    assert {path.name: path.read_text() for path in (CLUSTER / "base").iterdir()} == files, (
        "run `labkit cluster render --profile base --out cluster/base`"
    )


def test_comments_change_nothing() -> None:
    documents = everything("node")
    text = annotate.to_yaml(documents)
    assert list(yaml.safe_load_all(text)) == documents
    assert text.count("# ") >= len(annotate.WHY)


def test_every_comment_has_its_field() -> None:
    text = "".join(annotate.to_yaml(everything(profile)) for profile in render.PROFILES)
    for why in annotate.WHY.values():
        assert f"# {why.splitlines()[0]}\n" in text, why


def test_files_can_be_written_anew(tmp_path: Path) -> None:
    annotate.write(tmp_path / "out", render.manifests(redis=True))
    paths = annotate.write(tmp_path / "out", render.manifests(redis=True))
    kustomization = yaml.safe_load((tmp_path / "out" / "kustomization.yaml").read_text())
    assert {"kustomization.yaml", *kustomization["resources"]} == {path.name for path in paths}
    assert "redis.yaml" in kustomization["resources"]


# What the cluster says


@pytest.mark.parametrize("profile", render.PROFILES)
def test_the_schemas_accept_all_of_it(profile: str) -> None:
    verdicts = check(everything(profile))
    assert len(verdicts) > 15
    assert [str(verdict) for verdict in verdicts if verdict.state != "valid"] == []


@pytest.mark.parametrize("profile", render.PROFILES)
def test_every_pod_is_restricted(profile: str) -> None:
    """By https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted, point by point."""
    found = [spec for manifest in everything(profile) for spec in pods(manifest)]
    assert len(found) > 10
    for spec in found:
        security = spec["securityContext"]
        assert security["runAsNonRoot"] is True and security["runAsUser"] > 0
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
        kinds = {kind for volume in spec["volumes"] for kind in volume if kind != "name"}
        assert kinds <= {"emptyDir", "persistentVolumeClaim"}
        assert len(spec["containers"]) == 1
        for container in spec["containers"]:
            own = container["securityContext"]
            assert own["allowPrivilegeEscalation"] is False and own["capabilities"] == {"drop": ["ALL"]}
            assert own["readOnlyRootFilesystem"] is True
            assert all("hostPort" not in port for port in container.get("ports", []))
            mounted = {mount["name"] for mount in container["volumeMounts"]}
            assert mounted == {volume["name"] for volume in spec["volumes"]}


def test_the_autoscaler_which_the_operator_adds_is_restricted_and_alone_has_a_token() -> None:
    spec = render.raycluster("node", workers=0, most_workers=2)["spec"]
    assert spec["autoscalerOptions"]["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    head, worker = (next(pods(part)) for part in (spec["headGroupSpec"], spec["workerGroupSpecs"]))
    assert head["automountServiceAccountToken"] and not worker["automountServiceAccountToken"]
    # The operator makes an account of the cluster's name where none is given, with its role.
    assert "serviceAccountName" not in head and worker["serviceAccountName"] == "ray"
    for manifest in render.manifests(redis=True):
        assert all(not spec["automountServiceAccountToken"] for spec in pods(manifest))


def test_names_are_no_longer_than_the_operator_allows() -> None:
    for make, longest in [
        (lambda name: render.rayservice([FP32], name=name), 47),
        (lambda name: render.rayjob("true", name=name), 47),
        (lambda name: render.raycluster(name=name), 53),
    ]:
        make("a" * longest)
        with pytest.raises(ValueError, match=f"has {longest + 1} characters; expected at most {longest}"):
            make("a" * (longest + 1))
    for wrong in ("", "1lab", "Lab", "lab_", "lab-", "lab.a"):
        with pytest.raises(ValueError, match="expected small letters"):
            render.rayservice([FP32], name=wrong)
        with pytest.raises(ValueError, match="Namespace name"):
            render.rayservice([FP32], namespace=wrong)
    with pytest.raises(ValueError, match="there are base, node, kind, gpu"):
        render.manifests(profile="aws")


# What it takes


def requests(spec: dict[str, Any], *injected: str) -> float:
    """Cores that the scheduler sets aside for a pod: of its containers together, or of the greediest init container."""
    own = [parse_quantity(container["resources"]["requests"]["cpu"]) for container in spec["containers"]]
    return float(max(sum(own), *map(parse_quantity, injected), 0))


def cores(cluster: dict[str, Any]) -> float:
    """Of one Ray cluster. The operator puts an init container before each worker: 200m (its pod.go, wait-gcs-ready)."""
    head = requests(next(pods(cluster["headGroupSpec"])))
    group = cluster["workerGroupSpecs"][0]
    return head + group["replicas"] * requests(next(pods(group)), "200m")


def system() -> float:
    """Of the operator, CoreDNS and metrics-server, as the node runs them."""
    config = CLUSTER / "node" / "config"
    patches = yaml.safe_load((config / "kustomization.yaml").read_text())["patches"]
    documents = [
        *yaml.safe_load_all((config / "addons.yaml").read_text()),
        *(yaml.safe_load(patch["patch"]) for patch in patches),
    ]
    found = [requests(spec) for spec in pods(documents)]
    assert len(found) == 3 and all(found)
    return sum(found)


def test_an_upgrade_fits_the_node() -> None:
    for redis in (False, True):
        documents = render.manifests([FP32], "node", redis=redis)
        service = documents[-1]["spec"]["rayClusterConfig"]
        rest = sum(requests(spec) for document in documents[:-1] for spec in pods(document))
        total = system() + 2 * cores(service) + rest
        print(f"redis={redis}: {total:.2f} cores")
        assert total <= 1.8


def test_a_job_fits_beside_the_service_on_the_node() -> None:
    service = render.rayservice([FP32], "node")["spec"]["rayClusterConfig"]
    job = render.rayjob("true", "node", mode="K8sJobMode")["spec"]
    submitter = requests(job["submitterPodTemplate"]["spec"])
    assert submitter > 0
    assert system() + cores(service) + cores(job["rayClusterSpec"]) + submitter <= 1.8


@pytest.mark.parametrize("profile", render.PROFILES)
def test_the_worker_has_room_for_the_old_and_the_new_replica(profile: str) -> None:
    spec = render.rayservice([FP32], profile)["spec"]
    [group] = spec["rayClusterConfig"]["workerGroupSpecs"]
    [application] = yaml.safe_load(spec["serveConfigV2"])["applications"]
    ingress, model = application["deployments"]
    assert ingress["num_replicas"] == 1 and "max_surge_percent" not in model
    needed = FP32.threads + ingress["ray_actor_options"]["num_cpus"]
    assert 2 * needed <= int(group["rayStartParams"]["num-cpus"]) * group["replicas"]
    assert spec["rayClusterConfig"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_replicas_that_can_have_a_worker_each_do() -> None:
    """A replica takes its node's only place, also while it ends: nothing can be started before it, there."""
    twice = Deployment(checkpoint="tiny", replicas=2, threads=1)
    spec = render.rayservice([twice], "node", redis=True)["spec"]
    assert spec["rayClusterConfig"]["workerGroupSpecs"][0]["replicas"] == 2
    for deployment in yaml.safe_load(spec["serveConfigV2"])["applications"][0]["deployments"]:
        assert (deployment["max_replicas_per_node"], deployment["max_surge_percent"]) == (1, 0)
    for workers, replicas in [(1, 2), (2, 3), (2, 1)]:
        served = [Deployment(checkpoint="tiny", replicas=replicas)]
        for deployment in render.serve_config(served, workers=workers)["applications"][0]["deployments"]:
            assert "max_replicas_per_node" not in deployment and "max_surge_percent" not in deployment


def test_the_object_store_fits_shared_memory() -> None:
    for spec in (render.raycluster()["spec"],):
        for part in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            [shm] = [v["emptyDir"] for v in next(pods(part))["volumes"] if v["name"] == "shm"]
            assert shm["medium"] == "Memory"
            assert int(part["rayStartParams"]["object-store-memory"]) < parse_quantity(shm["sizeLimit"])


# What is served


@pytest.mark.parametrize("deployments", [[FP32], [INT4, Deployment(checkpoint="tiny")]])
def test_the_serve_config_is_ray_serves_own_and_names_what_build_makes(
    deployments: list[Deployment],
) -> None:
    config = render.serve_config(deployments)
    [application] = ServeDeploySchema.model_validate(config).applications
    assert (application.name, application.import_path) == (APP_NAME, "labkit.serving.app:build")
    built = build_app(build(application.args), name=APP_NAME, default_runtime_env={})
    assert {d.name for d in built.deployments} == {d.name for d in application.deployments}
    assert built.ingress_deployment_name == application.deployments[0].name
    # What args leave out is the default: the replicas get the very deployments.
    assert [Deployment.model_validate(fields) for fields in application.args["deployments"]] == deployments
    # Everything that serves is replaced by starting the new one first, and is given time to end.
    for deployment in built.deployments:
        assert deployment._deployment_config.max_surge_percent == 100
    for override in application.deployments:
        assert override.graceful_shutdown_timeout_s >= 60


def test_there_must_be_something_to_serve_and_no_alias_twice() -> None:
    with pytest.raises(ValueError, match="nothing to serve"):
        render.serve_config([])
    with pytest.raises(ValueError, match="its own name"):
        render.serve_config([FP32, INT4])


def test_another_checkpoint_changes_only_what_is_updated_in_place() -> None:
    """The operator makes a new Ray cluster for any change below rayClusterConfig."""
    one, other = (render.rayservice([served], "node")["spec"] for served in (FP32, INT4))
    assert {key for key in one if one[key] != other[key]} == {"serveConfigV2"}
    names = [
        [d["name"] for d in yaml.safe_load(spec["serveConfigV2"])["applications"][0]["deployments"]]
        for spec in (one, other)
    ]
    assert names[0] == names[1] == ["Ingress", "model-lab"]  # kept and updated, not ended and begun


def test_redis_holds_the_heads_state() -> None:
    deployment, service = redis_manifests("node", name="x", namespace="n")
    rayservice = render.rayservice([FP32], "node", name="x", namespace="n", redis=True)
    spec, annotations = rayservice["spec"]["rayClusterConfig"], rayservice["metadata"]["annotations"]
    assert 0 < int(annotations["ray.io/gcs-ft-deletion-timeout"]) < 300  # which is the operator's own
    options = spec["gcsFaultToleranceOptions"]
    port = service["spec"]["ports"][0]["port"]
    assert options["redisAddress"] == f"{service['metadata']['name']}:{port}"
    [redis] = next(pods(deployment))["containers"]
    secret = render.redis_secret(name="x", namespace="n")
    for reference in (options["redisPassword"], redis["env"][0]):
        ref = reference["valueFrom"]["secretKeyRef"]
        assert ref["name"] == secret["metadata"]["name"] and ref["key"] in secret["stringData"]
    assert (
        service["spec"]["selector"].items() <= deployment["spec"]["template"]["metadata"]["labels"].items()
    )
    assert spec["workerGroupSpecs"][0]["replicas"] == 2
    assert len(secret["stringData"]["password"]) >= 32
    assert secret != render.redis_secret(name="x", namespace="n")
    assert not any(
        m["kind"] == "Secret" for m in render.manifests(redis=True)
    )  # applied again, it would differ


def test_what_a_caller_changes_is_the_callers_own() -> None:
    before = copy.deepcopy(everything("base")[:9])

    def spoil(value: Any) -> None:
        if isinstance(value, dict):
            for inner in value.values():
                spoil(inner)
            value["spoiled"] = True
        elif isinstance(value, list):
            for inner in value:
                spoil(inner)

    spoil(everything("base"))
    assert everything("base")[:9] == before
