"""Places that nothing can be written to are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_dhellam.files import check_file, check_folder


def test_folders_that_are_there_or_can_be_made_are_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.png").touch()
    check_folder(tmp_path, "--output")
    check_folder(Path("new/below"), "--output")
    check_file(Path("old.png"), "--output")
    check_file(Path("new/x.png"), "--output")
    assert [path.name for path in tmp_path.iterdir()] == ["old.png"]


def test_a_folder_that_cannot_be_written_to_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)
    with pytest.raises(ValueError, match=f"^--output x: {tmp_path} cannot be written to: give"):
        check_folder(tmp_path / "new" / "below", "--output x")


def test_a_link_to_nowhere_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match="link is not a folder"):
        check_folder(tmp_path / "link", "--output x")
