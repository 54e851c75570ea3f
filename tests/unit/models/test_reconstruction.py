"""What AdaRound does to the outputs of a real model's layers, on text that calibration did not see."""

from __future__ import annotations

from labkit import models
from labkit.quant import QuantSpec, adaround, hessian_error, rtn


def test_adaround_reconstructs_every_layer_better_than_nearest() -> None:
    """The first and the last decoder layer; `tests/bench/adaround.py` looks at all of the reference model."""
    tiny, spec, layers = models.load("tiny"), QuantSpec.parse("int3 g64 asym"), "model.layers.[03].*"
    windows = models.calibration_windows(tiny.tokenizer, 24, 128, seed=0)
    seen, unseen = (models.hessians(tiny, part, layers) for part in (windows[:16], windows[16:]))
    for name, stats in seen.items():
        weight = tiny.linears()[name].weight.detach()
        found = hessian_error(weight, adaround(weight, spec, stats, steps=100), unseen[name].hessian)
        for observer in ("minmax", "mse"):
            nearest = rtn(weight, spec, observer=observer)
            assert found < 0.9 * hessian_error(weight, nearest, unseen[name].hessian), name
