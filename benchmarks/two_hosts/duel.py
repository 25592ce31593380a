"""The sides of the two-hosts benchmark: our plans and Megatron-core, from the same weights."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.two_hosts.settings import HEAD, MEGATRON_CORE, Settings
from benchmarks.two_hosts.tap import Tap
from lightning_dhellam.bench.megatron_side import MegatronSide
from lightning_dhellam.bench.plans import PLANS, Plans
from lightning_dhellam.bench.rounds import Result, Timer, in_turn, result_of
from lightning_dhellam.bench.workload import Workload, whole
from lightning_dhellam.models import CausalLM, ModelConfig
from lightning_dhellam.parallel import ParallelContext
from lightning_dhellam.plan import Lane
from lightning_dhellam.search.measure import Profile, merged
from lightning_dhellam.search.model import Costs

_REPEATS = 3
"""Runs of each operator in a round."""


def model_config(settings: Settings) -> ModelConfig:
    """The Llama that all sides train."""
    heads = settings.hidden // HEAD
    return ModelConfig(
        num_layers=settings.layers,
        hidden_size=settings.hidden,
        ffn_hidden_size=settings.ffn,
        num_attention_heads=heads,
        num_query_groups=heads // 2,
        vocab_size=settings.vocabulary,
        max_sequence_length=settings.length,
    )


class Duel:
    """One host's part of the comparison. torch.distributed is initialised, and spans both hosts."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        device = torch.device("cpu")
        context = ParallelContext.create(device, tensor_parallel_size=dist.get_world_size())
        config = model_config(settings)
        self._tap = Tap(context.communicators[Lane.TP])
        model = CausalLM(config, context.through(Lane.TP, self._tap))
        generator = torch.Generator().manual_seed(5)
        sequences = settings.micro_batches * settings.micro_batch
        size = (sequences, settings.length + 1)
        tokens = torch.randint(0, settings.vocabulary, size, generator=generator)
        batch = {"tokens": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}
        self._work: Workload = whole(model, batch, settings.micro_batch)
        self._theirs = MegatronSide(config, context, batch, settings.micro_batch)
        self._timer = Timer(device, dist.group.WORLD)

    def measure(self) -> dict[str, Any]:
        """Profile, search, check that all sides compute the same, and time them in turn.

        The operators are timed once more in each round, for what the simulator says of the plans.
        """
        work, names = self._work, self._settings.sides
        # A connection that has idled begins slowly.
        work.engine().train(work.pieces)
        costs = Costs.of(work.profile(dist.group.WORLD))
        planned = [name for name in names if name in PLANS]
        plans = Plans.of(work.layers, costs, planned, tokens=work.tokens)
        steps = {name: self._step(name, plans) for name in names}
        parity = self._parity(steps)
        sequential = steps["sequential"]
        parts = {"compute": self._tap.silent(sequential), "link": self._tap.alone(sequential)}
        profiles: list[Profile] = []

        def profile() -> Tensor:
            profiles.append(work.profile(dist.group.WORLD, _REPEATS, rounds=1))
            return torch.zeros(())

        everything = {**parts, **steps, "profile": profile}
        sides = {name: (step,) for name, step in everything.items()}
        timed = in_turn(sides, self._timer, self._settings.rounds)
        times = {name: one for name, (one,) in timed.items()}
        cpu = {name: _cpu_seconds(step) for name, step in steps.items()}
        count = len(work.pieces)
        # The plans are those of a profile before; what they should take, on a machine that
        # drifts, operators say that were timed among the steps.
        plans = replace(plans, costs=Costs.of(merged(profiles)))
        predicted = {
            name: plans.simulate(work.layers, name, count).seconds for name in plans.builders
        }
        return {
            **{part: times[part].median for part in parts},
            "search": plans.search_seconds.get("auto"),
            "resource": plans.solutions["auto"].main.resource if "auto" in names else None,
            "sides": [
                {
                    "side": name,
                    "seconds": times[name].median,
                    "spread": times[name].spread,
                    "cpu": cpu[name],
                    "predicted": predicted.get(name),
                    "parity": parity[name],
                }
                for name in names
            ],
        }

    def _step(self, name: str, plans: Plans) -> Callable[[], Tensor]:
        if name == MEGATRON_CORE:
            return self._theirs.step
        engine = self._work.engine(plans.builders[name])
        return lambda: engine.train(self._work.pieces)

    def _parity(self, steps: dict[str, Callable[[], Tensor]]) -> dict[str, float]:
        """How far sides are from the sequential plan: ours by all results, Megatron's by loss."""
        parameters = self._work.parameters
        reference = result_of(steps["sequential"], parameters)
        found = {}
        for name, step in steps.items():
            if name == MEGATRON_CORE:
                found[name] = Result(step(), ()).distance(Result(reference.loss, ()))
            else:
                found[name] = result_of(step, parameters).distance(reference)
        return found


def _cpu_seconds(step: Callable[[], Tensor]) -> float:
    """Seconds of the processor that all threads of this process need for a step."""
    begin = time.process_time()
    step()
    return time.process_time() - begin
