from __future__ import annotations

from labkit.models import chapters


def test_the_book_is_all_there_in_order() -> None:
    book = chapters()
    assert [chapter.number for chapter in book] == list(range(1, 136))
    assert book[0].title == "Loomings." and book[0].text.startswith("Call me Ishmael. Some years ago")
    assert book[134].title == "The Chase.—Third Day."
    assert book[134].text.endswith("rolled on as it rolled five thousand years ago.")
    # Counted in the source: 1,185,128 characters with the line break that ends each chapter.
    assert sum(len(chapter.text) + 1 for chapter in book) == 1_185_128
    assert not any("=== " in chapter.text for chapter in book)
