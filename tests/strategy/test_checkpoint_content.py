"""Files of checkpoints: reading one runs none of its code, and what is written can be read."""

from __future__ import annotations

import argparse
import collections
import datetime
import decimal
import enum
import json
import pathlib
import pickle
import random
import shutil
import uuid
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    Timer,
)
from lightning.pytorch.loggers import CSVLogger

from lightning_dhellam.checkpoint import content
from lightning_dhellam.checkpoint.checksums import checksum
from lightning_dhellam.checkpoint.description import save_description
from lightning_dhellam.checkpoint.folder import load_common
from lightning_dhellam.checkpoint.writing import save
from lightning_dhellam.parallel import ParallelContext
from tests.checkpoint.first_format import make_old
from tests.strategy.runs import SHAPE, Losses, Model, evaluation, loader, make_trainer

CALLS: list[str] = []
VALUES: dict[str, Any] = {
    "plain": [None, True, 1, -(2**400), 0.5, 1j, "a", b"b", (1,), {2}, bytearray(b"c")],
    "tensors": [torch.ones(2), torch.float32, torch.Size([1]), torch.device("cpu")],
    "collections": [
        frozenset({1}),
        range(3),
        slice(1, 2),
        collections.OrderedDict(a=1),
        collections.Counter("aab"),
        argparse.Namespace(a=1),
    ],
    "times": [
        datetime.timedelta(minutes=1),
        datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC),
        datetime.date(2026, 1, 1),
        datetime.time(1),
    ],
    "numbers": [decimal.Decimal("0.1"), uuid.UUID(int=7)],
    "paths": [pathlib.Path("a/b"), pathlib.PurePosixPath("c"), pathlib.PureWindowsPath("d")],
    "numpy": [numpy.float32(0.5), numpy.int64(1), numpy.bool_(True)],
    "model": SHAPE,
}
ARRAYS = [numpy.arange(3), numpy.ones(2, "float16"), numpy.array(["a"]), numpy.zeros(2, bool)]


class Colour(enum.Enum):
    RED = 1


class Calls:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return CALLS.append, ("called",)


class Marks:
    """Runs code when it is unpickled, by the name of a function."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _call, ("called",)


def _call(value: str) -> str:
    CALLS.append(value)
    return value


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "common.pt"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one step."""
    folder = tmp_path_factory.mktemp("whole")
    keep = ModelCheckpoint(folder, filename="a", every_n_train_steps=1)
    options: dict[str, Any] = {"max_steps": 1, "enable_checkpointing": True}
    make_trainer({}, [keep], **options).fit(Model(), loader({}, samples=8))
    return folder / "a.ckpt"


@pytest.mark.filterwarnings("error")
def test_values_of_usual_types_come_back_as_they_were(file: Path) -> None:
    states = {"random": random.getstate(), "bits": numpy.random.default_rng(1).bit_generator.state}
    content.write(file, {**VALUES, "arrays": ARRAYS, **states})
    found = content.read(file)
    tensors, *others = found.pop("tensors")
    assert torch.equal(tensors, torch.ones(2)) and others == VALUES["tensors"][1:]
    for mine, theirs in zip(ARRAYS, found.pop("arrays"), strict=True):
        assert mine.dtype == theirs.dtype and (mine == theirs).all()
    expected = {name: value for name, value in VALUES.items() if name != "tensors"}
    assert found == {**expected, **states}
    for name, value in expected.items():
        if isinstance(value, list):
            assert [type(v) for v in value] == [type(v) for v in found[name]], name


def _forge(checkpoint: Path) -> None:
    """Give a checkpoint the checksums of what its files are now."""
    fields = json.loads((checkpoint / "topology.json").read_text())
    files = {name: checksum(checkpoint / name) for name in fields.pop("files", {})}
    others = {name: value for name, value in fields.items() if name != "checksum"}
    if files:
        save_description(checkpoint, {**others, "files": files})


@pytest.mark.parametrize(
    ("kind", "name"),
    [(Marks, "tests.strategy.test_checkpoint_content._call"), (Calls, "builtins.getattr")],
)
@pytest.mark.parametrize("place", ["common.pt", "rest.pt", "weights-00000.pt", "state-00000.pt"])
def test_a_file_that_would_run_code_is_refused_by_name_and_runs_none(
    place: str, kind: type, name: str, whole: Path, tmp_path: Path
) -> None:
    checkpoint = shutil.copytree(whole, tmp_path / "a.ckpt")
    if place.endswith("00000.pt"):
        make_old(checkpoint)
    honest = torch.load(checkpoint / place, weights_only=False)
    torch.save({**honest, "more": kind()}, checkpoint / place)
    _forge(checkpoint)
    CALLS.clear()
    trainer = make_trainer({}, max_steps=2)
    with pytest.raises(ValueError, match=f"{place} holds .*{name}.*could run code") as caught:
        if place == "state-00000.pt":
            trainer.fit(Model(), loader({}, samples=8), ckpt_path=checkpoint)
        else:
            trainer.validate(Model(), evaluation({}), ckpt_path=checkpoint, verbose=False)
    assert not CALLS
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [Marks, Calls])
def test_a_description_of_tensors_that_would_run_code_is_refused(
    kind: type, whole: Path, tmp_path: Path
) -> None:
    checkpoint = shutil.copytree(whole, tmp_path / "a.ckpt")
    (checkpoint / ".metadata").write_bytes(pickle.dumps(kind()))
    _forge(checkpoint)
    CALLS.clear()
    trainer = make_trainer({}, max_steps=2)
    with pytest.raises(ValueError, match=r"\.metadata cannot be read .*use another checkpoint"):
        trainer.validate(Model(), evaluation({}), ckpt_path=checkpoint, verbose=False)
    assert not CALLS


def test_a_type_of_ones_own_is_said_when_it_is_written_and_read_when_it_is_allowed(
    file: Path,
) -> None:
    with pytest.warns(UserWarning, match=r"hyper_parameters\.colours\[1\] \(.*\.Colour\)") as said:
        content.write(file, {"hyper_parameters": {"colours": [0, Colour.RED]}})
    (warning,) = said
    assert "torch.serialization.add_safe_globals([tests" in str(warning.message)
    with pytest.raises(ValueError, match=r"common\.pt holds .*\.Colour, which could run code"):
        content.read(file)
    with torch.serialization.safe_globals([Colour]):
        assert content.read(file)["hyper_parameters"]["colours"] == [0, Colour.RED]
        content.write(file, {"colour": Colour.RED})


def test_what_could_never_be_read_is_refused_when_it_is_saved(tmp_path: Path) -> None:
    context = ParallelContext.single(torch.device("cpu"))
    path = tmp_path / "a.ckpt"
    save(path, context, {"epoch": 1}, {}, {})
    for value, words in (
        (collections.defaultdict(list, {"a": [1]}), "collections.defaultdict.*keep a dict"),
        (lambda: 1, "builtins.function, which cannot be saved.*ignore="),
    ):
        common = {"callbacks": {"Mine": {"seen": value}}}
        with pytest.raises(ValueError, match=rf"common\.pt: callbacks\.Mine\.seen is a {words}"):
            save(path, context, common, {}, {})
    assert load_common(path) == {"epoch": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["a.ckpt"]


class Described(Model):
    """With hyperparameters of several types."""

    def __init__(self, **given: Any) -> None:
        super().__init__()
        self.save_hyperparameters()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (
            collections.defaultdict(list, {"a": [1]}),
            "collections.defaultdict, which .* keep a dict",
        ),
        ([collections.deque([1])], "collections.deque, which cannot be read again"),
        (lambda: 1, "builtins.function, which cannot be saved"),
    ],
)
def test_hyperparameters_that_no_checkpoint_can_hold_are_refused_before_training(
    value: Any, words: str, tmp_path: Path
) -> None:
    losses = Losses()
    trainer = _trainer(tmp_path, Counting(), losses, 2)
    with pytest.raises(ValueError, match=rf"^Described\.hparams\.kept\S* is a {words}"):
        trainer.fit(Described(kept=value), loader({}))
    assert losses.values == []
    make_trainer({}, [losses], max_steps=1).fit(Described(kept=value), loader({}))
    assert len(losses.values) == 1, "nothing is saved here"


class Counting(Callback):
    """With a state of its own."""

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"when": datetime.timedelta(1), "mean": numpy.float64(0.5), "at": Path("a")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seen = state_dict


def _trainer(folder: Path, counting: Counting, losses: Losses, steps: int) -> Trainer:
    callbacks = [
        ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2, monitor="train_loss"),
        EarlyStopping("train_loss", patience=100, check_on_train_epoch_end=True),
        Timer(duration=datetime.timedelta(hours=1)),
        LearningRateMonitor(),
        counting,
        losses,
    ]
    options: dict[str, Any] = {"enable_checkpointing": True, "logger": CSVLogger(folder)}
    return make_trainer({}, callbacks, max_steps=steps, log_every_n_steps=1, **options)


def test_what_lightnings_own_callbacks_save_is_read_again(tmp_path: Path) -> None:
    given = {"path": Path("b"), "wait": datetime.timedelta(2), "shape": SHAPE, "factor": (1, 2)}
    _trainer(tmp_path, Counting(), Losses(), 2).fit(Described(**given), loader({}))
    counting, losses = Counting(), Losses()
    checkpoint = tmp_path / "step=2.ckpt"
    trainer = _trainer(tmp_path, counting, losses, 3)
    trainer.fit(Described(**given), loader({}), ckpt_path=checkpoint)
    assert len(losses.values) == 1
    assert counting.seen == Counting().state_dict()
    assert content.read(checkpoint / "common.pt")["hyper_parameters"] == given
