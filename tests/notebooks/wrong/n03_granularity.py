"""Notebook 03: answers that are wrong in a known way, and honest variants."""

import math

import numpy as np
import torch


def per_tensor(w, group, bits):
    return w.abs().max() / ((2**bits - 1) / 2)


def per_row(w, group, bits):
    return w.abs().amax(dim=1) / ((2**bits - 1) / 2)


def per_row_kept(w, group, bits):
    return w.abs().amax(dim=1, keepdim=True) / ((2**bits - 1) / 2)


def without_abs(w, group, bits):
    return w.reshape(len(w), -1, group).amax(-1) / ((2**bits - 1) / 2)


def narrow(w, group, bits):
    return w.reshape(len(w), -1, group).abs().amax(-1) / (2 ** (bits - 1) - 1)


def whole_width(w, group, bits):
    return w.reshape(len(w), -1, group).abs().amax(-1) / (2**bits - 1)


def no_division(w, group, bits):
    return w.reshape(len(w), -1, group).abs().amax(-1)


def mean_not_max(w, group, bits):
    return w.reshape(len(w), -1, group).abs().mean(-1) / ((2**bits - 1) / 2)


def axis_kept(w, group, bits):
    return w.reshape(len(w), -1, group).abs().amax(-1, keepdim=True) / ((2**bits - 1) / 2)


def every_so_many(w, group, bits):
    return w.reshape(len(w), group, -1).abs().amax(1) / ((2**bits - 1) / 2)


def looped_scales(w, group, bits):
    half = (2**bits - 1) / 2
    return torch.tensor(
        [
            [max(abs(v) for v in row[i : i + group]) / half for i in range(0, len(row), group)]
            for row in w.tolist()
        ]
    )


def scales_by_split(w, group, bits):
    return (
        torch.stack([part.abs().max(1).values for part in w.double().split(group, 1)], 1)
        / (2**bits - 1)
        * 2
    )


def scales_in_numpy(w, group, bits):
    return np.abs(w.numpy().reshape(len(w), -1, group)).max(-1) / (2**bits - 1) * 2


def without_zeros(rows, columns, group, bits, scale_bits, zero_bits):
    return bits + rows * math.ceil(columns / group) * scale_bits / (rows * columns)


def without_scales(rows, columns, group, bits, scale_bits, zero_bits):
    return bits


def rounded_down(rows, columns, group, bits, scale_bits, zero_bits):
    return bits + (columns // group) * (scale_bits + zero_bits) / columns


def plain_quotient(rows, columns, group, bits, scale_bits, zero_bits):
    return bits + (scale_bits + zero_bits) / group


def one_row_of_groups(rows, columns, group, bits, scale_bits, zero_bits):
    return bits + math.ceil(columns / group) * (scale_bits + zero_bits) / (rows * columns)


def all_the_bits(rows, columns, group, bits, scale_bits, zero_bits):
    return rows * (columns * bits + math.ceil(columns / group) * (scale_bits + zero_bits))


def in_bytes(rows, columns, group, bits, scale_bits, zero_bits):
    return (bits + math.ceil(columns / group) * (scale_bits + zero_bits) / columns) / 8


def scale_for_each(rows, columns, group, bits, scale_bits, zero_bits):
    return bits + scale_bits + zero_bits


def by_counting(rows, columns, group, bits, scale_bits, zero_bits):
    total = 0
    for _ in range(rows):
        total += columns * bits + len(range(0, columns, group)) * (scale_bits + zero_bits)
    return torch.tensor(total / (rows * columns), dtype=torch.float64)


def high_half_first(codes):
    return (codes[:, 0::2] << 4) | codes[:, 1::2]


def shifted_by_three(codes):
    return codes[:, 0::2] | (codes[:, 1::2] << 3)


def only_added(codes):
    return codes[:, 0::2] + codes[:, 1::2]


def halves_of_a_row(codes):
    half = codes.shape[1] // 2
    return codes[:, :half] | (codes[:, half:] << 4)


def not_packed(codes):
    return codes


def times_fifteen(codes):
    return codes[:, 0::2].int() + 15 * codes[:, 1::2].int()


def packed_by_arithmetic(codes):
    pairs = codes.int().reshape(len(codes), -1, 2)
    return (pairs * torch.tensor([1, 16])).sum(-1)


def packed_in_python(codes):
    return torch.tensor(
        [[row[i] + 16 * row[i + 1] for i in range(0, len(row), 2)] for row in codes.tolist()],
        dtype=torch.uint8,
    )


def _codes(packed):
    return torch.stack([packed & 15, packed >> 4], -1).flatten(1)


def _spread(each, packed):
    return each.float().repeat_interleave(2 * packed.shape[1] // each.shape[1], 1)


def high_half_read_first(packed, scale, zero):
    codes = torch.stack([packed >> 4, packed & 15], -1).flatten(1)
    return (codes.float() - _spread(zero, packed)) * _spread(scale, packed)


def halves_apart(packed, scale, zero):
    codes = torch.cat([packed & 15, packed >> 4], 1)
    return (codes.float() - _spread(zero, packed)) * _spread(scale, packed)


def forgets_zero(packed, scale, zero):
    return _codes(packed) * _spread(scale, packed)


def adds_zero(packed, scale, zero):
    return (_codes(packed) + _spread(zero, packed)) * _spread(scale, packed)


def zero_after_scale(packed, scale, zero):
    return _codes(packed) * _spread(scale, packed) - _spread(zero, packed)


def wraps_around(packed, scale, zero):
    group = 2 * packed.shape[1] // zero.shape[1]
    return (_codes(packed) - zero.repeat_interleave(group, 1)) * _spread(scale, packed)


def scales_side_by_side(packed, scale, zero):
    group = 2 * packed.shape[1] // zero.shape[1]
    return (_codes(packed).float() - zero.float().repeat(1, group)) * scale.float().repeat(1, group)


def forgets_scale(packed, scale, zero):
    return _codes(packed).float() - _spread(zero, packed)


def only_codes(packed, scale, zero):
    return _codes(packed)


def by_reshaping(packed, scale, zero):
    codes = torch.stack([packed % 16, packed // 16], -1).reshape(*scale.shape, -1)
    return ((codes.int() - zero.int()[..., None]) * scale.double()[..., None]).flatten(1)


def one_by_one(packed, scale, zero):
    rows, half = packed.shape
    group = 2 * half // scale.shape[1]
    out = torch.empty(rows, 2 * half)
    for i in range(rows):
        for j in range(2 * half):
            code = int(packed[i, j // 2]) >> (4 * (j % 2)) & 15
            out[i, j] = (code - int(zero[i, j // group])) * float(scale[i, j // group])
    return out


WRONG = {
    "03.1": [
        (per_tensor, "one scale for the whole matrix"),
        (per_row, "one scale per row"),
        (per_row_kept, "one scale per row"),
        (without_abs, "largest |w|"),
        (narrow, "narrow rule"),
        (whole_width, "whole width"),
        (no_division, "get the step"),
        (mean_not_max, "mean of |w|"),
        (axis_kept, "kept the axis"),
        (every_so_many, "every so-manyth"),
    ],
    "03.2": [
        (without_zeros, "leave out the zero points"),
        (without_scales, "leave out the scales"),
        (rounded_down, "Round up"),
        (plain_quotient, "Round up"),
        (one_row_of_groups, "multiply by rows"),
        (all_the_bits, "divide by the number of weights"),
        (in_bytes, "count bits"),
        (scale_for_each, "a scale for every weight"),
    ],
    "03.3": [
        (high_half_first, "low half of the byte"),
        (shifted_by_three, "shift by 4"),
        (only_added, "without moving"),
        (halves_of_a_row, "neighbours of a row"),
        (not_packed, "two of them share a byte"),
        (times_fifteen, "factor of 16"),
    ],
    "03.4": [
        (high_half_read_first, "low half of a byte holds the first"),
        (halves_apart, "wrong order"),
        (forgets_zero, "leave the zero point out"),
        (adds_zero, "subtract it"),
        (zero_after_scale, "after scaling"),
        (wraps_around, "uint8"),
        (scales_side_by_side, "repeat_interleave"),
        (forgets_scale, "without their scale"),
        (only_codes, "these are the codes"),
    ],
}
RIGHT = {
    "03.1": [looped_scales, scales_by_split, scales_in_numpy],
    "03.2": [by_counting],
    "03.3": [packed_by_arithmetic, packed_in_python],
    "03.4": [by_reshaping, one_by_one],
}
