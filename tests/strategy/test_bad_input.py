"""Every wrong configuration is answered by one clear error, before anything trains."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    GradientAccumulationScheduler,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.plugins import AsyncCheckpointIO
from torch.utils.data import DataLoader, Dataset

from lightning_dhellam.data import IndexedDataModule
from lightning_dhellam.models import preset
from lightning_dhellam.parallel import Cluster, Link
from lightning_dhellam.plan.file import PlanFile
from lightning_dhellam.strategy import DHellamStrategy
from lightning_dhellam.strategy.checks import check_ckpt_path
from tests.ranks import run_ranks
from tests.strategy.runs import SHAPE, Losses, Model, Sequences, join, loader, make_trainer

# Before processes


def _arguments(**arguments: Any) -> Callable[[], Any]:
    return lambda: DHellamStrategy(**arguments)


def _trainer(strategy: dict[str, Any] | None = None, **options: Any) -> Callable[[], Any]:
    return lambda: make_trainer(strategy or {}, **options)


CONSTRUCTION: dict[str, tuple[Callable[[], Any], str]] = {
    "unknown-plan": (
        _arguments(plan="interleave"),
        r"plan='interleave' is not a known plan.*'sequential'.*did you mean 'interleaved'",
    ),
    "unknown-schedule": (
        _arguments(schedule="dualpipe"),
        r"schedule='dualpipe' is not a known schedule: use 1f1b or interleaved-1f1b or zb-v or"
        r" dualpipe-v or fold or auto, or the path of a file.*did you mean 'dualpipe-v'",
    ),
    "schedule-of-no-chunks": (
        _arguments(schedule="interleaved-1f1b-0", pipeline_parallel_size=2),
        r"schedule='interleaved-1f1b-0' is not a known schedule: .*mean 'interleaved-1f1b'",
    ),
    "schedule-that-is-missing": (
        _arguments(schedule="none.txt"),
        r"schedule='none.txt' cannot be read: ",
    ),
    "no-micro-batch": (_arguments(micro_batch_size=0), r"micro_batch_size=0 must be .*at least 1"),
    "negative-micro-batch": (
        _arguments(micro_batch_size=-2),
        r"micro_batch_size=-2 must be .*at least 1",
    ),
    "true-micro-batch": (
        _arguments(micro_batch_size=True),
        r"micro_batch_size=True must be a whole number",
    ),
    "half-a-rank": (
        _arguments(tensor_parallel_size=0.5),
        r"tensor_parallel_size=0.5 must be a whole number",
    ),
    "no-stage": (
        _arguments(pipeline_parallel_size=0),
        r"pipeline_parallel_size=0 must be .*at least 1",
    ),
    "emulated-stage": (
        _arguments(pipeline_parallel_size=2, emulate="cluster.yaml"),
        r"pipeline_parallel_size=2 a stage computes only what others send: leave .* at 1",
    ),
    "world-does-not-divide-by-stages": (
        _trainer({"pipeline_parallel_size": 2, "tensor_parallel_size": 2}, devices=6),
        r"tensor_parallel_size=2, pipeline_parallel_size=2 needs a multiple of 4 processes",
    ),
    "no-context-rank": (
        _arguments(context_parallel_size=0),
        r"context_parallel_size=0 must be .*at least 1",
    ),
    "unknown-transport-of-stages": (
        _arguments(pipeline_parallel_size=2, pipeline_transport="gloo"),
        r"pipeline_transport='gloo' is not known: use one of auto, nccl, copy_engine",
    ),
    "unknown-transport": (
        _arguments(context_parallel_size=2, context_transport="nvlink"),
        r"context_transport='nvlink' is not known: use one of auto, nccl, copy_engine",
    ),
    "transport-over-a-link": (
        _arguments(
            context_parallel_size=2,
            context_transport="nccl",
            emulate=Cluster(8, {"tp": Link(1e9), "cp": Link(1e9)}),
        ),
        r"context_transport='nccl' carries nothing under emulate=.*link 'cp'.* leave it at 'auto'",
    ),
    "world-does-not-divide-by-context": (
        _trainer({"context_parallel_size": 3, "tensor_parallel_size": 2}, devices=4),
        r"tensor_parallel_size=2, context_parallel_size=3 needs a multiple of 6 processes.*is 4",
    ),
    "no-expert-rank": (
        _arguments(expert_parallel_size=0),
        r"expert_parallel_size=0 must be .*at least 1",
    ),
    "experts-beyond-the-ranks": (
        _trainer({"expert_parallel_size": 4}, devices=2),
        r"expert_parallel_size=4 needs a multiple of 4 ranks, but the job has 2: lower",
    ),
    "experts-in-some-parts": (
        _trainer({"tensor_parallel_size": 4, "expert_tensor_parallel_size": 2}, devices=4),
        r"expert_tensor_parallel_size=2 with tensor_parallel_size=4 must be 1 or 4: experts are",
    ),
    "emulated-without-a-link-to-experts": (
        _arguments(expert_parallel_size=4, emulate=Cluster(8, {"tp": Link(1e9)})),
        r"emulate='cluster' has no link 'ep', so with expert_parallel_size=4 tokens .*add one",
    ),
    "unknown-exchange": (
        _arguments(context_parallel_size=2, context_exchange="p2p"),
        r"context_exchange='p2p' is not known: use ring or all_gather",
    ),
    "kernel-without-blocks": (
        _arguments(context_parallel_size=2, kernels={"attention": "flash_attn"}),
        r"kernels=\{attention: flash_attn\}: with context parallelism attention is merged from .*"
        r"log-sum-exp to itself; use flash_attn_4 or cudnn or torch_flash or .*leave attention out",
    ),
    "emulated-without-a-link": (
        _arguments(context_parallel_size=2, emulate=Cluster(8, {"tp": Link(1e9)})),
        r"emulate='cluster' has no link 'cp', so with context_parallel_size=2 .*add one under",
    ),
    "unknown-operator": (
        _arguments(kernels={"atention": "cpu"}),
        r"kernels=\{atention: cpu\}: there is no operator 'atention'; did you mean 'attention'",
    ),
    "unknown-kernel": (
        _arguments(kernels={"attention": "flash_atn"}),
        r"attention has no backend 'flash_atn'; did you mean 'flash_attn'\? known: ",
    ),
    "kernel-without-name": (
        _arguments(kernels={"rope": None}),
        r"kernels=\{rope: None\}: rope has no backend 'None'; known: triton, reference",
    ),
    "empty-buckets": (_arguments(bucket_size=0), r"bucket_size=0 must be .*at least 1"),
    "world-smaller-than-tp": (
        _trainer({"tensor_parallel_size": 2}, devices=1),
        r"tensor_parallel_size=2 needs a multiple of 2 processes.*world size is 1.*set devices",
    ),
    "world-does-not-divide": (
        _trainer({"tensor_parallel_size": 2}, devices=3),
        r"tensor_parallel_size=2 needs a multiple of 2 .*world size is 3.*lower",
    ),
    "nodes-do-not-divide": (
        _trainer({"tensor_parallel_size": 4}, devices=3, num_nodes=2),
        r"tensor_parallel_size=4 needs a multiple of 4 .*world size is 6",
    ),
    "half-precision": (
        _trainer(precision="16-true"),
        r"precision='16-true'.*use one of 32-true, bf16-mixed, 16-mixed, bf16-true",
    ),
    "double-precision": (
        _trainer(precision="64-true"),
        r"precision='64-true'.*use one of 32-true, bf16-mixed, 16-mixed, bf16-true",
    ),
    "unknown-preset": (
        lambda: preset("llama-3-80b"),
        r"unknown preset 'llama-3-80b'; did you mean 'llama-3-8b'",
    ),
    "missing-dataset": (
        lambda: IndexedDataModule("nowhere/data", 8, 4),
        r"(?s)nowhere/data.*dhellam data prepare",
    ),
    "heads": (
        lambda: Model(hidden_size=18),
        r"hidden_size=18 is not a multiple of num_attention_heads=4: change one",
    ),
    "groups": (
        lambda: Model(num_query_groups=3),
        r"num_attention_heads=4 is not a multiple of num_query_groups=3",
    ),
}


@pytest.mark.parametrize("name", CONSTRUCTION)
def test_refused_when_constructed(name: str) -> None:
    build, pattern = CONSTRUCTION[name]
    with pytest.raises(ValueError, match=pattern):
        build()


class Manual(Model):
    automatic_optimization = False


class Shapeless(Model):
    def __init__(self) -> None:
        super().__init__()
        del self.model_config


class Data(LightningDataModule):
    """What a data module may say of itself."""

    def __init__(self, **facts: int) -> None:
        super().__init__()
        for name, value in facts.items():
            setattr(self, name, value)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Sequences(), batch_size=8)


def _launch(
    *,
    module: LightningModule | None = None,
    strategy: dict[str, Any] | None = None,
    data: LightningDataModule | None = None,
    entry: str = "fit",
    ckpt_path: Any = None,
    **options: Any,
) -> Callable[[], Any]:
    def fit() -> None:
        trainer = make_trainer(strategy or {}, **{"devices": 2, **options})
        given = data or DataLoader(Sequences(), batch_size=8)
        getattr(trainer, entry)(module or Model(), given, ckpt_path=ckpt_path)

    return fit


TP2 = {"tensor_parallel_size": 2}
LAUNCH: dict[str, tuple[Callable[[], Any], str]] = {
    "accumulation": (
        _launch(accumulate_grad_batches=4),
        r"accumulate_grad_batches=4 conflicts .*leave it at 1.*batch larger",
    ),
    "scheduled-accumulation": (
        _launch(callbacks=[GradientAccumulationScheduler({9: 3})]),
        r"GradientAccumulationScheduler.*9: 3.* conflicts .*leave the callback out",
    ),
    "stochastic-averaging": (
        _launch(callbacks=[StochasticWeightAveraging(1e-2)]),
        r"^StochasticWeightAveraging averages weights in a copy .*leave the callback out",
    ),
    "averaging": (
        _launch(callbacks=[WeightAveraging()]),
        r"^WeightAveraging averages weights in a copy of .*leave the callback out, average",
    ),
    "pruning": (
        _launch(callbacks=[ModelPruning("l1_unstructured", amount=0.5)]),
        r"^ModelPruning multiplies weights by masks .*leave the callback out, and prune",
    ),
    "checkpoint-plugin": (
        _launch(plugins=[AsyncCheckpointIO()]),
        r"plugins=AsyncCheckpointIO would not be used.*leave the plugin out",
    ),
    "anomalies-of-nothing": (
        _launch(
            detect_anomaly=True,
            strategy={"emulate": Cluster(2, {"tp": Link(1e9)}), "tensor_parallel_size": 2},
            devices=1,
        ),
        r"emulate=.* numbers that mean nothing, .*leave detect_anomaly at False",
    ),
    "batch-norm": (_launch(sync_batchnorm=True), r"sync_batchnorm=True .*leave it at False"),
    "manual-optimization": (
        _launch(module=Manual()),
        r"Manual.automatic_optimization=False.*leave automatic_optimization at True",
    ),
    "no-mixin": (
        _launch(module=BoringModel()),
        r"cannot train BoringModel: make it a DualStrandMixin",
    ),
    "no-shape": (
        _launch(module=Shapeless()),
        r"Shapeless has no model_config: set self.model_config in __init__",
    ),
    "heads-over-ranks": (
        _launch(
            module=Model(num_attention_heads=3, hidden_size=18, num_query_groups=1),
            strategy=TP2,
        ),
        r"num_attention_heads=3 is not a multiple of tensor_parallel_size=2.*lower",
    ),
    "groups-over-ranks": (
        _launch(module=Model(num_query_groups=1), strategy=TP2),
        r"num_query_groups=1 is not a multiple of tensor_parallel_size=2.*lower",
    ),
    "ffn-over-ranks": (
        _launch(module=Model(ffn_hidden_size=33), strategy=TP2),
        r"ffn_hidden_size=33 is not a multiple of tensor_parallel_size=2.*lower",
    ),
    "no-experts": (
        _launch(strategy={"expert_parallel_size": 2}),
        r"expert_parallel_size=2, but the model has no experts: leave it at 1, or give num_experts",
    ),
    "experts-over-ranks": (
        _launch(module=Model(num_experts=6), strategy={"expert_parallel_size": 4}, devices=4),
        r"num_experts=6 is not a multiple of expert_parallel_size=4: .*use one of 1, 2, 3, 6",
    ),
    "width-of-experts-over-ranks": (
        _launch(module=Model(num_experts=4, expert_ffn_hidden_size=9), strategy=TP2),
        r"expert_ffn_hidden_size=9 is not a multiple of expert_tensor_parallel_size=2: .*set"
        r" expert_tensor_parallel_size=1 or change",
    ),
    "few-layers": (
        _launch(strategy={"pipeline_parallel_size": 4}, devices=4),
        r"pipeline_parallel_size=4 needs at least 6 layers.*num_layers=2: lower",
    ),
    "stage-without-layers": (
        _launch(strategy={"pipeline_parallel_size": 2, "pipeline_split": [1, 0, 1, 0]}),
        r"pipeline_split=\[1, 0, 1, 0\]: chunk 1, on stage 1, has no layers",
    ),
    "split-of-another-model": (
        _launch(strategy={"pipeline_parallel_size": 2, "pipeline_split": [1, 1, 1, 1]}),
        r"places 4 layers, and the model has num_layers=2",
    ),
    "long-data": (
        _launch(data=Data(sequence_length=32)),
        r"sequence_length=32 is longer than .*max_sequence_length=16: shorten.*or raise",
    ),
    "data-over-ranks": (
        _launch(data=Data(sequence_length=9), strategy=TP2),
        r"sequence_length=9 is not a multiple of tensor_parallel_size=2.*change one",
    ),
    "data-over-context-ranks": (
        _launch(
            data=Data(sequence_length=12), strategy=TP2 | {"context_parallel_size": 2}, devices=4
        ),
        r"sequence_length=12 is not a multiple of 8, 2 x context_parallel_size=2 x"
        r" tensor_parallel_size=2: every rank holds two equal pieces .*change one of them, or pad",
    ),
    "transport-of-gpus": (
        _launch(strategy={"context_parallel_size": 2, "context_transport": "copy_engine"}),
        r"context_transport='copy_engine' works between GPUs, but the device is 'cpu': leave it at",
    ),
    "large-tokenizer": (
        _launch(data=Data(vocab_size=50)),
        r"tokenizer has 50 tokens, but the model has vocab_size=32: set vocab_size=50",
    ),
    **{
        f"no-checkpoint-to-{entry}": (
            _launch(entry=entry, ckpt_path="runs/nowhere.ckpt"),
            r"^checkpoint runs/nowhere.ckpt does not exist: give a folder that a run with",
        )
        for entry in ("fit", "validate", "test", "predict")
    },
    "checkpoint-of-another-kind": (
        _launch(ckpt_path=Path(__file__)),
        r"test_bad_input.py is no checkpoint: give a folder that a run with DHellamStrategy",
    ),
}


@pytest.mark.parametrize("name", LAUNCH)
def test_refused_at_launch_without_any_process(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_process(*_: Any, **__: Any) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr("subprocess.Popen", no_process)
    fit, pattern = LAUNCH[name]
    with pytest.raises(ValueError, match=pattern):
        fit()
    assert not dist.is_initialized()


def test_a_plan_file_of_another_model_is_refused_at_launch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("subprocess.Popen", None)
    file, shapes = tmp_path / "plan.json", {"shapes": {"num_layers": 7}, "device": "another"}
    PlanFile({}, {}, conditions={"sizes": {"tp": 2, "dp": 1}, **shapes}).save(file)
    with pytest.raises(ValueError, match=r"plan.json was made under other conditions") as error:
        _launch(strategy={"plan": str(file)})()
    for words in ("is 2 in the file and 1 here", "is 1 in the file and 2 here", "num_layers is 7"):
        assert words in str(error.value)
    # Which device it will be, this process does not know.
    assert "device" not in str(error.value)


@pytest.mark.parametrize("path", [None, "", "last", "hpc", "registry:model:1"])
def test_a_checkpoint_that_lightning_looks_for_is_not_checked_at_launch(path: str | None) -> None:
    check_ckpt_path(path, SHAPE, 1, training=True, resume_settings="checkpoint")


@pytest.mark.parametrize(
    ("trainer", "fit", "given"),
    [
        ({"default_root_dir": "memory://root"}, {}, "default_root_dir=memory://root: memory://"),
        (
            {},
            {"ckpt_path": "zzz://bucket/a.ckpt"},
            "ckpt_path=zzz://bucket/a.ckpt: zzz:// cannot be",
        ),
    ],
)
def test_places_that_are_not_on_this_machine_are_refused_before_training(
    trainer: dict[str, Any], fit: dict[str, Any], given: str, tmp_path: Path
) -> None:
    options = {
        "enable_checkpointing": True,
        "default_root_dir": tmp_path,
        **trainer,
    }
    callbacks = options.pop("callbacks", [])
    with contextlib.chdir(tmp_path):
        with pytest.raises(ValueError, match="a folder that all nodes see") as caught:
            make_trainer({}, callbacks, max_steps=1, **options).fit(Model(), loader({}), **fit)
        assert given in str(caught.value) and "\n" not in str(caught.value)
        assert not list(tmp_path.rglob("memory*"))


def test_a_checkpoint_goes_where_a_url_says_and_into_no_folder_of_its_name(tmp_path: Path) -> None:
    trainer = make_trainer({}, max_steps=1)
    trainer.fit(Model(), loader({}, samples=8))
    with contextlib.chdir(tmp_path):
        with pytest.raises(ValueError, match="zzz:// cannot be used"):
            trainer.save_checkpoint("zzz://ck/a.ckpt")
        assert not list(tmp_path.iterdir())
        trainer.save_checkpoint(f"file://{tmp_path}/b.ckpt")
        assert (tmp_path / "b.ckpt" / "topology.json").exists()


@pytest.mark.parametrize(("devices", "num_nodes"), [(1, 1), (4, 1), (1, 2), (2, 2)])
def test_processes_in_another_number_than_devices_are_refused(devices: int, num_nodes: int) -> None:
    join(1, 2)
    with pytest.raises(
        ValueError,
        match=rf"^the job has 2 processes, at least 2 of them on this node, but devices={devices}"
        rf" x num_nodes={num_nodes} is {devices * num_nodes}: set devices to .* and num_nodes to",
    ):
        make_trainer({}, devices=devices, num_nodes=num_nodes)
    make_trainer({}, devices=2)


def test_other_accelerators_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer({})
    strategy = trainer.strategy
    assert isinstance(strategy, DHellamStrategy)
    strategy.connect(Model())
    strategy.parallel_devices = [torch.device("mps")]
    with pytest.raises(ValueError, match=r"accelerator='mps' does not work.*use 'gpu' or 'cpu'"):
        strategy.check(trainer)


def test_what_is_used_too_early_says_when_it_exists() -> None:
    strategy = DHellamStrategy(timeout=timedelta(seconds=1))
    with pytest.raises(RuntimeError, match="use it in `configure_model` or later"):
        _ = strategy.context
    with pytest.raises(RuntimeError, match="use it after `setup`"):
        _ = strategy.runner


# In the processes, before the first step or at the batch itself


class TwoOptimizers(Model):
    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.parameters(), lr=0.1) for _ in range(2)]


class NoOptimizer(Model):
    def configure_optimizers(self) -> None:
        return None


class Forgetful(Model):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.dim() > 1], lr=0.1)


class Extra(Model):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))


class Sgd(Model):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Lbfgs(Model):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters())


class Samples(Dataset[Any]):
    """The same sample again and again."""

    def __init__(self, sample: Any) -> None:
        self.sample = sample

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        return self.sample


def _tokens(length: int) -> torch.Tensor:
    return torch.zeros(length, dtype=torch.long)


def _emptied(samples: list[Any]) -> dict[str, torch.Tensor]:
    return {"tokens": torch.zeros(0, 8).long(), "labels": torch.zeros(0, 8).long()}


# Module, strategy, sample, options of the Trainer, what the error says.
class TwoLosses(Model):
    """Adds up the losses of two batches."""

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Any:
        return self.batch_loss(batch) + self.batch_loss(batch)


SETUP: dict[str, tuple[type[Model], dict[str, Any], dict[str, Any], str]] = {
    "two-losses": (
        TwoLosses,
        {},
        {},
        r"training_step called batch_loss twice, .*: call it once",
    ),
    "two-optimizers": (
        TwoOptimizers,
        {},
        {},
        r"returned several optimizers: .*exactly one; use its parameter groups",
    ),
    "no-optimizer": (
        NoOptimizer,
        {},
        {},
        r"leaves out 'embedding.word_embeddings.weight': give the optimizer every parameter",
    ),
    "forgotten-parameter": (
        Forgetful,
        {},
        {},
        r"leaves out 'layers.0.input_layernorm.weight': give .*or freeze it",
    ),
    "parameter-outside": (
        Extra,
        {},
        {},
        r"parameter 'scale' is not part of Extra.model.*put it into a layer.*or freeze it",
    ),
    "closure": (
        Lbfgs,
        {},
        {},
        r"returned LBFGS, whose step\(\) computes the loss.*use an optimizer that needs no closure",
    ),
    "sharded-sgd": (
        Sgd,
        {"distributed_optimizer": True},
        {},
        r"distributed_optimizer=True does not work with SGD.*torch.optim.AdamW.*leave",
    ),
    "sharded-bf16-true": (
        Model,
        {"distributed_optimizer": True},
        {"precision": "bf16-true"},
        r"distributed_optimizer=True .*precision='bf16-true'.*'bf16-mixed' or '16-mixed'",
    ),
}
BATCHES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no-labels": (
        {"tokens": _tokens(8)},
        {},
        r"yields a mapping with \['tokens'\], without \['labels'\]: yield a mapping",
    ),
    "hugging-face-names": (
        {"input_ids": _tokens(8), "labels": _tokens(8), "loss_mask": _tokens(8).float()},
        {},
        "the batch has input_ids and loss_mask, and with Hugging Face's labels",
    ),
    "unknown-names": (
        {"ids": _tokens(8), "labels": _tokens(8)},
        {},
        r"without \['tokens'\]: yield a mapping with `tokens`",
    ),
    "tuple": ((_tokens(8), _tokens(8)), {}, r"yields a list, without \['tokens', 'labels'\]"),
    "shapes": (
        {"tokens": _tokens(8), "labels": _tokens(7)},
        {},
        r"shapes \{'tokens': \(8, 8\), 'labels': \(8, 7\)\}: all must be \[B, S\]",
    ),
    "shape-of-the-mask": (
        {"tokens": _tokens(8), "labels": _tokens(8), "loss_mask": torch.ones(7)},
        {},
        r"'labels': \(8, 8\), 'loss_mask': \(8, 7\)\}: all must be \[B, S\]",
    ),
    "floating-tokens": (
        {"tokens": _tokens(8).float(), "labels": _tokens(8)},
        {},
        r"the batch's tokens have dtype torch.float32: .*yield torch.int64 or torch.int32",
    ),
    "floating-labels": (
        {"tokens": _tokens(8), "labels": _tokens(8).float()},
        {},
        r"the batch's labels have dtype torch.float32: .*yield torch.int64 or torch.int32",
    ),
    "no-tensors": (
        {"tokens": _tokens(8), "labels": "text"},
        {},
        r"the batch's labels are of type list: yield tensors \[B, S\]",
    ),
    "flat": (
        {"tokens": torch.tensor(1), "labels": torch.tensor(1)},
        {},
        r"shapes .*all must be \[B, S\]",
    ),
    "long": (
        {"tokens": _tokens(24), "labels": _tokens(24)},
        {},
        r"sequence_length=24 is longer than .*max_sequence_length=16: shorten",
    ),
    "tokens-too-high": (
        {"tokens": _tokens(8) + 32, "labels": _tokens(8)},
        {},
        r"the batch's tokens hold 32, but the model has vocab_size=32: ids must be from 0 to 31$",
    ),
    "tokens-negative": (
        {"tokens": _tokens(8) - 100, "labels": _tokens(8)},
        {},
        r"the batch's tokens hold -100, .* ids must be from 0 to 31$",
    ),
    "labels-negative": (
        {"tokens": _tokens(8), "labels": _tokens(8) - 1},
        {},
        r"the batch's labels hold -1, .*from 0 to 31, or -100 for what does not count",
    ),
    "positions": (
        {"tokens": _tokens(8), "labels": _tokens(8), "position_ids": _tokens(8) + 3},
        {},
        r"the batch has position_ids that begin a sample with 3: a sample begins with a document,"
        r" and a document at 0$",
    ),
    "documents": (
        {"tokens": _tokens(8), "labels": _tokens(8), "cu_seqlens": torch.tensor([0, 9])},
        {},
        r"the batch has cu_seqlens .*: they begin at 0 and end at the number of tokens",
    ),
    "mask": (
        {"tokens": _tokens(8), "labels": _tokens(8), "attention_mask": torch.ones(8, 8).long()},
        {},
        r"the batch has attention_mask, which masks what causal attention within documents sees",
    ),
    "empty": ({}, {"collate_fn": _emptied}, r"the batch has no samples: use drop_last=True"),
}


def _refusal(
    module: LightningModule,
    strategy: dict[str, Any],
    data: DataLoader[Any],
    options: dict[str, Any],
    **fit: Any,
) -> tuple[str, int]:
    """The message, and how many steps were taken before it."""
    losses = Losses()
    trainer: Trainer = make_trainer(strategy, [losses], max_steps=1, **options)
    try:
        trainer.fit(module, data, **fit)
    except ValueError as error:
        return str(error), len(losses.values)
    return "no error", len(losses.values)


def _refusals(rank: int) -> dict[str, tuple[str, int]]:
    join(rank, 1)
    messages = {}
    for name, (module, strategy, options, _) in SETUP.items():
        data = DataLoader(Sequences(8), batch_size=8)
        messages[name] = _refusal(module(), strategy, data, options)
    for name, (sample, loading, _) in BATCHES.items():
        loader: DataLoader[Any] = DataLoader(Samples(sample), batch_size=8, **loading)
        messages[name] = _refusal(Model(), {}, loader, {})
    loader = DataLoader(Sequences(8), batch_size=8)
    messages["checkpoint"] = _refusal(Model(), {}, loader, {}, ckpt_path=Path(__file__))
    nowhere = Path(__file__).with_suffix(".ckpt")
    messages["no-checkpoint"] = _refusal(Model(), {}, loader, {}, ckpt_path=nowhere)
    return messages


@pytest.fixture(scope="module")
def messages() -> dict[str, tuple[str, int]]:
    (found,) = run_ranks(1, _refusals)
    return found


PATTERNS = {
    **{name: case[-1] for name, case in SETUP.items()},
    **{name: case[-1] for name, case in BATCHES.items()},
    "checkpoint": r"test_bad_input.py is no checkpoint: give a folder that a run",
    "no-checkpoint": r"test_bad_input.ckpt does not exist: give a folder that a run",
}


@pytest.mark.parametrize("name", PATTERNS)
def test_refused_before_the_first_step(messages: dict[str, tuple[str, int]], name: str) -> None:
    message, steps = messages[name]
    assert re.search(PATTERNS[name], message), message
    assert steps == 0


def _odd_sequences(rank: int) -> tuple[str, int]:
    join(rank, 2)
    data = DataLoader(Sequences(8, length=9), batch_size=8)
    return _refusal(Model(), TP2, data, {})


def test_a_sequence_that_does_not_divide_is_refused_on_every_rank() -> None:
    for message, steps in run_ranks(2, _odd_sequences):
        assert re.search(r"sequence_length=9 is not a multiple of tensor_parallel_size=2", message)
        assert steps == 0
