"""Our own kernel against a product in float64: every format, odd shapes, extremes, gradients, memory errors."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from labkit import quant
from labkit.kernels import backends, build, prepare
from labkit.kernels.native_cpu import NativeCpu, settle
from labkit.quant import QuantizedTensor, QuantSpec, encode, fit

FORMATS = [
    *(f"int{bits} {rest}" for bits in (2, 3, 4, 5, 8) for rest in ("g64", "g64 asym", "channel", "channel asym")),
    "int4 g32 narrow",
    "int4 tensor",
    "int4 32x128 asym",
    "int4 g16 asym-float scale=bf16",
    "int4 g64 asym scale=(int8 b256 asym scale=fp32)",
    "int8 g64 asym-float scale=fp32",
    "nf4 g64",
    "mxfp4",
    "nvfp4",
    *(f"table{bits} {rest}, own" for bits, rest in ((2, "g64"), (3, "tensor"), (4, "g32 scale=fp32"), (4, "8x48"))),
]  # fmt: skip
MARCHES = ["native", "x86-64-v3"]  # the second has AVX2 and no AVX-512
if "avx512bw" in Path("/proc/cpuinfo").read_text():
    MARCHES.append("skylake-avx512")  # AVX-512 without VNNI

INTEGERS = [text for text in FORMATS if text.startswith("int")]
INPUTS = [f"int8 {block} narrow scale=fp32" for block in ("g8", "g32", "g64", "channel")]


def quantized(text: str, out: int, inputs: int) -> QuantizedTensor:
    weight, spec = torch.randn(out, inputs), QuantSpec.parse(text.removesuffix(", own"))
    if text.endswith(", own"):
        return quant.quantile(weight, spec)  # a table for each row, with no search
    return encode(weight, spec, fit(weight, spec))


def off(y: Tensor, x: Tensor, weight: QuantizedTensor) -> float:
    """The largest error of the outputs, each in units of the sizes of what is added up to it."""
    dense = middle = weight.dequantize(torch.float64)
    if (
        weight.zero is not None
    ):  # codes count from the middle of their range, and the zero point is added apart
        zero = torch.full_like(weight.zero, 2 ** (weight.spec.bits - 1))
        middle = replace(weight, zero=zero).dequantize(torch.float64)
    exact, size = x.double() @ dense.T, x.double().abs() @ (middle.abs() + (dense - middle).abs()).T
    return float(((y.double() - exact).abs() / (size + 1e-30)).max())


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("march", MARCHES)
@pytest.mark.parametrize("text", FORMATS)
def test_every_format(text: str, march: str, threads: int) -> None:
    torch.manual_seed(0)
    weight = quantized(text, 75, 576)
    kernel = NativeCpu(weight, march=march)
    for rows in (1, 2, 3, 7, 8, 300):
        x = torch.randn(rows, 576)
        assert off(kernel(x), x, weight) < 1e-6, rows


@given(
    text=st.sampled_from(FORMATS),
    march=st.sampled_from(MARCHES),
    out=st.integers(1, 70),
    inputs=st.integers(1, 200),
    rows=st.integers(1, 20),
    seed=st.integers(0, 9),
)
def test_odd_shapes_and_ragged_groups(
    text: str, march: str, out: int, inputs: int, rows: int, seed: int
) -> None:
    torch.manual_seed(seed)
    weight, x = quantized(text, out, inputs), torch.randn(rows, inputs)
    assert off(NativeCpu(weight, march=march)(x), x, weight) < 1e-6


def off_rounded(kernel: NativeCpu, x: Tensor, weight: QuantizedTensor, input: QuantSpec) -> float:
    """The same, where x was rounded by ``quant`` first: code by code, or the error is that of a whole step."""
    return off(kernel(x), encode(x, input, fit(x, input)).dequantize(), weight)


@pytest.mark.parametrize("march", MARCHES)
@pytest.mark.parametrize("text", INTEGERS)
def test_every_integer_with_rounded_activations(text: str, march: str, threads: int) -> None:
    torch.manual_seed(0)
    weight, grid = quantized(text, 75, 192), QuantSpec.parse("int8 g32 narrow scale=fp32")
    kernel = NativeCpu(weight, grid, march)
    for rows in (1, 2, 3, 7, 8, 30):
        x = torch.randn(rows, 192) * torch.logspace(-3, 3, rows)[:, None]
        x[0, :40] = 0
        assert off_rounded(kernel, x, weight, grid) < 1e-6, rows


@given(
    text=st.sampled_from(INTEGERS),
    input=st.sampled_from(INPUTS),
    march=st.sampled_from(MARCHES),
    out=st.integers(1, 70),
    inputs=st.integers(1, 200),
    rows=st.integers(1, 20),
    seed=st.integers(0, 9),
)
def test_odd_shapes_with_rounded_activations(
    text: str, input: str, march: str, out: int, inputs: int, rows: int, seed: int
) -> None:
    torch.manual_seed(seed)
    weight, x, grid = quantized(text, out, inputs), torch.randn(rows, inputs), QuantSpec.parse(input)
    if backends(weight, grid)["native_cpu"] is None:
        assert off_rounded(NativeCpu(weight, grid, march), x, weight, grid) < 1e-6
    else:
        assert "overlap" in str(backends(weight, grid)["native_cpu"])
        assert prepare(weight, input=grid).backend == "reference"


@pytest.mark.parametrize("march", MARCHES)
@pytest.mark.parametrize("text", ["int4 g32 asym", "int4 g32", "int8 g32 asym", "int8 g32"])
def test_the_ends_of_codes_with_the_ends_of_activations(text: str, march: str) -> None:
    spec, grid = QuantSpec.parse(text), QuantSpec.parse("int8 g32 narrow scale=fp32")
    low, high = spec.code_range
    codes = torch.tensor([low, high]).to(torch.int8 if low < 0 else torch.uint8).repeat_interleave(20)
    zero = torch.full((40, 3), high, dtype=torch.uint8) if spec.zero == "int" else None
    weight = QuantizedTensor(codes[:, None].repeat(1, 96), torch.ones(40, 3).half(), spec, zero)
    signs = torch.ones(96)
    signs[::2] = -1
    for x in (
        torch.full((9, 96), 1e30),
        -torch.full((9, 96), 1e-30),
        torch.full((1, 96), 1e-44),
        signs[None] * 127,
    ):
        y = NativeCpu(weight, grid, march)(x)
        assert (
            bool(y.isfinite().all())
            and off_rounded(NativeCpu(weight, grid, march), x, weight, grid) < 1e-6
        )


def test_rounded_activations_by_act_order_leading_axes_and_dtype() -> None:
    grid = QuantSpec.parse("int8 g32 narrow scale=fp32")
    weight = quantized("int4 g32 asym", 20, 96)
    weight = replace(weight, g_idx=(torch.arange(96).int() // 32)[torch.randperm(96)])
    x, order = torch.randn(2, 5, 96).bfloat16(), torch.argsort(weight.g_idx, stable=True)
    y = prepare(weight, "native_cpu", grid)(x)
    # What is multiplied together is rounded together: in the weight's order, not in that of x.
    arranged = x.float()[..., order]
    seen = encode(arranged, grid, fit(arranged, grid)).dequantize()[..., torch.argsort(order)]
    wanted = seen.double() @ weight.dequantize(torch.float64).T
    assert y.dtype == torch.bfloat16 and y.shape == (2, 5, 20)
    assert (y.double() - wanted).norm() < 0.005 * wanted.norm()


def test_what_is_no_number_stays_in_its_row_when_rounded_too() -> None:
    grid = QuantSpec.parse("int8 g16 narrow scale=fp32")
    for bad in (torch.nan, torch.inf):
        x = torch.ones(3, 30)
        x[1, 29] = bad
        y = prepare(quantized("int4 g16", 20, 30), "native_cpu", grid)(x)
        assert bool(y[1].isnan().all()) and bool(y[[0, 2]].isfinite().all())


@pytest.mark.parametrize(
    ("text", "input", "reason"),
    [
        ("nf4 g64", "int8 g32 narrow scale=fp32", "multiplied by integers, found nf4"),
        ("int4 g64", "int8 g32 scale=fp32", "rounds activations to 'int8 g32 narrow scale=fp32'"),
        ("int4 g64", "fp8_e4m3 channel", "found fp8_e4m3 channel"),
        ("int4 g64", "int8 g12 narrow scale=fp32", "a multiple of 8, found 12"),
        ("int4 g48", "int8 g32 narrow scale=fp32", "steps of 32 activations and groups of 48 overlap"),
    ],
)
def test_the_reason_why_not_rounded_is_named(text: str, input: str, reason: str) -> None:
    weight, grid = quantized(text, 16, 192), QuantSpec.parse(input)
    assert reason in str(backends(weight, grid)["native_cpu"])
    assert prepare(weight, input=grid).backend == "reference"


@pytest.mark.parametrize("march", MARCHES)
@pytest.mark.parametrize("text", ["int4 g32 asym", "int4 g32", "int8 g32 asym", "int8 g32"])
def test_the_ends_of_codes_and_zero_points(text: str, march: str) -> None:
    spec = QuantSpec.parse(text)
    low, high = spec.code_range
    ends = torch.tensor([low, high, 0 if low < 0 else (low + high) // 2])
    codes = ends[torch.arange(40 * 96).view(40, 96) % 3].to(torch.int8 if low < 0 else torch.uint8)
    scale = torch.tensor([0.0, 1e-7, 60000.0]).half().repeat(40, 1)
    zero = torch.tensor([low, high, 7]).to(torch.uint8).repeat(40, 1) if spec.zero == "int" else None
    weight = QuantizedTensor(codes, scale, spec, zero)
    for x in (torch.zeros(3, 96), torch.full((3, 96), 1e30), torch.randn(3, 96) * 1e-30):
        y = NativeCpu(weight, march=march)(x)
        assert bool(y.isfinite().all()) and off(y, x, weight) < 1e-6


def test_what_is_no_number_in_x_reaches_its_own_row_only() -> None:
    weight, x = quantized("int4 g16", 20, 30), torch.ones(3, 30)
    x[1, 29] = torch.nan
    y = prepare(weight, "native_cpu")(x)
    assert bool(y[1].isnan().all()) and bool(y[[0, 2]].isfinite().all())


def test_a_copy_by_pickle_works_like_the_original() -> None:
    kernel, x = prepare(quantized("int3 g16 asym", 20, 32), "native_cpu"), torch.randn(3, 32)
    kernel(x)
    assert torch.equal(pickle.loads(pickle.dumps(kernel))(x), kernel(x))


def test_flat_runs_that_fill_rows_and_codebooks_of_one_table() -> None:
    runs = quantized("nf4 b64", 24, 192)
    x = torch.randn(4, 192)
    assert off(prepare(runs, "native_cpu")(x), x, runs) < 1e-6
    for bits in (2, 3, 4):
        spec = QuantSpec.parse(f"table{bits} g32")
        table = torch.randn(2**bits).sort().values
        codes = torch.randint(2**bits, (24, 192), dtype=torch.uint8)
        learned = QuantizedTensor(codes, torch.rand(24, 6).half(), spec, table=table)
        assert off(prepare(learned, "native_cpu")(x), x, learned) < 1e-6


def test_act_order_also_with_a_smaller_last_group() -> None:
    weight = quantized("int4 g32 asym", 20, 80)
    weight = replace(weight, g_idx=(torch.arange(80).int() // 32)[torch.randperm(80)])
    x = torch.randn(5, 80)
    assert off(prepare(weight, "native_cpu")(x), x, weight) < 1e-6


def test_the_gradient_is_that_of_the_written_out_weight() -> None:
    weight, bias = quantized("nf4 g64", 40, 128), torch.randn(40)
    found, wanted = (torch.randn(2, 3, 128).requires_grad_() for _ in range(2))
    wanted.data.copy_(found.data)
    prepare(weight, "native_cpu")(found, bias).square().sum().backward()
    (wanted @ weight.dequantize().T + bias).square().sum().backward()
    assert found.grad is not None and wanted.grad is not None
    assert (found.grad - wanted.grad).norm() < 1e-5 * wanted.grad.norm()


@pytest.mark.parametrize(
    ("text", "bits"), [("int2 g64", 4), ("nf4 g64", 4), ("int4 g64", 4), ("int8 g64", 8)]
)
def test_it_holds_the_codes_and_no_more(text: str, bits: int) -> None:
    kernel = prepare(quantized(text, 64, 512), "native_cpu")
    assert kernel.nbytes == 64 * 512 * bits // 8 + 64 * 8 * 2 + 16 * 4


@pytest.mark.parametrize(
    ("text", "inputs", "reason"),
    [
        ("fp8_e4m3 g64", 64, "above 4 bits the kernel is for integers, found fp8_e4m3"),
        ("int4 g12", 48, "groups must be a multiple of 8, found 12"),
        ("nf4 b64", 100, "runs of 64 cross rows of 100"),
        ("nf4 b64 mean", 64, "the mean that was taken off"),
    ],
)
def test_the_reason_why_not_is_named(text: str, inputs: int, reason: str) -> None:
    weight = quantized(text, 16, inputs)
    with pytest.raises(ValueError, match=reason):
        prepare(weight, "native_cpu")
    assert prepare(weight).backend == "reference"


@pytest.mark.parametrize("march", MARCHES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_table_for_each_row(dtype: torch.dtype, march: str) -> None:
    codes, table = torch.randint(16, (21, 1400), dtype=torch.uint8), torch.randn(21, 16).sort().values.to(dtype)
    g_idx = (torch.arange(1400).int() // 48)[torch.randperm(1400)]
    weight = QuantizedTensor(codes, torch.rand(21, 30).half(), QuantSpec.parse("table4 g48"), table=table, g_idx=g_idx)
    x = torch.randn(11, 1400)
    assert off(NativeCpu(weight, march=march)(x), x, weight) < 1e-6
    kernel = NativeCpu(quant.kmeans(torch.randn(64, 512), QuantSpec.parse("table4 g64")))
    assert kernel.nbytes == 64 * 512 // 2 + 64 * 8 * 2 + 64 * 16 * 2


def test_what_it_does_not_know_is_refused() -> None:
    narrow = quantized("table2 g8, own", 4, 32)
    assert "a multiple of 16, found 8" in str(backends(narrow)["native_cpu"])
    grid = QuantSpec.parse("int8 g32 narrow scale=fp32")
    assert "by integers" in str(backends(quantized("table2 g64, own", 4, 64), grid)["native_cpu"])
    outliers = (torch.tensor([3]), torch.tensor([50.0]))
    assert "outliers" in str(
        backends(replace(quantized("int3 g16", 4, 16), outliers=outliers))["native_cpu"]
    )
    uneven = replace(quantized("int4 g16", 4, 32), g_idx=torch.zeros(32, dtype=torch.int32))
    assert "16 columns each" in str(backends(uneven)["native_cpu"])


@pytest.mark.parametrize("march", MARCHES)
def test_what_reads_memory_reads_every_number(march: str, threads: int) -> None:
    for blocks in (0, 1, 7, 40):
        x = torch.randn(64 * blocks)
        found = build.library(march).labkit_sum(x.data_ptr(), x.numel(), threads)
        assert found == pytest.approx(float(x.double().sum()), abs=1e-4)


PRODUCTS = textwrap.dedent("""
    import ctypes, sys, torch
    from labkit.kernels import backends, build, prepare
    from labkit.kernels.native_cpu import NativeCpu
    from labkit.quant import QuantSpec, encode, fit, quantile
    def weight(text, out=33, inputs=75):
        w, spec = torch.randn(out, inputs), QuantSpec.parse(text)
        return encode(w, spec, fit(w, spec))
""")


def program(code: str) -> list[str]:
    return [sys.executable, "-c", PRODUCTS + textwrap.dedent(code)]


def run(code: str, **environment: str) -> str:
    ran = subprocess.run(
        program(code),
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.mark.parametrize(("sanitizer", "march"), [*(("address", march) for march in MARCHES), ("thread", "native")])
def test_no_byte_is_touched_outside_its_buffers_or_by_two_at_once(sanitizer: str, march: str, tmp_path: Path) -> None:
    """AddressSanitizer and ThreadSanitizer, with two threads. They do not know OpenMP, by which torch computes."""
    compiler = shutil.which("g++")
    assert compiler
    checked = tmp_path / "checked.so"
    command = [
        compiler,
        "-O1",
        "-g",
        "-std=c++17",
        "-shared",
        "-fPIC",
        "-pthread",
        f"-fsanitize={sanitizer}",
        f"-march={march}",
    ]
    subprocess.run(
        [*command, str(build.FOLDER / "library.cpp"), "-o", str(checked)], check=True, capture_output=True
    )
    runtime = subprocess.run(
        [compiler, f"-print-file-name=lib{sanitizer[0]}san.so"], capture_output=True, text=True
    ).stdout.strip()
    code = f"""
    build.library = lambda march="native": build.declared(ctypes.CDLL({str(checked)!r}))
    torch.get_num_threads = lambda: 2
    for text in ("int4 g16 asym", "int8 g32 asym scale=fp32", "nf4 channel", "int3 channel"):
        for out, inputs in ((1, 1), (33, 75), (16, 64)):
            for rows in (1, 2, 5, 8, 11):
                NativeCpu(weight(text, out, inputs))(torch.randn(rows, inputs))
                own = NativeCpu(quantile(torch.randn(out, inputs), QuantSpec.parse("table3 g16")))
                own(torch.randn(rows, inputs))
                if text.startswith("int"):
                    grid = QuantSpec.parse("int8 g16 narrow scale=fp32")
                    NativeCpu(weight(text, out, inputs), grid)(torch.randn(rows, inputs))
    from labkit import models
    from labkit.models.kv import KVSpec
    from labkit.serving.kv_cache import KVCache
    from labkit.serving.step import Step
    for recipe in (None, "w3a16-gptq-g64-actorder", "w4a8-rtn-g32", "w4a16-rotate-rtn-g64"):
        model = models.load("tiny") if recipe is None else models.quantize(models.load("tiny"), recipe)
        for kv in (KVSpec(), KVSpec("fp16", "bf16"), KVSpec("int8 g6 asym", "int4 g16")):
            cache = KVCache(model.config, max_batch=2, max_len=20, kv=kv)
            step = Step(model, cache)
            for sequence in (0, 1):
                cache.add(sequence)
            for at in range(20):
                step([[at], [at]], cache.batch([0, 1], 1))
            cache.remove(0), cache.add(0)
            step([range(20)], cache.batch([0], 20))
    print("clean")
    """  # fmt: skip
    (known := tmp_path / "known").write_text("race:libtorch\nrace:libgomp\n")
    options = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": f"suppressions={known}"}
    assert run(code, LD_PRELOAD=runtime, OMP_NUM_THREADS="1", **options) == "clean\n"


def test_a_forked_process_has_threads_of_its_own_and_ends() -> None:
    code = """
    import os
    torch.get_num_threads = lambda: 2
    product, x = NativeCpu(weight("int4 g16", 40, 64)), torch.randn(3, 64)
    wanted = product(x)
    for computes in (True, False):
        child = os.fork()
        if child == 0:
            raise SystemExit(7 if not computes or torch.equal(product(x), wanted) else 1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    assert run(code) == "7\n7\n"


def test_one_pool_of_threads_serves_all_that_a_thread_asks_for_and_ends_with_it() -> None:
    code = """
    import os, threading, time
    threads, count = 3, lambda: len(os.listdir("/proc/self/task"))
    torch.get_num_threads = lambda: threads
    product, small = NativeCpu(weight("int4 g16", 80, 64)), NativeCpu(weight("int4 g16", 20, 64))
    x, many = torch.randn(3, 64), torch.randn(6400)
    wanted, total = x @ product._source.dequantize().T, float(many.double().sum())
    def check():
        torch.testing.assert_close(product(x), wanted, rtol=1e-4, atol=1e-4)
        assert small(x).shape == (3, 20)  # two panels: for a thread less
        assert abs(build.library().labkit_sum(many.data_ptr(), many.numel(), threads) - total) < 1e-2
    before, seen = count(), []
    def work():
        global threads
        for threads in (3, 1, 2, 5, 2):
            check()
            seen.append(count())
        time.sleep(0.5)  # all of them sleep now
        check()
    other = threading.Thread(target=work)
    other.start(), other.join()  # which does not wait for what a thread does last
    for _ in range(100):
        time.sleep(0.05 * (count() > before))
    print([n - before - 1 for n in seen], count() - before)
    """
    assert run(code) == "[2, 2, 2, 4, 4] 0\n"


def test_a_weight_that_moves_is_the_same() -> None:
    weight, x = quantized("int4 g16 asym", 33, 64), torch.randn(2, 64)
    product = NativeCpu(weight)
    wanted, told = product(x), product._told
    settle([product])
    assert product._told is not told and torch.equal(product(x), wanted)
    settle([product])
    for other in (product, deepcopy(product), pickle.loads(pickle.dumps(product))):
        assert torch.equal(other(x), wanted)


def test_without_a_compiler_the_reference_takes_over_and_the_reason_is_said() -> None:
    code = """
    w = weight("int3 g16")
    print(prepare(w).backend, "|", backends(w)["native_cpu"])
    """
    missing = run(code, CXX="", PATH="/nonexistent")
    assert missing.startswith("reference | no C++ compiler; install one")
    broken = run(code, CXX="/nonexistent/c++ -m64")
    assert broken.startswith("reference | the C++ compiler /nonexistent/c++ -m64 does not run")


def test_a_processor_that_it_is_not_for_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path))
    with pytest.raises(build.Unavailable, match="wants a processor with AVX2 or AVX-512"):
        build.library.__wrapped__("x86-64-v2")
    assert list((tmp_path / "kernels").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path / "file"))
    with pytest.raises(build.Unavailable, match="set LABKIT_CACHE"):
        build.library.__wrapped__()


def test_built_once_for_each_source_by_however_many_at_once(tmp_path: Path) -> None:
    code = "print(build.library().labkit_arithmetic().decode())"
    environment = os.environ | {"LABKIT_CACHE": str(tmp_path)}
    both = [
        subprocess.Popen(program(code), env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = {process.communicate()[0] for process in both}
    assert len(said) == 1 and said <= {"AVX-512 with VNNI\n", "AVX-512\n", "AVX2\n"}
    [made] = (tmp_path / "kernels").iterdir()
    before = made.stat().st_mtime_ns
    assert run(code, LABKIT_CACHE=str(tmp_path)) in said and made.stat().st_mtime_ns == before
    sources = shutil.copytree(build.FOLDER, tmp_path / "native")
    (sources / "step.h").write_text((sources / "step.h").read_text() + "// changed\n")
    changed = code.replace("print(", f"build.FOLDER = __import__('pathlib').Path({str(sources)!r}); print(")
    run(changed, LABKIT_CACHE=str(tmp_path))
    assert len(list((tmp_path / "kernels").iterdir())) == 2
