"""The Triton kernels beside float64: on a GPU where there is one, and in Triton's interpreter everywhere.

The interpreter must be chosen before Triton is imported, so ../test_gpu_interpreted.py starts a process of its own.
Where there is neither, nothing here is collected.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from on_gpu import DTYPES, INTERPRETED, of_programs

ON_A_GPU = ["test_gpu_bounds.py"] if torch.cuda.is_available() else ["test_*.py"]  # what is left out there
collect_ignore_glob = [] if INTERPRETED else ON_A_GPU


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=[1, 3, 256])
def programs(request: pytest.FixtureRequest) -> Iterator[int]:
    with of_programs(request.param):
        yield request.param
