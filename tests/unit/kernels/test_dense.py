"""The product with a plain weight: equal to float64's, by oneDNN where it is worth it, with gradients where wanted."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from labkit.kernels import dense


def operators(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> set[str]:
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        dense(x, weight, bias)
    return {event.key for event in seen.key_averages()}


def by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    return "mkldnn::_linear_pointwise" in operators(x, weight, bias)


@pytest.mark.parametrize("shape", [(16, 512), (300, 512), (2, 5, 8, 512), (1, 17, 512)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_the_product_in_float64(shape: tuple[int, ...], with_bias: bool) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(shape), torch.randn(1000, 512), torch.randn(1000) if with_bias else None
    assert by_onednn(x, weight, bias)
    y = dense(x, weight, bias)
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert y.shape == exact.shape and y.dtype == torch.float32
    assert (y - exact).norm() < 1e-6 * exact.norm()


def test_views_with_strides_of_their_own() -> None:
    x, weight = torch.randn(128, 1024)[::2, ::2], torch.randn(512, 1000).T
    assert by_onednn(x, weight)
    torch.testing.assert_close(dense(x, weight), F.linear(x, weight), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (torch.randn(15, 1024), torch.randn(1024, 1024)),  # too few rows
        (torch.randn(64, 64), torch.randn(64, 64)),  # too little work
        (torch.randn(0, 1024), torch.randn(4096, 1024)),
        (torch.randn(64, 1024, dtype=torch.float64), torch.randn(1024, 1024, dtype=torch.float64)),
        (torch.randn(64, 1024).bfloat16(), torch.randn(1024, 1024).bfloat16()),
        (torch.randn(4096), torch.randn(4096, 4096)),
    ],
)
def test_what_is_left_to_torch(x: Tensor, weight: Tensor) -> None:
    assert not by_onednn(x, weight)
    assert torch.equal(dense(x, weight), F.linear(x, weight))


@pytest.mark.parametrize(
    "wanted", [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]
)
def test_gradients_equal_those_in_float64(wanted: tuple[bool, bool, bool]) -> None:
    torch.manual_seed(0)
    parts = torch.randn(3, 40, 512), torch.randn(300, 512), torch.randn(300)
    ours = [t.clone().requires_grad_(w) for t, w in zip(parts, wanted, strict=True)]
    exact = [t.double().requires_grad_(w) for t, w in zip(parts, wanted, strict=True)]
    assert by_onednn(*ours)
    target = torch.randn(3, 40, 300)
    (dense(*ours) - target).square().sum().backward()
    (F.linear(*exact) - target).square().sum().backward()
    for found, right, asked in zip(ours, exact, wanted, strict=True):
        assert (found.grad is not None) == asked
        if found.grad is not None and right.grad is not None:
            assert (found.grad - right.grad).norm() < 1e-6 * right.grad.norm()


def test_a_second_derivative_is_refused_and_not_wrong() -> None:
    x, weight = torch.randn(64, 512).requires_grad_(), torch.randn(512, 512)
    [first] = torch.autograd.grad(dense(x, weight).pow(3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_without_gradients_it_runs_under_both_modes() -> None:
    x, weight = torch.randn(64, 512), nn.Parameter(torch.randn(512, 512))
    with torch.no_grad():
        assert by_onednn(x, weight)
    with torch.inference_mode():
        assert by_onednn(torch.randn(64, 512), weight)


def test_shapes_that_do_not_fit_raise_as_torchs_do() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        dense(torch.randn(64, 512), torch.randn(512, 500))
