"""One job, three recipes, two workers: each writes a checkpoint of the real model to the shared claim."""

from __future__ import annotations

import json
from pathlib import Path

from node import Node

from labkit.cluster.kuberay import KubeRay
from labkit.cluster.render import rayjob, surroundings
from labkit.models import checkpoint

RECIPES = ("w8a16-rtn-channel", "w4a16-rtn-channel", "w4a16-rtn-g64")


def test_three_recipes_run_on_two_nodes_and_leave_three_checkpoints(
    node: Node, namespace: str, image: str
) -> None:
    ray = KubeRay(namespace=namespace)
    for manifest in surroundings("node", namespace=namespace):
        ray.apply(manifest)
    command = f"python -m labkit.cluster.sweep {' '.join(RECIPES)} --out /checkpoints --cores 2"
    output = "".join(ray.submit(rayjob(command, "node", name="sweep", namespace=namespace, workers=2)))
    made = [json.loads(line) for line in output.splitlines() if line.startswith('{"recipe"')]
    print(json.dumps(made, indent=1))
    assert {each["recipe"] for each in made} == set(RECIPES)
    assert len({each["node"] for each in made}) == 2
    assert ray.job_status("sweep")["jobStatus"] == "SUCCEEDED"

    claim = ray.get("PersistentVolumeClaim", "checkpoints")["spec"]["volumeName"]
    volume = json.loads(node.kubectl("get", "pv", claim, "-o", "json"))["spec"]["hostPath"]["path"]
    for recipe in RECIPES:
        made_here = checkpoint.load(Path(volume) / recipe).made
        assert made_here is not None
        assert made_here.recipe.name == recipe
