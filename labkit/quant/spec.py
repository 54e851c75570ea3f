"""QuantSpec: what grid a tensor is put on."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from labkit.quant import formats

Block = tuple[int | None, int | None] | int

# Formats that people name in one word.
NAMED = {
    "mxfp8_e4m3": "fp8_e4m3 g32 scale=e8m0",
    "mxfp8_e5m2": "fp8_e5m2 g32 scale=e8m0",
    "mxfp6_e2m3": "fp6_e2m3 g32 scale=e8m0",
    "mxfp6_e3m2": "fp6_e3m2 g32 scale=e8m0",
    "mxfp4": "fp4_e2m1 g32 scale=e8m0",
    "mxint8": "int8 g32 narrow scale=e8m0",
    "nvfp4": "fp4_e2m1 g16 scale=(fp8_e4m3 tensor scale=fp32)",
}
_EXAMPLES = "'int4 g64 asym', 'int8 channel', 'nf4 b64 scale=fp32', 'fp8_e4m3 128x128'"


@dataclass(frozen=True)
class QuantSpec:
    """A grid: the format of the codes, and which elements share a scale.

    format  int2 to int8, fp8_e4m3, fp8_e5m2, fp6_e2m3, fp6_e3m2, fp4_e2m1, nf4, dynamic8, or table2 to
            table4: a learned codebook of that many bits
    block   (rows, columns) that share one scale; None is the whole axis. An int counts along the
            flattened tensor
    zero    "none": symmetric; "int": affine, 0.0 has a code of its own; "float": affine, any range;
            "mean": flat runs less the mean of the whole tensor, as bitsandbytes nests its scales
    scale   what the scales are stored as (fp32, bf16, fp16, fp8_e4m3, fp8_e5m2, e8m0, e8m0-ceil,
            e8m0-even), or the QuantSpec they are themselves quantized with
    narrow  symmetric integers: False scales by absmax/((2^b - 1)/2) and uses all codes,
            True by absmax/(2^(b-1) - 1) and leaves out the lowest code

    Raises ValueError when the parts do not fit together.
    """

    format: str
    block: Block = (None, None)
    zero: Literal["none", "int", "float", "mean"] = "none"
    scale: str | QuantSpec = "fp16"
    narrow: bool = False

    def __post_init__(self) -> None:
        formats.bits_of(self.format)
        sizes = (self.block,) if isinstance(self.block, int) else self.block
        if not isinstance(self.block, int) and len(self.block) != 2:
            raise ValueError(f"block must be (rows, columns) or an int, found {self.block!r}")
        if any(size is not None and (not isinstance(size, int) or size < 1) for size in sizes):
            raise ValueError(f"block sizes must be None or at least 1, found {self.block!r}")
        if self.zero not in ("none", "int", "float", "mean"):
            raise ValueError(f"zero must be 'none', 'int', 'float' or 'mean', found {self.zero!r}")
        if self.zero in ("int", "float") and not self.is_integer:
            raise ValueError(
                f"only integers take a zero point, found zero={self.zero!r} with {self.format}"
            )
        if self.zero == "mean" and (self.is_integer or not isinstance(self.block, int)):
            raise ValueError(
                f"zero='mean' is for floats and tables in flat runs, found {self.format} {self.block}"
            )
        if self.narrow and (self.zero != "none" or not self.is_integer):
            raise ValueError(
                f"narrow is for symmetric integers, found {self.format} with zero={self.zero!r}"
            )
        if isinstance(self.scale, str) and self.scale not in formats.SCALE_DTYPES:
            raise ValueError(
                f"scale must be a QuantSpec or one of {', '.join(formats.SCALE_DTYPES)}, "
                f"found {self.scale!r}"
            )
        if self.scale == "e8m0-even" and self.format in formats.TABLES:
            raise ValueError(
                f"e8m0-even rounds to a format's mantissa, which {self.format} lacks; use e8m0-ceil"
            )

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return formats.bits_of(self.format)

    @property
    def is_integer(self) -> bool:
        return self.format in formats.INTEGERS

    @property
    def levels(self) -> int:
        """How many codes there are."""
        return 2**self.bits - (1 if self.narrow else 0)

    @property
    def code_range(self) -> tuple[int, int]:
        """The lowest and highest code: int4 (-8, 7), narrow (-7, 7), affine and not integer (0, 15)."""
        if not self.is_integer or self.zero != "none":
            return 0, 2**self.bits - 1
        half = 2 ** (self.bits - 1)
        return (-half + 1 if self.narrow else -half), half - 1

    @classmethod
    def parse(cls, text: str) -> QuantSpec:
        """The spec that ``text`` names: "int4 g64 asym", "nf4 b64", "fp8_e4m3 tensor".

        Words, in any order after the format: ``tensor``; ``channel`` (a scale per row); ``g64`` (64 columns
        of a row); ``b64`` (64 of the flattened tensor); ``128x128``, where ``*`` is the whole axis; ``sym``
        (the default), ``asym``, ``asym-float``, ``mean``; ``narrow``; ``scale=bf16`` or
        ``scale=(fp8_e4m3 tensor scale=fp32)``. "mxfp4", "nvfp4" and their like stand alone. Raises
        ValueError that names the word it does not know.
        """
        text = " ".join(text.split())
        text = NAMED.get(text, text)
        words = re.findall(r"scale=\(.*\)|\S+", text)
        if not words:
            raise ValueError(f"expected a spec such as {_EXAMPLES}, found nothing")
        parts: dict = {}
        for word in words[1:]:
            key, value = _parse_word(word, text)
            if key in parts:
                raise ValueError(f"{text!r} says {key} twice; {word!r} is one too many")
            parts[key] = value
        return cls(words[0], **parts)

    def __str__(self) -> str:
        words = [self.format, _block_word(self.block)]
        if self.zero != "none":
            words.append({"int": "asym", "float": "asym-float", "mean": "mean"}[self.zero])
        if self.narrow:
            words.append("narrow")
        if self.scale != "fp16":
            words.append(f"scale={self.scale}" if isinstance(self.scale, str) else f"scale=({self.scale})")
        return " ".join(words)


def _parse_word(word: str, text: str) -> tuple[str, object]:
    fixed: dict[str, tuple[str, object]] = {
        "tensor": ("block", (None, None)),
        "channel": ("block", (1, None)),
        "sym": ("zero", "none"),
        "asym": ("zero", "int"),
        "asym-float": ("zero", "float"),
        "mean": ("zero", "mean"),
        "narrow": ("narrow", True),
    }
    if word in fixed:
        return fixed[word]
    if match := re.fullmatch(r"([gb])(\d+)", word):
        size = int(match[2])
        return "block", (1, size) if match[1] == "g" else size
    if match := re.fullmatch(r"(\d+|\*)x(\d+|\*)", word):
        return "block", tuple(None if size == "*" else int(size) for size in match.groups())
    if word.startswith("scale=("):
        return "scale", QuantSpec.parse(word[7:-1])
    if word.startswith("scale="):
        return "scale", word[6:]
    raise ValueError(f"{text!r}: cannot read {word!r}; expected words as in {_EXAMPLES}")


def _block_word(block: Block) -> str:
    if isinstance(block, int):
        return f"b{block}"
    if block == (None, None):
        return "tensor"
    if block == (1, None):
        return "channel"
    if block[0] == 1:
        return f"g{block[1]}"
    return "x".join("*" if size is None else str(size) for size in block)
