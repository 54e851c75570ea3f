"""Every kernel for GPUs compiled for three architectures without one: within their limits, and on the tensor cores."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.needs("triton")

TENSOR_CORES = {80: {"mma.sync"}, 90: {"mma.sync", "wgmma.mma_async"}, 100: {"mma.sync", "tcgen05.mma"}}


@pytest.mark.parametrize("architecture", TENSOR_CORES)
def test_within_the_limits_and_on_the_tensor_cores(architecture: int) -> None:
    from labkit.kernels.gpu.compiled import REGISTERS, SHARED, cases, compiled

    for case in cases():
        row = compiled(case, architecture)
        assert 0 < row.registers <= REGISTERS and row.registers * row.warps * 32 <= 65536, row
        assert row.shared <= SHARED[architecture] and row.spilled == 0, row
        assert bool(row.instructions) == case.tensor_cores, row
        assert set(row.instructions) <= TENSOR_CORES[architecture], row


def test_tiles_of_weights_use_each_architectures_own_instruction() -> None:
    from labkit.kernels.gpu.compiled import cases, compiled

    by_name = {case.name: case for case in cases()}
    newest = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
    for architecture, instruction in newest.items():
        for name in ("int4, few rows", "nf4, many rows"):
            assert compiled(by_name[name], architecture).instructions == [instruction]
