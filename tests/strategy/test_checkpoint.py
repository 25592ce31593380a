"""Checkpoints: a restart is bitwise the run that was never interrupted, and nothing is torn."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_dhellam import checkpoint, files
from lightning_dhellam.checkpoint.folder import load_common
from lightning_dhellam.files import WriteError
from lightning_dhellam.runner import Runner
from lightning_dhellam.strategy import DHellamStrategy
from tests.full_disk import full_disk
from tests.ranks import run_ranks
from tests.strategy.runs import SHAPE, Losses, Model, evaluation, join, loader, make_trainer

STEPS, STOP = 6, 3
DROPOUT: dict[str, Any] = {"hidden_dropout": 0.2}
Outcome = tuple[list[float], dict[str, torch.Tensor]]


class Scheduled(Model):
    """With a learning rate that changes at every step."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def _fit(
    strategy: dict[str, Any], precision: Any, *callbacks: Callback, steps: int, **resume: Any
) -> Outcome:
    losses = Losses()
    module = Scheduled(**DROPOUT)
    trainer = make_trainer(
        strategy,
        [losses, *callbacks],
        precision=precision,
        max_steps=steps,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
    )
    trainer.fit(module, loader(strategy, samples=40), **resume)
    return losses.values, {name: p.detach().clone() for name, p in module.named_parameters()}


def _keep_every_step(folder: Path, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(
        folder, filename="{step}", every_n_train_steps=1, save_top_k=-1, **options
    )


def _interrupted(strategy: dict[str, Any], precision: Any, folder: Path) -> dict[str, Outcome]:
    straight = _fit(strategy, precision, steps=STEPS)
    before = _fit(strategy, precision, _keep_every_step(folder), steps=STOP)
    after = _fit(strategy, precision, steps=STEPS, ckpt_path=folder / f"step={STOP}.ckpt")
    return {"straight": straight, "before": before, "after": after}


RESTARTS: dict[str, tuple[int, dict[str, Any], str]] = {
    "alone-32-true": (1, {"micro_batch_size": 3}, "32-true"),
    "alone-bf16-mixed": (1, {"micro_batch_size": 3}, "bf16-mixed"),
    "tp2-bf16-mixed": (2, {"tensor_parallel_size": 2, "micro_batch_size": 2}, "bf16-mixed"),
    "tp2-bf16-true": (2, {"tensor_parallel_size": 2, "micro_batch_size": 2}, "bf16-true"),
    "pp2-bf16-mixed": (2, {"pipeline_parallel_size": 2, "micro_batch_size": 2}, "bf16-mixed"),
    "dp2-sharded-32-true": (2, {"distributed_optimizer": True}, "32-true"),
    "dp2-sharded-bf16-mixed": (2, {"distributed_optimizer": True}, "bf16-mixed"),
}


DAMAGED = ("topology.json", "common.pt", "rest.pt", ".metadata", "__1_0.distcp")
LACKS = "final_norm.weight"
"""What a checkpoint does not have."""


class FailingSave:
    """`torch.save` that fails on one rank, for tensors that it alone writes."""

    def __init__(self, rank: int, error: Exception) -> None:
        self.rank, self.error, self.save = rank, error, torch.save

    def __call__(self, value: Any, stream: Any, **options: Any) -> None:
        if dist.get_rank() == self.rank and isinstance(value, torch.Tensor):
            raise self.error
        self.save(value, stream, **options)


def _read(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@contextmanager
def _message(kind: type[Exception], messages: dict[str, str], name: str) -> Iterator[None]:
    messages[name] = "no error"
    try:
        yield
    except kind as error:
        messages[name] = str(error)


def _save_with_failures(strategy: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Save once over a good checkpoint and once under a new name, while rank 1 cannot write."""
    good, new = folder / "good.ckpt", folder / "new.ckpt"
    messages: dict[str, str] = {}
    contents = []

    class Save(Callback):
        def on_train_end(self, trainer: Trainer, *_: Any) -> None:
            trainer.save_checkpoint(good)
            contents.append(_read(good))
            full, odd = OSError("no space left on device"), pickle.PicklingError("not this")
            for name, path, error in (("over", good, full), ("new", new, odd)):
                failing = FailingSave(1, error)
                with mock.patch("torch.save", failing), _message(OSError, messages, name):
                    trainer.save_checkpoint(path)
            contents.append(_read(good))

    _fit(strategy, "32-true", Save(), steps=1)
    names = sorted(path.name for path in folder.iterdir())
    return {"messages": messages, "unchanged": contents[0] == contents[1], "names": names}


def _cut_off(checkpoint: Path, copy: Path, file: str, kept: int | None = 100) -> Path:
    """A copy of which a file is cut off after some bytes, or missing."""
    if dist.get_rank() == 0:
        shutil.copytree(checkpoint, copy)
        content = (copy / file).read_bytes()
        (copy / file).unlink()
        if kept is not None:
            (copy / file).write_bytes(content[:kept])
    dist.barrier()
    return copy


class _Forgetful(Callback):
    """Leaves a weight out of checkpoints."""

    def on_save_checkpoint(self, trainer: Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        del checkpoint["state_dict"][f"model.{LACKS}"]


def _loop_lacks(path: Path) -> str:
    """What a loop of one's own is told."""
    with Runner.create(SHAPE, "cpu", tensor_parallel_size=2, precision="bf16-mixed") as runner:
        with pytest.raises((ValueError, RuntimeError)) as refused:
            runner.load(path)
        return str(refused.value)


def _refusals(root: Path) -> dict[str, str]:
    """What two ranks are told when they resume from what does not fit."""
    sharded = root / "dp2-sharded-32-true" / f"step={STOP}.ckpt"
    split = root / "tp2-bf16-mixed" / f"step={STOP}.ckpt"
    thin = root / "thin"
    keep = _keep_every_step(thin, save_weights_only=True)
    _fit({"tensor_parallel_size": 2}, "bf16-mixed", keep, steps=1)
    plain = root / "plain.ckpt"
    plain.write_text("not a folder")
    cases: dict[str, tuple[dict[str, Any], Path]] = {
        "weights-only": ({"tensor_parallel_size": 2}, thin / "step=1.ckpt"),
        "file": ({"tensor_parallel_size": 2}, plain),
        "missing": ({"tensor_parallel_size": 2}, root / "nowhere.ckpt"),
        "other-folder": ({"tensor_parallel_size": 2}, root / "thin"),
        "other-precision": ({"tensor_parallel_size": 2}, split),
    }
    for file in DAMAGED:
        cases[file] = {}, _cut_off(sharded, root / f"cut-{file}", file)
    cases["no-file"] = {}, _cut_off(sharded, root / "no-file", "__1_0.distcp", kept=None)
    forgets = _Forgetful(), _keep_every_step(root / "forgets")
    _fit({"tensor_parallel_size": 2}, "bf16-mixed", *forgets, steps=1)
    lacking = root / "forgets" / "step=1.ckpt"
    messages: dict[str, str] = {"lacking-in-a-loop": _loop_lacks(lacking)}
    with _message(ValueError, messages, "lacking"):
        _fit({"tensor_parallel_size": 2}, "bf16-mixed", steps=STEPS, ckpt_path=lacking)
    for name, (strategy, path) in cases.items():
        with _message(ValueError, messages, name):
            _fit(strategy, "32-true", steps=STEPS, ckpt_path=path)
    return messages


def _validate_weights(root: Path) -> tuple[float, float]:
    """Validation loss at the end of a run, and of its weights-only checkpoint."""
    strategy = {"tensor_parallel_size": 2}
    keep = _keep_every_step(root / "weights", save_weights_only=True)
    trainer = make_trainer(strategy, [keep], max_steps=2, enable_checkpointing=True)
    module = Model()
    trainer.fit(module, loader(strategy))
    (direct,) = trainer.validate(module, evaluation(strategy), verbose=False)
    other = make_trainer(strategy)
    path = root / "weights" / "step=2.ckpt"
    (loaded,) = other.validate(Model(), evaluation(strategy), ckpt_path=path, verbose=False)
    return direct["val_loss"], loaded["val_loss"]


def _everything(rank: int, world: int, root: Path) -> dict[str, Any]:
    join(rank, world)
    outcome: dict[str, Any] = {
        name: _interrupted(strategy, precision, root / name)
        for name, (size, strategy, precision) in RESTARTS.items()
        if size == world
    }
    if world == 2:
        outcome["failures"] = _save_with_failures({}, root / "failures")
        outcome["refusals"] = _refusals(root)
        outcome["weights"] = _validate_weights(root)
    return outcome


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def outcomes(root: Path) -> dict[int, list[dict[str, Any]]]:
    return {world: run_ranks(world, _everything, world, root) for world in (1, 2)}


@pytest.mark.parametrize("name", RESTARTS)
def test_a_restart_goes_on_bitwise(outcomes: dict[int, list[dict[str, Any]]], name: str) -> None:
    for outcome in outcomes[RESTARTS[name][0]]:
        straight, weights = outcome[name]["straight"]
        assert len(straight) == STEPS and len(set(straight)) == STEPS
        assert outcome[name]["before"][0] == straight[:STOP]
        losses, resumed = outcome[name]["after"]
        assert losses == straight[STOP:]
        different = [key for key in weights if not torch.equal(weights[key], resumed[key])]
        assert not different


def test_a_checkpoint_is_one_folder_with_a_file_per_rank(
    outcomes: dict[int, list[dict[str, Any]]], root: Path
) -> None:
    whole = [".metadata", "__0_0.distcp", "__1_0.distcp", "common.pt", "rest.pt", "topology.json"]
    for name in ("tp2-bf16-mixed", "pp2-bf16-mixed", "dp2-sharded-32-true"):
        names = {path.name for path in (root / name).iterdir()}
        assert names == {f"step={step}.ckpt" for step in range(1, STOP + 1)}
        files = [path.name for path in sorted((root / name / f"step={STOP}.ckpt").iterdir())]
        assert files == whole


def test_a_failed_save_is_an_error_on_every_rank_and_leaves_the_old_checkpoint(
    outcomes: dict[int, list[dict[str, Any]]],
) -> None:
    for outcome in outcomes[2]:
        failures = outcome["failures"]
        assert failures["unchanged"]
        assert failures["names"] == ["good.ckpt"]
        over, new = failures["messages"]["over"], failures["messages"]["new"]
        assert "good.ckpt was not written: rank 1: WriteError: __1_0.distcp in " in over
        assert over.endswith("no space left on device")
        assert "new.ckpt was not written: rank 1: PicklingError: not this" in new


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("weights-only", ["holds weights only", "save_weights_only=False"]),
        ("file", ["plain.ckpt is no checkpoint: give a folder that a run", "or a file"]),
        ("missing", ["nowhere.ckpt does not exist: give a folder that a run"]),
        ("no-file", ["no-file has no __1_0.distcp: ", "use another checkpoint"]),
        *((file, [f"cut-{file}/{file} ", "use another checkpoint"]) for file in DAMAGED),
        ("other-folder", ["has no topology.json", "give a folder that a run"]),
        ("other-precision", ["precision=bf16-mixed", "precision=32-true", "same value"]),
        *(
            (f"lacking{where}", ["the checkpoint does not have ", LACKS, "the sizes that it was"])
            for where in ("", "-in-a-loop")
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_on_every_rank(
    outcomes: dict[int, list[dict[str, Any]]], name: str, words: list[str]
) -> None:
    for outcome in outcomes[2]:
        message = outcome["refusals"][name]
        assert all(word in message for word in words), message
        assert "\n" not in message


def test_a_weights_only_checkpoint_validates_like_the_run_that_wrote_it(
    outcomes: dict[int, list[dict[str, Any]]],
) -> None:
    for outcome in outcomes[2]:
        direct, loaded = outcome["weights"]
        assert direct == loaded


@pytest.mark.parametrize("room", [0, 100, 1500, 4500, 10_000])
def test_a_full_disk_is_said_with_the_file_and_what_is_missing(room: int, tmp_path: Path) -> None:
    from lightning_dhellam.parallel import ParallelContext

    context = ParallelContext.single(torch.device("cpu"))
    path = tmp_path / "a.ckpt"
    weights = {"first": torch.ones(1000), "second": torch.ones(1000)}
    checkpoint.save(path, context, {"value": 1}, weights, {})
    plain = (path / "common.pt").stat().st_size
    with full_disk(tmp_path, room), pytest.raises(WriteError) as caught:
        checkpoint.save(path, context, {"value": 2}, weights, {})
    message = str(caught.value)
    file = "common.pt" if room < plain else "rest.pt" if room < 4500 else "__0_0.distcp"
    assert f"{path} was not written: rank 0: WriteError: {file} in {tmp_path}" in message
    assert "No space left on device" in message and "more are needed, and" in message
    assert "unexpected pos" not in message and "\n" not in message
    assert load_common(path) == {"value": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["a.ckpt"]


def test_a_folder_of_the_final_name_is_whole_without_torch_distributed(tmp_path: Path) -> None:
    from lightning_dhellam.parallel import ParallelContext

    context = ParallelContext.single(torch.device("cpu"))
    path = tmp_path / "a.ckpt"
    for value in (1, 2):
        checkpoint.save(path, context, {"value": value}, {"w": torch.ones(2)}, {})
        assert load_common(path) == {"value": value}
    assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]


def test_a_checkpoint_stays_when_its_successor_cannot_take_its_place(tmp_path: Path) -> None:
    from lightning_dhellam.parallel import ParallelContext

    context = ParallelContext.single(torch.device("cpu"))
    path = tmp_path / "last.ckpt"
    checkpoint.save(path, context, {"value": 1}, {"w": torch.ones(2)}, {})
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError("no space left")
        return rename(self, target)

    def fail(one: Path, other: Path) -> bool:
        raise OSError("no space left")

    # Where names can be exchanged, and where they cannot.
    unable = mock.patch.object(files, "_exchange", lambda one, other: False)
    for failing in (mock.patch.object(files, "_exchange", fail), unable):
        renaming = mock.patch.object(Path, "rename", refuse)
        with failing, renaming, pytest.raises(OSError, match="no space left"):
            checkpoint.save(path, context, {"value": 2}, {"w": torch.ones(2)}, {})
        assert load_common(path) == {"value": 1}
        assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_checkpoint_replaces_a_link_and_not_what_it_points_to(tmp_path: Path) -> None:
    from lightning_dhellam.parallel import ParallelContext

    context = ParallelContext.single(torch.device("cpu"))
    best, last = tmp_path / "best.ckpt", tmp_path / "last.ckpt"
    checkpoint.save(best, context, {"value": 1}, {"w": torch.ones(2)}, {})
    last.symlink_to(best)
    for value in (2, 3):
        checkpoint.save(last, context, {"value": value}, {"w": torch.ones(2)}, {})
        assert load_common(last) == {"value": value}
    assert load_common(best) == {"value": 1}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.ckpt", "last.ckpt"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"hidden_size": 2 * SHAPE.hidden_size},
            ["word_embeddings.weight of shape (32, 16), this run of shape (32, 32)"],
        ),
        ({"num_layers": SHAPE.num_layers + 1}, [f"does not have model.layers.{SHAPE.num_layers}."]),
        ({"num_layers": SHAPE.num_layers - 1}, [f"has model.layers.{SHAPE.num_layers - 1}."]),
    ],
)
def test_weights_of_a_model_of_other_sizes_are_refused(
    changes: dict[str, int], words: list[str], tmp_path: Path
) -> None:
    writes = {"max_steps": 1, "enable_checkpointing": True}
    make_trainer({}, [_keep_every_step(tmp_path)], **writes).fit(Model(), loader({}, samples=8))
    # As version 0.1 wrote it, without the model's configuration.
    file = tmp_path / "step=1.ckpt" / "topology.json"
    description = {**json.loads(file.read_text()), "model": None}
    del description["checksum"]
    file.write_text(json.dumps(description))
    other = make_trainer({}, max_steps=2)
    with pytest.raises(ValueError, match="give the model the sizes") as caught:
        other.fit(Model(**changes), loader({}, samples=8), ckpt_path=tmp_path / "step=1.ckpt")
    message = str(caught.value)
    assert all(word in message for word in [*words, "and", "more like it"]), message
    assert "\n" not in message


def test_saving_elsewhere_is_refused() -> None:
    with pytest.raises(ValueError, match="storage_options is not supported"):
        DHellamStrategy().save_checkpoint({}, "x.ckpt", storage_options={"a": 1})
