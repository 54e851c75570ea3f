"""labkit.files: files appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from labkit.files import data_path, whole_file, whole_folder


def test_a_file_appears_only_when_the_block_ends_well(tmp_path: Path) -> None:
    target = tmp_path / "new" / "a.txt"
    with whole_file(target) as part:
        part.write_text("done")
        assert not target.exists()
        assert part.parent == target.parent  # the same file system, so that the move is one step
    assert target.read_text() == "done"
    assert [path.name for path in target.parent.iterdir()] == ["a.txt"]


@pytest.mark.parametrize(("options", "mode"), [({}, 0o644), ({"mode": 0o600}, 0o600)])
def test_a_file_can_be_read_by_others_unless_it_is_private(
    tmp_path: Path, options: dict[str, int], mode: int
) -> None:
    with whole_file(tmp_path / "a.txt", **options) as part:
        part.write_text("done")
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == mode


def test_an_exception_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError), whole_file(target) as part:
        part.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "checkpoint"
    with whole_folder(target) as part:
        (part / "a").write_text("1")
        assert not target.exists()
    assert (target / "a").read_text() == "1"
    assert target.stat().st_mode & 0o777 == 0o755
    assert list(tmp_path.iterdir()) == [target]


def test_an_exception_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "checkpoint") as part:
        (part / "a").write_text("1")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_only_replaced_on_request(tmp_path: Path) -> None:
    target = tmp_path / "checkpoint"
    target.mkdir()
    (target / "old").write_text("1")
    with pytest.raises(FileExistsError, match="exists already; choose another"), whole_folder(target):
        pass
    assert (target / "old").exists()
    with whole_folder(target, overwrite=True) as part:
        (part / "new").write_text("2")
    assert [path.name for path in target.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [target]


def test_a_missing_data_file_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"'texts/none\.txt' is missing"):
        data_path("texts/none.txt")
