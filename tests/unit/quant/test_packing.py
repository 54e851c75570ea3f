"""Packed bytes, against one big whole number per row."""

import pytest
import torch
from brute_force import pack_row
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit.quant.packing import pack_bits, packed_bytes, unpack_bits


def test_the_first_of_two_nibbles_is_the_low_half() -> None:
    assert pack_bits(torch.tensor([[0x1, 0xA, 0x3]], dtype=torch.uint8), 4).tolist() == [[0xA1, 0x03]]


def test_three_bits_run_over_the_edge_of_a_byte() -> None:
    # 1 + 2*8 + 7*64 + 5*512 = 0b101_111_010_001
    codes = torch.tensor([[1, 2, 7, 5]], dtype=torch.uint8)
    assert pack_bits(codes, 3).tolist() == [[0b11_010_001, 0b101_1]]


@pytest.mark.parametrize("bits", range(1, 9))
@settings(max_examples=40)
@given(data=st.data())
def test_equals_brute_force_and_comes_back(bits: int, data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 40))
    code = st.integers(0, 2**bits - 1)
    line = st.lists(code, min_size=columns, max_size=columns)
    numbers = data.draw(st.lists(line, min_size=rows, max_size=rows))
    codes = torch.tensor(numbers, dtype=torch.uint8).reshape(rows, columns)
    packed = pack_bits(codes, bits)
    assert packed.shape == (rows, packed_bytes(columns, bits))
    assert packed.tolist() == [pack_row(line, bits) for line in numbers]
    assert torch.equal(unpack_bits(packed, bits, columns), codes)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="below 16, found 16"):
        pack_bits(torch.tensor([[16]], dtype=torch.uint8), 4)
    with pytest.raises(ValueError, match="uint8 codes"):
        pack_bits(torch.tensor([[1]]), 4)
    with pytest.raises(ValueError, match=r"bytes \(rows, 2\) for 4 codes"):
        unpack_bits(torch.zeros(1, 3, dtype=torch.uint8), 4, 4)
