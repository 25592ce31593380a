"""Places that nothing can be written to are refused, and full disks are named."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_dhellam import files
from lightning_dhellam.checkpoint.description import read_topology
from lightning_dhellam.files import (
    WriteError,
    check_file,
    check_folder,
    save_text,
    staged_directory,
)
from lightning_dhellam.models.source import open_weights
from lightning_dhellam.plan.file import PlanFile
from lightning_dhellam.search.measure import Profile
from tests.full_disk import full_disk


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


@pytest.mark.parametrize("kind", ["text", "plan", "folder"])
def test_a_full_disk_is_named_with_what_is_missing(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text("old")
    with full_disk(tmp_path, 10), pytest.raises(WriteError, match="No space left") as caught:
        if kind == "text":
            save_text(file, "x" * 5000)
        elif kind == "plan":
            PlanFile({}, {}).save(file)
        else:
            with staged_directory(file, replace=True) as folder, (folder / "x").open("wb") as part:
                part.write(b"x" * 5000)
    message = str(caught.value)
    assert f"plan.json in {tmp_path}: No space left on device: 10 bytes were written, " in message
    assert kind != "text" or "5.0 kB more are needed, and " in message
    assert message.endswith(" are free") and "\n" not in message
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def _config(file: Path) -> Any:
    return open_weights("import_llama", "LlamaForCausalLM", file.parent, None)


@pytest.mark.parametrize("can_exchange", [True, False])
@pytest.mark.parametrize("kind", ["folder", "link", "file"])
def test_what_has_a_name_is_replaced(
    kind: str, can_exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not can_exchange:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    target, elsewhere = tmp_path / "target", tmp_path / "elsewhere"
    elsewhere.mkdir()
    if kind == "folder":
        target.mkdir()
        (target / "old").touch()
    elif kind == "link":
        target.symlink_to(elsewhere)
    else:
        target.touch()
    with staged_directory(target, replace=True) as folder:
        (folder / "new").touch()
    assert [path.name for path in target.iterdir()] == ["new"] and not target.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "target"]
    assert not [*elsewhere.iterdir()]


@pytest.mark.skipif(sys.platform != "linux", reason="names are exchanged on Linux")
def test_a_folder_that_is_replaced_is_there_at_every_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process may be killed at any of them."""
    target = tmp_path / "target"
    with staged_directory(target) as folder:
        (folder / "number").write_text("0")
    there: list[bool] = []
    for owner, name in ((files, "_exchange"), (Path, "rename"), (shutil, "rmtree")):
        whole = getattr(owner, name)

        def watched(*args: Any, whole: Any = whole, **options: Any) -> Any:
            there.append((target / "number").exists())
            result = whole(*args, **options)
            there.append((target / "number").exists())
            return result

        monkeypatch.setattr(owner, name, watched)
    with staged_directory(target, replace=True) as folder:
        (folder / "number").write_text("1")
    assert (target / "number").read_text() == "1"
    assert len(there) >= 4 and all(there)


READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "plan": ("plan.json", PlanFile.load),
    "profile": ("profile.json", Profile.load),
    "checkpoint": ("topology.json", lambda file: read_topology(file.parent)),
    "hugging-face": ("config.json", _config),
}


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_of_json_says_what_is_wrong_and_what_to_do(
    reader: str, tmp_path: Path
) -> None:
    name, read = READERS[reader]
    file = tmp_path / name
    torch.save({}, tmp_path / "pytorch_model.bin")  # beside a configuration
    for broken, message in (
        ("", r"is not a whole [\w ]+ \(.*\): \w+"),
        ('{"format": 1', r"is not a whole [\w ]+ \(.*\): \w+"),
        ("[1]", r"holds a list, and is not a [\w ]+: \w+"),
    ):
        file.write_text(broken)
        with pytest.raises(ValueError, match=f"{name} {message}"):
            read(file)
