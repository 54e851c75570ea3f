"""One product with a weight that comes from memory, beside those who multiply by int4 too, and memory itself.

A weight of 4096 x 4096 in int4 fits into a large cache, where no model would find it: everybody has copies of it, more
than ``STREAMED`` bytes together, and takes them in turn.
"""

from __future__ import annotations

import importlib.metadata
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import labkit
from labkit.bench.measure import Contender, Row, Setting, Unit, invited
from labkit.bench.pipe import Peer
from labkit.kernels import Prepared, build, prepare
from labkit.kernels.arena import Arena
from labkit.kernels.native_cpu import NativeCpu, settle
from labkit.quant import QuantizedTensor, QuantSpec, rtn

SIZE = 4096
GROUP = 64
SPEC = f"int4 g{GROUP} asym"
INPUT = "int8 g32 narrow scale=fp32"  # activations are rounded, as onnxruntime's are at its fastest
STREAMED = (
    200_000_000  # bytes; several times the largest caches there are on the machines that a learner has
)
READ = 512 * 2**20  # bytes that memory's speed is measured on
SEVERAL, MANY = 32, 512  # rows
GOAL_OF_BANDWIDTH, GOAL_OF_BF16 = 0.9, 1.9
ROUNDS = 15
TURN = 0.1  # seconds; a processor that slept is slow at first


def kernels(setting: Setting, size: int = SIZE, rounds: int = ROUNDS) -> Iterator[list[Row]]:
    """The rows of one weight (size, size), work by work: one row streamed, several, many; and nf4."""
    torch.manual_seed(0)
    weight = torch.randn(size, size) / size**0.5
    int4 = rtn(weight, QuantSpec.parse(SPEC))
    with ExitStack() as stack:
        ours = Products(prepare(int4, input=QuantSpec.parse(INPUT)))
        torch_int4, bf16 = Products(prepare(int4, "int4_cpu")), Products(weight.bfloat16(), torch.bfloat16)
        x = {rows: torch.randn(rows, size) for rows in (1, SEVERAL, MANY)}
        name = f"{SPEC} times {INPUT.partition(' narrow')[0]}, {ours.kernel}"
        us, ms = Unit("microseconds", 1e6), Unit("ms", 1e3)

        @cache
        def opened() -> Peer:
            peer = stack.enter_context(Peer("onnxruntime", setting.threads))
            peer.ask("open", size, size, GROUP, 1 + STREAMED // _onnx_bytes(size), setting.threads)
            return peer

        def peers(rows: int, goals: dict[str, float]) -> list[Contender]:
            found = [
                invited("onnxruntime MatMulNBits", lambda: onnxruntime(opened(), size, rows)),
                torch_int4.contender("torch int4 op", x[rows]),
                bf16.contender("torch bf16", x[rows]),
            ]
            return [replace(peer, goal=goals.get(peer.name)) for peer in found]

        one, flop = ours.contender(name, x[1]), 2.0 * size * size
        nf4 = invited("bitsandbytes nf4", lambda: bitsandbytes(weight, x[1]))
        goals = {"onnxruntime MatMulNBits": 1.0, "torch int4 op": 1.0}
        yield setting.rows(
            f"one row by {size} x {size}, streamed", us, one, [*peers(1, goals), replace(nf4, goal=1.0)],
            rounds=rounds, flop=flop,
        )  # fmt: skip
        assert one.bytes is not None
        yield setting.rows(
            f"bandwidth of one row by {size} x {size}, streamed", Unit("GB/s", one.bytes * 1e-9, rate=True), one,
            [memory(one.bytes)], rounds=rounds,
        )  # fmt: skip
        yield setting.rows(
            f"{SEVERAL} rows by {size} x {size}", us, ours.contender(name, x[SEVERAL]),
            peers(SEVERAL, {"torch bf16": GOAL_OF_BF16}), rounds=rounds, flop=SEVERAL * flop,
        )  # fmt: skip
        yield setting.rows(
            f"{MANY} rows by {size} x {size}", ms, ours.contender(name, x[MANY]), peers(MANY, {}),
            rounds=max(1, rounds // 3), flop=MANY * flop,
        )  # fmt: skip
        ours = Products(prepare(rtn(weight, QuantSpec.parse("nf4 b64"))))
        yield setting.rows(
            f"one row by {size} x {size}, nf4, streamed", us, ours.contender(f"nf4 b64, {ours.kernel}", x[1]), [nf4],
            rounds=rounds, flop=flop,
        )  # fmt: skip


class Products:
    """Copies of one weight, laid out for a kernel or plain, which are multiplied by in turn."""

    def __init__(self, weight: Prepared | Tensor, dtype: torch.dtype = torch.float32) -> None:
        self.bytes, self._dtype, self._next = weight.nbytes, dtype, 0
        self.kernel = "linear" if isinstance(weight, Tensor) else weight.backend
        copies = [weight, *(_copy(weight) for _ in range(int(STREAMED // self.bytes)))]
        self._copies = in_large_pages(copies)  # as the engine has them

    def contender(self, name: str, x: Tensor) -> Contender:
        """x (rows, in). A turn goes through the copies for ``TURN`` seconds."""
        x = x.to(self._dtype)
        version = (
            f"labkit {labkit.__version__}" if self.kernel == "native_cpu" else f"torch {torch.__version__}"
        )
        return Contender(name, version, lambda: self.turn(x), bytes=float(self.bytes))

    @torch.inference_mode()
    def turn(self, x: Tensor) -> float:
        """Seconds for one product, the mean over a turn."""

        def product() -> None:
            weight = self._copies[self._next]
            F.linear(x, weight) if isinstance(weight, Tensor) else weight(x)
            self._next = (self._next + 1) % len(self._copies)

        return _mean(product)


def onnxruntime(peer: Peer, size: int, rows: int) -> Contender:
    """Products of ``rows`` rows by the weights that the peer has open. Raises PeerFailed."""
    return Contender(
        "onnxruntime MatMulNBits", peer.ask("version"), lambda: peer.seconds("product", rows, TURN),
        bytes=float(_onnx_bytes(size)),
    )  # fmt: skip


def _onnx_bytes(size: int) -> int:
    return (
        size * size // 2 + size * size // GROUP * 9 // 2
    )  # a group has a float32 scale and 4 bits of zero point


def bitsandbytes(weight: Tensor, x: Tensor) -> Contender:
    """Its nf4 layer in eval mode, laid out anew for the processors that it knows. Raises ImportError."""
    import bitsandbytes as bnb

    def layer() -> torch.nn.Module:
        made = bnb.nn.Linear4bit(
            weight.shape[1], weight.shape[0], bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
        )
        made.weight = bnb.nn.Params4bit(weight.clone(), requires_grad=False, blocksize=64, quant_type="nf4")
        return made.to("cpu").eval()

    half = x.bfloat16()
    size = weight.numel() // 2 + weight.numel() // 64 * 4
    layers = [layer() for _ in range(1 + STREAMED // size)]
    for made in layers:  # lays its weight out when it is first called
        made(half)
    for made, weight in zip(layers, in_large_pages([made.weight.data for made in layers]), strict=True):
        made.weight.data = weight

    def products() -> None:
        for made in layers:
            made(half)

    @torch.inference_mode()
    def turn() -> float:
        return _mean(products) / len(layers)

    version = f"bitsandbytes {importlib.metadata.version('bitsandbytes')}"
    return Contender("bitsandbytes nf4", version, turn, bytes=float(size))


def memory(size: float) -> Contender:
    """Reading ``size`` bytes, by torch's sum or our own, whichever is faster, from pages as large as the system gives
    them. Our own reads as our kernel does, so that what the kernel falls short of it is not memory's. It is timed as
    long as a product is, and by one of the two: the better of two times would be better by luck alone.
    """
    block = Arena(READ).take(torch.ones(1).expand(READ // 4))
    readers: list[Callable[[], object]] = [block.sum]
    if build.why_not() is None:
        own, threads = build.library().labkit_sum, torch.get_num_threads()
        readers.append(lambda: own(block.data_ptr(), block.numel(), threads))

    fastest = min(readers, key=lambda reader: statistics.median(_timed(reader) for _ in range(7)))

    return Contender(
        "reading memory", f"labkit {labkit.__version__}, torch {torch.__version__}",
        lambda: _mean(fastest) * size / block.nbytes, bytes=size, goal=GOAL_OF_BANDWIDTH,
    )  # fmt: skip


def _mean(run: Callable[[], object]) -> float:
    """Seconds of one run, the mean over a turn: as many as begin within ``TURN`` seconds."""
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < TURN:
        run()
        count += 1
    return (time.perf_counter() - start) / count


def _timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def in_large_pages(weights: Sequence[Any]) -> list[Any]:
    """Tensors, or weights laid out for a kernel, with their numbers side by side in pages as large as there are."""
    settle(weights)  # what is ours; of others, each tensor that they hold
    parts = [
        (weight, name, part)
        for weight in weights
        for name, part in ({} if isinstance(weight, Tensor | NativeCpu) else vars(weight)).items()
        if isinstance(part, Tensor)
    ]
    plain = [weight for weight in weights if isinstance(weight, Tensor)]
    arena = Arena(Arena.nbytes([*(part for *_, part in parts), *plain]))
    for weight, name, part in parts:
        setattr(weight, name, arena.take(part))
    return [arena.take(weight) if isinstance(weight, Tensor) else weight for weight in weights]


def _copy(weight: Any) -> Any:
    if isinstance(weight, Tensor):
        return weight.clone()
    shared = [
        part for part in vars(weight).values() if isinstance(part, QuantizedTensor)
    ]  # not read by a product
    return deepcopy(weight, {id(part): part for part in shared})
