"""What was saved with any parallel sizes goes on with any other: weights, masters, moments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_dhellam.checkpoint import content
from lightning_dhellam.checkpoint.stepped import values_of
from lightning_dhellam.models import ModelConfig
from lightning_dhellam.runner import Runner
from tests.checkpoint.first_format import whole_tensors
from tests.ranks import run_ranks
from tests.strategy.runs import LENGTH, SHAPE

STOP, MORE = 2, 5
BATCH = 4
"""Samples of a step: two micro-batches, or one for each of two ranks with samples of their own."""
FROZEN = "layers.1.self_attention.linear_proj.weight"
EXPERTS = replace(
    SHAPE,
    num_layers=3,
    vocab_size=21,  # padded to 24 rows, and to 32 where two ranks share them
    num_experts=4,
    experts_per_token=2,
    expert_ffn_hidden_size=24,
    shared_expert_ffn_hidden_size=16,
    moe_layer_freq=(0, 1, 1),
)
TIED = replace(SHAPE, num_layers=3, vocab_size=21, tie_embeddings=True)
SIZES: dict[str, dict[str, Any]] = {
    "tp2": {"tensor_parallel_size": 2},
    "tp2-ep2-whole": {
        "tensor_parallel_size": 2,
        "expert_parallel_size": 2,
        "expert_tensor_parallel_size": 1,
    },
    "pp2": {"pipeline_parallel_size": 2, "pipeline_split": [0, 1, 1, 1]},
    "pp2-1f1b": {"pipeline_parallel_size": 2, "schedule": "1f1b"},
    "dp2": {"bucket_size": 700},
    "cp2": {"context_parallel_size": 2},
    "ep2-dp2": {"expert_parallel_size": 2},
}
ALONE: dict[str, dict[str, Any]] = {"alone": {}}
HALF = {"precision": "bf16-mixed"}


def _batch(step: int, runner: Runner) -> dict[str, Tensor]:
    """This rank's share of a step's global batch."""
    generator = torch.Generator().manual_seed(step)
    size = BATCH, LENGTH + 1
    tokens = torch.randint(21, size, generator=generator).sort().values
    topology = runner.context.topology
    own = tokens.chunk(topology.dp_size)[topology.dp_rank]
    return {"tokens": own[:, :-1], "labels": own[:, 1:]}


def _optimizer(runner: Runner) -> torch.optim.Optimizer:
    """AdamW with two groups, of which one has no decay; a parameter is frozen."""
    for name, parameter in runner.model.named_parameters():
        if name == FROZEN:
            parameter.requires_grad_(False)
    trained = [p for p in runner.model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.01)


Job = tuple[Path | None, Path, int]
"""What is loaded, if anything, where it is saved, and how many steps there are."""


def _runs(config: ModelConfig, sizes: dict[str, Any], jobs: Sequence[Job]) -> list[list[float]]:
    """Losses of the steps of each job. It saves before step `STOP`."""
    found = []
    with Runner.create(config, "cpu", micro_batch_size=2, **sizes) as runner:
        optimizer = runner.optimizer(_optimizer(runner))
        for load, save, steps in jobs:
            losses, first = [], 0
            if load is not None:
                assert runner.load(load) == {"noted": STOP}
                first = runner.steps
                assert first == STOP
            for step in range(first, first + steps):
                if step == STOP:
                    runner.save(save, {"noted": STOP})
                loss = runner.train(_batch(step, runner))
                optimizer.clip_by_norm(1.0)
                optimizer.step()
                losses.append(runner.mean(loss))
            if first and not steps:
                runner.save(save, {"noted": STOP})
            found.append([loss.item() for loss in losses])
    return found


def _goes_on(saved: str, name: str) -> bool:
    """Whether a pair is trained further: it costs, and that states are the same is known of all."""
    names = [*ALONE, *SIZES]
    return name in (saved, names[names.index(saved) - 1], names[names.index(saved) - 4])


def _loads(root: Path, name: str) -> dict[str, Job]:
    """What is to be loaded with some sizes, by what it is called."""
    return {
        f"{saved}-{name}": (
            root / f"{saved}.ckpt",
            root / f"{saved}-{name}.ckpt",
            MORE if _goes_on(saved, name) else 0,
        )
        for saved in (*ALONE, *SIZES)
    }


def _matrix(rank: int, root: Path) -> dict[str, list[float]]:
    """Two ranks save with each sizes, and load with each what was saved with any."""
    found: dict[str, list[float]] = {}
    for name, sizes in SIZES.items():
        (found[name],) = _runs(EXPERTS, sizes, [(None, root / f"{name}.ckpt", STOP + MORE)])
    for name, sizes in SIZES.items():
        jobs = _loads(root, name)
        found |= zip(jobs, _runs(EXPERTS, sizes, [*jobs.values()]), strict=True)
    half = root / "half.ckpt"
    (found["half"],) = _runs(TIED, {**SIZES["dp2"], **HALF}, [(None, half, STOP + MORE)])
    for name in ("tp2", "pp2", "pp2-1f1b", "dp2"):
        job = half, root / f"half-{name}.ckpt", MORE
        (found[f"half-{name}"],) = _runs(TIED, {**SIZES[name], **HALF}, [job])
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resharding")


@pytest.fixture(scope="module")
def losses(root: Path) -> dict[str, list[float]]:
    """Of the runs of two ranks, and of those of one process."""
    (straight,) = _runs(EXPERTS, {}, [(None, root / "alone.ckpt", STOP + MORE)])
    of_ranks = run_ranks(2, _matrix, root)
    assert of_ranks[0] == of_ranks[1]
    jobs = _loads(root, "alone")
    alone = zip(jobs, _runs(EXPERTS, {}, [*jobs.values()]), strict=True)
    half = root / "half.ckpt", root / "half-alone.ckpt", MORE
    (of_half,) = _runs(TIED, HALF, [half])
    return {"alone": straight, **of_ranks[0], **dict(alone), "half-alone": of_half}


@cache
def _whole(path: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, without padding."""
    return {
        name: value[:21] if "word_embeddings" in name or "output_layer" in name else value
        for name, value in whole_tensors(path).items()
    }


def _check_same(first: Path, second: Path) -> None:
    """All that the second was loaded from the first is the same to the bit."""
    a, b = _whole(first), _whole(second)
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different
    a, b = (content.read(path / "rest.pt")["optimizer"] for path in (first, second))
    values = values_of(a)
    assert values == values_of(b) and len(values) > 15
    assert len(a["alike"]) == len(b["alike"]) == 1  # all count the same steps
    assert [set(group["names"]) for group in a["groups"]] == [
        set(group["names"]) for group in b["groups"]
    ]


@pytest.mark.parametrize("saved", [*SIZES, *ALONE])
@pytest.mark.parametrize("name", [*SIZES, *ALONE])
def test_any_sizes_go_on_with_any_other(
    losses: dict[str, list[float]], root: Path, saved: str, name: str
) -> None:
    _check_same(root / f"{saved}.ckpt", root / f"{saved}-{name}.ckpt")
    if not _goes_on(saved, name):
        return
    straight, resumed = losses[saved][STOP:], losses[f"{saved}-{name}"]
    assert len(set(straight)) == len(resumed) == MORE
    if saved == name:
        assert resumed == straight
    else:
        assert resumed == pytest.approx(straight, rel=2e-5)


@pytest.mark.parametrize("name", ["tp2", "pp2", "pp2-1f1b", "dp2", "alone"])
def test_master_weights_and_tied_embeddings_go_on(
    losses: dict[str, list[float]], root: Path, name: str
) -> None:
    _check_same(root / "half.ckpt", root / f"half-{name}.ckpt")
    names = [*_whole(root / "half.ckpt")]
    assert any("master_weight/" in name for name in names)
    unknown = "output_layer.weight", f"exp_avg/model.{FROZEN}"
    assert not any(part in name for name in names for part in unknown)
    straight, resumed = losses["half"][STOP:], losses[f"half-{name}"]
    assert resumed == (straight if name == "dp2" else pytest.approx(straight, rel=5e-3))
