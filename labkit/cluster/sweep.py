"""Quantize a model by several recipes at once, one Ray task each, spread over the cluster's nodes.

    python -m labkit.cluster.sweep w4a16-rtn-g64 w4a16-gptq-g64 --out /checkpoints

In a Ray job it runs on that cluster, elsewhere on a Ray of its own.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from labkit.cluster.local import ray_session


@dataclass(frozen=True)
class Made:
    """A checkpoint that a task made.

    node     Ray's id of the node where it ran
    seconds  for loading, quantizing and saving
    bytes    of the checkpoint's weights on disk
    """

    recipe: str
    folder: str
    node: str
    seconds: float
    bytes: int


def sweep(
    recipes: Sequence[str], out: Path, *, model: str | None = None, seed: int = 0, cores: int = 1
) -> Iterator[Made]:
    """Write ``out/<recipe>`` for each recipe, in parallel, and yield each when it is done.

    model  as ``labkit.models.load`` takes it; out must be a folder that all nodes see
    cores  that one task counts for

    Raises FileExistsError before any work where one of the folders is there, ValueError for a recipe named twice or
    unknown.
    """
    import ray

    from labkit.models import Recipe

    if len(set(recipes)) < len(recipes):
        raise ValueError(f"each recipe once, found {', '.join(recipes)}")
    for recipe in recipes:
        Recipe.load(recipe)
        if (out / recipe).exists():
            raise FileExistsError(
                f"{out / recipe} exists already; choose another folder or remove it first"
            )
    with ray_session():
        task = ray.remote(num_cpus=cores, scheduling_strategy="SPREAD", max_retries=0)(_make)
        waiting = [task.remote(recipe, str(out / recipe), model, seed, cores) for recipe in recipes]
        while waiting:
            [done], waiting = ray.wait(waiting)
            yield ray.get(done)


def _make(recipe: str, folder: str, model: str | None, seed: int, cores: int) -> Made:
    import time

    import ray
    import torch

    from labkit import models

    torch.set_num_threads(cores)
    start = time.perf_counter()
    made = models.quantize(models.load(model, seed=seed), models.Recipe.load(recipe), seed=seed)
    models.save(made, Path(folder))
    size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    node = ray.get_runtime_context().get_node_id()
    return Made(recipe, folder, node, round(time.perf_counter() - start, 1), size)


def main() -> None:
    """Print one JSON object for each checkpoint, as it is made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("recipes", nargs="+", help="of labkit's, by name")
    parser.add_argument("--out", type=Path, required=True, help="a folder that all nodes see")
    parser.add_argument("--model", help="default: LABKIT_MODEL, or the bundled model")
    parser.add_argument("--cores", type=int, default=1, help="that one task counts for")
    given = parser.parse_args()
    for made in sweep(given.recipes, given.out, model=given.model, cores=given.cores):
        print(json.dumps(asdict(made)), flush=True)


if __name__ == "__main__":
    main()
