"""A whole model: decoding, reading a prompt, and what a process needs to its first token.

Ours goes through the engine, as a request of the server does, with its sampling and its text. Peers take the
likeliest token of each step and make no text.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import labkit
from labkit import models
from labkit.bench.measure import Contender, Row, Setting, Unit, invited
from labkit.bench.pipe import Fresh, Peer
from labkit.bench.quality import Reference
from labkit.bench.reference import prompt_of, stored_bytes, write_folder, write_gguf
from labkit.kernels.int4_cpu import Int4Cpu
from labkit.models.calibrate import shared_copy
from labkit.models.memory import kv_bytes
from labkit.quant import QuantizedTensor
from labkit.serving.engine import Engine
from labkit.serving.sampling import SamplingParams
from labkit.serving.step import Step

RECIPE = "w4a8-gptq-g64"  # what stands beside llama.cpp, which rounds activations too
PROMPT, TOKENS = 128, 128
LONG, AFTER_LONG = 868, 64  # 900 tokens of context in the middle
SEQUENCES, TOGETHER = 8, 64
PREFILL = 512
SPARE = 64  # tokens that the other sequences may be ahead of the one that is timed
LENGTH = LONG + AFTER_LONG + 4
ROUNDS = 7
OF_TORCH = {"int4_op": "torch's int4 op", "Bfloat16": "torch bf16"}
QUANTIZED = {  # llama.cpp's file types: layers, head
    "Q4_0": ("Q4_0", "Q8_0"),
    "Q4_1": ("Q4_1", "Q8_0"),
    "Q4_0 with its head": ("Q4_0", "Q4_0"),
}


def model(
    setting: Setting, name: str | None = None, recipe: str = RECIPE, rounds: int = ROUNDS
) -> Iterator[list[Row]]:
    """The rows of a whole model, work by work. ``name`` as ``models.load`` takes it, ``recipe`` what stands beside
    llama.cpp."""
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="labkit-bench-")))
        original = models.load(name, seed=0)
        reference = Reference(original, models.protocol_for(original.tokenizer, "lesson"))
        made = models.quantize(original, recipe)
        fast = Ours(made, recipe, reference, stack)
        # What stands beside torch: the same weights, by activations that stay floats.
        floats = with_floats(made)
        plain = Ours(floats, f"{recipe}'s weights, float32 activations", reference, stack)
        folder = models.save(made, scratch / "checkpoint")
        looped = Looped("int4_op", folder, floats, setting.threads, reference, stack)
        half = Looped("Bfloat16", folder, floats, setting.threads, reference, stack)
        llama = LlamaCpp(original, scratch, setting.threads, reference, stack)

        at = PROMPT + TOKENS // 2
        prompt = prompt_of(original, PROMPT)
        yield setting.rows(
            f"decode {TOKENS} tokens after {PROMPT}", Unit("tokens/s", TOKENS, rate=True),
            fast.decode([prompt], TOKENS, at),
            [
                llama.decode("Q4_0", [prompt], TOKENS, at, goal=1.5, even_kl=True),
                llama.decode("Q4_1", [prompt], TOKENS, at, goal=2.2, even_kl=True),
                llama.decode("Q4_0 with its head", [prompt], TOKENS, at),
            ],
            rounds=rounds,
        )  # fmt: skip
        yield setting.rows(
            f"decode {TOKENS} tokens after {PROMPT}, W4A16", Unit("tokens/s", TOKENS, rate=True),
            plain.decode([prompt], TOKENS, at),
            [
                transformers(original, scratch, setting.threads, reference, stack, prompt, at, goal=5.0),
                looped.contender("decode", prompt, TOKENS, at=at, goal=1.3),
            ],
            rounds=rounds,
        )  # fmt: skip
        prompt = prompt_of(original, LONG)
        yield setting.rows(
            f"decode {AFTER_LONG} tokens at {LONG + AFTER_LONG // 2} of context",
            Unit("tokens/s", AFTER_LONG, rate=True),
            fast.decode([prompt], AFTER_LONG, LONG + AFTER_LONG // 2),
            [llama.decode("Q4_0", [prompt], AFTER_LONG, LONG + AFTER_LONG // 2, goal=2.0)],
            rounds=rounds,
        )  # fmt: skip
        prompts = [prompt_of(original, PROMPT, start=PROMPT * i) for i in range(SEQUENCES)]
        at = PROMPT + TOGETHER // 2
        yield setting.rows(
            f"decode, {SEQUENCES} sequences at once", Unit("tokens/s", SEQUENCES * TOGETHER, rate=True),
            fast.decode(prompts, TOGETHER, at),
            [
                llama.decode("Q4_0", prompts, TOGETHER, at, goal=1.5),
                vllm(original, scratch, setting.threads, stack, prompts, at, goal=1.5),
            ],
            rounds=rounds,
        )  # fmt: skip
        prompt = prompt_of(original, PREFILL)
        yield setting.rows(
            f"prefill {PREFILL} tokens", Unit("tokens/s", PREFILL, rate=True), fast.prefill(prompt),
            [llama.prefill("Q4_0", prompt, goal=1.5), half.contender("prefill", prompt, at=0, goal=1.2)], rounds=rounds,
        )  # fmt: skip
        yield from start(setting, folder, recipe, llama, prompt_of(original, PROMPT), rounds)


class Ours:
    """A quantized model in our engine."""

    def __init__(
        self, made: models.Llama, name: str, reference: Reference, stack: ExitStack, *, native: bool = True
    ) -> None:
        self.model, self.name, self.native = made, name, native
        self.engine = Engine(made, max_batch=SEQUENCES, max_len=LENGTH, native=native)
        stack.callback(self.engine.close)
        self.kl = reference.of_decode(made, native)

    def decode(self, prompts: list[list[int]], tokens: int, at: int) -> Contender:
        return self._contender(lambda: decode(self.engine, prompts, tokens), at, len(prompts))

    def prefill(self, prompt: list[int]) -> Contender:
        def turn() -> float:
            start = time.perf_counter()
            next(self.engine.submit(prompt, SamplingParams(max_tokens=1, ignore_eos=True)))
            return time.perf_counter() - start

        return replace(self._contender(turn, 0, 1), bytes=None)

    def _contender(self, turn: Callable[[], float], at: int, sequences: int) -> Contender:
        head = self.model.lm_head.weight
        step = "its own step" if self.native and Step.why_not(self.model) is None else "the model's pass"
        return Contender(
            name=self.name, version=f"labkit {labkit.__version__}, torch {torch.__version__}, {step}", turn=turn,
            head=str(head.dtype).removeprefix("torch.") if isinstance(head, Tensor) else str(head.spec),
            bytes=per_token(held_bytes(self.model), self.model, at, sequences, cache_bits(self.model)), kl=self.kl,
        )  # fmt: skip


class Looped:
    """The quantized model in its own pass, multiplied by an operator of torch's, in a process of its own.

    In that of the engine OpenMP has more threads than processors, and lets them sleep between two operators.
    """

    def __init__(
        self, kernel: str, folder: Path, floats: models.Llama, threads: int, reference: Reference, stack: ExitStack
    ) -> None:
        self._name = f"the model's own pass, {OF_TORCH[kernel]}"
        self._model = with_kernel(floats, globals()[kernel])
        self._kl = reference.of_windows(lambda window: self._model(torch.tensor([window]))[0])
        self._peer = stack.enter_context(Peer("labkit", threads))
        self._peer.ask("open", str(folder), kernel, threads)

    def contender(self, method: str, *arguments: Any, at: int, goal: float) -> Contender:
        return Contender(
            self._name, f"torch {torch.__version__}", lambda: self._peer.seconds(method, *arguments), head="bfloat16",
            bytes=per_token(held_bytes(self._model), self._model, at, 1, cache_bits(self._model)) if at else None,
            kl=self._kl, goal=goal,
        )  # fmt: skip


def decode(engine: Engine, prompts: list[list[int]], tokens: int) -> float:
    """Seconds for ``tokens`` steps of all prompts together, once all are read.

    The last to be read is the one that is timed: from its first token on every step has all of them. The others may
    be some steps ahead, so they get more tokens, and end when it does.
    """
    asked = [tokens + SPARE] * (len(prompts) - 1) + [tokens + 1]
    streams = [
        engine.submit(prompt, SamplingParams(max_tokens=count, ignore_eos=True))
        for prompt, count in zip(prompts, asked, strict=True)
    ]
    try:
        next(streams[-1])
        start = time.perf_counter()
        streams[-1].result()
        return time.perf_counter() - start
    finally:
        for stream in streams:
            stream.cancel()


def held_bytes(found: models.Llama) -> int:
    """Bytes of all matrices as the kernels hold them; an embedding that is the head counts once, as the head."""
    return sum(
        linear.weight.nbytes if isinstance(linear.weight, Tensor) else linear.prepared.nbytes
        for linear in found.linears().values()
    )


def per_token(weights: float, found: models.Llama, at: int, sequences: int, bits: float) -> float:
    """Bytes read for one token: its share of the weights, and the keys and values of ``at`` tokens."""
    return weights / sequences + kv_bytes(found.config, at, bits)


def cache_bits(found: models.Llama) -> float:
    """Of a number in our cache, on average."""
    return found.kv.bits(found.config.head_dim)


class Bfloat16:
    """A quantized weight written out in bfloat16 once."""

    backend = "bfloat16"

    def __init__(self, weight: QuantizedTensor) -> None:
        self.shape, self._weight = weight.shape, weight.dequantize(torch.bfloat16)

    @property
    def nbytes(self) -> int:
        return self._weight.nbytes

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y = F.linear(x.bfloat16(), self._weight).to(x.dtype)
        return y if bias is None else y + bias


def int4_op(weight: QuantizedTensor) -> Int4Cpu | Bfloat16:
    """torch's fastest product: its operator for int4, and bfloat16 for the head, which has more bits."""
    return Int4Cpu(weight) if Int4Cpu.why_not(weight) is None else Bfloat16(weight)


def with_floats(made: models.Llama) -> models.Llama:
    """The same model with activations that are not rounded."""
    copy = shared_copy(made)
    for linear in copy.linears().values():
        linear.input = None
    return copy


def with_kernel(made: models.Llama, kernel: Callable[[QuantizedTensor], Any]) -> models.Llama:
    """The same model with every quantized layer multiplied by ``kernel`` of its weight."""
    copy = shared_copy(made)
    for linear in copy.linears().values():
        if isinstance(linear.weight, QuantizedTensor):
            linear._prepared = kernel(linear.weight)
    return copy


class LlamaCpp:
    """llama.cpp with flash attention on files that it quantized itself, from the reference in float32."""

    def __init__(
        self, original: models.Llama, scratch: Path, threads: int, reference: Reference, stack: ExitStack
    ) -> None:
        self._original, self._scratch, self._threads = original, scratch, threads
        self._reference, self._stack = reference, stack
        self._open: dict[tuple[str, int], Peer] = {}
        self._kl: dict[str, float] = {}

    def decode(self, kind: str, prompts: list[list[int]], tokens: int, at: int, **goal: Any) -> Contender:
        return self._contender(kind, len(prompts), at, goal, "decode", prompts, tokens)

    def prefill(self, kind: str, prompt: list[int], **goal: Any) -> Contender:
        return replace(self._contender(kind, 1, 0, goal, "prefill", prompt), bytes=None)

    def file(self, kind: str) -> Path:
        """The file of that kind, made when first asked for. Raises PeerMissing, PeerFailed."""
        source, target = self._scratch / "reference.gguf", self._scratch / f"{kind}.gguf"
        if not target.exists():
            with Peer("llama_cpp", self._threads) as peer:
                if not source.exists():
                    write_gguf(self._original, source)
                peer.ask("quantize", str(source), str(target), *QUANTIZED[kind], self._threads)
        return target

    def version(self) -> str:
        """Raises PeerMissing, PeerFailed."""
        with Peer("llama_cpp", self._threads) as peer:
            return str(peer.ask("version"))

    def _contender(
        self, kind: str, sequences: int, at: int, goal: dict[str, Any], method: str, *arguments: Any
    ) -> Contender:
        name = f"llama.cpp {kind}, flash attention"

        def make() -> Contender:
            peer = self._peer(kind, sequences)
            size = per_token(stored_bytes(self.file(kind)), self._original, at, sequences, 16)
            return Contender(
                name, peer.ask("version"), lambda: peer.seconds(method, *arguments), head=QUANTIZED[kind][1],
                bytes=size, kl=self._kl_of(kind),
            )  # fmt: skip

        return replace(invited(name, make), **goal)

    def _peer(self, kind: str, sequences: int) -> Peer:
        key = kind, sequences
        if key not in self._open:
            file = self.file(kind)
            length = LENGTH if sequences == 1 else PROMPT + TOGETHER + 4
            peer = self._stack.enter_context(Peer("llama_cpp", self._threads))
            peer.ask("open", str(file), self._threads, True, length, sequences)
            self._open[key] = peer
        return self._open[key]

    def _kl_of(self, kind: str) -> float:
        if kind not in self._kl:
            self._kl[kind] = self._reference.of_windows(logits_of(self._peer(kind, 1), self._scratch))
        return self._kl[kind]


def logits_of(peer: Peer, scratch: Path) -> Callable[[list[int]], Tensor]:
    """A peer's logits (tokens, vocab) of a window, by way of a file."""
    file = scratch / "logits.npy"

    def logits(window: list[int]) -> Tensor:
        peer.ask("logits", window, str(file))
        return torch.from_numpy(np.load(file))

    return logits


def transformers(
    original: models.Llama, scratch: Path, threads: int, reference: Reference, stack: ExitStack,
    prompt: list[int], at: int, goal: float,
) -> Contender:  # fmt: skip
    """transformers in bfloat16, in a process of its own."""
    name = "transformers bf16"

    def make() -> Contender:
        peer = stack.enter_context(Peer("transformers", threads))
        peer.ask("open", str(reference_folder(original, scratch)), threads)
        return Contender(
            name, peer.ask("version"), lambda: peer.seconds("decode", prompt, TOKENS), head="bfloat16",
            bytes=per_token(bf16_bytes(original), original, at, 1, 16),
            kl=reference.of_windows(logits_of(peer, scratch)),
        )  # fmt: skip

    return replace(invited(name, make), goal=goal)


def vllm(
    original: models.Llama, scratch: Path, threads: int, stack: ExitStack, prompts: list[list[int]], at: int,
    goal: float,
) -> Contender:  # fmt: skip
    """vllm in bfloat16, in a process of its own."""
    name = "vllm bf16"

    def make() -> Contender:
        peer = stack.enter_context(Peer("vllm", threads))
        folder = reference_folder(original, scratch)
        peer.ask("open", str(folder), len(prompts), PROMPT + TOGETHER + 4, threads)
        return Contender(
            name, peer.ask("version"), lambda: peer.seconds("decode", prompts, TOGETHER), head="bfloat16",
            bytes=per_token(bf16_bytes(original), original, at, len(prompts), 16),
        )  # fmt: skip

    return replace(invited(name, make), goal=goal)


def reference_folder(original: models.Llama, scratch: Path) -> Path:
    """The model in Hugging Face layout, written when first asked for."""
    folder = scratch / "reference"
    return folder if folder.exists() else write_folder(original, folder)


def bf16_bytes(original: models.Llama) -> float:
    """Of all matrices."""
    return sum(2.0 * linear.weight.shape.numel() for linear in original.linears().values())


def start(
    setting: Setting, folder: Path, recipe: str, llama: LlamaCpp, prompt: list[int], rounds: int
) -> Iterator[list[Row]]:
    """From a file to the first token, in a new process each time; its imports are not counted, its memory is."""

    def make() -> Contender:
        turn = Fresh(
            "llama_cpp", setting.threads, "first", str(llama.file("Q4_0")), setting.threads, prompt
        )
        return Contender(name, llama.version(), turn)

    name = "llama.cpp Q4_0, flash attention"
    ours = Contender(
        recipe, f"labkit {labkit.__version__}, torch {torch.__version__}",
        Fresh("labkit", setting.threads, "first", str(folder), setting.threads, prompt),
    )  # fmt: skip
    peers = [invited(name, make)]
    work = f"checkpoint to the first token after {PROMPT}"
    yield setting.rows(work, Unit("s"), ours, peers, rounds=rounds)
    yield setting.peaks(f"peak memory, {work}", ours, peers)
