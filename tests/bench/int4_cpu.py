"""How fast is int4_cpu? One decode step's products, beside torch's fp32 and bf16 and bitsandbytes' nf4.

    python tests/bench/int4_cpu.py [--threads 1] [--rows 1] [--rounds 51]

Prints microseconds and ratios to fp32 (above 1 is faster): medians of rounds in which they take turns.
Shapes are those of SmolLM2-135M: attention, gate and up, down, lm_head.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import bitsandbytes
import torch
from bitsandbytes.functional import quantize_4bit

from labkit.kernels import prepare
from labkit.quant import QuantSpec, encode, fit

SHAPES = [(576, 576), (1536, 576), (576, 1536), (49152, 576)]


def candidates(out: int, inputs: int, rows: int) -> dict[str, Callable[[], torch.Tensor]]:
    weight, x = torch.randn(out, inputs) / inputs**0.5, torch.randn(rows, inputs)
    half, x_half = weight.bfloat16(), x.bfloat16()
    spec = QuantSpec.parse("int4 g64 asym")
    int4 = prepare(encode(weight, spec, fit(weight, spec)), "int4_cpu")
    nf4, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
    linear = torch.nn.functional.linear
    return {
        "fp32": lambda: linear(x, weight),
        "bf16": lambda: linear(x_half, half),
        "int4_cpu": lambda: int4(x),
        "bitsandbytes nf4": lambda: bitsandbytes.matmul_4bit(x_half, nf4.t(), quant_state=state),
    }


def medians(runs: dict[str, Callable[[], torch.Tensor]], rounds: int) -> dict[str, float]:
    """Seconds for each, by turns, so that a slow moment of the machine hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 3):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken[3:]) for name, taken in times.items()}  # the first three warm up


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=51)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(
        f"{processor()}, {torch.backends.cpu.get_cpu_capability()}, "
        f"{args.threads} threads, {args.rows} rows; "
        f"torch {torch.__version__}, bitsandbytes {bitsandbytes.__version__}"
    )
    with torch.inference_mode():
        for out, inputs in SHAPES:
            taken = medians(candidates(out, inputs, args.rows), args.rounds)
            parts = [f"{name} {s * 1e6:.0f} us ({taken['fp32'] / s:.2f}x)" for name, s in taken.items()]
            print(f"({out}, {inputs}):  " + "   ".join(parts))


if __name__ == "__main__":
    main()
