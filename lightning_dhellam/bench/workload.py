"""What a benchmark trains: a rank's layers under several plans, and micro-batches for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from lightning_dhellam.agreed import conditions_of
from lightning_dhellam.autosearch.profiling import fingerprint, routings_of, take_profile
from lightning_dhellam.engine import Engine, Lanes, MicroBatch, cut, make_lanes
from lightning_dhellam.layers import lower
from lightning_dhellam.layers.balancing import LOAD
from lightning_dhellam.models import CausalLM
from lightning_dhellam.parallel.tally import Tally
from lightning_dhellam.plan import BUILDERS, Builder, Graph, GraphPair, Lane, Operator, Strand
from lightning_dhellam.plan.by_layer import USUAL, ByLayer
from lightning_dhellam.plan.passes import Recompute
from lightning_dhellam.search.measure import Profile

_SEED = 1234


@dataclass
class Workload:
    """Layers of one rank, and micro-batches to train them on.

    Attributes:
        model: The model whose weights are trained; every parameter has a `main_grad`.
        layers: The layers' graphs, first to last.
        pieces: The micro-batches of the longest step that is timed.
        kernels: The backends of the operators, by operator.
        priority: The priority of communication streams, on CUDA.
        processors: The processors that a collective occupies.
        lanes: The lanes of the device.
    """

    model: CausalLM
    layers: Sequence[GraphPair]
    pieces: Sequence[MicroBatch]
    kernels: Mapping[str, str]
    priority: int = -1
    processors: int = 0
    lanes: Lanes = field(init=False)

    def __post_init__(self) -> None:
        self.lanes = make_lanes(
            self.model.context.device, priority=self.priority, processors=self.processors
        )

    @cached_property
    def parameters(self) -> list[Parameter]:
        """The parameters that these layers train."""
        used = {
            id(parameter)
            for pair in self.layers
            for operator in pair.backward.operators
            for parameter in operator.accumulates
        }
        return [p for p in self.model.parameters() if id(p) in used]

    @property
    def tokens(self) -> int:
        """The tokens of a micro-batch."""
        return self.pieces[0].tokens

    def engine(self, builder: Builder = BUILDERS["sequential"]) -> Engine:
        """An engine that runs the plans of `builder`. Engines share the lanes and their memory."""
        return Engine(self.layers, self.lanes, builder)

    def loads(self, layers: Sequence[int], experts: int) -> Tensor:
        """How many tokens choose each of the `experts` of `layers` in a step: [layers, experts]."""
        tally = Tally()
        pieces = [MicroBatch({**p.slots, "batch.tally": tally}, p.tokens) for p in self.pieces]
        self.engine().train(pieces)
        return tally.everywhere({LOAD: experts}, layers, None, self.model.context.device)[LOAD]

    def profile(
        self,
        group: dist.ProcessGroup | None = None,
        repeats: int = 7,
        rounds: int | None = None,
    ) -> Profile:
        """The times of the operators, the largest of any rank of `group`; see `take_profile`."""
        engine, piece, context = self.engine(), self.pieces[0], self.model.context
        dtype = self.model.transformer_config.params_dtype
        made_for = conditions_of(
            context, self.model.config, dtype, len(piece.slots["batch.tokens"])
        )
        conditions_of_profile = fingerprint(engine, piece, made_for, self.kernels)
        return take_profile(
            engine,
            piece,
            conditions_of_profile,
            group=group,
            repeats=repeats,
            rounds=rounds,
            others=routings_of(engine, self.pieces, group),
        )


def whole(model: CausalLM, batch: dict[str, Tensor], micro_batch: int) -> Workload:
    """A whole model: embedding, layers, loss head. `batch` has `tokens` and `labels` [B, S]."""
    give_gradients(model)
    device = model.context.device
    pieces = cut(
        batch, micro_batch, device=device, seed=_SEED, step=0, topology=model.context.topology
    )
    lowered = lower(model)
    layers = [pair.at(batch["tokens"].shape[1]) for pair in lowered.layers]
    processors = model.context.processors(layers)
    return Workload(model, layers, pieces, lowered.kernels.names, processors=processors)


def trunk(
    model: CausalLM,
    layers: int,
    length: int,
    micro_batch: int,
    count: int,
    *,
    priority: int = -1,
    processors: int | None = None,
    context_exchange: str = "ring",
    recompute: Recompute | ByLayer = USUAL,
    fp8: str | None = None,
    fp8_all_gather: bool = False,
) -> Workload:
    """The first `layers` transformer layers alone: `count` micro-batches of [micro_batch, length].

    They start from fixed hidden states, and their loss is a linear function of what comes out, so
    that embedding and loss head, which have little to hide, do not blur the times. GEMMs can leave
    so many `processors` free; None: as many as collectives of these layers occupy. Backward makes
    `recompute` again. With `fp8` linear layers compute in 8 bits, emulated on a CPU.
    """
    give_gradients(model)
    lowered = lower(
        model,
        recompute=recompute,
        context_exchange=context_exchange,
        kernels=emulated(fp8, model.context.device),
        fp8=fp8,
        fp8_all_gather=fp8_all_gather,
    )
    inner = [pair.at(length) for pair in lowered.layers[1 : layers + 1]]
    context = model.context
    if processors is None:
        processors = context.processors(inner)
    generator = torch.Generator(context.device).manual_seed(_SEED)
    unread = torch.zeros(micro_batch, length, dtype=torch.long, device=context.device)
    (piece,) = cut(
        {"tokens": unread},
        micro_batch,
        device=context.device,
        seed=_SEED,
        step=0,
        topology=context.topology,
    )
    own = piece.tokens // micro_batch // context.topology.tp_size
    shape = (own, micro_batch, model.config.hidden_size)
    options: dict[str, Any] = {"generator": generator, "device": context.device}
    options["dtype"] = model.transformer_config.params_dtype
    x, dy = torch.randn(shape, **options), torch.randn(shape, **options) / length
    slots = {**piece.slots, "batch.key": None, "batch.whole_key": None}
    pieces = [MicroBatch(dict(slots), piece.tokens) for _ in range(count)]
    layers_and_ends = (_source(x), *inner, _sink(dy))
    return Workload(model, layers_and_ends, pieces, lowered.kernels.names, priority, processors)


def emulated(fp8: str | None, device: torch.device) -> dict[str, str] | None:
    """Backends where no kernels compute in 8 bits: what emulates them."""
    return {"fp8": "reference"} if fp8 and device.type == "cpu" else None


def _source(x: Tensor) -> GraphPair:
    """Hands out copies of the hidden states `x`, and looks at what comes back."""
    # Every operator launches something: what takes no time at all cannot be profiled.
    look = torch.empty((), device=x.device, dtype=torch.float32)

    def grad(dy: Tensor) -> None:
        look.copy_(dy.flatten()[0])

    return _pair(
        "source",
        (Operator("source", Lane.COMPUTE, (), ("y",), x.clone, 1e-12), (), ("y",)),
        (Operator("source.grad", Lane.COMPUTE, ("dy",), (), grad, 1e-12), ("dy",), ()),
    )


def _sink(dy: Tensor) -> GraphPair:
    """A loss whose gradient by the hidden states is `dy`: their inner product."""

    def loss(x: Tensor) -> Tensor:
        # Not `dot`, whose result is rounded to the type of `x`: that alone would be a difference.
        return torch.mul(x, dy).sum(dtype=torch.float32)

    return _pair(
        "sink",
        (Operator("sink", Lane.COMPUTE, ("x",), ("loss",), loss, 1e-12), ("x",), ("loss",)),
        (Operator("sink.grad", Lane.COMPUTE, (), ("dx",), dy.clone, 1e-12), (), ("dx",)),
    )


_End = tuple[Operator, tuple[str, ...], tuple[str, ...]]


def _pair(name: str, forward: _End, backward: _End) -> GraphPair:
    return GraphPair(_end(name, Strand.FORWARD, forward), _end(name, Strand.BACKWARD, backward))


def _end(name: str, direction: Strand, end: _End) -> Graph:
    operator, inputs, outputs = end
    sizes = dict.fromkeys((*inputs, *outputs), 0.0)
    return Graph(name, direction, (operator,), inputs, outputs, sizes)


def give_gradients(model: CausalLM) -> None:
    """Give every parameter an fp32 buffer to accumulate its gradient in, if it has none."""
    for parameter in model.parameters():
        if not hasattr(parameter, "main_grad"):
            grad = torch.zeros_like(parameter, dtype=torch.float32)
            parameter.main_grad = grad  # type: ignore[attr-defined]
