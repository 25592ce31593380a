"""Checkpoints on file systems of fsspec's: whole or not there, though nothing can be renamed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import fsspec
import pytest
import torch
import torch.distributed as dist
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_dhellam.checkpoint.description import TOPOLOGY, read_topology
from lightning_dhellam.commands.main import main
from lightning_dhellam.parallel import Cluster
from lightning_dhellam.parallel.emulate import Link
from lightning_dhellam.remote import RemotePath, place_of
from lightning_dhellam.runner import Runner
from tests.ranks import run_ranks
from tests.strategy.runs import SHAPE, Losses, Model, join, loader, make_trainer

STEPS = 4
ROOT = "memory://runs/here"
SHAPE_OF_ONE = replace(SHAPE, num_layers=1)


@pytest.fixture(autouse=True)
def _memory() -> Iterator[None]:
    yield
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


def _keep(folder: str, **options: Any) -> ModelCheckpoint:
    given = {"every_n_train_steps": 1, "save_top_k": 2, "monitor": "step", "mode": "max"}
    return ModelCheckpoint(folder, filename="{step}", **{**given, **options})


def _fit(
    strategy: dict[str, Any], *callbacks: Callback, steps: int = STEPS, path: Any = None
) -> Trainer:
    keeps = any(isinstance(one, ModelCheckpoint) for one in callbacks)
    trainer = make_trainer(strategy, callbacks, max_steps=steps, enable_checkpointing=keeps)
    trainer.fit(Model(num_layers=1), loader(strategy), ckpt_path=path)
    return trainer


def _names(folder: str) -> list[str]:
    return [one.name for one in RemotePath(folder).iterdir()]


@pytest.mark.parametrize("beside", [False, True])
def test_a_run_saves_to_memory_and_goes_on_from_the_last(
    beside: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    straight, losses = Losses(), Losses()
    _fit({}, straight)
    keep = _keep(ROOT, save_last=True)
    _fit({"async_checkpoint": beside}, keep, steps=2)
    assert _names(ROOT) == ["last.ckpt", "step=1.ckpt", "step=2.ckpt"]
    assert keep.best_model_path == f"{ROOT}/step=2.ckpt"
    _fit({"async_checkpoint": beside}, _keep(ROOT, save_last=True), losses, path="last")
    assert losses.values == straight.values[2:]
    assert _names(ROOT) == ["last.ckpt", "step=3.ckpt", "step=4.ckpt"]
    last = RemotePath(f"{ROOT}/last.ckpt")
    inside = read_topology(last)["folder"]
    assert [one.name for one in last.iterdir()] == [inside, TOPOLOGY]  # the older one is gone
    assert main(["checkpoint", "show", str(last)]) == 0
    shown = capsys.readouterr().out
    assert f"{last}: whole" in shown and "step 4" in shown and "folder=" not in shown


def test_a_failed_save_and_a_killed_one_leave_the_one_before() -> None:
    path = f"{ROOT}/a.ckpt"
    with Runner.create(SHAPE, "cpu", micro_batch_size=1) as runner:
        runner.save(path, {"number": 1})
        before = [one.name for one in RemotePath(path).iterdir()]
        full = OSError(28, "No space left on device")
        for part in ("pipe_file", "_open"):
            with (
                mock.patch.object(MemoryFileSystem, part, side_effect=full),
                pytest.raises(OSError, match=r"a\.ckpt was not written: .*No space left"),
            ):
                runner.save(path, {"number": 2})
            assert [one.name for one in RemotePath(path).iterdir()] == before
            assert runner.load(path) == {"number": 1}
        killed = RemotePath(path) / "parts-of-one-that-was-killed"
        (killed / "common.pt").write_bytes(b"half")
        assert runner.load(path) == {"number": 1}
        runner.save(path, {"number": 3})
        assert runner.load(path) == {"number": 3} and not killed.exists()
        first = RemotePath(f"{ROOT}/first.ckpt")  # of which nothing but parts was written
        (first / "parts-x" / "common.pt").write_bytes(b"half")
        with pytest.raises(ValueError, match=r"first\.ckpt has no topology\.json"):
            runner.load(str(first))


def test_a_flipped_byte_is_named_and_the_newest_whole_one_goes_on() -> None:
    _fit({}, _keep(ROOT, save_last=True), steps=2)
    last = RemotePath(f"{ROOT}/last.ckpt")
    name = next(name for name in read_topology(last)["files"] if name.endswith("common.pt"))
    file = RemotePath(f"{last}/{name}")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"common\.pt is damaged: its checksum"):
        _fit({}, path=str(last))
    seen = Losses()
    with pytest.warns(UserWarning, match=r"going on from memory://runs/here/step=2\.ckpt"):
        _fit({}, _keep(ROOT), seen, path="last", steps=3)
    assert len(seen.values) == 1


@pytest.mark.parametrize(
    ("folder", "path", "said"),
    [
        ("memory://x", None, r"ModelCheckpoint\(dirpath='memory://x'\)"),
        ("simplecache::memory://x", None, r"ModelCheckpoint\(dirpath='simplecache::memory://x'\)"),
        (None, "memory://x/a.ckpt", r"ckpt_path=memory://x/a\.ckpt"),
    ],
)
def test_several_processes_are_refused_the_memory_of_one_before_they_start(
    folder: str | None, path: str | None, said: str
) -> None:
    keeps = [] if folder is None else [_keep(folder)]
    started = mock.patch("subprocess.Popen", side_effect=AssertionError("a process starts"))
    with started, pytest.raises(ValueError, match=f"{said}: .*is the memory of one process, and 2"):
        trainer = make_trainer({}, keeps, devices=2, enable_checkpointing=bool(keeps))
        trainer.fit(Model(num_layers=1), loader({}), ckpt_path=path)
    if path is not None:
        with started, pytest.raises(ValueError, match=said):
            trainer = make_trainer({}, devices=2)
            trainer.validate(Model(num_layers=1), loader({}), ckpt_path=path)


def test_a_rank_of_an_emulated_cluster_goes_on_from_memory() -> None:
    path = f"{ROOT}/a.ckpt"
    _fit({}, steps=2).save_checkpoint(path)
    begun = Begun()
    cluster = Cluster(4, {lane: Link(1e9) for lane in ("tp", "dp")}, rank=3)
    trainer = make_trainer({"emulate": cluster, "tensor_parallel_size": 2}, [begun], max_steps=3)
    with pytest.raises(ValueError, match=r"emulate=.* of an earlier run: call torch"):
        trainer.fit(Model(num_layers=1), loader({}), ckpt_path=path)
    dist.destroy_process_group()
    trainer.fit(Model(num_layers=1), loader({}), ckpt_path=path)
    assert begun.step == 2
    with Runner.create(SHAPE_OF_ONE, "cpu", micro_batch_size=1) as runner:
        runner.load(path)
        name = "embedding.word_embeddings.weight"
        whole = dict(runner.model.named_parameters())[name]
        assert torch.equal(begun.weights[name], whole[len(whole) // 2 :])


class Begun(Callback):
    """Notes the step that a run goes on from, and its weights then."""

    step = -1

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        self.step = trainer.global_step
        named = module.model.named_parameters()
        self.weights = {name: parameter.detach().clone() for name, parameter in named}


class _Shelf(LocalFileSystem):
    """Files of this machine in which nothing can be renamed, as in an object store."""

    protocol = "shelf"
    root_marker = "/"

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return str(path).removeprefix("shelf://").rstrip("/")

    def mv(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError


def _on_rank(rank: int, root: Path) -> tuple[list[float], list[str]]:
    join(rank, 2)
    fsspec.register_implementation("shelf", _Shelf, clobber=True)
    losses, sizes = Losses(), {"tensor_parallel_size": 2}
    _fit(sizes, _keep(f"shelf://{root}/run", save_top_k=-1), losses, steps=3)
    again = Losses()
    _fit(sizes, again, steps=3, path=f"shelf://{root}/run/step=2.ckpt")
    assert again.values == losses.values[2:]
    with pytest.raises(ValueError, match=r"dirpath='memory://x'\): memory:// is the memory of one"):
        _fit(sizes, _keep("memory://x"), steps=1)
    return losses.values, sorted(path.name for path in (root / "run").iterdir())


def test_ranks_write_where_nothing_can_be_renamed(tmp_path: Path) -> None:
    (values, names), (others, _) = run_ranks(2, _on_rank, tmp_path)
    assert values == others and names == ["step=1.ckpt", "step=2.ckpt", "step=3.ckpt"]
    fsspec.register_implementation("shelf", _Shelf, clobber=True)
    alone = Losses()
    _fit({}, alone, steps=3, path=f"shelf://{tmp_path}/run/step=2.ckpt")  # on other sizes
    assert alone.values == pytest.approx(values[2:], rel=1e-5)


def test_what_others_have_written_is_read_though_it_was_missing_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """File systems keep listings, also of what is not there, until they are told to forget them."""
    missing: set[str] = set()
    exists, opened = MemoryFileSystem.exists, MemoryFileSystem.open

    def look(self: MemoryFileSystem, path: str, **options: Any) -> bool:
        if not exists(self, path, **options):
            missing.add(path)
        return path not in missing

    def read(self: MemoryFileSystem, path: str, *mode: Any, **options: Any) -> Any:
        if path in missing:
            raise FileNotFoundError(path)
        return opened(self, path, *mode, **options)

    monkeypatch.setattr(MemoryFileSystem, "exists", look)
    monkeypatch.setattr(MemoryFileSystem, "open", read)
    monkeypatch.setattr(MemoryFileSystem, "invalidate_cache", lambda *_: missing.clear())
    file = RemotePath(f"{ROOT}/late")
    for reading in (RemotePath.exists, RemotePath.read_bytes, lambda path: path.open().read()):
        missing.add(file._root)
        MemoryFileSystem.store[file._root] = MemoryFile(None, file._root, b"there")
        assert reading(file) in (True, b"there")
    missing.add(file._root)
    with file.open("wb") as written:
        written.write(b"again")
    assert file.read_bytes() == b"again"


def test_what_fsspec_cannot_use_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"^zzz://a: zzz:// cannot be used \(Protocol not known"):
        place_of("zzz://a")
    missing = mock.patch("fsspec.core.url_to_fs", side_effect=ImportError("Install s3fs"))
    with missing, pytest.raises(ValueError, match=r"--to: s3:// cannot be used \(Install s3fs\)"):
        place_of("s3://a", "--to")
    with pytest.raises(ValueError, match="memory of one process, and 2 have"):
        place_of("memory://a", processes=2)
    assert place_of("memory://a/b") == RemotePath("memory://a/b") != RemotePath("memory://a/c")
    assert place_of("a/b") == Path("a/b") and str(RemotePath("memory://a") / "b") == "memory://a/b"
