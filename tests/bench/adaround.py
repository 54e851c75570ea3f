"""AdaRound beside rounding to nearest, layer by layer, on text that calibration did not see.

    python tests/bench/adaround.py --spec "int3 g64 asym" --out data/measurements/adaround_layers.json

The relative output error tr(dW H dW^T) / tr(W H W^T) of every layer, H from held-out windows of the calibration
chapters; each layer's own statistics come from the unquantized model. About as long as `labkit quantize
--recipe w3a16-adaround-g64`.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path

import torch

from labkit import models
from labkit.files import whole_file
from labkit.models.calibrate import Inputs, shared_copy, walk
from labkit.models.ladder import measured_on
from labkit.models.llama import Linear
from labkit.quant import FellBack, QuantSpec, Stats, adaround, hessian_error, rtn


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--spec", default="int3 g64 asym")
    parser.add_argument("--model", default=None, help="default: the bundled model")
    parser.add_argument("--layers", default="model.layers.", help="names that begin so")
    parser.add_argument(
        "--windows", type=int, default=32, help="for calibration; half as many are held out"
    )
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()

    model, spec, start = models.load(args.model, seed=0), QuantSpec.parse(args.spec), time.perf_counter()
    tokens = models.calibration_windows(model.tokenizer, args.windows * 3 // 2, 256, seed=0)
    rows: list[dict[str, object]] = []

    def visit(name: str, linear: Linear, inputs: Inputs) -> None:
        seen, unseen = Stats.of(inputs.x[: args.windows]), Stats.of(inputs.x[args.windows :])
        weight = linear.weight.detach()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = adaround(weight, spec, seen)
        fell_back = any(warning.category is FellBack for warning in said)
        error = hessian_error(weight, found, unseen.hessian)
        nearest = [
            hessian_error(weight, rtn(weight, spec, observer=o), unseen.hessian) for o in ("minmax", "mse")
        ]
        rows.append(
            {
                "layer": name,
                "adaround": error,
                "rtn": nearest[0],
                "rtn_mse": nearest[1],
                "fell_back": fell_back,
            }
        )
        print(f"{name:40} {error:.5f}  nearest {nearest[0]:.5f}, mse {nearest[1]:.5f}", flush=True)

    layers = [name for name in model.linears() if name.startswith(args.layers)]
    with torch.no_grad():
        walk(shared_copy(model), tokens, visit, layers)
    better = sum(row["adaround"] < min(row["rtn"], row["rtn_mse"]) for row in rows)
    fallbacks = sum(bool(row["fell_back"]) for row in rows)
    seconds = round(time.perf_counter() - start)
    print(f"better in {better} of {len(rows)} layers, {fallbacks} fell back, {seconds} s")
    if args.out:
        tree = {
            "command": f'python tests/bench/adaround.py --spec "{args.spec}"', "model": model.name, "better": better,
            "layers": len(rows), "fallbacks": fallbacks, "seconds": seconds, "threads": torch.get_num_threads(),
            **measured_on(), "rows": rows,
        }  # fmt: skip
        with whole_file(args.out) as part:
            part.write_text(json.dumps(tree, indent=1) + "\n")


if __name__ == "__main__":
    main()
