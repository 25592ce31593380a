"""An embedding and an output layer with one weight, on different stages of a pipeline.

The stage of the embedding has the parameter, which is stepped and saved as any other. That of the
output layer has a copy of it, which comes before each step, and gives its gradient back behind,
unless the weight is frozen:

    first stage   weight.send |  ...            | d_weight.receive  d_weight.add
    last stage                | weight.receive  | ...  d_weight.send
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_dhellam.layers.writer import main_grad
from lightning_dhellam.parallel import collectives
from lightning_dhellam.parallel.gradients import start_over, taken_first
from lightning_dhellam.plan import BEGIN, Collective, Ends, Lane, Operator


def lower_tied(model: Any) -> Ends:
    """The operators by which stages share a tied weight; none where one stage has both.

    Raises:
        ValueError: the stages were connected for a model that ties nothing.
    """
    context = model.context
    loop = context.placement.loop
    if not loop or not model.config.tie_embeddings:
        return Ends()
    if not context.edges.keys() >= {*loop}:
        raise ValueError(
            "build_model has made a model with tie_embeddings=True, but stages were connected for"
            " tie_embeddings=False: say so in the configuration that the module is given"
        )
    if model.embedding is not None:
        ends = _of_first(model.embedding.word_embeddings.weight, context)
    elif model.tied_copy is not None:
        ends = _of_last(model.tied_copy, context)
    else:
        return Ends()
    return ends if model.trains_tied else Ends(ends.prologue)


def _of_first(weight: torch.nn.Parameter, context: Any) -> Ends:
    ahead, back = context.placement.loop

    def give(_: Any) -> collectives.Pending:
        return collectives.send(weight.detach(), ahead.target, context.edges[ahead])

    def take() -> collectives.Pending:
        out = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
        return collectives.receive(out, back.source, context.edges[back])

    def add(grad: Tensor) -> None:
        if weight.requires_grad:
            main_grad(weight).add_(grad)

    trained = (weight,) if weight.requires_grad else ()
    return Ends(
        (_transfer("weight.send", (BEGIN,), (), give, str(ahead)),),
        (
            _transfer("d_weight.receive", (), ("step.d_weight",), take, str(back)),
            Operator(
                "d_weight.add", Lane.COMPUTE, ("step.d_weight",), (), add, 0.0, accumulates=trained
            ),
        ),
    )


def _of_last(copy: Any, context: Any) -> Ends:
    ahead, back = context.placement.loop

    def take(_: Any) -> collectives.Pending:
        return collectives.receive(copy.detach(), ahead.source, context.edges[ahead])

    def begin(_: Tensor) -> None:
        if copy.requires_grad:
            start_over(copy)

    def end() -> Tensor:
        grad: Tensor = copy.main_grad
        if taken_first(copy):
            grad.zero_()  # no layer has added to it
        return grad

    def give(grad: Tensor) -> collectives.Pending:
        return collectives.send(grad, back.target, context.edges[back])

    return Ends(
        (
            _transfer("weight.receive", (BEGIN,), ("step.weight",), take, str(ahead)),
            Operator("weight.begin", Lane.COMPUTE, ("step.weight",), (), begin, 0.0),
        ),
        (
            Operator("d_weight.end", Lane.COMPUTE, (), ("step.d_weight",), end, 0.0),
            _transfer("d_weight.send", ("step.d_weight",), (), give, str(back)),
        ),
    )


def _transfer(
    name: str, reads: tuple[str, ...], writes: tuple[str, ...], run: Any, edge: str
) -> Operator:
    collective = Collective.SEND if name.endswith(".send") else Collective.RECEIVE
    return Operator(name, Lane.PP, reads, writes, run, 0.0, edge=edge, collective=collective)
