"""Notebook 00: answers that are wrong in a known way, and honest variants."""

from fractions import Fraction


def in_megabits(parameters, bits):
    return parameters * bits / 1e6


def in_bytes(parameters, bits):
    return parameters * bits / 8


def in_mebibytes(parameters, bits):
    return parameters * bits / 8 / 1024**2


def upside_down(parameters, bits):
    return parameters / bits / 1e6


def in_fractions(parameters, bits):
    return float(Fraction(parameters) * Fraction(bits) / 8_000_000)


def codes_only(bits, group, scale_bits, zero_bits):
    return bits


def a_scale_for_every_weight(bits, group, scale_bits, zero_bits):
    return bits + scale_bits + zero_bits


def no_zero_point(bits, group, scale_bits, zero_bits):
    return bits + scale_bits / group


def of_the_whole_group(bits, group, scale_bits, zero_bits):
    return group * bits + scale_bits + zero_bits


def counted_over_the_group(bits, group, scale_bits, zero_bits):
    total = scale_bits + zero_bits
    for _ in range(group):
        total += bits
    return total / group


WRONG = {
    "00.1": [
        (in_megabits, "8 bits in a byte"),
        (in_bytes, "divide by 1e6"),
        (in_mebibytes, "2^20"),
        (upside_down, "upside down"),
    ],
    "00.2": [
        (codes_only, "missing"),
        (a_scale_for_every_weight, "shares it"),
        (no_zero_point, "zero point is missing"),
        (of_the_whole_group, "whole group"),
    ],
}
RIGHT = {"00.1": [in_fractions], "00.2": [counted_over_the_group]}
