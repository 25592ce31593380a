"""Checkpoints that are written beside training: what they hold, name and replace, and failures."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_dhellam.checkpoint import background, writing
from lightning_dhellam.checkpoint.folder import check_whole
from lightning_dhellam.data.loader import ResumableDataLoader, SampleOrder
from lightning_dhellam.files import WriteError
from lightning_dhellam.parallel import ParallelContext
from lightning_dhellam.parallel.optimizer import ModelParallelOptimizer
from lightning_dhellam.strategy import termination
from tests.gpu.test_staging import copies_of
from tests.ranks import run_ranks
from tests.strategy.runs import (
    GLOBAL_BATCH,
    Losses,
    Model,
    Sequences,
    join,
    loader,
    make_trainer,
)

STEPS = 6
ASYNC = {"async_checkpoint": True}


class Gate:
    """Lets writing begin when it is opened, and counts what is written."""

    def __init__(self) -> None:
        self.open, self.writes = threading.Event(), 0
        self._write = background.write

    def __call__(self, *args: Any) -> None:
        assert self.open.wait(300)
        self._write(*args)
        self.writes += 1

    def __enter__(self) -> Gate:
        self._patch = mock.patch.object(background, "write", self)
        self._patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.open.set()
        self._patch.stop()


class Do(Callback):
    """Does something when a step is over, behind all other callbacks."""

    def __init__(self, action: Callable[[Trainer], None]) -> None:
        self.action = action

    def on_before_zero_grad(self, trainer: Trainer, *_: Any) -> None:
        self.action(trainer)  # of the next step: what was saved after the last one is in flight


class Seen(Callback):
    """Notes which samples a step is given."""

    def __init__(self, seen: list[list[int]]) -> None:
        self.seen = seen

    def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Any, *_: Any) -> None:
        self.seen.append(batch["index"].tolist())


def _keep(folder: Path, **options: Any) -> ModelCheckpoint:
    given = {"every_n_train_steps": 1, "save_top_k": 1, "filename": "{step}", **options}
    return ModelCheckpoint(folder, **given)


def _fit(strategy: dict[str, Any], *callbacks: Callback, steps: int = STEPS, **run: Any) -> Trainer:
    keeps = any(isinstance(one, ModelCheckpoint) for one in callbacks)
    trainer = make_trainer(strategy, callbacks, max_steps=steps, enable_checkpointing=keeps)
    trainer.fit(Model(num_layers=1), loader(strategy), **run)
    return trainer


def _whole(folder: Path) -> list[str]:
    """The checkpoints of a folder by their names, all of which must be whole."""
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    for name in names:
        check_whole(folder / name, ParallelContext.single(torch.device("cpu")))
    return names


def _read(path: Path) -> dict[str, Any]:
    return writing.content.read(path / "common.pt")


def _same(one: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same tensors in the same places."""
    names = sorted(file.name for file in one.iterdir())
    same = {"__0_0.distcp", "rest.pt"}
    return names == sorted(file.name for file in other.iterdir()) and all(
        (one / name).read_bytes() == (other / name).read_bytes() for name in same
    )


WAYS: dict[str, dict[str, Any]] = {
    "one": {},
    "all": {"save_top_k": -1},
    "two best": {"save_top_k": 2, "monitor": "train_loss"},
    "same name": {"save_top_k": 3, "monitor": "train_loss", "mode": "max", "filename": "same"},
    "last": {"save_last": True, "every_n_train_steps": 2},
    "link": {"save_last": "link"},
    "weights": {"save_weights_only": True, "save_last": "link", "save_top_k": -1},
}


@pytest.mark.parametrize("way", WAYS)
def test_the_same_checkpoints_as_without(way: str, tmp_path: Path) -> None:
    found = {}
    for name, strategy in (("at once", {}), ("beside", ASYNC)):
        keep = _keep(tmp_path / name, **WAYS[way])
        _fit(strategy, keep)
        found[name] = _whole(tmp_path / name), keep.state_dict()["best_k_models"].values()
        assert not list((tmp_path / name).glob(".*"))
        assert Path(keep.best_model_path).is_dir()
        assert not keep.save_last or Path(keep.last_model_path).is_dir()
    assert found["at once"][0] == found["beside"][0] != []
    assert list(found["at once"][1]) == list(found["beside"][1])
    for name in found["beside"][0]:
        assert _same(tmp_path / "at once" / name, tmp_path / "beside" / name), name


def test_last_and_best_name_what_is_whole_while_the_next_is_written(tmp_path: Path) -> None:
    keep, seen = _keep(tmp_path, save_last="link"), []

    def look(trainer: Trainer) -> None:
        if trainer.global_step == 2:
            trainer.strategy.wait_for_checkpoint()
            gate.open.clear()  # what is saved after this step stays in flight for two more
            keep._every_n_train_steps = 1
        elif trainer.global_step in (3, 4):
            keep._every_n_train_steps = 0
            seen.append((_whole(tmp_path), os.readlink(tmp_path / "last.ckpt")))
        elif trainer.global_step == 5:
            gate.open.set()

    with Gate() as gate:
        gate.open.set()
        _fit(ASYNC, keep, Do(look))
    assert seen == [(["last.ckpt", "step=2.ckpt"], "step=2.ckpt")] * 2
    assert _whole(tmp_path) == ["last.ckpt", "step=3.ckpt"]
    assert os.readlink(tmp_path / "last.ckpt") == "step=3.ckpt"


def test_what_is_written_late_is_what_was_there_when_it_was_saved(tmp_path: Path) -> None:
    """The steps that an optimizer counts and its settings as well, which change meanwhile."""

    def look(trainer: Trainer) -> None:
        if trainer.global_step == 2:
            trainer.save_checkpoint(tmp_path / "beside")
            trainer.optimizers[0].param_groups[0]["betas"] = (0.5, 0.6)
        elif trainer.global_step == 4:
            gate.open.set()

    def save(trainer: Trainer) -> None:
        if trainer.global_step == 2:
            trainer.save_checkpoint(tmp_path / "at once")

    _fit({}, Do(save))
    with Gate() as gate:
        _fit(ASYNC, Do(look))
    assert _whole(tmp_path) == ["at once", "beside"]
    assert _same(tmp_path / "at once", tmp_path / "beside")
    (alike,) = writing.content.read(tmp_path / "beside" / "rest.pt")["optimizer"]["alike"]
    assert float(alike["values"]["step"]) == 2


def test_hooks_that_may_change_or_save_what_is_stepped_are_held_on_both_sides(
    tmp_path: Path,
) -> None:
    """They see masters in the optimizer's groups, which may still be copied."""
    order: list[str] = []

    class Hook(Callback):
        def on_before_optimizer_step(self, *_: Any) -> None:
            order.append("hook")

    step = ModelParallelOptimizer.step
    with (
        mock.patch.object(background.Background, "hold", lambda _: order.append("hold")),
        mock.patch.object(
            ModelParallelOptimizer, "step", lambda one: (order.append("step"), step(one))
        ),
    ):
        _fit(ASYNC, _keep(tmp_path), Hook(), steps=2)
    assert order == ["hold", "hook", "hold", "step"] * 2


def test_only_what_a_step_changes_is_copied_late(tmp_path: Path) -> None:
    """A schedule may change a learning rate that is a tensor before."""
    rate, count, moment, buffer, whole = (torch.full((2,), float(n)) for n in range(5))
    rest = writing.Rest(
        {"rest": {"extra": buffer}, "own": {}},
        {
            "rest": {"groups": [{"lr": rate}], "values": {"weight": {"step": count}}, "other": {}},
            "own": {"weight": {"moment": moment}},
        },
        {},
        True,
    )
    pieces = {"model/weight at 0": whole, "optimizer/exp_avg/weight at 0": whole + 1}
    planned: Any = SimpleNamespace(pieces=pieces)
    prepared = writing.Prepared(tmp_path, True, b"", planned, rest, "own.pt", {}, tmp_path)
    staging = mock.Mock()
    staging.copy.side_effect = lambda tensors, late: {n: t.clone() for n, t in tensors.items()}
    prepared.stage(staging)
    tensors, late = staging.copy.call_args.args
    assert {float(tensors[name][0]) for name in late} == {1.0, 2.0, 5.0}
    assert sorted(float(tensor[0]) for tensor in tensors.values()) == [0, 1, 2, 3, 4, 5]
    for changed in (rate, count, moment, buffer):
        changed.fill_(9)
    of_module, of_optimizer = prepared.rest.of_module, prepared.rest.of_optimizer
    assert float(of_optimizer["rest"]["groups"][0]["lr"][0]) == 0
    assert float(of_optimizer["rest"]["values"]["weight"]["step"][0]) == 1
    assert float(of_optimizer["own"]["weight"]["moment"][0]) == 2
    assert float(of_module["rest"]["extra"][0]) == 3


def test_weights_that_are_not_finite_end_the_run_before_they_are_written(tmp_path: Path) -> None:
    """Nobody has waited for the device to tell when they were saved; the one before stays."""
    keep = _keep(tmp_path)

    def spoil(trainer: Trainer) -> None:
        if trainer.global_step == 2:
            trainer.strategy.wait_for_checkpoint()
            trainer.lightning_module.model.final_norm.weight.data[0] = torch.inf

    with pytest.raises(ValueError, match=r"3.ckpt is not written: 'model.final_norm.weight' is"):
        _fit({**ASYNC, "max_skipped_steps": 9}, keep, Do(spoil))
    assert _whole(tmp_path) == ["step=2.ckpt"]


def test_training_goes_on_from_the_last_in_the_same_process(tmp_path: Path) -> None:
    straight, losses = Losses(), Losses()
    _fit({}, straight)
    _fit(ASYNC, _keep(tmp_path, save_last=True), steps=3)
    _fit(ASYNC, _keep(tmp_path, save_last=True), losses, ckpt_path="last")
    assert losses.values == straight.values[3:]


def test_a_second_save_waits_for_the_first_which_is_said_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []
    with mock.patch("lightning_dhellam.strategy.saving.rank_zero_info", said.append):
        _fit(ASYNC, _keep(tmp_path, save_last=True), steps=4)
    (line,) = [text for text in said if " waits until " in text]
    assert "one is written at a time" in line and "\n" not in line


@pytest.mark.parametrize("end", ["exception", "interrupt", "end of the run"])
def test_whatever_ends_a_run_waits_for_what_is_written(end: str, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(trainer: Trainer) -> None:
        if trainer.global_step == 2 and end != "end of the run":
            threading.Timer(0.2, gate.open.set).start()
            raise Stop if end == "exception" else KeyboardInterrupt
        if trainer.global_step == 1 and end == "end of the run":
            threading.Timer(0.2, gate.open.set).start()

    keep = _keep(tmp_path, every_n_train_steps=2)
    kinds = {"exception": Stop, "interrupt": SystemExit}
    with Gate() as gate:
        if end in kinds:
            with pytest.raises(kinds[end]):
                _fit(ASYNC, keep, Do(stop))
        else:
            _fit(ASYNC, keep, Do(stop), steps=2)
    assert _whole(tmp_path) == ["step=2.ckpt"] and gate.writes == 1


def test_what_is_saved_to_be_requeued_is_whole_at_once(tmp_path: Path) -> None:
    found: list[bool] = []

    def handler(connector: Any, *_: Any) -> None:
        connector.trainer.save_checkpoint(tmp_path / "hpc_ckpt_1.ckpt")
        found.append((tmp_path / "hpc_ckpt_1.ckpt").is_dir())

    def requeue(trainer: Trainer) -> None:
        if trainer.global_step == 2:
            for one in trainer.callbacks:
                if isinstance(one, termination.Termination):
                    one._to_requeue = True

    kind = "lightning.pytorch.trainer.connectors.signal_connector._SignalConnector"
    with mock.patch(f"{kind}._slurm_sigusr_handler_fn", handler):
        _fit(ASYNC, _keep(tmp_path), Do(requeue))
    assert found == [True]


def test_copies_are_what_was_there_when_they_were_asked_for() -> None:
    for found, wanted in copies_of("cpu", 2**10):
        assert torch.equal(found, wanted)


@contextmanager
def _full(rank: int) -> Iterator[None]:
    """A disk that is full for the tensors of one rank."""

    def save(value: Any, stream: Any, **options: Any) -> None:
        if dist.get_rank() == rank and isinstance(value, torch.Tensor) and stream is not None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(value, stream, **options)

    real = torch.save
    with mock.patch("torch.save", save):
        yield


def _on_rank(rank: int, root: Path) -> dict[str, Any]:
    join(rank, 2)
    found: dict[str, Any] = {}
    for name, sizes in (
        ("tp", {"tensor_parallel_size": 2}),
        ("dp", {"distributed_optimizer": True}),
    ):
        for way, more in (("at once", {}), ("beside", ASYNC)):
            _fit({**sizes, **more}, _keep(root / name / way, save_last="link"))
    at: list[int] = []

    def fill(trainer: Trainer) -> None:
        at.append(trainer.global_step)
        if trainer.global_step == 1:
            full.__enter__()
        elif trainer.global_step == 2:
            keep._every_n_train_steps = 0  # so that no other save waits for it
        elif trainer.global_step == 3:
            trainer.strategy._background._job._thread.join()

    full, keep = _full(1), _keep(root / "full", every_n_train_steps=2)
    with pytest.raises(WriteError) as raised:
        _fit(ASYNC, keep, Do(fill))
    full.__exit__(None, None, None)
    found["raised"], found["steps"] = str(raised.value), at
    with _full(1), pytest.raises(WriteError) as raised:
        _fit(ASYNC, _keep(root / "end"), steps=1)
    found["end"] = str(raised.value)
    return found


def test_a_failed_write_is_an_error_of_the_run_on_all_ranks(tmp_path: Path) -> None:
    first, second = run_ranks(2, _on_rank, tmp_path)
    assert first == second
    for name, file in (("raised", "full/step=2.ckpt"), ("end", "end/step=1.ckpt")):
        message = first[name]
        assert f"{tmp_path}/{file} was not written: rank 1: WriteError: __1_0.distcp" in message
        assert "No space left on device" in message and "\n" not in message
    assert max(first["steps"]) in (3, 4)  # when all have heard of it
    assert not list((tmp_path / "full").iterdir()) and not list((tmp_path / "end").iterdir())
    # One process, with another batch, goes on with the next sample.
    seen: list[list[int]] = []
    data = Sequences()
    trainer = make_trainer(ASYNC, [Seen(seen)], max_steps=STEPS + 1)
    path = tmp_path / "dp" / "beside" / "last.ckpt"
    order = ResumableDataLoader(data, SampleOrder(data, 3))
    trainer.fit(Model(num_layers=1), order, ckpt_path=path)
    first_left = STEPS * GLOBAL_BATCH
    assert seen == [[first_left, first_left + 1, first_left + 2]]
    for name in ("tp", "dp"):
        at_once, beside = tmp_path / name / "at once", tmp_path / name / "beside"
        assert _whole(at_once) == _whole(beside) == ["last.ckpt", f"step={STEPS}.ckpt"]
        for number in (0, 1):
            data = [f / f"step={STEPS}.ckpt/__{number}_0.distcp" for f in (at_once, beside)]
            assert data[0].read_bytes() == data[1].read_bytes()
