"""However many ranks share the experts: loss, gradients and logits are Hugging Face's, fp32.

A model with a shared expert, which none of the families has here, is compared with one process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_dhellam.autosearch.options import Options
from lightning_dhellam.autosearch.profiling import routings_of
from lightning_dhellam.autosearch.session import Session
from lightning_dhellam.engine.lanes import CpuLanes
from lightning_dhellam.models import ModelConfig, export_huggingface, import_huggingface
from lightning_dhellam.parallel.experts import ExpertNames
from lightning_dhellam.plan import Lane
from lightning_dhellam.runner import Runner
from lightning_dhellam.search.measure import Profile
from tests.engine.harness import CPU, batch_of, differing
from tests.models.llama import relative_error, token_losses
from tests.models.mixtures import MIXTURES, hugging_face_mixture
from tests.ranks import run_ranks

SAMPLES, LENGTH = 4, 16


@dataclass(frozen=True)
class Case:
    """A model, and how many ranks share what of it.

    Attributes:
        sizes: of parallelism.
        options: others of the runner.
        family: of the model.
    """

    sizes: dict[str, int]
    options: dict[str, Any] = field(default_factory=dict)
    family: str = "mixtral"

    @property
    def config(self) -> ModelConfig:
        """Of the model; four layers where there are stages."""
        config = MIXTURES[self.family]
        if "pipeline_parallel_size" in self.sizes:
            return replace(config, num_layers=4)
        return config


def _ep(size: int, **others: int) -> dict[str, int]:
    sizes = {f"{name}_parallel_size": other for name, other in others.items()}
    return {"expert_parallel_size": size, **sizes}


CASES: dict[int, dict[str, Case]] = {
    1: {
        "alone": Case(_ep(1)),
        "dense-between": Case(_ep(1), {"plan": "dhellam"}, "qwen3-moe"),
        "two-step": Case(_ep(1), {}, "phi-moe"),
    },
    2: {
        "experts": Case(_ep(2)),
        "dense-between": Case(_ep(2), {"plan": "megatron"}, "qwen3-moe"),
        "two-step": Case(_ep(2), {"plan": "dhellam"}, "phi-moe"),
        "split": Case(_ep(1, tensor=2)),
        "whole-experts-each": Case(_ep(1, tensor=2, expert_tensor=1)),
        "over-tensor-ranks": Case(_ep(2, tensor=2, expert_tensor=1)),
    },
    4: {
        "one-expert-each": Case(_ep(4)),
        "split": Case(_ep(2, tensor=2), {"plan": "megatron"}),
        "whole": Case(_ep(2, tensor=2, expert_tensor=1)),
        "over-all": Case(_ep(4, tensor=2, expert_tensor=1), {"recompute": "none"}),
        "stages": Case(_ep(2, pipeline=2), {"plan": "dhellam"}),
        "replicas": Case(_ep(2), {}, "qwen3-moe"),
        "sequences": Case(_ep(2, context=2)),
    },
}
Outcome = tuple[Tensor, dict[str, Tensor], Tensor, Tensor]
"""Loss, gradients, loss in evaluation of this rank's samples, their logits."""


def _batch(config: ModelConfig) -> dict[str, Tensor]:
    batch = batch_of(config, SAMPLES, LENGTH)
    generator = torch.Generator().manual_seed(2)
    batch["loss_mask"] = torch.rand(SAMPLES, LENGTH, generator=generator)
    return batch


def started(
    case: Case, device: torch.device = CPU, *, config: ModelConfig | None = None, **options: Any
) -> Runner:
    """A runner with Hugging Face's weights and an optimizer that leaves gradients whole.

    Of the model of `config`, if that is not to be the case's own.
    """
    config = config or case.config
    options = {**case.options, **options}
    runner = Runner.create(config, device, micro_batch_size=1, **case.sizes, **options)
    import_huggingface(runner.model, hugging_face_mixture(config).state_dict())
    optimizer = torch.optim.SGD(runner.model.parameters(), lr=0.1)
    runner.optimizer(optimizer, distributed_optimizer=False)
    return runner


def _own(runner: Runner, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    topology = runner.context.topology
    return {n: x.chunk(topology.dp_size)[topology.dp_rank] for n, x in batch.items()}


def gradients_of(runner: Runner) -> dict[str, Tensor]:
    return {name: p.main_grad.clone() for name, p in runner.model.named_parameters()}


def _outcome(case: Case, device: torch.device) -> Outcome:
    with pytest.MonkeyPatch.context() as patch, started(case, device) as runner:
        # As on GPUs, where stages rehearse.
        patch.setattr(CpuLanes, "loads", True)
        batch = _own(runner, _batch(case.config))
        loss = runner.mean(runner.train(batch))
        gradients = export_huggingface(runner.model, gradients_of(runner), in_memory=True)
        return loss.cpu(), gradients, runner.evaluate(batch).cpu(), runner.predict(batch).cpu()


def outcomes_of_rank(rank: int, world: int, kind: str = "cpu") -> dict[str, Outcome]:
    """What each case gives on this rank, on the CPU or on its GPU."""
    device = CPU if kind == "cpu" else torch.device("cuda", rank)
    return {name: _outcome(case, device) for name, case in CASES[world].items()}


@cache
def _expected(config: ModelConfig) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    reference, batch = hugging_face_mixture(config), _batch(config)
    losses = token_losses(reference, batch["tokens"], batch["labels"])
    weights = (batch["labels"] != -100).float() * batch["loss_mask"]
    loss = (losses * weights).sum() / weights.sum()
    loss.backward()
    gradients = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, reference(batch["tokens"]).logits.detach()


def check_outcomes(world: int, of_ranks: Sequence[dict[str, Outcome]]) -> None:
    """Every rank has Hugging Face's loss, gradients and logits, in each case."""
    for name, case in CASES[world].items():
        expected_loss, expected, all_logits = _expected(case.config)
        for rank, outcome in enumerate(of_ranks):
            loss, gradients, _, logits = outcome[name]
            place = f"{name}, rank {rank}"
            assert abs(loss - expected_loss) <= 1e-6 * expected_loss, place
            assert gradients.keys() == expected.keys(), place
            errors = {n: relative_error(gradients[n], expected[n]) for n in expected}
            assert max(errors.values()) <= 1e-5, (place, errors)
            wanted = all_logits.split(len(logits))
            assert min(relative_error(logits, part) for part in wanted) <= 1e-5, place


@pytest.mark.parametrize("world", CASES)
def test_loss_gradients_and_logits_are_hugging_faces(world: int) -> None:
    check_outcomes(world, run_ranks(world, outcomes_of_rank, world))


SHARED = replace(MIXTURES["mixtral"], shared_expert_ffn_hidden_size=12, capacity_factor=4.0)
"""No family of these has a shared expert."""


def _shared(rank: int, folder: Path) -> dict[str, Any]:
    """Gradients of a step by the experts' numbers among all, and what a search found then."""
    options = {"micro_batch_size": 1, "expert_parallel_size": 2 if rank >= 0 else 1}
    with Runner.create(SHARED, CPU, plan="sequential", **options) as runner:
        optimizer = torch.optim.SGD(runner.model.parameters(), lr=0.1)
        runner.optimizer(optimizer, distributed_optimizer=False)
        batch = _own(runner, _batch(SHARED))
        loss = runner.train(batch, step=0)
        names = ExpertNames(runner.model)
        found: dict[str, Any] = {"loss": runner.mean(loss), "gradients": {}}
        plain = loss, gradients_of(runner)
        found["gradients"] = names.all_of(plain[1])
        if rank < 0:
            return found
        session = Session(runner, Options(rounds=1))
        session.begin(batch)
        while session.findings is None:
            with session.step(batch) as stop:
                runner.train(batch, step=1)
                stop()
        session.findings.write(folder / str(rank))
        found["changed"] = differing((runner.train(batch, step=0), gradients_of(runner)), plain)
        rows = [row for plan in runner.engine.plans() for row in plan.issues]
        found["waits"] = sum(row.operator == "counts.wait" for row in rows)
        return found


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Path]:
    folder = tmp_path_factory.mktemp("experts")
    return run_ranks(2, _shared, folder), folder


def test_a_shared_expert_learns_what_it_does_in_one_process(
    shared: tuple[list[dict[str, Any]], Path],
) -> None:
    alone = _shared(-1, shared[1])
    together: dict[str, Tensor] = {}
    for found in shared[0]:
        assert abs(found["loss"] - alone["loss"]) <= 1e-6 * alone["loss"]
        together |= found["gradients"]
    assert together.keys() == alone["gradients"].keys()
    errors = {n: relative_error(together[n], g) for n, g in alone["gradients"].items()}
    assert max(errors.values()) <= 1e-5, errors


def test_a_search_changes_nothing_and_shows_what_the_host_waits_for(
    shared: tuple[list[dict[str, Any]], Path],
) -> None:
    found, folder = shared
    for one in found:
        assert one["changed"] == [] and one["waits"] > 0
    profile = Profile.load(folder / "0" / "profile.json")
    looking = [o.name for graph in profile.graphs for o in graph.operators if o.waits]
    assert looking and {*looking} == {"counts.wait"}
    assert profile.lanes["mixture/counts.wait"] is Lane.HOST
    assert (folder / "0" / "timeline.png").stat().st_size > 0
    # Two micro-batches go through two layers of experts each.
    varying = {o.name for graph in profile.graphs for o in graph.operators if o.varies}
    assert {"experts.dispatch", "experts.fc1", "experts.fc2.wgrad"} <= varying
    assert not {name for name in varying if not name.startswith("experts.")}
    assert len(profile.routings) == 4
    assert (
        "by 4 routings of this run what experts do takes" in (folder / "0/summary.txt").read_text()
    )


def test_each_routing_is_of_a_micro_batch_and_a_layer_of_its_own() -> None:
    config = replace(MIXTURES["mixtral"], num_layers=3)
    with started(Case(_ep(1)), config=config) as runner:
        engine = runner.engine
        pieces = runner.intake.micro_batches(_batch(config))[:2]
        others = routings_of(engine, pieces, None)
        assert [(int(piece is pieces[1]), number % 3) for piece, number in others] == [
            (1, 1), (0, 1), (1, 2), (0, 2), (1, 0)
        ]  # fmt: skip
        captured = [engine.capture(piece, number) for piece, number in others]
        varying = {name for _, name in captured[0]}
        assert varying == {
            *("experts.fc1", "experts.fc2", "experts.fc1.dgrad", "experts.fc2.dgrad"),
            *("experts.fc1.wgrad", "experts.fc2.wgrad"),
        }
        forward = engine.layers[1].forward.fingerprint
        ends = {tuple(one[forward, "experts.fc1"][-1].tolist()) for one in captured}
        ends.add(tuple(engine.capture(pieces[0])[forward, "experts.fc1"][-1].tolist()))
        assert len(ends) == 6
        dense = Case(_ep(1), family="qwen3-moe")
    assert dense.config.moe_layer_freq == (1, 0, 1)
    with started(dense) as runner:
        others = routings_of(runner.engine, pieces, None)
        assert [number % 2 for _, number in others] == [1, 1, 0]
