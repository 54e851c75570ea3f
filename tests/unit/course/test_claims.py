"""Claims raise with both numbers; verdicts never raise."""

from __future__ import annotations

import pytest

from labkit.course import claim, verdict


def test_a_claim_that_holds_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    claim("perplexity", 78.31, about=78, within=1.5)
    claim("SQNR", 40.0, at_least=39.5, unit="dB")
    claim("share", 0.5, about=0.52, within="5%")
    assert capsys.readouterr().out.splitlines() == [
        "perplexity: 78.31 (the text says about 78, within 1.5)",
        "SQNR: 40 dB (the text says at least 39.5 dB)",
        "share: 0.5 (the text says about 0.52, within 5%)",
    ]


@pytest.mark.parametrize(
    "bounds",
    [
        {"about": 78, "within": 1.5},
        {"about": 78, "within": "1%"},
        {"at_least": 81},
        {"at_most": 79},
        {"at_least": 10, "at_most": 79},
    ],
)
def test_a_claim_that_does_not_hold_raises_with_both_numbers(bounds: dict[str, float]) -> None:
    with pytest.raises(AssertionError, match=r"measured 80, the text says .*\d"):
        claim("perplexity", 80, **bounds)  # type: ignore[arg-type]


def test_nan_never_holds() -> None:
    for bounds in ({"about": 1, "within": 1}, {"at_least": 0}, {"at_most": 9}):
        with pytest.raises(AssertionError):
            claim("loss", float("nan"), **bounds)  # type: ignore[arg-type]


def test_a_verdict_says_why_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert verdict("speed-up", 1.8, at_least=1.5, because="it is busy", unit="x")
    assert not verdict("speed-up", 1.2, at_least=1.5, because="it is busy", unit="x")
    assert not verdict("speed-up", float("nan"), at_least=1.5, because="it is busy")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "speed-up: 1.8 x, expected at least 1.5 x: as expected"
    assert lines[1] == "speed-up: 1.2 x, expected at least 1.5 x: not on this machine, because it is busy"


def test_a_claim_without_a_text_is_an_error() -> None:
    with pytest.raises(TypeError):
        claim("x", 1)
    with pytest.raises(TypeError):
        claim("x", 1, about=1)
    with pytest.raises(ValueError, match="percentage"):
        claim("x", 1, about=1, within="a bit")
