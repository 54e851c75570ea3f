"""The long run: 2-bit quantization-aware training beside what needs none, and an unquantized control.

    python tests/bench/qat.py --state FOLDER --out data/measurements/qat.json

Trains the recipe, then a control equally without quantizing, and measures both beside rounding to nearest and
GPTQ on the same grid, by the full protocol. Hours on a CPU: --state keeps both trainings, and the same command
goes on after an interruption. --steps shortens it.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

from labkit import models
from labkit.files import whole_file
from labkit.models.evaluate import compare_each
from labkit.models.ladder import measured_on


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="w2a16-qat-g64")
    parser.add_argument("--steps", type=int, default=None, help="default: the recipe's")
    parser.add_argument("--model", default=None, help="default: the bundled model")
    parser.add_argument("--protocol", choices=["full", "lesson"], default="full")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    original, recipe = models.load(args.model, seed=args.seed), models.Recipe.load(args.recipe)
    assert recipe.train is not None, "a recipe that trains"
    if args.steps:
        recipe = replace(recipe, train=replace(recipe.train, steps=args.steps))
    batches = models.training_batches(original.tokenizer, recipe.train, args.seed)
    losses: dict[str, list[float]] = {"trained": [], "control": []}
    print(f"needs about {models.peak_bytes(original, recipe) / 1e9:.1f} GB beside the model")

    def subjects():  # type: ignore[no-untyped-def]
        rules = recipe.rules
        for method, observer in (("rtn", "minmax"), ("rtn", "mse"), ("gptq", "minmax"), ("gptq", "mse")):
            changed = tuple(
                replace(r, method=method, options={"observer": observer}) if r.weight else r for r in rules
            )
            name = f"{method}, {observer}"
            yield models.quantize(
                original, replace(recipe, rules=changed, train=None, name=name), seed=args.seed
            )
        for what in ("trained", "control"):
            yield models.train(
                original,
                recipe,
                batches,
                control=what == "control",
                seed=args.seed,
                state=args.state / f"{what}.pt",
                callback=lambda step, loss, to=losses[what]: to.append(loss),
            )

    start, rows = time.perf_counter(), []
    names = ["rtn, minmax", "rtn, mse", "gptq, minmax", "gptq, mse", recipe.name, f"{recipe.name}, control"]
    for name, report in zip(names, compare_each(subjects(), original, args.protocol), strict=True):
        rows.append({**report.to_dict(), "recipe": name})
        print(f"{name:28} KL {report.kl:.4f}  perplexity {report.perplexity:.2f}", flush=True)
    best = min(row["kl"] for row in rows[:4])
    tree = {
        "command": f"python tests/bench/qat.py --recipe {args.recipe} --steps {recipe.train.steps}",
        "recipe": recipe.to_dict(),
        "seed": args.seed,
        "kl": rows[4]["kl"],
        "best_without_training": best,
        "ratio": rows[4]["kl"] / best,
        "rows": rows,
        "losses": losses,
        **measured_on(),
        "seconds": round(time.perf_counter() - start),
    }
    with whole_file(args.out) as part:
        part.write_text(json.dumps(tree, indent=1) + "\n")


if __name__ == "__main__":
    main()
