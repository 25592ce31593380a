"""Four and eight GPUs compute what one does, by all parallel sizes, plans and schedules.

`DEVICE=cpu` rehearses this on processes of the CPU, by gloo.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_dhellam.kernels.deterministic import prepare
from lightning_dhellam.models import ModelConfig, export_huggingface, import_huggingface
from lightning_dhellam.pipeline.schedules import Placement, playable, scheme_of
from lightning_dhellam.plan import BUILDERS
from lightning_dhellam.runner import Runner
from tests.engine.harness import batch_of, differing
from tests.gpu.test_several import needs
from tests.models.llama import SMALL, hugging_face_llama, relative_error
from tests.models.mixtures import MIXTURES, hugging_face_mixture
from tests.plan.graphs import random_builder
from tests.ranks import run_ranks
from tests.strategy.lost_rank import lose, torchrun

KIND = os.environ.get("DEVICE", "cuda")
pytestmark = [pytest.mark.gpu] * (KIND == "cuda")
BACKEND = {"cuda": "nccl", "cpu": "gloo"}[KIND]
SAMPLES, LENGTH = 8, 64
RANDOM_PLANS = 5
# Heads of 16, which every attention kernel takes, and 4 groups of them, for as many ranks.
HEADS: dict[str, Any] = {"hidden_size": 128, "num_attention_heads": 8, "num_query_groups": 8}
DENSE = replace(SMALL, num_layers=8, ffn_hidden_size=96, **HEADS)
EXPERTS = replace(MIXTURES["mixtral"], num_layers=4, num_experts=8, head_dim=16, **HEADS)


@dataclass(frozen=True)
class Case:
    """Parallel sizes, and what is trained with them.

    Attributes:
        sizes: of parallelism.
        config: of the model.
        options: others of the runner.
        schedules: of a pipeline that change nothing, beside its own.
    """

    sizes: dict[str, int]
    config: ModelConfig = DENSE
    options: dict[str, Any] = field(default_factory=dict)
    schedules: tuple[str, ...] = ()


def _sized(**sizes: int) -> dict[str, int]:
    return {f"{name}_parallel_size": size for name, size in sizes.items()}


FOLDED = tuple(playable(Placement.folded(4)))
CASES: dict[int, dict[str, Case]] = {
    4: {
        "cp4": Case(_sized(context=4)),
        "cp4-gathered": Case(_sized(context=4), options={"context_exchange": "all_gather"}),
        "tp2-cp2": Case(_sized(tensor=2, context=2)),
        "ep4": Case(_sized(expert=4), EXPERTS),
        "ep2-pp2": Case(_sized(expert=2, pipeline=2), EXPERTS),
        "pp4": Case(_sized(pipeline=4), schedules=FOLDED),
        "pp4-1f1b": Case(_sized(pipeline=4), options={"schedule": "1f1b"}),
        "pp4-interleaved": Case(_sized(pipeline=4), options={"schedule": "interleaved-1f1b"}),
    },
    8: {
        "ep8": Case(_sized(expert=8), EXPERTS),
        "ep4-pp2": Case(_sized(expert=4, pipeline=2), EXPERTS),
        "tp2-pp2-dp2": Case(_sized(tensor=2, pipeline=2), schedules=("zb-v", "dualpipe-v")),
        "tp2-cp4": Case(_sized(tensor=2, context=4)),
        "tp8": Case(_sized(tensor=8)),
        "tp2-pp4": Case(_sized(tensor=2, pipeline=4), schedules=FOLDED),
    },
}
ALONE = {"dense": Case({}), "experts": Case({}, EXPERTS)}
Outcome = tuple[Tensor, dict[str, Tensor], list[str]]
"""Loss, gradients, and the plans and schedules that have changed a bit of them on this rank."""


def _needs(world: int) -> None:
    if KIND == "cuda":
        needs(world)


def _device(rank: int) -> torch.device:
    return torch.device(KIND, rank) if KIND == "cuda" else torch.device(KIND)


def _started(case: Case, rank: int) -> Runner:
    """With Hugging Face's weights, so small that rounding is not blown up by layers."""
    config = case.config
    runner = Runner.create(config, _device(rank), micro_batch_size=1, **case.sizes, **case.options)
    made = hugging_face_mixture if config.num_experts else hugging_face_llama
    theirs = made(config).state_dict()
    weights = {n: x * 0.2 if x.dim() > 1 else x for n, x in theirs.items()}
    import_huggingface(runner.model, weights)
    # Each rank is to have whole gradients.
    optimizer = torch.optim.SGD(runner.model.parameters(), lr=0.1)
    runner.optimizer(optimizer, distributed_optimizer=False)
    return runner


def _batch(runner: Runner, number: int = 0) -> dict[str, Tensor]:
    """This data-parallel rank's share of a batch."""
    topology = runner.context.topology
    whole = batch_of(runner.model.config, SAMPLES, LENGTH)
    own = {n: x.chunk(topology.dp_size)[topology.dp_rank] for n, x in whole.items()}
    return {name: x.roll(number, 1).to(runner.device) for name, x in own.items()}


def _outcome(case: Case, rank: int) -> Outcome:
    with _started(case, rank) as runner:
        batch = _batch(runner)

        def trained() -> tuple[Tensor, dict[str, Tensor]]:
            loss = runner.train(batch, step=0)
            gradients = {n: p.main_grad.clone() for n, p in runner.model.named_parameters()}
            return loss.clone(), gradients

        expected = trained()
        whole = export_huggingface(runner.model, expected[1], in_memory=True)
        changing = []
        builders = BUILDERS | {f"random-{s}": random_builder(s) for s in range(RANDOM_PLANS)}
        for name, builder in builders.items() if case.sizes else ():
            runner.use_plan(name, builder)
            changing += [name] * bool(differing(trained(), expected))
        for name in case.schedules:
            runner.use_schedule(name, scheme_of(name, runner.engine.stage.count))
            changing += [name] * bool(differing(trained(), expected))
        loss = runner.mean(expected[0]).cpu()
        return loss, {name: gradient.cpu() for name, gradient in whole.items()}, changing


def _outcomes(rank: int, cases: dict[str, Case]) -> dict[str, Outcome]:
    prepare()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.use_deterministic_algorithms(True)
    return {name: _outcome(case, rank) for name, case in cases.items()}


@pytest.fixture(scope="module")
def alone() -> dict[str, Outcome]:
    """What one device computes."""
    (found,) = run_ranks(1, _outcomes, ALONE, backend=BACKEND)
    return dict(found)


def check_case(case: Case, outcomes: list[Outcome], expected: Outcome) -> None:
    """Every rank has the loss and the gradients of one device, whatever the plan and schedule."""
    for rank, (loss, gradients, changing) in enumerate(outcomes):
        assert not changing, (rank, changing)
        assert abs(loss - expected[0]) <= 2e-6 * expected[0], rank
        assert gradients.keys() == expected[1].keys()
        errors = {n: relative_error(gradients[n], x) for n, x in expected[1].items()}
        assert max(errors.values()) <= 1e-5, (rank, errors)


@pytest.fixture(scope="module")
def shared() -> dict[int, list[dict[str, Outcome]]]:
    """What so many devices compute in all cases, once it was asked for."""
    return {}


@pytest.mark.parametrize(("world", "name"), [(w, n) for w, cases in CASES.items() for n in cases])
def test_losses_and_gradients_are_those_of_one(
    world: int,
    name: str,
    alone: dict[str, Outcome],
    shared: dict[int, list[dict[str, Outcome]]],
) -> None:
    _needs(world)
    if world not in shared:
        shared[world] = run_ranks(world, _outcomes, CASES[world], backend=BACKEND, timeout=400)
    case = CASES[world][name]
    expected = alone["experts" if case.config.num_experts else "dense"]
    check_case(case, [outcomes[name] for outcomes in shared[world]], expected)


SAVED = _sized(tensor=2, pipeline=2)
"""With two replicas on eight."""
LOADED = {
    "tp4": _sized(tensor=4),
    "pp4": _sized(pipeline=4),
    "tp2-cp2": _sized(tensor=2, context=2),
}


def _steps(runner: Runner, first: int, last: int) -> list[float]:
    return [float(_step(runner, _batch(runner, number))) for number in range(first, last)]


def _step(runner: Runner, batch: dict[str, Tensor]) -> Tensor:
    loss = runner.mean(runner.train(batch))
    runner.stepped.step()
    return loss


def _adam(runner: Runner) -> Runner:
    runner.optimizer(torch.optim.AdamW(runner.model.parameters(), lr=1e-3))
    return runner


def _saved(rank: int, folder: Path) -> list[float]:
    prepare()
    with _adam(_started(Case(SAVED), rank)) as runner:
        _steps(runner, 0, 2)
        runner.save(folder)
        return _steps(runner, 2, 5)


def _loaded(rank: int, folder: Path) -> dict[str, list[float]]:
    prepare()
    found = {}
    for name, sizes in LOADED.items():
        with _adam(_started(Case(sizes), rank)) as runner:
            runner.load(folder)
            found[name] = _steps(runner, 2, 5)
    return found


def test_what_eight_have_saved_goes_on_on_four(tmp_path: Path) -> None:
    _needs(8)
    folder = tmp_path / "of-eight.ckpt"
    expected, *_ = run_ranks(8, _saved, folder, backend=BACKEND)
    for found in run_ranks(4, _loaded, folder, backend=BACKEND):
        for name, losses in found.items():
            assert losses == pytest.approx(expected, rel=1e-5), name


@pytest.mark.parametrize("launcher", ["lightning", "torchrun"])
def test_a_job_of_four_ends_when_a_rank_is_killed_in_a_step(launcher: str, tmp_path: Path) -> None:
    _needs(4)
    words = torchrun(4) if launcher == "torchrun" else ()
    output, code = lose(3, tmp_path, "gpu" if KIND == "cuda" else "cpu", *words, world=4)
    assert "rank 3 is killed" in output and code != 0
    assert ("Signal 9 (SIGKILL)" if words else "terminated with code -9") in output, output
