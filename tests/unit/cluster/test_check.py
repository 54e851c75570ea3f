"""`labkit cluster check`: manifests with one mistake each, and where it must be found."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from labkit.cluster import names
from labkit.cluster.check import Verdict, check, check_text
from labkit.cluster.documents import documents, resolve
from labkit.cluster.kubernetes_rules import quantity

SERVICE = """\
apiVersion: ray.io/v1
kind: RayService
metadata:
  name: lab
spec:
  serveConfigV2: |
    applications:
      - name: lab
        import_path: labkit.serving.app:build
        route_prefix: /
        args: {anything: goes}
        deployments:
          - name: tiny
            autoscaling_config:
              min_replicas: 1
              max_replicas: 3
            ray_actor_options:
              num_cpus: 0.1
  rayClusterConfig:
    rayVersion: 2.60.0
    headGroupSpec:
      rayStartParams:
        num-cpus: "0"
      template:
        spec:
          containers:
            - name: ray-head
              image: bits-to-pods/server:dev
              resources:
                requests: {cpu: 200m, memory: 1Gi}
    workerGroupSpecs:
      - groupName: workers
        replicas: 1
        minReplicas: 1
        maxReplicas: 2
        template:
          spec:
            containers:
              - name: ray-worker
                image: bits-to-pods/server:dev
"""
JOB = """\
apiVersion: ray.io/v1
kind: RayJob
metadata:
  name: quantize
spec:
  entrypoint: python -m labkit quantize
  shutdownAfterJobFinishes: true
  ttlSecondsAfterFinished: 60
  rayClusterSpec:
    headGroupSpec:
      template:
        spec:
          containers:
            - name: ray-head
              image: bits-to-pods/server:dev
"""
DEPLOYMENT = """\
apiVersion: apps/v1
kind: Deployment
metadata:
  name: redis
spec:
  selector:
    matchLabels: {app: redis}
  template:
    metadata:
      labels: {app: redis}
    spec:
      containers:
        - name: redis
          image: redis:7
          ports:
            - containerPort: 6379
          resources:
            limits: {cpu: 0.5, memory: 64Mi}
"""


def only(text: str) -> Verdict:
    (verdict,) = check_text(text, "lab.yaml")
    return verdict


def errors(text: str) -> list[tuple[int | None, str]]:
    return [(error.line, error.path) for error in only(text).errors]


@pytest.mark.parametrize("text", [SERVICE, JOB, DEPLOYMENT], ids=["RayService", "RayJob", "Deployment"])
def test_the_examples_are_valid_before_they_are_broken(text: str) -> None:
    assert only(text).errors == []
    assert only(text).state == "valid"


# what stands there, what it becomes, and the line and path of the one error; lines are counted by hand
HEAD = "spec.rayClusterConfig.headGroupSpec.template.spec.containers[0]"
WORKERS = "spec.rayClusterConfig.workerGroupSpecs[0]"
TINY = "spec.serveConfigV2: applications[0].deployments[0]"
BROKEN_SERVICE = [
    ("minReplicas: 1\n", "minReplica: 1\n", 34, WORKERS + ".minReplica"),
    ("replicas: 1\n        min", "replicas: '1'\n        min", 33, WORKERS + ".replicas"),
    ("minReplicas: 1\n", "minReplicas: 3\n", 34, WORKERS + ".minReplicas"),
    ("maxReplicas: 2\n", "maxReplicas: 2147483648\n", 35, WORKERS + ".maxReplicas"),
    ("cpu: 200m", "cpu: 200mm", 30, HEAD + ".resources.requests.cpu"),
    ("cpu: 200m", "cpu: 0.2", 30, HEAD + ".resources.requests.cpu"),
    ('num-cpus: "0"', "num-cpus: 0", 23, "spec.rayClusterConfig.headGroupSpec.rayStartParams.num-cpus"),
    ("rayVersion: 2.60.0\n", "rayVersion: 2.60\n", 20, "spec.rayClusterConfig.rayVersion"),
    ("name: lab\nspec", "name: 2nd\nspec", 4, "metadata.name"),
    ("name: lab\nspec", f"name: {'x' * 48}\nspec", 4, "metadata.name"),
    ("spec:\n  serve", "spec:\n  managedBy: me\n  serve", 6, "spec.managedBy"),
    ("            - name: ray-head\n", "            - name: ray-head\n              name: head\n", 28,
     HEAD + ".name"),
    ("    rayVersion: 2.60.0\n", "    rayVersion: 2.51.0\n    authOptions: {mode: token}\n", 20,
     "spec.rayClusterConfig.rayVersion"),
    # inside the block of serveConfigV2
    ("num_cpus: 0.1", "num_cpu: 0.1", 18, TINY + ".ray_actor_options.num_cpu"),
    ("max_replicas: 3", "max_replica: 3", 16,
     TINY + ".autoscaling_config.max_replica"),
    ("max_replicas: 3", "max_replicas: 0", 16,
     TINY + ".autoscaling_config.max_replicas"),
    ("min_replicas: 1", "min_replicas: 4", 16,
     TINY + ".autoscaling_config.max_replicas"),
    ("- name: tiny", "- nam: tiny", 13, TINY + ".nam"),
    ("import_path: labkit.serving.app:build", "import_path: labkit", 9,
     "spec.serveConfigV2: applications[0].import_path"),
    ("route_prefix: /", "route_prefix: lab", 10, "spec.serveConfigV2: applications[0].route_prefix"),
    ("        args:", "        args: [\n        more:", 13, "spec.serveConfigV2"),
]  # fmt: skip


@pytest.mark.parametrize(("before", "after", "line", "path"), BROKEN_SERVICE)
def test_one_mistake_in_a_service_is_found_where_it_stands(
    before: str, after: str, line: int, path: str
) -> None:
    assert SERVICE.count(before) == 1
    verdict = only(SERVICE.replace(before, after))
    assert (line, path) in [(error.line, error.path) for error in verdict.errors], str(verdict)
    assert verdict.state == "invalid"


BROKEN_JOB = [
    ("shutdownAfterJobFinishes: true", "shutdownAfterJobFinishes: false", 8, "spec.ttlSecondsAfterFinished"),
    ("shutdownAfterJobFinishes: true", "shutdownAfterJobFinishes: soon", 7, "spec.shutdownAfterJobFinishes"),
    ("ttlSecondsAfterFinished: 60", "ttlSecondsAfterFinished: -1", 8, "spec.ttlSecondsAfterFinished"),
    ("ttlSecondsAfterFinished: 60", "backoffLimit: -1", 8, "spec.backoffLimit"),
    ("ttlSecondsAfterFinished: 60", "runtimeEnvYAML: 'pip: ['", 8, "spec.runtimeEnvYAML"),
    ("ttlSecondsAfterFinished: 60", "runtimeEnvYAML: '[pip]'", 8, "spec.runtimeEnvYAML"),
    ("ttlSecondsAfterFinished: 60", "activeDeadlineSeconds: 0", 8, "spec.activeDeadlineSeconds"),
    ("ttlSecondsAfterFinished: 60", "deletionStrategy: {}", 8, "spec.deletionStrategy"),
    ("ttlSecondsAfterFinished: 60", "clusterSelector: {ray.io/cluster: lab}\n  suspend: true", 9, "spec.suspend"),
]  # fmt: skip


@pytest.mark.parametrize(("before", "after", "line", "path"), BROKEN_JOB)
def test_one_mistake_in_a_job_is_found_where_it_stands(
    before: str, after: str, line: int, path: str
) -> None:
    assert JOB.count(before) == 1
    assert errors(JOB.replace(before, after)) == [(line, path)]


BROKEN_DEPLOYMENT = [
    ("matchLabels: {app: redis}", "matchLabels: {app: ray}", 7, "spec.selector.matchLabels.app"),
    ("  selector:\n    matchLabels: {app: redis}\n", "", 5, "spec.selector"),
    ("containerPort: 6379", "containerPort: 65536", 16, "spec.template.spec.containers[0].ports[0].containerPort"),
    ("memory: 64Mi", "memory: 64MB", 18, "spec.template.spec.containers[0].resources.limits.memory"),
    ("memory: 64Mi", "mem: 64Mi", 18, "spec.template.spec.containers[0].resources.limits.mem"),
    ("name: redis\n          image", "name: Redis\n          image", 13, "spec.template.spec.containers[0].name"),
    ("image: redis:7", "Image: redis:7", 14, "spec.template.spec.containers[0].Image"),
    ("labels: {app: redis}\n    spec", "labels: {app: redis, tier: n}\n    spec", 10,
     "spec.template.metadata.labels.tier"),
]  # fmt: skip


@pytest.mark.parametrize(("before", "after", "line", "path"), BROKEN_DEPLOYMENT)
def test_one_mistake_in_a_deployment_is_found_where_it_stands(
    before: str, after: str, line: int, path: str
) -> None:
    assert DEPLOYMENT.count(before) == 1
    assert errors(DEPLOYMENT.replace(before, after)) == [(line, path)]


def test_what_is_allowed_though_it_looks_odd() -> None:
    nulls = SERVICE.replace('        num-cpus: "0"\n', "        num-cpus:\n").replace(
        "replicas: 1\n        min", "replicas:\n        min"
    )
    assert only(nulls).errors == []  # pruned, then the default holds
    many = DEPLOYMENT.replace("cpu: 0.5", "cpu: 1e3").replace("64Mi", "1.5Gi")
    assert only(many).errors == []
    assert only(JOB.replace("name: quantize", "generateName: quantize-")).errors == []


def test_a_message_names_the_field_that_was_meant() -> None:
    (error,) = only(SERVICE.replace("minReplicas", "minReplica")).errors
    assert error.message == "unknown field 'minReplica'; did you mean 'minReplicas'?"
    (error,) = only(SERVICE.replace("num_cpus", "num_cpu")).errors
    assert error.message == "unknown field 'num_cpu'; did you mean 'num_cpus'?"


def test_a_kind_without_a_schema_is_not_accepted() -> None:
    gateway = (
        "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {name: lab}\nspec: {odd: 1}\n"
    )
    assert only(gateway).state == "no schema"
    kustomization = (
        "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\nresources: [lab.yaml]\n"
    )
    assert only(kustomization).state == "no schema"
    assert only("resources: [lab.yaml]\n").state == "invalid"  # neither apiVersion nor kind
    assert only("- apiVersion: v1\n").state == "invalid"
    assert only(SERVICE.replace("ray.io/v1", "ray.io/v2")).state == "no schema"


def test_text_that_is_no_yaml_says_where() -> None:
    verdict = only("apiVersion: v1\nkind: Pod\nmetadata: {name: [}\n")
    assert (verdict.state, verdict.errors[0].line) == ("invalid", 3)


def test_each_document_of_a_file_has_a_verdict_at_its_own_line() -> None:
    text = f"# a comment\n---\n{DEPLOYMENT}---\n---\n{JOB.replace('entrypoint', 'entrypoints')}"
    verdicts = check_text(text, "lab.yaml")
    assert [(v.kind, v.name, v.line, v.state) for v in verdicts] == [
        ("Deployment", "redis", 3, "valid"),
        ("RayJob", "quantize", 23, "invalid"),
    ]
    assert [(e.line, e.path) for e in verdicts[1].errors] == [(28, "spec.entrypoints")]


def test_files_folders_and_data(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "b.yaml").write_text(SERVICE)
    (tmp_path / "deep" / "a.yml").write_text(JOB)
    (tmp_path / "notes.txt").write_text("no manifest")
    found = check(tmp_path)
    assert [(v.file, v.kind) for v in found] == [
        (str(tmp_path / "b.yaml"), "RayService"),
        (str(tmp_path / "deep" / "a.yml"), "RayJob"),
    ]
    data = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "Lab"}}
    (verdict,) = check(data)
    assert [(e.line, e.path) for e in verdict.errors] == [(None, "metadata.name")]
    assert json.loads(json.dumps(dataclasses.asdict(verdict)))["state"] == "invalid"
    with pytest.raises(FileNotFoundError, match="absent"):
        check(tmp_path / "absent.yaml")


def test_a_verdict_prints_file_line_and_path() -> None:
    text = str(only(SERVICE.replace("minReplicas: 1\n", "minReplicas: 3\n")))
    assert text.splitlines()[0] == "lab.yaml:1: RayService lab: invalid"
    assert text.splitlines()[1].startswith(
        "  lab.yaml:34: spec.rayClusterConfig.workerGroupSpecs[0].minReplicas: minReplicas 3 is above"
    )


def test_the_config_on_one_line_is_placed_at_its_key() -> None:
    config = 'serveConfigV2: "applications: [{import_path: a.b, nam: x}]"\n  rayClusterConfig:'
    start, end = SERVICE.index("serveConfigV2"), SERVICE.index("rayClusterConfig")
    broken = SERVICE[:start] + config + SERVICE[end + len("rayClusterConfig:") :]
    assert errors(broken) == [(6, "spec.serveConfigV2: applications[0].nam")]


# YAML as Kubernetes reads it: what go.yaml.in/yaml/v2 makes of plain scalars, from its resolve.go and YAML 1.1
@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("y", True),
        ("off", False),
        ("017", 15),
        ("0o17", 15),
        ("08", 8),
        ("0x1F", 31),
        ("1_000", 1000),
        ("1e3", 1000),
        (".5", 0.5),
        ("1.0", 1),
        ("1:30", "1:30"),
        ("2026-01-31", "2026-01-31"),
        ("~", None),
        ("1.2.3", "1.2.3"),
        ("-", "-"),
        ("18446744073709551616", 18446744073709551616),  # past 64 bits: a float, which JSON writes whole
    ],
)
def test_plain_scalars_are_read_as_kubernetes_reads_them(text: str, value: object) -> None:
    assert resolve(text) == value
    assert type(resolve(text)) is type(value)


def test_merged_and_doubled_keys() -> None:
    (document,) = documents("base: &b {p: 1, q: 2}\nown:\n  <<: *b\n  p: 3\nown: 4\n")
    assert document.data == {"base": {"p": 1, "q": 2}, "own": {"p": 3, "q": 2}}
    assert [(line, path) for path, line, _ in document.faults] == [(5, ("own",))]


@pytest.mark.parametrize(
    ("text", "value"),
    [("500m", 0.5), ("2Gi", 2 * 1024**3), ("1e3", 1000), ("1.5k", 1500), ("3", 3), ("-1", -1)],
)
def test_quantities(text: str, value: float) -> None:
    assert quantity(text) == value


def test_names() -> None:
    assert names.dns_label("a-1") is None
    assert names.dns_label("1a") is None
    assert names.dns_label_1035("1a") is not None
    assert names.dns_label("a" * 64) is not None
    assert names.dns_subdomain("a.b-c") is None
    assert names.dns_subdomain("a..b") is not None
    assert names.label_key("app.kubernetes.io/name") is None
    assert names.label_key("/name") is not None
    assert names.label_value("") is None
    assert names.label_value("a b") is not None


def test_neither_ray_nor_kubernetes_is_imported() -> None:
    code = (
        "import sys; from labkit.cluster.check import check; check({'apiVersion': 'v1', 'kind': 'Pod'});"
        "sys.exit(any(name in sys.modules for name in ('ray', 'kubernetes', 'torch')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
