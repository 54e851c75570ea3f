"""QuantSpec: what people say, parsed and printed."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit.quant import QuantSpec

SAID = {
    "int4 g64 asym": QuantSpec("int4", (1, 64), zero="int"),
    "int8 channel narrow": QuantSpec("int8", (1, None), narrow=True),
    "int2 32x1 asym-float scale=bf16": QuantSpec("int2", (32, 1), zero="float", scale="bf16"),
    "nf4 b64 scale=fp32": QuantSpec("nf4", 64, scale="fp32"),
    "fp8_e4m3 tensor": QuantSpec("fp8_e4m3", (None, None)),
    "fp8_e4m3 128x128 scale=fp32": QuantSpec("fp8_e4m3", (128, 128), scale="fp32"),
    "int8 *x1": QuantSpec("int8", (None, 1)),
    "table3 g64": QuantSpec("table3", (1, 64)),
    "fp6_e3m2 g32 scale=e8m0-ceil": QuantSpec("fp6_e3m2", (1, 32), scale="e8m0-ceil"),
    "nf4 b64 scale=(dynamic8 b256 mean scale=fp32)": QuantSpec(
        "nf4", 64, scale=QuantSpec("dynamic8", 256, zero="mean", scale="fp32")
    ),
    "fp4_e2m1 g16 scale=(fp8_e4m3 tensor scale=fp32)": QuantSpec(
        "fp4_e2m1", (1, 16), scale=QuantSpec("fp8_e4m3", (None, None), scale="fp32")
    ),
}


@pytest.mark.parametrize("text", SAID)
def test_what_is_said_is_parsed_and_printed_again(text: str) -> None:
    assert QuantSpec.parse(text) == SAID[text]
    assert str(SAID[text]) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("int4", QuantSpec("int4")),
        ("int4   sym  g64", QuantSpec("int4", (1, 64))),
        ("int4 asym scale=fp32 g64", QuantSpec("int4", (1, 64), zero="int", scale="fp32")),
        ("mxfp4", QuantSpec("fp4_e2m1", (1, 32), scale="e8m0")),
        ("nvfp4", SAID["fp4_e2m1 g16 scale=(fp8_e4m3 tensor scale=fp32)"]),
    ],
)
def test_other_ways_to_say_it(text: str, expected: QuantSpec) -> None:
    assert QuantSpec.parse(text) == expected


SIZES = st.none() | st.integers(1, 300)
PLAIN = st.sampled_from(["fp32", "bf16", "fp16", "fp8_e4m3", "e8m0"])
INTEGERS = st.builds(
    QuantSpec,
    st.sampled_from([f"int{b}" for b in range(2, 9)]),
    st.tuples(SIZES, SIZES) | st.integers(1, 300),
    st.sampled_from(["none", "int", "float"]),
    PLAIN | st.builds(QuantSpec, st.just("fp8_e4m3"), st.just((None, None)), scale=PLAIN),
)


@settings(max_examples=100)
@given(INTEGERS)
def test_printing_round_trips(spec: QuantSpec) -> None:
    assert QuantSpec.parse(str(spec)) == spec


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "found nothing"),
        ("int9 g64", "int9"),
        ("int4 g64 assym", "assym"),
        ("int4 g64 g32", "block twice"),
        ("int4 g0", "at least 1"),
        ("int4 g64 scale=fp17", "fp17"),
        ("nf4 b64 asym", "only integers take a zero point"),
        ("int4 g64 asym narrow", "narrow is for symmetric integers"),
        ("int8 b64 mean", "for floats and tables in flat runs"),
        ("dynamic8 g64 mean", "for floats and tables in flat runs"),
        ("table5 g64", "table5"),
    ],
)
def test_what_makes_no_sense_is_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantSpec.parse(text)


def test_bits_levels_and_code_range() -> None:
    ranges = {
        "int4": (4, 16, (-8, 7)),
        "int4 narrow": (4, 15, (-7, 7)),
        "int4 asym": (4, 16, (0, 15)),
        "int2": (2, 4, (-2, 1)),
        "int8": (8, 256, (-128, 127)),
        "nf4": (4, 16, (0, 15)),
        "fp6_e3m2": (6, 64, (0, 63)),
        "table2": (2, 4, (0, 3)),
        "dynamic8 b64 mean": (8, 256, (0, 255)),
    }
    for text, expected in ranges.items():
        spec = QuantSpec.parse(text)
        assert (spec.bits, spec.levels, spec.code_range) == expected
