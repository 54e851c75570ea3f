"""The row of bits that one flips, without a browser."""

from __future__ import annotations

import pytest

from labkit.course.widget import Explorer


def test_a_flipped_bit_reaches_the_function() -> None:
    seen: list[str] = []

    def show(pattern: str = "0110") -> str:
        seen.append(pattern)
        return pattern

    explorer = Explorer(show, {"pattern": "0110"})
    row = explorer.controls["pattern"]
    assert [button.description for button in row.buttons] == ["0", "1", "1", "0"]
    row.buttons[0].value = True
    row.buttons[2].value = False
    assert seen == ["0110", "1110", "1100"]
    assert explorer.values == {"pattern": "1100"} and explorer.result == "1100"
    row.buttons[0].value = False
    assert explorer.result == "0100"


@pytest.mark.parametrize("spec", ["", "012", "ab"])
def test_other_strings_are_no_control(spec: str) -> None:
    with pytest.raises(TypeError, match="0 and 1"):
        Explorer(str, {"pattern": spec})
