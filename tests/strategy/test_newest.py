"""A run that is to find its checkpoint goes on from the newest whole one, and says what is not."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.strategy.runs import Losses, Model, loader, make_trainer

STEPS, SAVED = 4, 3
DATA = "__0_0.distcp"


def _fit(folder: Path, steps: int, resume: Any = None, **options: Any) -> list[float]:
    keep = ModelCheckpoint(
        folder, filename="{step}", every_n_train_steps=1, save_top_k=-1, save_last=True, **options
    )
    losses = Losses()
    trainer = make_trainer({}, [losses, keep], max_steps=steps, enable_checkpointing=True)
    trainer.fit(Model(num_layers=1), loader({}), ckpt_path=resume)
    return losses.values


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 1 to 3, and the last, which is that of step 3 once more."""
    folder = tmp_path_factory.mktemp("saved")
    _fit(folder, SAVED)
    for step in range(1, SAVED + 1):
        os.utime(folder / f"step={step}.ckpt", (step, step))
    return folder


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return _fit(tmp_path_factory.mktemp("straight"), STEPS)


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy, with the times of the folders."""
    return Path(shutil.copytree(saved, tmp_path / "run"))


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _tear(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


FAULTS: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "flipped": (_flip, DATA, "its checksum is not that of what was written"),
    "torn": (_tear, DATA, "bytes, and"),
    "missing": (Path.unlink, DATA, f"last.ckpt has no {DATA}"),
    "no description": (Path.unlink, "topology.json", "last.ckpt has no topology.json"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_damaged_is_refused_and_the_one_before_goes_on(
    folder: Path, straight: list[float], fault: str
) -> None:
    damage, file, why = FAULTS[fault]
    for name in ("last.ckpt", "step=3.ckpt"):
        damage(folder / name / file)
    with pytest.warns(UserWarning, match="the newest that is whole") as warned:
        losses = _fit(folder, STEPS, "last")
    assert losses == straight[2:]
    said = [str(one.message) for one in warned if "newest that is whole" in str(one.message)]
    assert len(said) == 2 and why in said[0], said
    assert all(
        line.endswith(f"going on from {folder}/step=2.ckpt, the newest that is whole")
        for line in said
    ), said


def test_a_damaged_one_that_is_named_is_refused(folder: Path) -> None:
    _flip(folder / "last.ckpt" / DATA)
    with pytest.raises(ValueError, match=f"last.ckpt/{DATA} is damaged"):
        _fit(folder, STEPS, folder / "last.ckpt")


def test_none_that_is_whole_is_an_error(folder: Path) -> None:
    for one in folder.iterdir():
        _flip(one / DATA)
    with pytest.raises(ValueError, match="and none of 3 others there is whole: start a new run"):
        _fit(folder, STEPS, "last")


def test_weights_alone_are_no_checkpoint_to_go_on_from(folder: Path, straight: list[float]) -> None:
    _fit(folder / "thin", 1, save_weights_only=True)
    (folder / "thin" / "step=1.ckpt").rename(folder / "thin.ckpt")  # newer than all others
    shutil.rmtree(folder / "thin")
    _flip(folder / "last.ckpt" / DATA)
    with pytest.warns(UserWarning, match="thin.ckpt holds weights only: going on from .*step=3"):
        assert _fit(folder, STEPS, "last") == straight[3:]


def test_what_a_kill_took_the_name_of_has_it_again(folder: Path, straight: list[float]) -> None:
    """Where names cannot be exchanged, a kill between two renames leaves this."""
    old = folder / ".last.ckpt.old-abcd"
    old.mkdir()
    (folder / "last.ckpt").rename(old / "last.ckpt")
    assert _fit(folder, STEPS, "last") == straight[3:]
    assert not old.exists() and (folder / "last.ckpt").is_dir()


def test_a_link_to_what_is_gone_is_the_newest_whole_one(
    folder: Path, straight: list[float]
) -> None:
    shutil.rmtree(folder / "last.ckpt")
    (folder / "last.ckpt").symlink_to("step=9.ckpt")
    with pytest.warns(UserWarning, match="last.ckpt does not exist.*going on from .*step=3.ckpt"):
        assert _fit(folder, STEPS, "last") == straight[3:]


def test_what_was_being_written_and_removed_does_not_stay(folder: Path) -> None:
    for name in (
        ".0123.partial",
        ".a.ckpt.partial-xyz",
        ".ab.removed",
        ".c.ckpt.old-u",
        ".d.partial",
    ):
        (folder / name / "c.ckpt").mkdir(parents=True)
        (folder / name / "c.ckpt" / "file").touch()
    now = (folder / ".d.partial" / "c.ckpt" / "file").stat().st_mtime
    for path in (folder / ".0123.partial", folder / ".a.ckpt.partial-xyz"):
        for one in (path, *path.rglob("*")):
            os.utime(one, (now - 7200, now - 7200))
    _fit(folder, STEPS, "last")
    # Of the last another job may be writing something.
    assert sorted(one.name for one in folder.glob(".*")) == [".d.partial"]
    assert (folder / "c.ckpt" / "file").exists()
