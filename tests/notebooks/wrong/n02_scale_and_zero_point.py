"""Notebook 02: answers that are wrong in a known way, and honest variants."""

import math

import numpy as np
import torch


def forgets_the_clamp(x, scale, lowest, highest):
    return torch.round(x / scale)


def rounds_half_up(x, scale, lowest, highest):
    return torch.floor(x / scale + 0.5).clamp(lowest, highest)


def cuts_off_the_fraction(x, scale, lowest, highest):
    return (x / scale).int().clamp(lowest, highest)


def multiplies(x, scale, lowest, highest):
    return torch.round(x * scale).clamp(lowest, highest)


def clamps_the_numbers(x, scale, lowest, highest):
    return torch.round(x.clamp(lowest, highest) / scale)


def gives_numbers_back(x, scale, lowest, highest):
    return torch.round(x / scale).clamp(lowest, highest) * scale


def forgets_to_round(x, scale, lowest, highest):
    return (x / scale).clamp(lowest, highest)


def casts_before_clamping(x, scale, lowest, highest):
    return torch.round(x / scale).to(torch.int8).clamp(lowest, highest)


def looped_codes(x, scale, lowest, highest):
    flat = [min(max(round(v / scale), lowest), highest) for v in x.flatten().tolist()]
    return torch.tensor(flat, dtype=torch.int8).reshape(x.shape)


def codes_in_numpy(x, scale, lowest, highest):
    return np.clip(np.rint(x.numpy().astype(np.float64) / scale), lowest, highest)


def wraps_around(codes, scale, zero):
    return (codes - zero) * scale


def leaves_zero_out(codes, scale, zero):
    return codes.float() * scale


def adds_zero(codes, scale, zero):
    return (codes.float() + zero) * scale


def subtracts_zero_last(codes, scale, zero):
    return codes * scale - zero


def divides_by_scale(codes, scale, zero):
    return (codes.float() - zero) / scale


def subtracts_in_int8(codes, scale, zero):
    return (codes.to(torch.int8) - zero.to(torch.int8)).float() * scale


def in_float64(codes, scale, zero):
    return (codes.double() - zero.double()) * scale


def looped_numbers(codes, scale, zero):
    return torch.tensor([[(c - int(zero)) * scale for c in row] for row in codes.tolist()])


def forgets_to_widen(low, high, bits):
    scale = (high - low) / (2**bits - 1)
    return scale, min(max(round(-low / scale), 0), 2**bits - 1)


def widens_only_low(low, high, bits):
    low = min(low, 0)
    scale = (high - low) / (2**bits - 1)
    return scale, round(-low / scale)


def widens_only_high(low, high, bits):
    high = max(high, 0)
    scale = (high - low) / (2**bits - 1)
    return scale, round(-low / scale)


def counts_codes_not_steps(low, high, bits):
    low, high = min(low, 0), max(high, 0)
    scale = (high - low) / 2**bits
    return scale, round(-low / scale)


def zero_not_whole(low, high, bits):
    low, high = min(low, 0), max(high, 0)
    scale = (high - low) / (2**bits - 1)
    return scale, -low / scale


def zero_off_by_one(low, high, bits):
    low, high = min(low, 0), max(high, 0)
    scale = (high - low) / (2**bits - 1)
    return scale, round(-low / scale) + 1


def negative_zero(low, high, bits):
    low, high = min(low, 0), max(high, 0)
    scale = (high - low) / (2**bits - 1)
    return scale, round(low / scale)


def symmetric(low, high, bits):
    return 2 * max(abs(low), abs(high)) / (2**bits - 1), 2 ** (bits - 1)


def zero_from_the_top(low, high, bits):
    low, high = min(low, 0), max(high, 0)
    scale = (high - low) / (2**bits - 1)
    return scale, round(high / scale)


def only_the_scale(low, high, bits):
    return (max(high, 0) - min(low, 0)) / (2**bits - 1)


def by_linspace(low, high, bits):
    values = np.linspace(min(low, 0), max(high, 0), 2**bits)
    return values[1] - values[0], int(np.abs(values).argmin())


def as_tensors(low, high, bits):
    low, high = torch.tensor(low).double().clamp(max=0), torch.tensor(high).double().clamp(min=0)
    scale = (high - low) / (2**bits - 1)
    return scale, torch.round(-low / scale).clamp(0, 2**bits - 1)


def _search(x, bits, cost, clamp=True, largest=None, half=None):
    largest = x.abs().max() if largest is None else largest
    half = (2**bits - 1) / 2 if half is None else half
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    best, least = None, math.inf
    for percent in range(100, 0, -1):
        a = percent / 100 * largest
        scale = a / half
        codes = torch.round(x / scale)
        error = x - (codes.clamp(lowest, highest) if clamp else codes) * scale
        if (found := float(cost(error, x.abs() <= a))) < least:
            best, least = float(a), found
    return best


def never_clips(x, bits):
    return float(x.abs().max())


def returns_the_share(x, bits):
    return _search(x, bits, lambda e, _: e.double().square().sum()) / float(x.abs().max())


def returns_the_scale(x, bits):
    return _search(x, bits, lambda e, _: e.double().square().sum()) / ((2**bits - 1) / 2)


def searches_without_a_clamp(x, bits):
    return _search(x, bits, lambda e, _: e.square().sum(), clamp=False)


def sums_absolute_errors(x, bits):
    return _search(x, bits, lambda e, _: e.double().abs().sum())


def counts_the_inside_only(x, bits):
    return _search(x, bits, lambda e, inside: (e.double().square() * inside).sum())


def takes_the_largest_error(x, bits):
    return _search(x, bits, lambda e, _: e.abs().max())


def takes_the_largest_x(x, bits):
    return _search(x, bits, lambda e, _: e.double().square().sum(), largest=x.max())


def scales_by_the_narrow_rule(x, bits):
    return _search(x, bits, lambda e, _: e.double().square().sum(), half=2 ** (bits - 1) - 1)


def vectorised_clip(x, bits):
    a = torch.arange(100, 0, -1) / 100 * x.abs().max()
    scale = (a / ((2**bits - 1) / 2))[:, None]
    flat = x.reshape(1, -1)
    error = flat - (flat / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale
    return a[error.square().mean(dim=1).argmin()]


def clip_in_float64(x, bits):
    return _search(x.double(), bits, lambda e, _: e.square().mean())


WRONG = {
    "02.1": [
        (forgets_the_clamp, "clamp"),
        (rounds_half_up, "half up"),
        (cuts_off_the_fraction, "cut off"),
        (multiplies, "divide"),
        (clamps_the_numbers, "clamp after"),
        (gives_numbers_back, "not codes"),
        (forgets_to_round, "expected"),
        (casts_before_clamping, "clamp before you cast"),
    ],
    "02.2": [
        (wraps_around, "uint8"),
        (subtracts_in_int8, "code 255 became -1"),
        (leaves_zero_out, "leave the zero point out"),
        (adds_zero, "add the zero point"),
        (subtracts_zero_last, "before multiplying"),
        (divides_by_scale, "multiply"),
    ],
    "02.3": [
        (forgets_to_widen, "widen"),
        (widens_only_low, "-3.0 to -1.0 must end at 0: high = max(high, 0)"),
        (widens_only_high, "2.0 to 5.75 must begin at 0: low = min(low, 0)"),
        (counts_codes_not_steps, "2**bits - 1 steps"),
        (zero_not_whole, "not whole"),
        (zero_off_by_one, "one too high"),
        (negative_zero, "negative"),
        (symmetric, "symmetric"),
        (zero_from_the_top, "upper end"),
        (only_the_scale, "two things"),
    ],
    "02.4": [
        (never_clips, "never clips"),
        (returns_the_share, "return a itself"),
        (returns_the_scale, "this is the scale"),
        (searches_without_a_clamp, "clamp the codes"),
        (sums_absolute_errors, "square them first"),
        (counts_the_inside_only, "inside"),
        (takes_the_largest_error, "largest error"),
        (takes_the_largest_x, "take the largest |x|"),
        (scales_by_the_narrow_rule, "the narrow rule"),
    ],
}
RIGHT = {
    "02.1": [looped_codes, codes_in_numpy],
    "02.2": [in_float64, looped_numbers],
    "02.3": [by_linspace, as_tensors],
    "02.4": [vectorised_clip, clip_in_float64],
}
