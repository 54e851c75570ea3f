"""The kernels for GPUs, beside torch in bfloat16 and beside others who multiply by four bits there.

Shapes are those of Llama 3 8B, and the largest of 70B. As on a CPU, everybody has copies of the weight that no cache
holds together and takes them in turn. A launch takes the CPU longer than a small product takes the GPU, so all of a
turn's launches wait in the queue before the first begins: the time is the GPU's alone.
"""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import labkit
from labkit.bench.measure import Contender, Row, Setting, Unit, by_turns, invited
from labkit.bench.pipe import PeerFailed, PeerMissing
from labkit.kernels import prepare
from labkit.quant import QuantSpec, rtn

SHAPES = [(4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192)]  # (out, in)
ROWS = (1, 16, 256)
CONTEXTS = [(1, 32768), (32, 4096)]  # requests, tokens of each
HEADS, KV_HEADS, WIDTH = 32, 8, 128
GROUP = 64
ROUNDS = 15
STREAMED = 256 * 2**20  # bytes of four-bit weights at least: several times the second-level caches
READ = 2**30  # bytes that memory's speed is measured on
CYCLES = 400_000  # that the GPU waits for each launch of a turn, a fifth of a millisecond
GOALS = {1: 3.5, 16: 2.5}  # beside bfloat16, by rows
GOAL_OF_BANDWIDTH = 0.8
INT8 = QuantSpec("int8", (1, None), scale="fp32")  # of activations: a scale for each row
# What stands beside each of our formats, apart from bfloat16, which stands beside all.
BESIDE = {
    f"int4 g{GROUP}": ("torchao int4", "vllm Marlin int4"),
    f"int4 g{GROUP} asym": (),
    f"nf4 g{GROUP}": ("bitsandbytes nf4",),
    "int8 channel": (),
}
Product = Callable[[Tensor], Tensor]
US = Unit("microseconds", 1e6)


@torch.inference_mode()  # while it runs, not while whoever reads its rows does
def gpu(
    setting: Setting,
    device: str = "cuda",
    rounds: int = ROUNDS,
    *,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    contexts: Sequence[tuple[int, int]] = CONTEXTS,
    streamed: int = STREAMED,
) -> Iterator[list[Row]]:
    """The rows of products by weights of ``shapes`` (out, in) and of attention over ``contexts`` (requests, tokens).

    device  "cpu" is for Triton's interpreter, whose times say nothing

    Raises RuntimeError where there is no GPU.
    """
    where = torch.device(device)
    name = setting.facts["machine"]
    if where.type == "cuda":
        if not torch.cuda.is_available():
            raise RuntimeError(
                "labkit bench kernels --device cuda needs an NVIDIA GPU and a torch built for it; torch finds none, "
                "so nothing was measured. `labkit doctor` says what is here; without --device the CPU is measured"
            )
        name = torch.cuda.get_device_name(where)
    setting = replace(setting, facts=setting.facts | {"machine": name})
    torch.manual_seed(0)
    for out, inputs in shapes:
        yield from products(setting, where, out, inputs, rounds, streamed)
    for requests, tokens in contexts:
        yield from attention(setting, where, requests, tokens, rounds, streamed)


def products(
    setting: Setting, device: torch.device, out: int, inputs: int, rounds: int, streamed: int
) -> Iterator[list[Row]]:
    """Of each format of ours by some rows, and of memory by one. ``streamed``: bytes of its copies in four bits."""
    dtype = _dtype(device)
    count = 1 + 2 * streamed // (out * inputs)
    weights = [torch.randn(out, inputs, device=device, dtype=dtype) / inputs**0.5 for _ in range(count)]
    held = {format: [_prepared(weight, format) for weight in weights] for format in BESIDE}

    made = {"torchao int4": torchao, "vllm Marlin int4": marlin, "bitsandbytes nf4": bitsandbytes}
    guests = {name: _guest(name, partial(make, weights)) for name, make in made.items()}
    plain: list[Product] = [partial(F.linear, weight=weight) for weight in weights]
    for rows in ROWS:
        x = torch.randn(rows, inputs, device=device, dtype=dtype)
        work = f"{rows} {'row' if rows == 1 else 'rows'} by {inputs} x {out}"
        mine = {
            format: _contender(f"{format}, triton_gpu", f"labkit {labkit.__version__}", copies, x, copies[0].nbytes)
            for format, copies in held.items()
        }
        half = _contender(
            f"torch {_short(dtype)}", f"torch {torch.__version__}", plain, x, weights[0].nbytes
        )
        others = {name: invited(name, partial(guest, x)) for name, guest in guests.items()}
        costs = _by_turns([*mine.values(), half, *others.values()], rounds, work)
        for format, who in mine.items():
            # Four bits are the goal's; int8 has twice their bytes.
            goal = GOALS.get(rows) if format.startswith(("int4", "nf4")) else None
            peers = [replace(half, goal=goal), *(others[name] for name in BESIDE[format])]
            flop = 2.0 * rows * out * inputs
            yield setting.rows_of(
                f"{work}, {format}", US, who, peers, [costs[p.name] for p in (who, *peers)], flop
            )
        if rows == 1:
            first = next(iter(mine.values()))
            assert first.bytes is not None
            unit = Unit("GB/s", first.bytes * 1e-9, rate=True)
            yield setting.rows(
                f"bandwidth of {work}", unit, first, [memory(first.bytes, device)], rounds=rounds
            )


def attention(
    setting: Setting, device: torch.device, requests: int, tokens: int, rounds: int, streamed: int
) -> Iterator[list[Row]]:
    """A step of decoding: one query for each request and head, keys and values of the whole context as codes."""
    from labkit.kernels.gpu.attention import Held, attend

    dtype = _dtype(device)
    shape = requests, KV_HEADS, tokens, WIDTH
    numbers = 2 * requests * KV_HEADS * tokens * WIDTH  # of keys and values
    pairs = [
        (torch.randn(shape, device=device, dtype=dtype), torch.randn(shape, device=device, dtype=dtype))
        for _ in range(1 + 2 * streamed // numbers)
    ]
    q = torch.randn(requests, HEADS, WIDTH, device=device, dtype=dtype)

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)[:, :, 0]

    plain: list[Product] = [partial(sdpa, k=k, v=v) for k, v in pairs]
    half = _contender(
        f"torch {_short(dtype)}", f"torch {torch.__version__}", plain, q, numbers * q.element_size()
    )
    mine = []
    for format in ("int8 channel", "int4 channel asym"):
        spec = QuantSpec.parse(format)
        codes: list[Product] = [
            partial(attend, keys=Held.of(rtn(k, spec)), values=Held.of(rtn(v, spec)))
            for k, v in pairs
        ]
        mine.append(_contender(format, f"labkit {labkit.__version__}", codes, q, numbers * spec.bits // 8))
    work = f"attention of {requests} x {tokens} tokens"
    costs = _by_turns([*mine, half], rounds, work)
    for who in mine:
        yield setting.rows_of(f"{work}, {who.name}", US, who, [half], [costs[who.name], costs[half.name]])


def bitsandbytes(weights: Sequence[Tensor]) -> tuple[str, list[Product], int]:
    """Its nf4, in blocks of 64. Version, a product for each weight, and bytes of one. Raises ImportError."""
    from bitsandbytes import matmul_4bit
    from bitsandbytes.functional import quantize_4bit

    made = [quantize_4bit(weight, blocksize=GROUP, quant_type="nf4") for weight in weights]
    calls: list[Product] = [
        partial(lambda x, codes, state: matmul_4bit(x, codes.t(), state), codes=c, state=s) for c, s in made
    ]
    return _version("bitsandbytes"), calls, weights[0].numel() // 2 + weights[0].numel() // GROUP * 4


def torchao(weights: Sequence[Tensor]) -> tuple[str, list[Product], int]:
    """Its int4 in groups of 64, in the layout of torch's own kernel: that which it takes by default wants mslk."""
    from torchao.quantization import Int4WeightOnlyConfig, quantize_
    from torchao.quantization.quantize_.workflows import Int4PackingFormat

    config = Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format=Int4PackingFormat.TILE_PACKED_TO_4D)
    calls: list[Product] = []
    for weight in weights:
        linear = torch.nn.Linear(
            weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=weight.dtype
        )
        linear.weight = torch.nn.Parameter(weight, requires_grad=False)
        quantize_(linear, config)
        calls.append(linear)
    return _version("torchao"), calls, weights[0].numel() // 2 + weights[0].numel() // GROUP * 4


def marlin(weights: Sequence[Tensor]) -> tuple[str, list[Product], int]:
    """vllm's Marlin (arXiv 2408.11743), symmetric int4 in groups of 64, by the layout that its own tests make."""
    from vllm.model_executor.layers.quantization.utils import marlin_utils, marlin_utils_test
    from vllm.scalar_type import scalar_types

    out, inputs = weights[0].shape
    kind, empty = scalar_types.uint4b8, torch.empty(0, dtype=torch.int, device=weights[0].device)
    space = marlin_utils.marlin_make_workspace_new(weights[0].device)
    calls: list[Product] = []
    for weight in weights:
        _, words, scales = marlin_utils_test.marlin_quantize(weight.T.contiguous(), kind, GROUP)
        calls.append(
            partial(
                marlin_utils.apply_gptq_marlin_linear, weight=words, weight_scale=scales, weight_zp=empty,
                workspace=space, wtype=kind, output_size_per_partition=out, input_size_per_partition=inputs,
            )
        )  # fmt: skip
    return _version("vllm"), calls, weights[0].numel() // 2 + weights[0].numel() // GROUP * 2


def memory(size: float, device: torch.device) -> Contender:
    """Reading ``size`` bytes, by torch's sum."""
    block = torch.ones((READ if device.type == "cuda" else 2**20) // 4, device=device)
    return Contender(
        "reading memory", f"torch {torch.__version__}", lambda: seconds([block.sum], device) * size / block.nbytes,
        goal=GOAL_OF_BANDWIDTH, bytes=size,
    )  # fmt: skip


def seconds(runs: Sequence[Callable[[], object]], device: torch.device) -> float:
    """Of one of ``runs``, the mean of all, one after another."""
    if device.type != "cuda":
        began = time.perf_counter()
        for run in runs:
            run()
        return (time.perf_counter() - began) / len(runs)
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for tries in range(5):  # of whoever waits for the GPU in each call, the last is taken: that is its time
        torch.cuda._sleep(CYCLES * len(runs) << tries)
        start.record()
        for run in runs:
            run()
        queued_in_time = not start.query()
        stop.record()
        torch.cuda.synchronize(device)
        if queued_in_time:
            break
    return start.elapsed_time(stop) / 1000 / len(runs)


def _contender(name: str, version: str, calls: Sequence[Product], x: Tensor, size: int) -> Contender:
    runs = [partial(call, x) for call in calls]
    return Contender(name, version, lambda: seconds(runs, x.device), bytes=float(size))


def _guest(name: str, make: Callable[[], tuple[str, list[Product], int]]) -> Callable[[Tensor], Contender]:
    """A peer whose weights are made once. What it raises, as where no kernel fits the GPU, is why it is not here."""
    held: tuple[str, list[Product], int] | PeerMissing | PeerFailed
    try:
        held = make()
    except ImportError as missing:
        held = PeerMissing(f"{name}: {missing}; install {missing.name or name.split()[0]} beside labkit to measure it")
    except Exception as error:
        held = PeerFailed(f"{name}: {type(error).__name__}: {error}")

    def contender(x: Tensor) -> Contender:
        if isinstance(held, Exception):
            raise held
        version, calls, size = held
        found = _contender(name, version, calls, x, size)
        turn = found.turn
        assert turn is not None

        def guarded() -> float:
            try:
                return turn()
            except Exception as error:
                raise PeerFailed(f"{name}: {type(error).__name__}: {error}") from error

        return replace(found, turn=guarded)

    return contender


def _by_turns(contenders: Sequence[Contender], rounds: int, work: str) -> dict[str, list[float]]:
    costs = by_turns(contenders, rounds, work)
    return {contender.name: cost for contender, cost in zip(contenders, costs, strict=True)}


def _prepared(weight: Tensor, format: str):  # type: ignore[no-untyped-def]
    input = INT8 if format.startswith("int8") else None
    return prepare(rtn(weight, QuantSpec.parse(format)), "triton_gpu", input)


def _version(package: str) -> str:
    return f"{package} {importlib.metadata.version(package)}"


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32  # the interpreter is wrong in bfloat16


def _short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
