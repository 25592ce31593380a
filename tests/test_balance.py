"""What a step has used of the experts, and the bias that follows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lightning_dhellam.balance import Balance
from lightning_dhellam.models import CausalLM, ModelConfig
from lightning_dhellam.parallel import ParallelContext
from lightning_dhellam.parallel.tally import Tally
from lightning_dhellam.search.report.experts import save_load
from tests.strategy.test_no_waiting import Reads, watched

CPU = torch.device("cpu")
RATE = 0.25
CONFIG = ModelConfig(
    num_layers=3,
    hidden_size=16,
    ffn_hidden_size=16,
    num_attention_heads=2,
    num_query_groups=2,
    vocab_size=32,
    max_sequence_length=8,
    num_experts=4,
    moe_layer_freq=(0, 1, 1),
    router_scores="sigmoid",
    router_bias_update_rate=RATE,
    aux_loss="seq_aux_loss",
    aux_loss_coefficient=0.1,
)


@pytest.fixture
def model() -> CausalLM:
    return CausalLM(CONFIG, ParallelContext.single(CPU))


def _tally() -> Tally:
    tally = Tally()
    for _ in range(2):  # micro-batches
        tally.add("load", 1, torch.tensor([[4.0, 0.0, 2.0, 2.0]]))
        tally.add("load", 2, torch.tensor([[2.0, 2.0, 2.0, 2.0]]))
        tally.add("seq_load_balancing_loss", 1, torch.tensor(0.5))
        tally.add("seq_load_balancing_loss", 2, torch.tensor(0.25))
    return tally


def test_the_sums_of_a_step_are_by_layer(model: CausalLM) -> None:
    balance = Balance(model)
    assert balance.has_losses and balance.last is None
    balance.saw(_tally())
    use = balance.last
    assert use is not None and use.layers == (1, 2)
    assert use.load.tolist() == [[8, 0, 4, 4], [4, 4, 4, 4]]
    assert use.imbalance.tolist() == [2.0, 1.0]
    assert use.losses["seq_load_balancing_loss"].tolist() == [1.0, 0.5]
    assert use.means["seq_load_balancing_loss"] == 0.75


def test_biases_follow_the_load_once_a_step(model: CausalLM) -> None:
    balance = Balance(model)
    first, second = (model.layers[index].mlp.router.expert_bias for index in (1, 2))
    balance.saw(_tally())
    assert not first.any(), "before the optimizer has stepped"
    balance.step(torch.tensor(True))
    balance.step(torch.tensor(True))  # a step without a batch
    assert first.tolist() == [-RATE, RATE, 0.0, 0.0] and not second.any()


def test_a_rate_of_zero_holds_biases_as_they_are() -> None:
    model = CausalLM(replace(CONFIG, router_bias_update_rate=0.0), ParallelContext.single(CPU))
    balance, bias = Balance(model), model.layers[1].mlp.router.expert_bias
    bias.copy_(torch.tensor([0.5, -0.25, 0.125, 0.0]))
    before = bias.clone()
    balance.saw(_tally())
    balance.step(None)
    assert torch.equal(bias, before) and balance.last is not None
    without = CausalLM(replace(CONFIG, router_bias_update_rate=None), ParallelContext.single(CPU))
    assert without.layers[1].mlp.router.expert_bias is None


def test_nothing_is_read_on_the_host(model: CausalLM) -> None:
    balance, tally, reads = Balance(model), _tally(), Reads(set())
    with watched(reads):
        balance.saw(tally)
        balance.step(torch.tensor(True))
        assert balance.last is not None
        balance.last.imbalance.mean()
    assert reads.found == []


def test_a_step_that_is_left_out_moves_no_bias(model: CausalLM) -> None:
    balance = Balance(model)
    balance.saw(_tally())
    balance.step(torch.tensor(False))
    assert not model.layers[1].mlp.router.expert_bias.any()


def test_a_model_without_experts_has_no_use_of_them() -> None:
    dense = ModelConfig(
        num_layers=1,
        hidden_size=16,
        ffn_hidden_size=16,
        num_attention_heads=2,
        num_query_groups=2,
        vocab_size=32,
        max_sequence_length=8,
    )
    balance = Balance(CausalLM(dense, ParallelContext.single(CPU)))
    balance.saw(Tally())
    balance.step(None)
    assert balance.last is None and not balance.has_losses


@pytest.mark.parametrize("experts", [4, 64])
def test_the_picture_has_a_row_for_each_layer(tmp_path: Path, experts: int) -> None:
    path = tmp_path / "new" / "load.png"
    save_load(path, [1, 3], [[1.0] * experts, [0.0] * experts])
    assert path.read_bytes().startswith(b"\x89PNG")
