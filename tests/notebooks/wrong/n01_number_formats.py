"""Notebook 01: answers that are wrong in a known way, and honest variants."""

import math

import numpy as np
import torch


def parts(pattern):
    return (-1.0 if pattern >> 7 else 1.0), pattern >> 3 & 15, pattern & 7


def no_leading_one(pattern):
    s, e, m = parts(pattern)
    return s * (m / 8) * 2.0 ** (e - 7)


def bias_of_eight(pattern):
    s, e, m = parts(pattern)
    return s * (1 + m / 8) * 2.0 ** (e - 8)


def no_bias(pattern):
    s, e, m = parts(pattern)
    return s * (1 + m / 8) * 2.0**e


def no_sign(pattern):
    return abs(table_decode(pattern))


def no_subnormals(pattern):
    s, e, m = parts(pattern)
    return s * (1 + m / 8) * 2.0 ** (e - 7)


def subnormals_one_lower(pattern):
    s, e, m = parts(pattern)
    return s * (1 + m / 8 if e else m / 8) * 2.0 ** (e - 7)


def infinity_at_fifteen(pattern):
    s, e, _ = parts(pattern)
    return s * math.inf if e == 15 else table_decode(pattern)


def no_nan(pattern):
    s, e, m = parts(pattern)
    return s * (1 + m / 8) * 2.0 ** (e - 7) if e else s * m / 8 * 2.0**-6


def all_nan_at_fifteen(pattern):
    return math.nan if parts(pattern)[1] == 15 else table_decode(pattern)


def reads_e5m2(pattern):
    return torch.tensor([pattern], dtype=torch.uint8).view(torch.float8_e5m2).float().item()


def table_decode(pattern):
    return torch.tensor([pattern], dtype=torch.uint8).view(torch.float8_e4m3fn).float().item()


def string_decode(pattern):
    bits = f"{pattern:08b}"
    if bits[1:] == "1111111":
        return float("nan")
    e, m = int(bits[1:5], 2), int(bits[5:], 2)
    size = (8 + m) * 2.0 ** (e - 10) if e else m * 2.0**-9
    return -size if bits[0] == "1" else size


def no_floor(x, mantissa, smallest_exponent):
    return 2.0 ** (math.floor(math.log2(abs(x))) - mantissa) if x else 2.0 ** (smallest_exponent - mantissa)


def rounds_up(x, mantissa, smallest_exponent):
    return 2.0 ** (max(math.ceil(math.log2(abs(x)) + 1e-12), smallest_exponent) - mantissa)


def always_at_one(x, mantissa, smallest_exponent):
    return 2.0**-mantissa


def relative(x, mantissa, smallest_exponent):
    return 2.0 ** (max(math.floor(math.log2(abs(x))), smallest_exponent) - mantissa) / abs(x)


def one_step_fewer(x, mantissa, smallest_exponent):
    return 2.0 ** max(math.floor(math.log2(abs(x))), smallest_exponent) / (2**mantissa - 1)


def looped_spacing(x, mantissa, smallest_exponent):
    step = 2.0**smallest_exponent
    while abs(x) >= 2 * step:
        step *= 2
    return np.float64(step / 2**mantissa)


def steps_of(x, mantissa, low):
    return torch.exp2((torch.frexp(x)[1] - 1).clamp(min=low).float() - mantissa)


def no_clamp(x, mantissa, low, largest):
    step = steps_of(x, mantissa, low)
    return torch.round(x / step) * step


def ties_away(x, mantissa, low, largest):
    step = steps_of(x, mantissa, low)
    return (torch.floor(x.abs() / step + 0.5) * step * x.sign()).clamp(-largest, largest)


def truncates(x, mantissa, low, largest):
    step = steps_of(x, mantissa, low)
    return (torch.trunc(x / step) * step).clamp(-largest, largest)


def too_fine(x, mantissa, low, largest):
    step = torch.exp2((torch.frexp(x)[1] - 1).float() - mantissa)
    return (torch.round(x / step) * step).nan_to_num(0.0).clamp(-largest, largest)


def log_of_zero(x, mantissa, low, largest):
    step = 2.0 ** (torch.floor(torch.log2(x.abs())) - mantissa)
    return (torch.round(x / step) * step).clamp(-largest, largest)


def whole_numbers(x, mantissa, low, largest):
    return x.round().clamp(-largest, largest)


def flattens(x, mantissa, low, largest):
    return torch.clamp(no_clamp(x, mantissa, low, largest), -largest, largest).flatten()


def in_float64(x, mantissa, low, largest):
    x = x.double()
    exponent = torch.floor(torch.log2(x.abs().clamp(min=2.0**low))).clamp(min=low)
    step = 2.0 ** (exponent - mantissa)
    return torch.clamp((x / step).round() * step, -largest, largest)


def looped_round(x, mantissa, low, largest):
    def one(v):
        step = looped_spacing(v, mantissa, low)
        return min(max(round(v / step) * step, -largest), largest)

    return torch.tensor([float(one(v)) for v in x.flatten().tolist()]).reshape(x.shape)


def forgets_two(block):
    return math.floor(math.log2(float(block.abs().max()))) if block.any() else -127


def takes_ceil(block):
    return math.ceil(math.log2(float(block.abs().max()))) - 2 if block.any() else -127


def takes_nearest(block):
    return round(math.log2(float(block.abs().max()))) - 2 if block.any() else -127


def forgets_abs(block):
    return math.floor(math.log2(float(block.max()))) - 2 if block.any() else -127


def no_rounding(block):
    return math.log2(float(block.abs().max())) - 2 if block.any() else -127


def no_zero_case(block):
    return math.floor(math.log2(float(block.abs().max()))) - 2


def zeros_at_zero(block):
    return math.floor(math.log2(float(block.abs().max()))) - 2 if block.any() else 0


def as_tensor(block):
    top = block.abs().amax().double()
    return torch.where(
        top > 0, top.clamp(min=1e-30).log2().floor() - 2, torch.tensor(-127.0, dtype=torch.float64)
    )


WRONG = {
    "01.1": [
        (no_leading_one, "leading one"),
        (bias_of_eight, "bias of e4m3"),
        (no_bias, "subtract the bias"),
        (no_sign, "sign is minus"),
        (no_subnormals, "leading one; there"),
        (subnormals_one_lower, "exponent is -6"),
        (infinity_at_fifteen, "infinity"),
        (all_nan_at_fifteen, "0x7E is 448"),
        (no_nan, "NaN"),
        (reads_e5m2, "two bits of mantissa"),
    ],
    "01.2": [
        (no_floor, "stops shrinking"),
        (rounds_up, "exponent up"),
        (always_at_one, "doubles"),
        (relative, "relative"),
        (one_step_fewer, "2**mantissa steps"),
    ],
    "01.3": [
        (no_clamp, "clamp"),
        (ties_away, "even"),
        (truncates, "cut off"),
        (too_fine, "too finely"),
        (log_of_zero, "log2 is -inf"),
        (whole_numbers, "whole numbers"),
        (flattens, "flat"),
    ],
    "01.4": [
        (forgets_two, "subtract 2"),
        (takes_ceil, "up"),
        (takes_nearest, "nearest"),
        (forgets_abs, "magnitude"),
        (no_rounding, "whole number"),
        (no_zero_case, "block of zeros"),
        (zeros_at_zero, "zeros"),
    ],
}
RIGHT = {
    "01.1": [table_decode, string_decode],
    "01.2": [looped_spacing],
    "01.3": [in_float64, looped_round],
    "01.4": [as_tensor],
}
