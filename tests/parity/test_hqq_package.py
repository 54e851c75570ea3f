"""HQQ against the hqq package (0.2.8): the same settings, the same grouping along rows (its axis=1).

The package has two solvers. Its default one has an option kappa and never uses it: beta stays, as with kappa=1
here. The other, "v2", lets beta grow as the paper says.
"""

from functools import partial

import pytest
import torch

from labkit.quant import QuantSpec, hqq

quantize = pytest.importorskip("hqq.core.quantize")
optimize = pytest.importorskip("hqq.core.optimize")


def theirs_of(
    W: torch.Tensor, bits: int, solver: str = "legacy", iterations: int = 20, round_zero: bool = False
) -> tuple[torch.Tensor, ...]:
    """Codes, scales, zero points and what they stand for. The solver's options are defaults deep inside."""
    options = {"lp_norm": 0.7, "beta": 10.0, "kappa": 1.01, "iters": iterations}
    options |= {"tol": 0.0, "early_stop": False, "scale_gridsearch": False} if solver == "v2" else {}
    solve = partial(getattr(optimize, f"optimize_weights_proximal_{solver}"), opt_params=options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantize.Quantizer, "optimize_weights", solve)
        codes, meta = quantize.Quantizer.quantize(
            W, nbits=bits, group_size=64, axis=1, round_zero=round_zero, bitpack=False, device="cpu"
        )
    dequantized = ((codes - meta["zero"]) * meta["scale"]).reshape(W.shape)
    shape = (len(W), -1)
    return codes.reshape(W.shape), meta["scale"].reshape(shape), meta["zero"].reshape(shape), dequantized


def weights(seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    W = torch.randn(96, 576) * 0.08 * torch.exp(0.5 * torch.randn(96, 1))
    W[torch.rand_like(W) < 0.002] *= 8
    return W


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("iterations", [2, 4, 10])
@pytest.mark.parametrize(("solver", "kappa"), [("legacy", 1.0), ("v2", 1.01)])
def test_codes_scales_and_zero_points_are_equal(
    bits: int, iterations: int, solver: str, kappa: float
) -> None:
    """They multiply by 1 / scale where we divide by it. A weight that lies on the border between two codes to
    float32's last bit may then get the other one, which moves its group's zero point by 1/64 of a step.
    """
    W = weights(iterations)
    ours = hqq(
        W, QuantSpec.parse(f"int{bits} g64 asym-float scale=fp32"), kappa=kappa, iterations=iterations
    )
    codes, scale, zero, _ = theirs_of(W, bits, solver, iterations)
    torch.testing.assert_close(ours.scale, scale, rtol=1e-6, atol=0)
    moved = (ours.zero - zero).abs() > 1e-4 + 1e-6 * zero.abs()
    assert int(moved.sum()) <= 3  # of 864 groups
    off = (ours.codes.float() - codes).abs()
    assert off.max() <= 1
    assert int((off > 0)[~moved.repeat_interleave(64, dim=1)].sum()) <= 3  # of 55,296 codes


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_with_all_iterations_the_errors_are_equal(bits: int) -> None:
    """Both stop when the mean error no longer falls, which near the end is decided by float32's last bits:
    then a few groups that still move have taken some steps more.
    """
    W = weights(0)
    ours = hqq(W, QuantSpec.parse(f"int{bits} g64 asym-float scale=fp32"), kappa=1.0)
    codes, *_, theirs = theirs_of(W, bits)
    assert float((ours.codes == codes).float().mean()) > 0.998
    error, their_error = ((q - W).abs().mean() for q in (ours.dequantize(), theirs))
    assert float(error / their_error) == pytest.approx(1, abs=1e-4)


def test_their_four_bit_default_is_no_better() -> None:
    """It rounds the zero point that the solver begins with."""
    W = weights(2)
    ours = hqq(W, QuantSpec.parse("int4 g64 asym-float scale=fp32")).dequantize()
    *_, theirs = theirs_of(W, 4, round_zero=True)
    assert 0.95 < float((ours - W).norm() / (theirs - W).norm()) < 1
