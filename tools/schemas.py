"""Write labkit/cluster/schemas/*.json.gz, which `labkit cluster check` validates against, from their sources.

    .venv/bin/python tools/schemas.py            all three
    .venv/bin/python tools/schemas.py --check    write nothing; fail where one would differ

Needs Go, which fetches the two modules, and the installed Ray. Each file says inside where it comes from.
Three changes make one dialect of the three: descriptions go, what Kubernetes decodes by hand (quantities, raw
extensions) is spelled out, and Ray's validators that JSON Schema loses are put back where it can say them.
"""

from __future__ import annotations

import argparse
import gzip
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).resolve().parent.parent / "labkit" / "cluster" / "schemas"
KUBERAY = "github.com/ray-project/kuberay/ray-operator"
KUBERNETES = "k8s.io/kubernetes"
VERSIONS = {KUBERAY: "v1.6.2", KUBERNETES: "v1.37.2"}
META = "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"

# Definitions of the swagger file that say less than Kubernetes' decoder knows.
BY_HAND: dict[str, dict[str, Any]] = {
    "io.k8s.apimachinery.pkg.api.resource.Quantity": {"format": "quantity"},
    "io.k8s.apimachinery.pkg.util.intstr.IntOrString": {"x-kubernetes-int-or-string": True},
    "io.k8s.apimachinery.pkg.runtime.RawExtension": {
        "type": "object",
        "x-kubernetes-preserve-unknown-fields": True,
    },
    "io.k8s.apimachinery.pkg.apis.meta.v1.FieldsV1": {
        "type": "object",
        "x-kubernetes-preserve-unknown-fields": True,
    },
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail where a file would differ"
    )
    check = parser.parse_args().check
    stale = []
    for name, make in {"kubernetes": kubernetes, "kuberay": kuberay, "serve": serve}.items():
        path = FOLDER / f"{name}.json.gz"
        content = make()
        if path.exists() and json.loads(gzip.decompress(path.read_bytes())) == content:
            print(f"{path.name}: as its source has it")
        elif check:
            stale.append(path.name)
        else:
            text = json.dumps(content, separators=(",", ":"), sort_keys=True)
            path.write_bytes(gzip.compress(text.encode(), 9, mtime=0))
            print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB from {content['source']}")
    if stale:
        print(f"{', '.join(stale)} differ from their sources; run tools/schemas.py", file=sys.stderr)
    return 1 if stale else 0


def module(name: str) -> tuple[Path, dict[str, Any]]:
    """The folder of a Go module, fetched if need be, and where it comes from."""
    command = ["go", "mod", "download", "-json", f"{name}@{VERSIONS[name]}"]
    environment = {**os.environ, "GOFLAGS": "-mod=mod"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    answer = json.loads(done.stdout or "{}")
    if done.returncode or "Dir" not in answer:
        raise SystemExit(f"{' '.join(command)} failed: {answer.get('Error') or done.stderr.strip()}")
    source = f"Go module {name}"
    return Path(answer["Dir"]), {"source": source, "version": VERSIONS[name], "sum": answer["Sum"]}


def kubernetes() -> dict[str, Any]:
    """All of Kubernetes' own kinds, from the swagger file of its release."""
    folder, origin = module(KUBERNETES)
    swagger = json.loads((folder / "api" / "openapi-spec" / "swagger.json").read_text(encoding="utf-8"))
    kinds, definitions = {}, {}
    for name, found in sorted(swagger["definitions"].items()):
        schema = plain(found)
        groups = schema.pop("x-kubernetes-group-version-kind", [])
        if len(groups) == 1:  # what many groups share (DeleteOptions, WatchEvent) is no object to apply
            kinds[key(**groups[0])] = {"$ref": name}
        definitions[name] = BY_HAND.get(name, schema)
    return {**origin, "licence": "Apache-2.0", "kinds": kinds, "definitions": definitions}


def kuberay() -> dict[str, Any]:
    """KubeRay's kinds in every version that is served, from its custom resource definitions."""
    folder, origin = module(KUBERAY)
    kinds = {}
    for path in sorted((folder / "config" / "crd" / "bases").glob("*.yaml")):
        crd = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)["spec"]
        for version in crd["versions"]:
            if version["served"]:
                schema = plain(version["schema"]["openAPIV3Schema"])
                schema["properties"]["metadata"] = {"$ref": META}
                kinds[key(crd["group"], version["name"], crd["names"]["kind"])] = schema
    return {**origin, "licence": "Apache-2.0", "kinds": kinds, "definitions": {}}


def key(group: str, version: str, kind: str) -> str:
    """``apps/v1/Deployment``; ``v1/Pod`` for the group without a name."""
    return f"{group}/{version}/{kind}".removeprefix("/")


def plain(schema: Any) -> Any:
    """A schema without its prose, and with definitions named by their name alone."""
    if isinstance(schema, list):
        return [plain(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {}
    for word, value in schema.items():
        if word in ("properties", "$defs"):
            kept[word] = {name: plain(inner) for name, inner in value.items()}
        elif word == "$ref":
            kept[word] = value.rsplit("/", 1)[-1]
        elif word == "default":
            kept[word] = value
        elif word not in ("description", "title"):
            kept[word] = plain(value)
    return kept


def serve() -> dict[str, Any]:
    """Ray Serve's configuration, from Ray's own model, closed: a key that Ray would pass over is unknown."""
    import ray
    from ray._common.runtime_env_uri import Protocol
    from ray.runtime_env import RuntimeEnv
    from ray.serve import schema as of_ray

    root = closed(plain(of_ray.ServeDeploySchema.model_json_schema()))
    definitions = root.pop("$defs")

    # What Ray checks in Python, where a schema can say it. The rest is in labkit/cluster/serve_config.py.
    schemes = "|".join(sorted(protocol.value for protocol in Protocol))
    uri = {"type": "string", "pattern": f"^(?i:{schemes})://", "x-expected": "a remote or local:// URI"}
    texts = {"type": "object", "additionalProperties": {"type": "string"}}
    fields: dict[str, Any] = {name: {} for name in RuntimeEnv.known_fields if not name.startswith("_")}
    fields |= {"env_vars": texts, "working_dir": uri, "py_modules": {"type": "array", "items": uri}}
    definitions["RuntimeEnv"] = {"type": "object", "properties": fields, "additionalProperties": False}
    for owner in ("ServeApplicationSchema", "RayActorOptionsSchema"):
        definitions[owner]["properties"]["runtime_env"] = {"$ref": "RuntimeEnv"}
    definitions["ControllerOptions"]["properties"]["runtime_env"] = {
        "anyOf": [
            {"type": "object", "properties": {"env_vars": texts}, "additionalProperties": False},
            {"type": "null"},
        ]
    }
    log = definitions["LoggingConfig"]["properties"]
    log["log_level"] = {"enum": [*logging.getLevelNamesMapping(), *sorted(logging._levelToName)]}
    log["additional_log_standard_attrs"]["items"] = {"enum": sorted(of_ray.LOGRECORD_STANDARD_ATTRS)}
    definitions["TracingConfig"]["properties"]["sampling_ratio"] |= {"minimum": 0, "maximum": 1}

    deployment = definitions["DeploymentSchema"]["properties"]
    deployment["num_replicas"]["anyOf"][1] = {"enum": ["auto"]}
    deployment["max_replicas_per_node"] |= {"minimum": 1, "maximum": 100}
    deployment["placement_group_strategy"] = {"enum": ["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]}
    definitions["GangRuntimeFailurePolicy"]["enum"] = ["RESTART_GANG"]  # Ray: the other is not implemented
    return {
        "source": "ray.serve.schema.ServeDeploySchema of the PyPI package ray",
        "version": ray.__version__,
        "licence": "Apache-2.0",
        "kinds": {"serveConfigV2": root},
        "definitions": definitions,
    }


def closed(schema: Any) -> Any:
    """The schema with every object that names its keys closed to others, and without what hides it: pydantic
    says ``anyOf: [any object, AutoscalingConfig]`` where Ray takes a dict and reads it later."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {word: closed(value) for word, value in schema.items() if word != "default"}
    if "properties" in kept and isinstance(kept.get("type"), str):
        kept["additionalProperties"] = False
    if any("$ref" in option for option in kept.get("anyOf", ())):
        free = ({"type": "object", "additionalProperties": True}, {"type": "string"})
        kept["anyOf"] = [option for option in kept["anyOf"] if option not in free]
    return kept


if __name__ == "__main__":
    sys.exit(main())
