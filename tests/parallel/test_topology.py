"""Topology: sizes that do not fit are refused in the user's words; ranks lie as Megatron's do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from lightning_dhellam.parallel import Topology
from lightning_dhellam.parallel.topology import LANES
from lightning_dhellam.plan import Lane
from tests.ranks import run_ranks

CPU = torch.device("cpu")


SHORT = {shown: name for name, shown in Topology.SPELLING.items()}
SHORT["expert_tensor_parallel_size"] = "etp_size"


@pytest.mark.parametrize(
    ("world_size", "sizes", "words"),
    [
        (4, {"tensor_parallel_size": 3}, ["tensor_parallel_size=3", "world size is 4", "devices"]),
        (
            8,
            {"tensor_parallel_size": 4, "pipeline_parallel_size": 4},
            ["tensor_parallel_size=4, pipeline_parallel_size=4", "multiple of 16"],
        ),
        (2, {"context_parallel_size": 4}, ["context_parallel_size=4", "world size is 2"]),
        (
            4,
            {"expert_parallel_size": 3},
            ["expert_parallel_size=3", "the job has 4", "divisor of 4"],
        ),
        (
            2,
            {"expert_parallel_size": 4},
            ["expert_parallel_size=4", "multiple of 4 ranks", "has 2"],
        ),
        (
            4,
            {"tensor_parallel_size": 2, "expert_parallel_size": 4},
            ["expert_parallel_size=4 x 2", "divisor of 2", "expert_tensor_parallel_size=1"],
        ),
        (
            4,
            {"pipeline_parallel_size": 2, "expert_parallel_size": 4},
            ["expert_parallel_size=4", "a stage of 2 has 2"],
        ),
        (
            8,
            {"tensor_parallel_size": 4, "expert_tensor_parallel_size": 2},
            ["expert_tensor_parallel_size=2", "tensor_parallel_size=4", "1 or 4"],
        ),
        (8, {"expert_tensor_parallel_size": 2}, ["expert_tensor_parallel_size=2", "must be 1:"]),
        (4, {"tensor_parallel_size": 0}, ["tensor_parallel_size=0", "at least 1"]),
        (4, {"tensor_parallel_size": "2"}, ["tensor_parallel_size='2'", "integer"]),
    ],
)
def test_sizes_that_do_not_fit_are_refused(
    world_size: int, sizes: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ValueError) as error:
        Topology(world_size, **{SHORT[name]: size for name, size in sizes.items()})
    for word in words:
        assert word in str(error.value)


def test_sizes_that_fit_are_accepted() -> None:
    assert Topology().sizes == {"tp": 1, "pp": 1, "cp": 1, "ep": 1, "dp": 1}
    assert Topology(8, tp_size=2, pp_size=2, cp_size=2).dp_size == 1
    assert Topology(8, tp_size=2, ep_size=4).dp_size == 4


def test_a_rank_has_a_place_on_every_lane() -> None:
    topology = Topology(24, rank=21, tp_size=2, cp_size=2, pp_size=2)
    assert topology.dp_size == 3
    place = (topology.tp_rank, topology.cp_rank, topology.dp_rank, topology.pp_rank)
    assert place == (1, 0, 2, 1) and 1 + 2 * (0 + 2 * (2 + 3 * 1)) == 21
    assert (topology.stage_size, topology.rank_in_stage) == (12, 9)
    assert topology.groups(Lane.TP)[-2:] == [[20, 21], [22, 23]]
    assert topology.groups(Lane.DP)[:2] == [[0, 4, 8], [1, 5, 9]]
    assert topology.groups(Lane.PP)[9] == [9, 21]


def test_a_stage_is_a_world_of_its_own() -> None:
    topology = Topology(16, rank=13, tp_size=2, pp_size=2, ep_size=4)
    assert topology.stage == Topology(8, rank=5, tp_size=2, ep_size=4, etp_size=2)
    assert topology.stage.ep_rank == topology.ep_rank == 2
    assert topology.stage.dp_rank == topology.dp_rank == 2


SIZES = [
    {"tp": 2},
    {"cp": 2, "tp": 2},
    {"ep": 4},
    {"tp": 2, "ep": 2},
    {"tp": 2, "ep": 4, "etp": 1},
    {"tp": 2, "pp": 2, "ep": 2, "etp": 1},
    {"tp": 2, "cp": 2, "ep": 2},
    {"pp": 2, "ep": 2},
    {"pp": 2, "cp": 2, "ep": 2},
    {"pp": 2, "tp": 2, "cp": 2, "ep": 1},
]


_Place = tuple[int, list[int]]
"""A rank in a group, and the ranks of the group."""


def _megatrons_groups(rank: int) -> list[tuple[Topology, dict[Lane, _Place], list[_Place]]]:
    found = []
    for sizes in SIZES:
        topology = Topology(8, rank, **{f"{name}_size": size for name, size in sizes.items()})
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=topology.tp_size,
            pipeline_model_parallel_size=topology.pp_size,
            context_parallel_size=topology.cp_size,
            expert_model_parallel_size=topology.ep_size,
            expert_tensor_parallel_size=topology.etp_size,
            create_gloo_process_groups=False,
        )
        groups = {
            Lane.TP: parallel_state.get_tensor_model_parallel_group(),
            Lane.PP: parallel_state.get_pipeline_model_parallel_group(),
            Lane.CP: parallel_state.get_context_parallel_group(),
            Lane.EP: parallel_state.get_expert_model_parallel_group(),
            Lane.DP: parallel_state.get_data_parallel_group(),
        }
        assert set(groups) == set(LANES)
        of_experts = (
            parallel_state.get_expert_tensor_parallel_group(),
            parallel_state.get_expert_data_parallel_group(),
        )
        ranks = {lane: _place(group) for lane, group in groups.items()}
        found.append((topology, ranks, [*map(_place, of_experts)]))
        parallel_state.destroy_model_parallel()
    return found


def _place(group: dist.ProcessGroup) -> _Place:
    return group.rank(), dist.get_process_group_ranks(group)


def test_ranks_lie_as_megatrons_do() -> None:
    for found in run_ranks(8, _megatrons_groups):
        assert len(found) == len(SIZES)
        for topology, groups, ((etp_rank, etp_ranks), (expert_dp_rank, holders)) in found:
            assert (topology.etp_rank, topology.etp_size) == (etp_rank, len(etp_ranks))
            assert topology.expert_dp_rank == expert_dp_rank
            assert topology.expert_dp_size == len(holders)
            for lane, (rank, ranks) in groups.items():
                assert ranks in topology.groups(lane), (topology, lane)
                assert getattr(topology, f"{lane.value}_rank") == rank, (topology, lane)
                assert topology.size(lane) == len(ranks) and ranks[rank] == topology.rank
                everyone = sorted(rank for group in topology.groups(lane) for rank in group)
                assert everyone == list(range(8))
