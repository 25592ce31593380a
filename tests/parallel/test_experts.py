"""Experts on several ranks: who holds which, how they start, whose gradients are added up."""

from __future__ import annotations

import hashlib
import math
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_dhellam.checkpoint import by_rank, folder
from lightning_dhellam.engine import MicroBatch
from lightning_dhellam.engine.meeting import as_many, check_as_many
from lightning_dhellam.models import CausalLM
from lightning_dhellam.parallel import ParallelContext, Topology
from lightning_dhellam.parallel.collectives import of_all_ranks
from lightning_dhellam.parallel.experts import ExpertNames, is_expert
from lightning_dhellam.parallel.gradients import GradientBuffers, taken_first
from lightning_dhellam.parallel.optimizer import ModelParallelOptimizer
from lightning_dhellam.parallel.replicas import is_split
from tests.checkpoint import first_format
from tests.models.llama import SMALL
from tests.ranks import run_ranks

CPU = torch.device("cpu")
MOE = replace(
    SMALL,
    num_experts=4,
    experts_per_token=2,
    expert_ffn_hidden_size=24,
    shared_expert_ffn_hidden_size=16,
    moe_layer_freq=(0, 1),
    attention_bias=True,
)
LAYOUTS = {
    "ep2": {"expert_parallel_size": 2},
    "ep4": {"expert_parallel_size": 4},
    "tp2-ep2": {"tensor_parallel_size": 2, "expert_parallel_size": 2},
    "tp2-whole": {"tensor_parallel_size": 2, "expert_tensor_parallel_size": 1},
    "tp2-ep2-whole": {
        "tensor_parallel_size": 2,
        "expert_parallel_size": 2,
        "expert_tensor_parallel_size": 1,
    },
    "tp4-ep2-whole": {
        "tensor_parallel_size": 4,
        "expert_parallel_size": 2,
        "expert_tensor_parallel_size": 1,
    },
    "cp2-ep4": {"context_parallel_size": 2, "expert_parallel_size": 4},
    "pp2-ep2": {"pipeline_parallel_size": 2, "expert_parallel_size": 2},
}
_STEPS = 2
_LIMIT = 2.0


def _number(*words: Any) -> int:
    return int.from_bytes(hashlib.sha256(repr(words).encode()).digest()[:7])


def _drawn(shape: torch.Size, *words: Any) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(_number(*words)))


def _identity(name: str, parameter: Tensor, topology: Topology) -> tuple[str, int]:
    """Which parameter of the whole model, and which part of it."""
    if is_expert(parameter):
        return name, topology.etp_rank
    return name, topology.tp_rank if is_split(parameter) else 0


class _Rank:
    """A rank's model, with gradients that no engine has made, and what they should add up to."""

    def __init__(
        self, sizes: dict[str, int], sharded: bool, dtype: torch.dtype, *, frozen: str = "none"
    ) -> None:
        self.context = ParallelContext.create(CPU, **sizes)  # type: ignore[arg-type]
        self.topology = self.context.topology
        config = replace(MOE, num_query_groups=4)
        self.model = CausalLM(config, self.context, dtype)
        names = ExpertNames(self.model)
        self.names = {p: names.of_all(name) for name, p in self.model.named_parameters()}
        self.keys = {p: _identity(n, p, self.topology) for p, n in self.names.items()}
        for parameter, name in self.names.items():
            parameter.requires_grad_(frozen not in name)
        self._make_buffers = partial(
            GradientBuffers,
            self.model,
            self.model.transformer_config,
            self.context,
            sharded=sharded,
            fp32=True,
            bucket_size=1000,
        )
        self.buffers = self._make_buffers()
        self.inner = torch.optim.AdamW(
            [
                {"params": [p for p in self.names if p.dim() > 1], "weight_decay": 0.1},
                {"params": [p for p in self.names if p.dim() <= 1], "weight_decay": 0.0},
            ],
            lr=0.01,
        )
        self.optimizer = ModelParallelOptimizer(
            self.inner,
            self.buffers,
            self.context,
            self.names,
            sharded=sharded,
            master_weights=dtype is not torch.float32,
            max_skipped_steps=3,
        )
        self.start = {key: p.detach().float().clone() for p, key in self.keys.items()}

    def thaw(self) -> None:
        """Train everything from the next step on."""
        for parameter in self.names:
            parameter.requires_grad_(True)

        def replaced() -> GradientBuffers:
            self.buffers.close()
            self.buffers = self._make_buffers()
            return self.buffers

        self.optimizer.follow(replaced)

    def step(self, number: int, *, broken: tuple[str, int] | None = None) -> float:
        """One step of gradients that each rank has drawn; the norm of the whole one.

        That of the parameter and part `broken` is not finite on this rank.
        """
        self.optimizer.begin()
        self.buffers.zero()
        for parameter in reversed(list(self.names)):
            if parameter.requires_grad:
                grad = _drawn(parameter.shape, number, self.keys[parameter], self.topology.rank)
                assert taken_first(parameter)
                factor = torch.inf if self.keys[parameter] == broken else 1.0
                parameter.main_grad.copy_(grad * factor)  # type: ignore[attr-defined]
                self.buffers.ready((parameter,), nullcontext)
        self.buffers.finish()
        norm = self.optimizer.grad_norm().item()
        self.optimizer.clip_by_norm(_LIMIT)
        self.optimizer.step()
        return norm

    def whole_gradient(self, number: int) -> dict[tuple[str, int], Tensor]:
        """The gradient of each part of the model: the sum over all ranks that have some of it."""
        shapes = {self.keys[p]: p.shape for p in self.names if p.requires_grad}
        total: dict[tuple[str, int], Tensor] = {}
        for rank, theirs in enumerate(of_all_ranks(shapes, dist.group.WORLD)):
            for key, shape in theirs.items():
                drawn = _drawn(shape, number, key, rank)
                total[key] = total[key] + drawn if key in total else drawn
        return total

    def close(self) -> None:
        self.buffers.close()
        self.context.destroy()


def _expected(
    rank: _Rank, start: dict[tuple[str, int], Tensor], frozen: str = "none"
) -> tuple[Any, list[float]]:
    """What one process would have made of the same gradients, with some frozen at first."""
    weights = {key: value.clone() for key, value in start.items()}
    groups: list[list[Tensor]] = [[], []]
    for key in sorted(weights):
        groups[weights[key].dim() <= 1].append(weights[key])
    adam = torch.optim.AdamW(
        [
            {"params": groups[0], "weight_decay": 0.1},
            {"params": groups[1], "weight_decay": 0.0},
        ],
        lr=0.01,
    )
    norms = []
    for number in range(_STEPS):
        grads = rank.whole_gradient(number)
        if number == 0:
            grads = {key: grad for key, grad in grads.items() if frozen not in key[0]}
        norm = torch.stack([g.norm() for g in grads.values()]).norm()
        norms.append(norm.item())
        for key, grad in grads.items():
            weights[key].grad = grad * min(1.0, _LIMIT / (norm.item() + 1e-6))
        adam.step()
    return weights, norms


def _started(one: _Rank) -> dict[tuple[str, int], Tensor]:
    """The whole model; whoever holds the same has started with the same."""
    start: dict[tuple[str, int], Tensor] = {}
    for theirs in of_all_ranks(one.start, dist.group.WORLD):
        for key, value in theirs.items():
            assert torch.equal(start.setdefault(key, value), value), key
    return start


def _check(one: _Rank, weights: dict[tuple[str, int], Tensor]) -> None:
    exact = next(iter(one.names)).dtype is torch.float32
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if exact else {"rtol": 1e-2, "atol": 1e-4}
    for parameter, key in one.keys.items():
        torch.testing.assert_close(parameter.detach().float(), weights[key], **tolerance)


def _trained(layout: str, sharded: bool, dtype: torch.dtype) -> dict[str, dict[int, Tensor]]:
    """The experts that a run has started with, by name and part."""
    one = _Rank(LAYOUTS[layout], sharded, dtype)
    start = _started(one)
    norms = [one.step(number) for number in range(_STEPS)]
    weights, expected = _expected(one, start)
    torch.testing.assert_close(norms, expected, rtol=1e-5, atol=0)
    _check(one, weights)
    one.close()
    found: dict[str, dict[int, Tensor]] = {}
    for (name, part), value in start.items():
        if name.startswith("layers.1.mlp"):
            found.setdefault(name, {})[part] = value
    return found


def _thawed(sharded: bool) -> None:
    frozen = "experts.linear_fc2" if not sharded else "linear_fc1"
    one = _Rank(LAYOUTS["ep2"], sharded, torch.float32, frozen=frozen)
    start = _started(one)
    norms = [one.step(0)]
    one.thaw()
    norms.append(one.step(1))
    weights, expected = _expected(one, start, frozen)
    torch.testing.assert_close(norms, expected, rtol=1e-5, atol=0)
    _check(one, weights)
    one.close()


def _skipped_and_changed(sharded: bool) -> None:
    """One rank has one expert whose gradient is not finite; and weights become others."""
    one = _Rank(LAYOUTS["tp2-ep2-whole"], sharded, torch.bfloat16)
    broken = ("layers.1.mlp.experts.local_experts.3.linear_fc2.weight", 0)
    before = {p: p.detach().clone() for p in one.names}
    has_it = broken in one.keys.values() and one.topology.expert_dp_rank == 1
    norm = one.step(0, broken=broken if has_it else None)
    assert not math.isfinite(norm)
    assert all(torch.equal(p, old) for p, old in before.items())
    with pytest.warns(UserWarning, match="left out") if one.topology.rank == 0 else nullcontext():
        assert math.isfinite(one.step(1))
    assert not any(torch.equal(p, old) for p, old in before.items())
    for parameter in filter(is_expert, one.names):
        parameter.data.fill_(0.25)
    masters = one.optimizer.state_dict()["master_weights"]
    experts = [master for name, master in masters.items() if "local_experts" in name]
    assert experts and all((master == 0.25).all() for master in experts)
    one.close()


def _saved(root: Path) -> list[str]:
    """Save experts of one layout as version 0.1 did, load them on others; the files there were."""
    path = root / "a.ckpt"
    of_all: dict[str, Tensor] = {}
    for layout in ("ep2", "ep4", "none", "tp2-ep2-whole"):
        context = ParallelContext.create(CPU, **LAYOUTS.get(layout, {}))  # type: ignore[arg-type]
        model = CausalLM(replace(MOE, num_query_groups=4), context, seed=5)
        weights, experts = ExpertNames(model).split(model.state_dict())
        if not of_all:
            first_format.save(path, context, weights, experts, {"precision": "x"})
            for theirs in of_all_ranks(experts, dist.group.WORLD):
                of_all |= theirs
        elif layout.startswith("tp"):
            with pytest.raises(ValueError, match=r"tensor_parallel_size=1, this run has .*=2"):
                by_rank.load_weights(path, context, experts)
        else:
            loaded = by_rank.load_weights(path, context, experts)
            assert folder.misfit(loaded, weights | experts) is None
            own = [name for name, value in experts.items() if isinstance(value, Tensor)]
            assert all(torch.equal(loaded[name], of_all[name]) for name in own)
            assert len(own) == {"ep4": 2, "none": 8}[layout]
            ranks = context.topology.ep_size
            with pytest.raises(
                ValueError, match=rf"expert_parallel_size=2, this run has .*={ranks}"
            ):
                by_rank.load_state(path, context, {"precision": "x"})
        context.destroy()
    return sorted(file.name for file in path.iterdir())


def _met(rank: int) -> None:
    """Ranks have one micro-batch, or two."""
    pieces = [MicroBatch({"batch.labels": torch.ones(3, 1).long()}, 3)] * (1 + rank % 2)
    for sizes, many in (
        ({"context_parallel_size": 2, "expert_parallel_size": 2}, len(pieces)),
        (LAYOUTS["ep2"], 2),
    ):
        context = ParallelContext.create(CPU, **sizes)  # type: ignore[arg-type]
        found = as_many(pieces, context)
        assert len(found) == many and found[: len(pieces)] == pieces
        added = [piece.slots["batch.weights"] for piece in found[len(pieces) :]]
        assert all(weights.shape == (3, 1) and not weights.any() for weights in added)
        if context.topology.experts_see_several_batches:
            with pytest.raises(ValueError, match="batches of 1 and of 2 micro-batches: all ranks"):
                check_as_many(pieces, context)
        else:
            check_as_many(pieces, context)
        context.destroy()


def _on_four_ranks(rank: int, root: Path) -> tuple[dict[str, Any], list[str]]:
    found = {layout: _trained(layout, True, torch.float32) for layout in LAYOUTS}
    for layout in ("ep2", "ep4", "tp2-ep2", "tp2-ep2-whole"):
        _trained(layout, False, torch.float32)
    _trained("ep4", True, torch.bfloat16)
    for sharded in (False, True):
        _thawed(sharded)
        _skipped_and_changed(sharded)
    _met(rank)
    return found, _saved(root)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[str]]:
    """By layout the experts that training has started with, once all went well; and files."""
    (first, *_) = run_ranks(4, _on_four_ranks, tmp_path_factory.mktemp("experts"))
    assert isinstance(first, tuple)
    return first


@pytest.fixture(scope="module")
def starts(outcome: tuple[dict[str, Any], list[str]]) -> dict[str, Any]:
    return outcome[0]


def test_gradients_norms_and_steps_are_those_of_one_process(starts: dict[str, Any]) -> None:
    assert starts.keys() == LAYOUTS.keys()


def test_each_expert_is_saved_once(outcome: tuple[dict[str, Any], list[str]]) -> None:
    states = [f"state-0000{rank}.pt" for rank in range(4)]
    experts = ["experts-00000.pt", "experts-00001.pt"]
    assert outcome[1] == ["common.pt", *experts, *states, "topology.json", "weights-00000.pt"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_start_as_those_of_one_process(layout: str, starts: dict[str, Any]) -> None:
    model = CausalLM(replace(MOE, num_query_groups=4), ParallelContext.single(CPU))
    own = {n: p.detach() for n, p in model.named_parameters() if n.startswith("layers.1.mlp")}
    assert own.keys() == starts[layout].keys()
    experts = [p for name, p in own.items() if "local_experts" in name and "fc1" in name]
    assert len(experts) == 4 and not torch.equal(experts[0], experts[1])
    for name, parts in starts[layout].items():
        torch.testing.assert_close(_joined(name, parts), own[name], rtol=0, atol=0)


def _joined(name: str, parts: dict[int, Tensor]) -> Tensor:
    values = [parts[part] for part in sorted(parts)]
    if len(values) == 1:
        return values[0]
    if "linear_fc2" in name:
        return torch.cat(values, 1)
    return torch.cat(
        [half for pair in zip(*(v.chunk(2) for v in values), strict=True) for half in pair]
    )


def test_names_of_experts_go_both_ways() -> None:
    model = CausalLM(MOE, ParallelContext.single(CPU))
    model.layers[1].mlp.local_expert_indices = [2, 3, 4, 5]
    names = ExpertNames(torch.nn.ModuleDict({"model": model}))
    first = "model.layers.1.mlp.experts.local_experts.0.linear_fc1.weight"
    third = first.replace("experts.0", "experts.2")
    assert (names.of_all(first), names.of_rank(third)) == (third, first)
    te = "model.layers.1.mlp.experts.linear_fc2.weight1"
    assert names.of_all(te) == te.replace("weight1", "weight3")
    for other in ("model.layers.1.mlp.router.weight", "model.layers.0.mlp.linear_fc1.weight"):
        assert names.of_all(other) == names.of_rank(other) == other
    others, experts = names.split({first: 1, "model.final_norm.weight": 2})
    assert (others, experts) == ({"model.final_norm.weight": 2}, {third: 1})
