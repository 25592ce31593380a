"""However many ranks share a sequence: loss, gradients and logits are Hugging Face's, fp32.

With dropout, which draws other numbers there, they are those of one process.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_dhellam.checkpoint.reading import read_metadata
from lightning_dhellam.models import ModelConfig, export_llama, import_llama
from lightning_dhellam.plan import BUILDERS
from lightning_dhellam.runner import Runner
from tests.engine.harness import CPU, batch_of, differing
from tests.models.llama import SMALL, hugging_face_llama, relative_error, token_losses
from tests.plan.graphs import random_builder
from tests.ranks import run_ranks

SAMPLES, LENGTH = 4, 24
BEGINS = ((0, 1, 5, 17), (0,), (0, 8, 12, 13, 16), (0, 23))
"""Where documents begin in each sample: anywhere, some of one token, some across pieces."""
POSITIONS = torch.stack(
    [torch.cat([torch.arange(b - a) for a, b in pairwise((*begins, LENGTH))]) for begins in BEGINS]
)
GATHERED = {"context_exchange": "all_gather"}


@dataclass(frozen=True)
class Case:
    """A model, and how many ranks share what of it.

    Attributes:
        sizes: of parallelism.
        options: others of the runner.
        config: of the model.
        packed: whether samples hold documents.
    """

    sizes: dict[str, int]
    options: dict[str, Any] = field(default_factory=dict)
    config: ModelConfig = SMALL
    packed: bool = False

    @property
    def known(self) -> bool:
        """Whether Hugging Face has such a model."""
        return self.config.position_embedding == "rope" and self.config.sliding_window is None

    @property
    def batch(self) -> dict[str, Tensor]:
        """What is trained on."""
        batch = batch_with_mask(self.config)
        return batch | {"position_ids": POSITIONS} if self.packed else batch


def _cp(size: int, **others: int) -> dict[str, int]:
    sizes = {f"{name}_parallel_size": other for name, other in others.items()}
    return {"context_parallel_size": size, **sizes}


DROPS = replace(SMALL, hidden_dropout=0.1)
WITHOUT_ROTARY = replace(SMALL, position_embedding="none", init_std=0.3)
WINDOW = replace(SMALL, sliding_window=7, init_std=0.3)
ONE_WINDOW = replace(WINDOW, sliding_window=3, window_layers=(0, 1))
UNGROUPED = replace(SMALL, num_query_groups=4, tie_embeddings=True)
CASES: dict[int, dict[str, Case]] = {
    2: {
        "ring": Case(_cp(2)),
        "gathered": Case(_cp(2), GATHERED),
        "ungrouped-kept": Case(_cp(2), {"recompute": "none"}, UNGROUPED),
        "packed": Case(_cp(2), packed=True),
        "packed-gathered": Case(_cp(2), {**GATHERED, "recompute": "full"}, UNGROUPED, packed=True),
        "packed-tensor": Case({"tensor_parallel_size": 2}, packed=True),
        "window": Case(_cp(2), {}, WINDOW),
        "packed-without-rotary": Case(_cp(2), {}, WITHOUT_ROTARY, packed=True),
    },
    3: {
        "ring": Case(_cp(3), {"recompute": {0: "full", "1-": "none"}}),
        "gathered": Case(_cp(3), GATHERED),
        "packed": Case(_cp(3), packed=True),
        "packed-gathered": Case(_cp(3), GATHERED, packed=True),
        "packed-window": Case(_cp(3), {"recompute": "full"}, ONE_WINDOW, packed=True),
    },
    4: {
        "ring": Case(_cp(4)),
        "gathered": Case(_cp(4), GATHERED, UNGROUPED),
        "tensor": Case(_cp(2, tensor=2), {"plan": "megatron"}),
        "tensor-dropping": Case(_cp(2, tensor=2), GATHERED, DROPS),
        "packed-tensor": Case(_cp(2, tensor=2), packed=True),
        "packed-stages": Case(
            _cp(2, pipeline=2), {"plan": "dhellam"}, replace(DROPS, num_layers=4), packed=True
        ),
        "data": Case(_cp(2), GATHERED),
    },
}
Outcome = tuple[Tensor, dict[str, Tensor], Tensor, Tensor]
"""Loss, gradients, loss in evaluation, logits."""


def batch_with_mask(config: ModelConfig) -> dict[str, Tensor]:
    """Labels that count differently, and a whole piece of the sequences in which none does."""
    batch = batch_of(config, SAMPLES, LENGTH)
    generator = torch.Generator().manual_seed(2)
    batch["loss_mask"] = torch.rand(SAMPLES, LENGTH, generator=generator)
    batch["loss_mask"][:, 6:13] = 0
    return batch


def started(case: Case, device: torch.device = CPU, **options: Any) -> Runner:
    """A runner with Hugging Face's weights and an optimizer that leaves gradients whole."""
    runner = Runner.create(
        case.config, device, micro_batch_size=2, **case.sizes, **{**case.options, **options}
    )
    if case.known:
        import_llama(runner.model, hugging_face_llama(case.config).state_dict())
    optimizer = torch.optim.SGD(runner.model.parameters(), lr=0.1)
    runner.optimizer(optimizer, distributed_optimizer=False)
    return runner


def _own_samples(runner: Runner, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    topology = runner.context.topology
    own = {name: x.chunk(topology.dp_size)[topology.dp_rank] for name, x in batch.items()}
    return {name: x.to(runner.device) for name, x in own.items()}


def gradients_of(runner: Runner) -> dict[str, Tensor]:
    return {name: p.main_grad.clone() for name, p in runner.model.named_parameters()}


def _outcome(case: Case, device: torch.device) -> Outcome:
    with started(case, device) as runner:
        batch = _own_samples(runner, case.batch)
        loss = runner.mean(runner.train(batch))
        gradients = gradients_of(runner)
        if case.known and runner.context.topology.pp_size == 1:
            gradients = export_llama(runner.model, gradients)
        gradients = {name: gradient.cpu() for name, gradient in gradients.items()}
        return loss.cpu(), gradients, runner.evaluate(batch).cpu(), runner.predict(batch).cpu()


def outcomes_of_rank(rank: int, world: int, kind: str = "cpu") -> dict[str, Outcome]:
    """What each case gives on this rank, on the CPU or on its GPU."""
    device = CPU if kind == "cpu" else torch.device("cuda", rank)
    return {name: _outcome(case, device) for name, case in CASES[world].items()}


@pytest.fixture(scope="module", params=CASES)
def outcomes(request: pytest.FixtureRequest) -> tuple[int, list[dict[str, Outcome]]]:
    world: int = request.param
    return world, run_ranks(world, outcomes_of_rank, world)


def documents_for_hugging_face(positions: Tensor) -> dict[str, Tensor]:
    """Positions, and a mask for eager attention, of documents that begin where positions do."""
    number = (positions == 0).cumsum(dim=1)
    seen = (number[:, :, None] == number[:, None]).tril()[:, None]
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    return {"position_ids": positions, "attention_mask": mask}


@cache
def _expected(config: ModelConfig, packed: bool) -> Outcome:
    reference, batch = hugging_face_llama(config), Case({}, {}, config, packed).batch
    told = documents_for_hugging_face(POSITIONS) if packed else {}
    losses = token_losses(reference, batch["tokens"], batch["labels"], **told)
    weights = (batch["labels"] != -100).float() * batch["loss_mask"]
    loss = (losses * weights).sum() / weights.sum()
    loss.backward()
    gradients = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}
    of_half = [
        ((losses * weights)[half].sum() / weights[half].sum()).detach()
        for half in (slice(0, 2), slice(2, 4))
    ]
    logits = reference(batch["tokens"], **told).logits.detach()
    return loss.detach(), gradients, torch.stack([loss.detach(), *of_half]), logits


def test_loss_gradients_and_logits_are_hugging_faces(
    outcomes: tuple[int, list[dict[str, Outcome]]],
) -> None:
    check_outcomes(*outcomes)


def check_outcomes(world: int, of_ranks: list[dict[str, Outcome]]) -> None:
    """Every case on every rank against Hugging Face; what it does not have, against one process."""
    for name, case in CASES[world].items():
        _, expected, losses, all_logits = _expected(case.config, case.packed)
        expected_loss = losses[0]
        in_stages = "pipeline_parallel_size" in case.sizes
        if in_stages or case.config.hidden_dropout or not case.known:
            exported = case.known and not in_stages
            mine = alone(case.config, case.packed, exported=exported)
            expected_loss, expected = mine[:2]
            if not case.known:
                losses, all_logits = mine[2][None], mine[3]
        found: dict[str, Tensor] = {}
        for rank, outcome in enumerate(of_ranks):
            loss, gradients, evaluated, logits = outcome[name]
            place = f"{name}, rank {rank}"
            assert abs(loss - expected_loss) <= 1e-6 * expected_loss, place
            # Ranks of one sample agree; others evaluate their own.
            half = rank // 2 if name == "data" else None
            whole = losses[0 if half is None else 1 + half]
            assert abs(evaluated - whole) <= 1e-6 * whole, place
            own = all_logits if half is None else all_logits.chunk(2)[half]
            assert logits.shape == own.shape and relative_error(logits, own) <= 1e-5, place
            if not in_stages:
                _check_gradients(gradients, expected, place)
            found |= gradients
        # Each rank has the gradients of its stage.
        _check_gradients(found, expected, name)


def _check_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], place: str) -> None:
    assert found.keys() == expected.keys(), place
    errors = {name: relative_error(found[name], expected[name]) for name in expected}
    assert max(errors.values()) <= 1e-5, (place, errors)


@cache
def alone(config: ModelConfig, packed: bool, *, exported: bool) -> Outcome:
    """What one process finds, gradients by its own names or by those of Hugging Face."""
    case = Case({}, {}, config, packed)
    with started(case) as runner:
        loss = runner.train(case.batch)
        gradients = gradients_of(runner)
        if exported:
            gradients = export_llama(runner.model, gradients)
        return loss, gradients, runner.evaluate(case.batch), runner.predict(case.batch)


def loss_by_place(logits: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """A loss of a user's own, which looks at where tokens stand in their documents."""
    losses = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), batch["labels"], ignore_index=-100, reduction="none"
    )
    return (losses * (1.0 + batch["position_ids"])).mean()


OWN_LOSS = Case({}, {"loss": loss_by_place}, packed=True)


def _with_plans(rank: int, path: Path) -> dict[str, Any]:
    case = Case(_cp(2), {}, DROPS, packed=True)
    batch = case.batch
    found: dict[str, Any] = {"wrong": []}
    for name in ("ring", "all_gather"):
        with started(case, context_exchange=name, plan="sequential") as runner:
            expected = runner.train(batch, step=0), gradients_of(runner)
            builders = BUILDERS | {f"random-{seed}": random_builder(seed) for seed in range(12)}
            for plan, builder in builders.items():
                runner.use_plan(plan, builder)
                outcome = runner.train(batch, step=0), gradients_of(runner)
                if differing(outcome, expected):
                    found["wrong"].append(f"{name}, {plan}: {differing(outcome, expected)}")
            found[name] = expected
    with started(replace(OWN_LOSS, sizes=_cp(2))) as runner:
        found["own loss"] = runner.train(batch), gradients_of(runner)
    runner = started(case, context_fp32_gradients=False, precision="bf16-true")
    with runner:
        found["bf16"] = runner.train(batch, step=0)
        runner.save(path)
    return found


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Path]:
    path = tmp_path_factory.mktemp("context") / "saved.ckpt"
    return run_ranks(2, _with_plans, path, timeout=600), path


def test_no_plan_changes_a_bit(plans: tuple[list[dict[str, Any]], Path]) -> None:
    for found in plans[0]:
        assert found["wrong"] == []
        ring, gathered = found["ring"], found["all_gather"]
        assert abs(ring[0] - gathered[0]) <= 1e-6 * ring[0]
        errors = [relative_error(ring[1][name], gathered[1][name]) for name in ring[1]]
        assert max(errors) <= 1e-5
        assert abs(found["bf16"] - ring[0]) <= 2e-2 * ring[0]


def test_a_checkpoint_is_written_once(plans: tuple[list[dict[str, Any]], Path]) -> None:
    _, path = plans
    metadata = read_metadata(path).state_dict_metadata
    assert all(len(tensor.chunks) == 1 for tensor in metadata.values())
    with started(Case({}), precision="bf16-true") as runner:
        expected = {name: p.detach().clone() for name, p in runner.model.named_parameters()}
    with Runner.create(SMALL, CPU, precision="bf16-true") as runner:
        runner.load(path)
        found = dict(runner.model.named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_dropout_draws_what_one_process_draws(
    plans: tuple[list[dict[str, Any]], Path],
) -> None:
    expected_loss, expected = alone(DROPS, True, exported=False)[:2]
    for rank, found in enumerate(plans[0]):
        loss, gradients = found["ring"]
        assert abs(loss - expected_loss) <= 1e-6 * expected_loss
        _check_gradients(gradients, expected, f"rank {rank}")


def test_a_loss_of_ones_own_is_the_mean_over_the_parts(
    plans: tuple[list[dict[str, Any]], Path],
) -> None:
    with started(OWN_LOSS) as runner:
        expected_loss, expected = runner.train(OWN_LOSS.batch), gradients_of(runner)
    for rank, found in enumerate(plans[0]):
        loss, gradients = found["own loss"]
        assert abs(loss - expected_loss) <= 1e-6 * expected_loss
        _check_gradients(gradients, expected, f"rank {rank}")
