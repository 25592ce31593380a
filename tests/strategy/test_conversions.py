"""Checkpoints of ours under Lightning's own strategies, and theirs under ours: weights, state."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_dhellam.checkpoint.order import in_order
from lightning_dhellam.commands.main import main
from lightning_dhellam.models import CausalLM, LoRA, add_lora
from lightning_dhellam.module import LanguageModel
from lightning_dhellam.parallel import ParallelContext
from tests.checkpoint.test_resharding import EXPERTS
from tests.ranks import run_ranks
from tests.strategy.runs import OF_TEXT, SHAPE, Losses, Model, Sequences, join, loader, make_trainer

STOP, STEPS = 2, 4
FROZEN = "layers.1.self_attention.linear_proj.weight"
DENSE: dict[str, dict[str, Any]] = {
    "tp2": {"tensor_parallel_size": 2},
    "pp2": {"pipeline_parallel_size": 2, "schedule": "1f1b"},
    "dp2": {"bucket_size": 700, "micro_batch_size": 2},
}
MOE: dict[str, dict[str, Any]] = {
    "ep2": {"expert_parallel_size": 2},
    "pp2-moe": {"pipeline_parallel_size": 2, "pipeline_split": [0, 1, 1, 1]},
    "tp2-moe": {"tensor_parallel_size": 2, "expert_tensor_parallel_size": 1},
}
OURS = {**DENSE, **MOE}
SMALL = {"vocab_size": 21}  # padded to 24 rows, and to 32 where two ranks share them


class Grouped(Model):
    """Two groups of parameters, one of them without decay; one parameter is frozen."""

    def __init__(self, experts: bool = False) -> None:
        super().__init__(**SMALL)
        if experts:
            self.model_config = EXPERTS

    def configure_model(self) -> None:
        super().configure_model()
        for name, parameter in self.model.named_parameters():
            if name == FROZEN:
                parameter.requires_grad_(False)

    def configure_optimizers(self) -> Any:
        groups: list[dict[str, Any]] = [
            {"params": [p for p in self.parameters() if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in self.parameters() if p.dim() == 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=0.01)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {
                "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5),
                "interval": "step",
            },
        }


class Small(Sequences):
    """Tokens of the small vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = self.tokens % 21


def _fit(
    strategy: dict[str, Any] | str,
    steps: int,
    *,
    experts: bool = False,
    resume: Path | None = None,
    save: Path | None = None,
) -> list[float]:
    """Losses of the steps of the small vocabulary's batches."""
    losses = Losses()
    trainer = make_trainer(strategy, [losses], max_steps=steps, use_distributed_sampler=False)
    batches = loader(strategy)
    batches.dataset.tokens = Small().tokens
    trainer.fit(Grouped(experts), batches, ckpt_path=resume)
    if save is not None:
        trainer.save_checkpoint(save)
    return losses.values


def _on_rank(rank: int, root: Path) -> dict[str, list[float]]:
    join(rank, 2)
    found = {}
    for name, sizes in OURS.items():
        _fit(sizes, STOP, experts=name in MOE, save=root / f"{name}.ckpt")
    found["ddp"] = _fit("ddp", STEPS)
    _fit("ddp", STOP, save=root / "ddp.file")
    for name, sizes in OURS.items():
        if rank == 0:
            words = ["convert", f"{root}/{name}.ckpt", f"{root}/{name}.file", "--to=lightning"]
            assert main(words) == 0
        torch.distributed.barrier()
        if name in DENSE:
            found[f"{name} under ddp"] = _fit("ddp", STEPS, resume=root / f"{name}.file")
            found[f"ddp under {name}"] = _fit(sizes, STEPS, resume=root / "ddp.file")
        else:
            theirs = root / "auto-moe.file"
            found[f"auto under {name}"] = _fit(sizes, STEPS, experts=True, resume=theirs)
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("conversions")


@pytest.fixture(scope="module")
def losses(root: Path) -> dict[str, list[float]]:
    """Of all steps under a strategy, and of those that came after a checkpoint of another one."""
    found = {"auto": _fit("auto", STEPS), "auto-moe": _fit("auto", STEPS, experts=True)}
    _fit("auto", STOP, save=root / "auto.file")
    _fit("auto", STOP, experts=True, save=root / "auto-moe.file")
    found |= run_ranks(2, _on_rank, root)[0]
    for name in OURS:
        resume = root / f"{name}.file"
        found[f"{name} under auto"] = _fit("auto", STEPS, experts=name in MOE, resume=resume)
    return found


@pytest.mark.parametrize("name", OURS)
def test_ours_go_on_elsewhere(losses: dict[str, list[float]], root: Path, name: str) -> None:
    straight = losses["auto-moe" if name in MOE else "auto"][STOP:]
    assert len(set(straight)) == STEPS - STOP
    assert losses[f"{name} under auto"] == pytest.approx(straight, rel=2e-5)
    if name in DENSE:
        assert losses[f"{name} under ddp"] == pytest.approx(losses["ddp"][STOP:], rel=2e-5)


@pytest.mark.parametrize("name", OURS)
def test_theirs_go_on_here(losses: dict[str, list[float]], name: str) -> None:
    theirs = "auto" if name in MOE else "ddp"
    straight = losses["auto-moe" if name in MOE else "ddp"][STOP:]
    assert losses[f"{theirs} under {name}"] == pytest.approx(straight, rel=2e-5)


@pytest.mark.parametrize("name", OURS)
def test_numbers_are_those_of_the_same_parameters(
    losses: dict[str, list[float]], root: Path, name: str
) -> None:
    """Weights by name, state by number, to rounding those that the other strategy has saved."""
    assert losses
    ours = torch.load(root / f"{name}.file")
    theirs = torch.load(root / ("auto-moe.file" if name in MOE else "auto.file"))
    assert ours["state_dict"].keys() == theirs["state_dict"].keys()
    for key, value in theirs["state_dict"].items():
        if value is not None:
            torch.testing.assert_close(ours["state_dict"][key], value, rtol=1e-3, atol=1e-4)
    (mine,), (yours,) = ours["optimizer_states"], theirs["optimizer_states"]
    assert [g["params"] for g in mine["param_groups"]] == [
        g["params"] for g in yours["param_groups"]
    ]
    assert [g["weight_decay"] for g in mine["param_groups"]] == [0.1, 0.0]
    assert mine["state"].keys() == yours["state"].keys()
    for number, kinds in yours["state"].items():
        assert mine["state"][number].keys() == kinds.keys()
        for kind in ("step", "exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(
                mine["state"][number][kind], kinds[kind], rtol=1e-3, atol=1e-5
            )
    assert ours["lr_schedulers"][0]["last_epoch"] == theirs["lr_schedulers"][0]["last_epoch"]


def test_master_weights_become_the_weights(tmp_path: Path) -> None:
    half: dict[str, Any] = {"precision": "bf16-mixed", "max_steps": STOP}
    ours, theirs, back = (tmp_path / name for name in ("ours", "file", "back"))
    trainer = make_trainer({}, **half)
    trainer.fit(Model(), loader({}))
    trainer.save_checkpoint(ours)
    assert main(["convert", str(ours), str(theirs), "--to=lightning"]) == 0
    weights = torch.load(theirs)["state_dict"]
    whole = [value for value in weights.values() if value is not None]
    assert all(value.dtype is torch.float32 for value in whole)
    assert any(not torch.equal(value, value.bfloat16().float()) for value in whole)
    for strategy in ("auto", {}):
        trainer = make_trainer(strategy, **{**half, "max_steps": STOP + (strategy == "auto")})
        trainer.fit(Model(), loader(strategy), ckpt_path=theirs)
    trainer.save_checkpoint(back)  # no step was done since
    assert main(["convert", str(back), f"{back}.file", "--to=lightning"]) == 0
    again = torch.load(f"{back}.file")["state_dict"]
    assert all(torch.equal(again[n], value) for n, value in weights.items() if value is not None)


def test_a_module_of_a_checkpoint(losses: dict[str, list[float]], root: Path) -> None:
    """Whole, in one process, of any sizes; a Trainer of any strategy takes it further."""
    assert losses
    expected = torch.load(root / "pp2-moe.file")["state_dict"]
    module = Grouped.load_from_checkpoint(root / "pp2-moe.ckpt", experts=True)
    assert isinstance(module, Grouped)
    for name, value in module.state_dict().items():
        assert value is None or torch.equal(value, expected[name])
    batch: Any = DataLoader(Small(), 4)
    found = []
    for strategy in ("auto", {"micro_batch_size": 2}):
        trainer = make_trainer(strategy)
        (metrics,) = trainer.validate(module, batch, verbose=False)
        found.append(metrics["val_loss"])
        assert all(
            value is None or torch.equal(value, expected[name])
            for name, value in module.state_dict().items()
        )
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    again = Grouped.load_from_checkpoint(root / "auto-moe.file", experts=True, map_location="cpu")
    assert again.model.config == EXPERTS
    with pytest.raises(ValueError, match=r"hparams_file='a.yaml' cannot be used with a folder"):
        Grouped.load_from_checkpoint(root / "pp2-moe.ckpt", hparams_file="a.yaml")


def test_arguments_and_adapters_come_from_the_checkpoint(tmp_path: Path) -> None:
    module = LanguageModel(overrides=OF_TEXT, lora=LoRA(rank=2), learning_rate=0.5)
    trainer = make_trainer({}, max_steps=1)
    trainer.fit(module, loader({}))
    trainer.save_checkpoint(tmp_path / "ours")
    again = LanguageModel.load_from_checkpoint(tmp_path / "ours", learning_rate=0.25)
    assert (again.hparams["learning_rate"], again.hparams["overrides"]) == (0.25, OF_TEXT)
    assert again.state_dict().keys() == module.state_dict().keys()
    assert any("lora" in name or "adapter" in name for name in again.state_dict())
    # Under another strategy too, of which Lightning reads the file with `weights_only`.
    assert main(["convert", str(tmp_path / "ours"), f"{tmp_path}/file", "--to=lightning"]) == 0
    trainer = make_trainer("auto", max_steps=2)
    trainer.fit(
        LanguageModel(overrides=OF_TEXT, lora=LoRA(rank=2)),
        loader({}),
        ckpt_path=f"{tmp_path}/file",
    )
    assert trainer.global_step == 2


@pytest.mark.parametrize("config", [EXPERTS, replace(SHAPE, num_layers=11)])
def test_names_of_ranks_get_the_order_of_the_model(config: Any) -> None:
    model = CausalLM(config, ParallelContext.single(torch.device("cpu")), torch.float32)
    if config is not EXPERTS:
        add_lora(model, LoRA(rank=2), 1)
    names = [f"model.{name}" for name, _ in model.named_parameters()]
    assert in_order(names) == names

    # As two stages have them, each with half of the experts on either of its ranks.
    def is_on(name: str, stage: int, rank: int) -> bool:
        _, _, number = name.partition("layers.")
        expert = name.partition("local_experts.")[2]
        on_stage = int(number.partition(".")[0]) % 2 == stage if number else stage == 0
        return on_stage and (not expert or int(expert[0]) // 2 == rank)

    places = [(stage, rank) for stage in range(2) for rank in range(2)]
    of_ranks = [[name for name in names if is_on(name, *place)] for place in places]
    assert all(of_ranks)
    assert in_order([*chain.from_iterable(of_ranks)]) == names


def test_what_cannot_go_on_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    trainer = make_trainer({}, max_steps=1)
    trainer.fit(Model(), loader({}))
    trainer.save_checkpoint(ours, weights_only=True)
    assert main(["convert", str(ours), str(theirs), "--to=lightning", "--dtype=bfloat16"]) == 0
    weights: dict[str, Tensor] = torch.load(theirs)["state_dict"]
    assert {v.dtype for v in weights.values() if v is not None} == {torch.bfloat16}
    trainer = make_trainer({}, max_steps=2)
    with pytest.raises(ValueError, match="theirs holds weights only: training cannot go on"):
        trainer.fit(Model(), loader({}), ckpt_path=theirs)
    assert main(["convert", str(ours), str(theirs), "--to=lightning"]) == 2
    assert "theirs is there already" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"holds a model with vocab_size=32, this run has"):
        trainer.validate(Model(vocab_size=21), loader({}), ckpt_path=theirs)
    content = torch.load(theirs)
    content["optimizer_states"] = [{"state": {}, "param_groups": [{"params": [0, 1], "lr": 0.1}]}]
    content["lr_schedulers"] = []
    torch.save(content, tmp_path / "few")
    with pytest.raises(ValueError, match=r"has parameter groups of \[2\] parameters, this run's"):
        trainer.fit(Model(), loader({}), ckpt_path=tmp_path / "few")
    theirs.write_bytes(theirs.read_bytes()[:2000])
    with pytest.raises(ValueError, match="theirs is damaged, or cut off at 2000 bytes"):
        trainer.fit(Model(), loader({}), ckpt_path=theirs)
