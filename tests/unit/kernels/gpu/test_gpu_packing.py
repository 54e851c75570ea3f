"""Words of codes: the bytes of ``labkit.quant.packing``, and the codes again."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from on_gpu import DEVICE

from labkit.kernels.gpu.packing import pack, unpack
from labkit.quant.packing import pack_bits

pytestmark = pytest.mark.gpu


@settings(max_examples=20)
@given(
    bits=st.sampled_from([2, 4, 8]),
    rows=st.integers(1, 40),
    columns=st.integers(1, 70),
    seed=st.integers(0, 9),
)
def test_words_are_the_bytes_and_give_the_codes_back(bits: int, rows: int, columns: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (rows, columns), generator=torch.Generator().manual_seed(seed)).byte()
    words, stream = pack(codes.to(DEVICE), bits), pack_bits(codes, bits)
    as_bytes = words.cpu().view(torch.uint8)
    assert torch.equal(as_bytes[:, : stream.shape[1]], stream)
    assert not as_bytes[:, stream.shape[1] :].any()
    assert torch.equal(unpack(words, bits, columns).cpu(), codes)


def test_more_words_than_one_program_takes() -> None:
    codes = torch.randint(0, 16, (3, 5003)).byte()
    words = pack(codes.to(DEVICE), 4)
    assert torch.equal(words.cpu().view(torch.uint8)[:, :2502], pack_bits(codes, 4))
    assert torch.equal(unpack(words, 4, 5003).cpu(), codes)


def test_what_does_not_fit_is_refused() -> None:
    codes = torch.zeros(2, 9, dtype=torch.uint8, device=DEVICE)
    with pytest.raises(ValueError, match="2, 4 or 8 bits, found 3"):
        pack(codes, 3)
    with pytest.raises(ValueError, match="uint8 codes"):
        pack(codes.int(), 4)
    with pytest.raises(ValueError, match=r"\(rows, 3\)"):
        unpack(pack(codes, 4), 4, 17)
    assert pack(codes[:0], 4).shape == (0, 2)
