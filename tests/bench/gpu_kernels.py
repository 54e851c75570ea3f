"""How fast are the kernels for GPUs? Beside torch's bf16, and bitsandbytes and torchao where they are installed.

    python tests/bench/gpu_kernels.py [--rows 1 16 256] [--rounds 100]

Prints microseconds, medians of rounds in which all take turns, and the ratio to bf16 (above 1 is faster). Each round
uses another copy of the weights, of more than the second-level cache together. Shapes are those of Llama 3 8B.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.kernels import prepare
from labkit.kernels.triton_gpu import TritonGpu
from labkit.quant import QuantizedTensor, QuantSpec, encode, fit

SHAPES = [(4096, 4096), (14336, 4096), (4096, 14336)]
CONTEXTS = [(1, 32768), (32, 4096)]  # requests, tokens of each
COPIES = 256 * 2**20  # bytes of them at least
Runs = dict[str, Callable[[], Tensor]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 256])
    parser.add_argument("--rounds", type=int, default=100)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no GPU found: nothing was measured")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    torch.manual_seed(0)
    with torch.inference_mode():
        for out, inputs in SHAPES:
            copies = [weights(out, inputs) for _ in range(-(-COPIES // (out * inputs // 2)))]
            for rows in args.rows:
                x = torch.randn(rows, inputs, device="cuda", dtype=torch.bfloat16)
                told(f"({out}, {inputs}) {rows} rows", [products(x, held) for held in copies], args.rounds)
            del copies
        for requests, tokens in CONTEXTS:
            copies = [attentions(requests, tokens) for _ in range(-(-COPIES // (requests * tokens * 1024)))]
            told(f"attention, {requests} x {tokens} tokens", copies, args.rounds)


def told(name: str, copies: list[Runs], rounds: int) -> None:
    taken = medians(copies, rounds)
    parts = [f"{kind} {us:.1f} us ({taken['bf16'] / us:.2f}x)" for kind, us in taken.items()]
    print(f"{name}:  " + "   ".join(parts), flush=True)


def medians(copies: list[Runs], rounds: int) -> dict[str, float]:
    """Microseconds of each; the first rounds compile and warm up."""
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in copies[0]}
    for i in range(rounds + 5):
        for name, run in copies[i % len(copies)].items():
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(200_000)  # a launch is shorter, so the GPU never waits for the CPU
            start.record()
            run()
            stop.record()
            events[name].append((start, stop))
    torch.cuda.synchronize()
    return {
        name: statistics.median(1000 * start.elapsed_time(stop) for start, stop in pairs[5:])
        for name, pairs in events.items()
    }


def quantized(x: Tensor, text: str) -> QuantizedTensor:
    spec = QuantSpec.parse(text)
    return encode(x, spec, fit(x, spec))


def weights(out: int, inputs: int) -> dict[str, Callable[[Tensor], Tensor]]:
    weight = torch.randn(out, inputs, device="cuda", dtype=torch.bfloat16) / inputs**0.5
    int8 = QuantSpec("int8", (1, None), scale="fp32")
    half = weight.clone()
    held = {
        "bf16": lambda x: F.linear(x, half),
        "int4": prepare(quantized(weight, "int4 g64"), "triton_gpu"),
        "int4 asym": prepare(quantized(weight, "int4 g64 asym"), "triton_gpu"),
        "nf4": prepare(quantized(weight, "nf4 g64"), "triton_gpu"),
        "w8a8": TritonGpu(quantized(weight, "int8 channel"), int8),
    }
    if find_spec("bitsandbytes"):
        from bitsandbytes import matmul_4bit
        from bitsandbytes.functional import quantize_4bit

        codes, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
        held["bitsandbytes nf4"] = lambda x: matmul_4bit(x, codes.t(), quant_state=state)
    if find_spec("torchao"):
        from torchao.quantization import Int4WeightOnlyConfig, quantize_

        linear = torch.nn.Linear(inputs, out, bias=False, device="cuda", dtype=torch.bfloat16)
        quantize_(linear, Int4WeightOnlyConfig(group_size=64))
        held["torchao int4"] = linear
    return held


def products(x: Tensor, held: dict[str, Callable[[Tensor], Tensor]]) -> Runs:
    return {name: lambda multiply=multiply: multiply(x) for name, multiply in held.items()}  # type: ignore[misc]


def attentions(requests: int, tokens: int, heads: int = 32, kv_heads: int = 8, width: int = 128) -> Runs:
    from labkit.kernels.gpu.attention import Held, attend

    k, v = torch.randn(2, requests, kv_heads, tokens, width, device="cuda", dtype=torch.bfloat16).unbind()
    q = torch.randn(requests, heads, width, device="cuda", dtype=torch.bfloat16)
    runs: Runs = {
        "bf16": lambda: F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)[:, :, 0]
    }
    for text in ("int8 channel", "int4 channel asym"):
        keys, values = (Held.of(quantized(part, text)) for part in (k, v))
        runs[text] = lambda keys=keys, values=values: attend(q, keys, values)  # type: ignore[misc]
    return runs


if __name__ == "__main__":
    main()
