"""What balances experts is the same on any ranks, and is in the gradients that train."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor

from lightning_dhellam.models import CausalLM, ModelConfig
from lightning_dhellam.parallel import ParallelContext
from lightning_dhellam.runner import Runner
from tests.engine.harness import CPU, batch_of
from tests.ranks import run_ranks

SAMPLES, LENGTH, STEPS = 4, 16, 3
# As DeepSeek-V3: a bias chooses, groups limit, and each sequence is balanced by itself.
CONFIG = ModelConfig(
    num_layers=4,
    hidden_size=16,
    ffn_hidden_size=24,
    num_attention_heads=2,
    num_query_groups=2,
    vocab_size=48,
    max_sequence_length=LENGTH,
    num_experts=8,
    experts_per_token=2,
    moe_layer_freq=(0, 1, 1, 1),
    router_scores="sigmoid",
    router_scaling_factor=2.5,
    router_groups=4,
    router_groups_per_token=2,
    router_bias_update_rate=0.02,
    aux_loss="seq_aux_loss",
    aux_loss_coefficient=0.5,
    z_loss_coefficient=0.1,
)
CASES: dict[int, list[dict[str, Any]]] = {
    1: [{}, {"plan": "sequential"}, {"micro_batch_size": SAMPLES}],
    4: [
        {"expert_parallel_size": 2, "pipeline_parallel_size": 2, "schedule": "zb-v"},
        {"expert_parallel_size": 2, "tensor_parallel_size": 2},
        {"context_parallel_size": 2, "tensor_parallel_size": 2, "expert_parallel_size": 2},
    ],
}
Outcome = dict[str, Tensor]


PADDING = (5, 0, 9, 2)
"""Tokens at the end of each sample that nothing is learnt of."""


def _padded(length: int) -> dict[str, Tensor]:
    """Samples of `LENGTH` tokens less their padding, with so much that they have `length`."""
    batch = batch_of(CONFIG, SAMPLES, LENGTH)
    more = length - LENGTH
    tokens = torch.nn.functional.pad(batch["tokens"], (0, more), value=1)
    labels = torch.nn.functional.pad(batch["labels"], (0, more), value=-100)
    for row, padding in zip(labels, PADDING, strict=True):
        row[LENGTH - padding :] = -100
    return {"tokens": tokens, "labels": labels}


def _trained(sizes: dict[str, Any], length: int = LENGTH, config: ModelConfig = CONFIG) -> Outcome:
    """Router gradients of the first step, and after a few what the layers have used and biases."""
    batch = _padded(length)
    with Runner.create(config, CPU, **sizes) as runner:
        topology = runner.context.topology
        own = {n: x.chunk(topology.dp_size)[topology.dp_rank] for n, x in batch.items()}
        optimizer = runner.optimizer(
            torch.optim.SGD(runner.model.parameters(), lr=0.1), distributed_optimizer=False
        )
        found: Outcome = {}
        for step in range(STEPS):
            runner.train(own)
            if not step:
                found |= {
                    f"grad {name}": p.main_grad.clone()
                    for name, p in runner.model.named_parameters()
                    if "router" in name
                }
            optimizer.step()
        use = runner.expert_use
        assert use is not None and use.layers == (1, 2, 3)
        found |= {f"step {STEPS} {name}": value for name, value in use.losses.items()}
        found["load"] = use.load
        biases = (n for n in runner.model.state_dict() if n.endswith("expert_bias"))
        return found | {name: runner.model.state_dict()[name].clone() for name in biases}


def _of_rank(rank: int, world: int) -> list[Outcome]:
    return [_trained(sizes) for sizes in CASES[world]]


def test_any_ranks_and_micro_batches_balance_alike() -> None:
    ((expected, planned, other),) = run_ranks(1, _of_rank, 1)
    assert [n for n in expected if not torch.equal(expected[n], planned[n])] == [], "by its plan"
    tokens = SAMPLES * LENGTH - sum(PADDING)
    assert expected["load"].sum(1).tolist() == [2 * tokens] * 3
    biases = [value for name, value in expected.items() if name.endswith("expert_bias")]
    # Each step moves each bias by the rate, or not at all.
    moves = torch.stack(biases) / 0.02
    assert moves.any() and torch.equal(moves.round(), moves.round(decimals=3))
    outcomes = [("one micro-batch", other)]
    for rank, found in enumerate(run_ranks(4, _of_rank, 4)):
        outcomes += [(f"{s}, rank {rank}", o) for s, o in zip(CASES[4], found, strict=True)]
    for place, found in outcomes:
        assert found.keys() <= expected.keys() and len(found) >= 5, place
        for name, value in found.items():
            torch.testing.assert_close(
                value, expected[name], rtol=1e-4, atol=1e-6, msg=f"{place}: {name}"
            )


PADDED: dict[str, dict[str, Any]] = {
    "each sequence": {},
    "each micro-batch": {"aux_loss": "aux_loss"},
    "dropped": {"capacity_factor": 1.0},
}


def _with_more_padding(rank: int) -> list[tuple[str, str, float]]:
    """How far each number is off with more padding, by the case."""
    errors = []
    for case, changes in PADDED.items():
        config = replace(CONFIG, max_sequence_length=2 * LENGTH, **changes)
        sizes = {"micro_batch_size": 2}
        short, long = (_trained(sizes, length, config) for length in (LENGTH, LENGTH + 12))
        assert short.keys() == long.keys() and short["load"].any()
        for name, value in short.items():
            error = (long[name] - value).abs().max() / value.abs().max().clamp_min(1e-6)
            errors.append((case, name, error.item()))
    return errors


def test_padding_changes_nothing() -> None:
    (errors,) = run_ranks(1, _with_more_padding)
    assert [found for found in errors if not found[2] <= 1e-4] == []
    assert {case for case, *_ in errors} == PADDED.keys()


def _by_autograd(rank: int) -> list[tuple[str, float]]:
    """How far each gradient is from that of Megatron's own modules."""
    config = replace(
        CONFIG,
        router_scores="softmax",
        router_groups=None,
        router_groups_per_token=None,
        router_bias_update_rate=None,
        aux_loss="aux_loss",
    )
    batch, errors = batch_of(config, SAMPLES, LENGTH), []
    reference = CausalLM(config, ParallelContext.single(CPU))
    losses = reference(batch["tokens"], batch["labels"].clamp_min(0))
    weights = (batch["labels"] != -100).float()
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(()))
    with reference.context.megatron():
        ((losses * weights).sum() / weights.sum()).backward()
    expected = {name: p.grad for name, p in reference.named_parameters()}
    with Runner.create(config, CPU, micro_batch_size=SAMPLES) as runner:
        runner.model.load_state_dict(reference.state_dict())
        runner.optimizer(torch.optim.SGD(runner.model.parameters(), lr=0.1))
        runner.train(batch)
        for name, parameter in runner.model.named_parameters():
            wanted: Any = expected[name]
            wanted = torch.zeros_like(parameter) if wanted is None else wanted
            error = (parameter.main_grad - wanted).abs().max() / wanted.abs().max().clamp_min(1e-3)
            errors.append((name, error.item()))
    return errors


def test_gradients_with_losses_of_balance_are_megatrons() -> None:
    (errors,) = run_ranks(1, _by_autograd)
    assert max(error for _, error in errors) <= 1e-5, errors


def _unequal(rank: int) -> str:
    config = replace(CONFIG, aux_loss="global_aux_loss")
    with Runner.create(config, CPU, micro_batch_size=1) as runner:
        runner.optimizer(torch.optim.SGD(runner.model.parameters(), lr=0.1))
        try:
            runner.train(batch_of(config, 2 + rank, LENGTH))
        except ValueError as error:
            return str(error)
    return ""


def test_replicas_that_balance_together_need_as_many_micro_batches() -> None:
    for said in run_ranks(2, _unequal, timeout=120):
        assert "with global_aux_loss" in said and "of 2 and of 3 micro-batches" in said


def _resumed(rank: int, path: Path) -> None:
    """Biases are state of a run, in fp32 whatever the model's type."""
    batch, ends = batch_of(CONFIG, SAMPLES, LENGTH), []
    for begins in (0, 2):
        with Runner.create(CONFIG, CPU, precision="bf16-mixed") as runner:
            optimizer = runner.optimizer(torch.optim.AdamW(runner.model.parameters(), lr=0.01))
            if begins:
                runner.load(path)
            for step in range(begins, 4):
                runner.train(batch)
                optimizer.step()
                if step == 1:
                    runner.save(path)
            state = runner.model.state_dict().items()
            ends.append({name: x.clone() for name, x in state if isinstance(x, Tensor)})
    through, resumed = ends
    biases = [value for name, value in resumed.items() if name.endswith("expert_bias")]
    assert len(biases) == 3 and all(bias.dtype is torch.float32 for bias in biases)
    assert any(bias.any() for bias in biases)
    assert [name for name in through if not torch.equal(through[name], resumed[name])] == []


def test_a_resumed_run_goes_on_with_its_biases(tmp_path: Path) -> None:
    run_ranks(1, _resumed, tmp_path / "saved")
