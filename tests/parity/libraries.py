"""labkit.quant beside torchao, optimum-quanto and llm-compressor, on the same weights.

    .venv-parity/bin/python tests/parity/libraries.py --out data/measurements/parity.json

`make parity-libraries` makes that environment, at the versions of libraries.txt, and runs this. A row is one method on
one grid against one function of a library: how many codes differ, by how much the scales do, how far apart the numbers
are, and whose error is smaller. Where they differ, the step that the library does in its own way is done in that way,
with labkit's parts for all the rest (library_steps.py), and codes and scales are compared again: none left that differ
means that this step is the reason, and the only one.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

os.environ |= {"LLM_COMPRESSOR_LOG_LEVEL": "ERROR", "LOGURU_LEVEL": "ERROR", "TQDM_DISABLE": "1"}
warnings.simplefilter("ignore")
logging.disable(logging.WARNING)

from library_layers import Layer, awq, digest, layers, quantize, rounded, stats_of  # noqa: E402
from library_peers import Case, Side, llm_compressor, optimum_quanto, scaled, torchao  # noqa: E402
from library_steps import spread  # noqa: E402
from torch import Tensor  # noqa: E402

from labkit.files import whole_file  # noqa: E402
from labkit.models.ladder import measured_on  # noqa: E402
from labkit.quant import QuantSpec, hessian_error, mse, values_of  # noqa: E402

PACKAGES = ("torchao", "optimum-quanto", "llmcompressor", "compressed-tensors", "transformers")
# What rounding in float32, or in another order, may do: to a scale its last bits, to one code in a thousand one step.
SCALE, CODES, STEPS = 1e-6, 1e-3, 1.01
PRINTED = ("codes", "codes_differing", "scale_difference", "steps", "error_ratio", "left", "library_says")


def ours_of(case: Case, layer: Layer, spec: QuantSpec) -> Side:
    if case.method == "awq_scale":
        return scaled(layer, spec, awq(layer, spec)[0])
    q = quantize(case.method, spec, case.options, layer)
    scale, zero = q.params.dense()
    return Side(q.codes, scale, q.dequantize(), zero)


def steps_of(layer: Layer, spec: QuantSpec, ours: Side, method: str) -> Tensor:
    """The widest step of labkit's grid at each weight, to broadcast against (out, in)."""
    s = ours.scale if method == "awq_scale" else None
    scale = ours.scale if s is None else rounded(layer, spec, s).params.dense()[0]
    step = spread(scale, spec, layer)
    if isinstance(spec.block, int):
        step = step.reshape(layer.weight.shape)
    if not spec.is_integer:
        values = values_of(spec.format)
        step = step * values[values.isfinite()].unique().diff().max()
    return step if s is None else step / s


def measure(case: Case) -> dict[str, Any]:
    """A row: the case over all its layers."""
    spec = QuantSpec.parse(case.spec)
    names = ("method", "spec", "options", "library", "function")
    row: dict[str, Any] = {name: getattr(case, name) for name in names}
    count = dict.fromkeys(
        ("codes", "codes_differing", "scales", "scales_differing", "zeros_differing", "left"), 0
    )
    scale_off = steps_off = 0.0
    ours_error = their_error = 0.0
    for layer in layers(case.method, spec):
        ours = ours_of(case, layer, spec)
        try:
            theirs = case.theirs(layer, spec)
        except AssertionError as refused:
            return row | {"verdict": "not compared", "why": case.why, "library_says": str(refused)}
        a, b = ours.scale.flatten().double(), theirs.scale.flatten().double()
        count["codes"] += ours.codes.numel()
        count["codes_differing"] += differing(ours.codes, theirs.codes)
        count["scales"] += len(a)
        count["scales_differing"] += differing(a, b)
        scale_off = max(scale_off, float(((a - b).abs() / a).max()))
        if ours.zero is not None and theirs.zero is not None:
            count["zeros_differing"] += differing(ours.zero, theirs.zero)
        apart = (ours.numbers - theirs.numbers).abs() / steps_of(layer, spec, ours, case.method)
        steps_off = max(steps_off, float(apart.max()))
        ours_error += error_of(layer, ours)
        their_error += error_of(layer, theirs)
        if case.redone is not None:
            codes, scale = case.redone(layer, spec)
            count["left"] += differing(codes, theirs.codes)
            count["left"] += 0 if scale is None else differing(scale, theirs.scale)
    left = count.pop("left")
    row |= {"verdict": verdict(count, scale_off, steps_off), **count}
    row |= {"scale_difference": scale_off, "steps": round(steps_off, 6)}
    row |= {
        "error": "of the outputs" if layer.inputs is not None else "of the weights",
        "error_ratio": round(ours_error / their_error, 9),
    }
    if row["verdict"] != "exact":
        assert case.why, f"they differ, and nobody has said why: {row}"
        row["why"] = case.why
        if case.redone is not None:
            row["left"] = left
    return row | {"sha256": digest(case.method, case.spec, case.options)}


def differing(a: Tensor, b: Tensor) -> int:
    return int((a.flatten().double() != b.flatten().double()).sum())


def error_of(layer: Layer, side: Side) -> float:
    """Squared and relative: of the layer's outputs where it has inputs, else of the weights."""
    W, stats = layer.weight, stats_of(layer)
    Q = side.numbers.reshape(W.shape)
    return mse(W, Q) / mse(W, 0 * W) if stats is None else hessian_error(W, Q, stats.hessian)


def verdict(count: dict[str, int], scale_off: float, steps_off: float) -> str:
    if not (count["codes_differing"] or count["scales_differing"] or count["zeros_differing"]):
        return "exact"
    few = count["codes_differing"] <= CODES * count["codes"]
    return "within tolerance" if few and scale_off <= SCALE and steps_off <= STEPS else "differs"


def matrix(rows: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, int]]]:
    """method: library: how many rows of each verdict."""
    table: dict[str, dict[str, dict[str, int]]] = {}
    for row in rows:
        cell = table.setdefault(row["method"], {}).setdefault(row["library"], {})
        cell[row["verdict"]] = cell.get(row["verdict"], 0) + 1
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=None, help="default: only print")
    parser.add_argument(
        "--only", default="", help="rows whose library, method, grid or function contains this"
    )
    args = parser.parse_args()
    if args.out and args.only:
        sys.exit("--only is for a look; --out writes the whole record")
    rows = []
    for case in (*torchao(), *optimum_quanto(), *llm_compressor()):
        title = f"{case.library} {case.method} {case.spec} {case.options or ''} {case.function}"
        if args.only in title:
            rows.append(measure(case))
            figures = "  ".join(f"{name} {rows[-1][name]}" for name in PRINTED if name in rows[-1])
            print(f"{rows[-1]['verdict']:17}{title}: {figures}", flush=True)
    for method, cells in matrix(rows).items():
        print(method, *(f"{library}: {cell}" for library, cell in cells.items()), sep="  ")
    facts = measured_on()
    facts["versions"] |= {name: importlib.metadata.version(name) for name in PACKAGES}
    facts.pop("seconds")  # it tells of times, and here are none
    by_row = QuantSpec.parse("int4 channel")
    tree = {
        "what": "labkit.quant beside torchao, optimum-quanto and llm-compressor: codes, scales, numbers and errors",
        "command": "make parity-libraries",
        **facts,
        "layers": {method: [layer.name for layer in layers(method, by_row)] for method in ("rtn", "gptq")},
        "tolerance": {"scale_difference": SCALE, "codes_differing": CODES, "steps": STEPS},
        "matrix": matrix(rows),
        "rows": rows,
    }
    if args.out:
        with whole_file(args.out) as part:
            part.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
