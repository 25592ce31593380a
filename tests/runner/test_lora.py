"""Low-rank adapters train as in Hugging Face's model, whatever the parallel sizes and the plan."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_dhellam.models import (
    CausalLM,
    LoRA,
    ModelConfig,
    adapter_conversions,
    add_lora,
    export_llama,
    import_llama,
)
from lightning_dhellam.models.huggingface import fill, gathered, own_of
from lightning_dhellam.parallel import ParallelContext
from lightning_dhellam.plan import BUILDERS
from lightning_dhellam.runner import Runner
from tests.engine.harness import CPU, batch_of, differing
from tests.models.llama import SMALL, hugging_face_llama, relative_error, token_losses
from tests.models.lora import adapted, peft_tensors
from tests.plan.graphs import random_builder
from tests.ranks import run_ranks

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ODD = replace(SMALL, vocab_size=53, head_dim=6, num_layers=4)


@dataclass(frozen=True)
class Case:
    """Adapters of a model, and how many ranks share what of it.

    Attributes:
        sizes: of parallelism.
        lora: which adapters.
        targets: what they are around, by Hugging Face's names.
        config: of the model.
    """

    sizes: dict[str, int]
    lora: LoRA = LoRA(rank=3, alpha=6)  # noqa: RUF009  it is frozen
    targets: tuple[str, ...] = ALL
    config: ModelConfig = ODD


SOME = LoRA(rank=5, alpha=2, targets=("v_proj", "up_proj", "linear_proj"), rslora=True)
CASES: dict[int, dict[str, Case]] = {
    1: {
        "all": Case({}),
        "some": Case({}, SOME, ("v_proj", "up_proj", "o_proj")),
        "fused": Case({}, LoRA(2, 1.0, ("linear_qkv",)), ("q_proj", "k_proj", "v_proj")),
    },
    2: {
        "tensor": Case({"tensor_parallel_size": 2}),
        "tensor-some": Case({"tensor_parallel_size": 2}, SOME, ("v_proj", "up_proj", "o_proj")),
        "stages": Case({"pipeline_parallel_size": 2}),
        "context": Case({"context_parallel_size": 2}),
        "data": Case({}),
    },
    4: {"tensor-stages": Case({"tensor_parallel_size": 2, "pipeline_parallel_size": 2})},
}
Outcome = dict[str, Any]


def _reference(case: Case) -> Any:
    return adapted(hugging_face_llama(case.config), case.lora, case.targets)


def _started(case: Case, device: torch.device = CPU, **options: Any) -> Runner:
    """A runner whose model has Hugging Face's weights and the reference's adapters."""

    def build(context: ParallelContext, dtype: torch.dtype) -> CausalLM:
        model = CausalLM(case.config, context, dtype)
        import_llama(model, hugging_face_llama(case.config))
        add_lora(model, case.lora)
        every = list(adapter_conversions(case.config, case.lora))
        fill(model, own_of(every, model), peft_tensors(_reference(case)))
        return model

    return Runner.create(build, device, micro_batch_size=2, **case.sizes, **options)


def _by_peft(model: CausalLM, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    assert model.lora is not None
    every = list(adapter_conversions(model.config, model.lora))
    return dict(gathered(every, model, tensors, True))


def _gradients(runner: Runner) -> dict[str, Tensor]:
    named = runner.model.named_parameters()
    return {name: p.main_grad.clone() for name, p in named if p.requires_grad}


def _outcome(case: Case, device: torch.device) -> Outcome:
    with _started(case, device) as runner:
        batch = batch_of(case.config, 4, 24)
        topology = runner.context.topology
        own = {n: x.chunk(topology.dp_size)[topology.dp_rank].to(device) for n, x in batch.items()}
        base = {n: p.detach().clone() for n, p in runner.model.named_parameters()}
        optimizer = runner.optimizer(
            torch.optim.AdamW([p for p in runner.model.parameters() if p.requires_grad], lr=0.1),
            distributed_optimizer=False,
        )
        found: Outcome = {"loss": runner.mean(runner.train(own)).cpu()}
        found["gradients"] = _by_peft(runner.model, _gradients(runner))
        optimizer.step()
        found["changed"] = sorted(
            n for n, p in runner.model.named_parameters() if not torch.equal(p, base[n])
        )
        found["masters"] = [
            n for n, p in runner.model.named_parameters() if hasattr(p, "main_grad")
        ]
        found["logits"] = runner.predict({n: x.to(device) for n, x in batch.items()}).cpu()
        found["merged"] = export_llama(runner.model)
        return found


def outcomes_of_rank(rank: int, world: int, kind: str = "cpu") -> dict[str, Outcome]:
    """What each case gives on this rank, on the CPU or on its GPU."""
    device = CPU if kind == "cpu" else torch.device("cuda", rank)
    return {name: _outcome(case, device) for name, case in cases_of(world, kind).items()}


def cases_of(world: int, kind: str) -> dict[str, Case]:
    """Cases of so many ranks. On GPUs heads have 16 channels, which their kernels take."""
    cases = CASES[world]
    if kind == "cpu":
        return cases
    return {n: replace(case, config=replace(ODD, head_dim=16)) for n, case in cases.items()}


@pytest.fixture(scope="module", params=CASES)
def outcomes(request: pytest.FixtureRequest) -> tuple[int, list[dict[str, Outcome]]]:
    world: int = request.param
    return world, [outcomes_of_rank(0, 1)] if world == 1 else run_ranks(
        world, outcomes_of_rank, world
    )


def _expected(case: Case) -> tuple[Tensor, dict[str, Tensor]]:
    reference, batch = _reference(case), batch_of(case.config, 4, 24)
    losses = token_losses(reference, batch["tokens"], batch["labels"])
    counts = batch["labels"] != -100
    loss = (losses * counts).sum() / counts.sum()
    loss.backward()
    return loss.detach(), peft_tensors(reference, grads=True)


def test_loss_and_gradients_are_those_of_hugging_faces_model(
    outcomes: tuple[int, list[dict[str, Outcome]]],
) -> None:
    check_gradients(*outcomes)


def check_gradients(world: int, of_ranks: list[dict[str, Outcome]], kind: str = "cpu") -> None:
    """Loss and gradients of every case on every rank against Hugging Face's model."""
    for name, case in cases_of(world, kind).items():
        expected_loss, expected = _expected(case)
        for rank, found in enumerate(of_ranks):
            place = f"{name}, rank {rank}"
            outcome = found[name]
            assert abs(outcome["loss"] - expected_loss) <= 1e-6 * expected_loss, place
            assert outcome["gradients"].keys() == expected.keys(), place
            errors = {n: relative_error(outcome["gradients"][n], expected[n]) for n in expected}
            limit = 1e-5 if kind == "cpu" else 3e-5  # a GPU adds up in another order
            assert max(errors.values()) <= limit, (place, errors)


def test_a_step_changes_adapters_alone_and_nothing_else_has_a_buffer(
    outcomes: tuple[int, list[dict[str, Outcome]]],
) -> None:
    for found in outcomes[1]:
        for outcome in found.values():
            assert outcome["changed"]
            assert all(".lora." in name for name in outcome["changed"])
            assert sorted(outcome["masters"]) == outcome["changed"]


def test_merged_weights_give_the_logits_of_the_adapters(
    outcomes: tuple[int, list[dict[str, Outcome]]],
) -> None:
    check_merged(*outcomes)


def check_merged(world: int, of_ranks: list[dict[str, Outcome]], kind: str = "cpu") -> None:
    """Logits of a Hugging Face model with the merged weights against those of the adapters."""
    for name, case in cases_of(world, kind).items():
        batch = batch_of(case.config, 4, 24)
        for found in of_ranks:
            model = hugging_face_llama(case.config)
            model.load_state_dict(found[name]["merged"])
            logits = model(batch["tokens"]).logits.detach()
            assert relative_error(found[name]["logits"], logits) <= 3e-5, name


DROPPING = replace(SMALL, hidden_dropout=0.1)


def _with_plans(rank: int) -> tuple[list[str], Tensor, dict[str, Tensor]]:
    wrong = []
    case = Case({"tensor_parallel_size": 2}, LoRA(rank=3, dropout=0.3), config=DROPPING)
    batch = batch_of(case.config, 4, 24)
    with _started(case, plan="sequential") as runner:
        trained = [p for p in runner.model.parameters() if p.requires_grad]
        runner.optimizer(torch.optim.SGD(trained, lr=0.1), distributed_optimizer=False)
        expected = runner.train(batch, step=0), _gradients(runner)
        whole = _by_peft(runner.model, expected[1])
        for plan, builder in (
            BUILDERS | {f"random-{seed}": random_builder(seed) for seed in range(12)}
        ).items():
            runner.use_plan(plan, builder)
            found = runner.train(batch, step=0), _gradients(runner)
            wrong += [f"{plan}: {name}" for name in differing(found, expected)]
        logits = runner.predict(batch)
    # What adapters have written over is made again as well, and what they drop is drawn again.
    for slots in (["qkv", "qkv_low"], ["gathers", "gate_up"], "selective", "full"):
        with _started(case, plan="dhellam", recompute=slots) as runner:
            trained = [p for p in runner.model.parameters() if p.requires_grad]
            runner.optimizer(torch.optim.SGD(trained, lr=0.1), distributed_optimizer=False)
            found = runner.train(batch, step=0), _gradients(runner)
            wrong += [f"{slots}: {name}" for name in differing(found, expected)]
    return wrong, logits, whole


def test_neither_plans_nor_what_is_made_again_change_a_bit_nor_do_ranks_drop_otherwise() -> None:
    of_ranks = run_ranks(2, _with_plans)
    case = Case({}, LoRA(rank=3, dropout=0.3), config=DROPPING)
    batch = batch_of(case.config, 4, 24)
    with _started(case) as runner:
        trained = [p for p in runner.model.parameters() if p.requires_grad]
        runner.optimizer(torch.optim.SGD(trained, lr=0.1), distributed_optimizer=False)
        runner.train(batch, step=0)
        expected = _by_peft(runner.model, _gradients(runner))
    with _started(replace(case, lora=LoRA(rank=3))) as runner:
        logits = runner.predict(batch)
    for wrong, found, gradients in of_ranks:
        assert wrong == []
        assert relative_error(found, logits) <= 1e-5
        errors = {name: relative_error(gradients[name], expected[name]) for name in expected}
        # Another element dropped would show in the first digit.
        assert max(errors.values()) <= 5e-5, errors
