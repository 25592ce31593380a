"""A Megatron-core `TransformerLayer` as operators: twice a norm, a block and a residual sum.

    forward   norm  attention  residual  norm  mlp  residual
    backward        mlp  norm            attention  norm

The second block may be a mixture of experts; such a layer's graphs have a name of their own, and so
have those of a layer whose norms are of what a block gives (`post_norm`):

    forward   attention  norm  residual  mlp  norm  residual
    backward  norm  mlp  stream  norm  attention  stream

Between the blocks hidden states are split along the sequence: [S / TP, B, H].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.moe_layer import MoELayer

from lightning_dhellam.layers import attention, experts, linear, mlp, norm, residual, router
from lightning_dhellam.layers.attention import Attention
from lightning_dhellam.layers.block import Block, Setting, Supported, check_class, check_config
from lightning_dhellam.layers.experts import Experts
from lightning_dhellam.layers.fields import check_unknown
from lightning_dhellam.layers.mlp import Mlp
from lightning_dhellam.layers.norm import Norm
from lightning_dhellam.layers.post_norm import NormedSum
from lightning_dhellam.layers.residual import Residual
from lightning_dhellam.layers.writer import GraphWriter
from lightning_dhellam.plan import Graph, GraphPair, Strand

SUPPORTED: Supported = {
    "cpu_offloading": (False,),
    "heterogeneous_block_specs": (False,),
    "mtp_num_layers": (None,),
    "pipeline_model_parallel_size": (1,),
    "recompute_granularity": (None,),
}

CHECKED = frozenset().union(
    *(block.SUPPORTED for block in (attention, experts, linear, mlp, norm, residual, router)),
    SUPPORTED,
    attention.READ,
)
"""Fields that a layer or one of its blocks looks at."""

BLOCKS: dict[type, Callable[[Any, Setting], Block]] = {
    SelfAttention: Attention.of,
    MLP: Mlp.of,
    MoELayer: Experts.of,
}
"""What lowers a block of a layer, by the class of its Megatron-core module."""


@dataclass(frozen=True)
class _Half:
    """A norm, a block and a residual sum.

    Attributes:
        x: the slot of the residual stream before it.
        y: that after it.
        is_post: whether the norm is of what the block gives, not of what it reads.
    """

    norm: Norm
    block: Block
    residual: Residual
    x: str
    y: str
    is_post: bool = False

    def forward(self, w: GraphWriter, read: str) -> str:
        """Add the block and its norm, where that comes last. Returns what joins the stream."""
        found = self.block.forward(w, read)
        return self.norm.forward(w, found) if self.is_post else found

    def backward(self, w: GraphWriter, dy: str, dx: str) -> None:
        """Add `dx` from the gradient by the stream after it."""
        joined = self.norm.output if self.is_post else self.block.output
        grad = self.residual.backward(w, dy, f"d_{joined}")
        if not self.is_post:
            grad = self.block.backward(w, grad, self.norm.output)
            self.norm.backward(w, grad, self.x, dx, residual=dy)
            return
        self.norm.backward(w, grad, self.block.written(w), f"d_{self.block.output}")
        grad = self.block.backward(w, f"d_{self.block.output}", self.x)
        w.compute(
            f"{self.norm.name}.stream.grad",
            (grad, dy),
            {dx: w.sizes.shard},
            torch.add,
            moved=3 * w.sizes.shard,
        )


def lower_transformer(layer: Any, setting: Setting) -> GraphPair:
    """Both directions of a Megatron-core `TransformerLayer`.

    Its weights are read and their `main_grad` accumulated in place.

    Raises:
        ValueError: the layer has a part, or its configuration a value, that cannot be lowered.
    """
    for supported in (SUPPORTED, norm.SUPPORTED, residual.SUPPORTED):
        check_config(layer.config, supported)
    check_unknown(layer.config, CHECKED)
    check_class(layer.cross_attention, IdentityOp, "cross_attention", setting.index)
    halves = (
        _half(layer, layer.input_layernorm, layer.self_attention, setting, "attention", "x", "mid"),
        _half(layer, layer.pre_mlp_layernorm, layer.mlp, setting, "mlp", "mid", "y"),
    )
    return GraphPair(_forward(halves, setting), _backward(halves, setting))


def _half(
    layer: Any, norm_module: Any, module: Any, setting: Setting, name: str, x: str, y: str
) -> _Half:
    make = BLOCKS.get(type(module))
    if make is None:
        raise ValueError(
            f"layer {setting.index}: its {name} is a {type(module).__name__}, which has no"
            f" lowering: use one of {', '.join(known.__name__ for known in BLOCKS)}"
        )
    block = make(module, setting)
    add = layer.self_attn_bda if name == "attention" else layer.mlp_bda
    is_post = isinstance(add, NormedSum)
    if is_post:
        check_class(norm_module, IdentityOp, f"norm before the {name}", setting.index)
        norm_module = add.norm
        if block.bias is not None:
            raise ValueError(
                f"layer {setting.index}: its {name} has a bias that joins before a norm, which has"
                " no lowering: use linear layers without bias, or norms before the blocks"
            )
    # Distinguishes the random numbers of the two sums of a layer.
    salt = 1 if name == "attention" else 2
    return _Half(
        Norm.of(norm_module, name, setting.kernels, f"layer {setting.index}"),
        block,
        Residual(
            name,
            float(layer.hidden_dropout),
            (setting.index, salt),
            setting.kernels.dropout,
            block.bias,
        ),
        x,
        y,
        is_post,
    )


def _forward(halves: tuple[_Half, _Half], setting: Setting) -> Graph:
    w = GraphWriter(_name(halves), Strand.FORWARD, setting.sizes)
    first, second = halves
    read = first.x if first.is_post else first.norm.forward(w, first.x)
    given = first.forward(w, read), first.x
    if second.is_post:
        first.residual.forward(w, given, first.y)
        read = second.x
    else:
        read = first.residual.forward_and_norm(w, given, first.y, second.norm)
    second.residual.forward(w, (second.forward(w, read), second.x), second.y)
    return w.graph({first.x: setting.sizes.shard}, (second.y,))


def _backward(halves: tuple[_Half, _Half], setting: Setting) -> Graph:
    w = GraphWriter(_name(halves), Strand.BACKWARD, setting.sizes)
    first, second = halves
    # A block that reads the stream itself has `d_mid` for its own part of the gradient.
    between = "d_stream" if second.is_post else "d_mid"
    second.backward(w, "dy", between)
    first.backward(w, between, "dx")
    return w.graph({"dy": setting.sizes.shard}, ("dx",))


def _name(halves: tuple[_Half, _Half]) -> str:
    """Kind of the layer: of its plans, and in tables and pictures.

    Attention in a window has the operators of any other, and other times.
    """
    attends, computes = (half.block for half in halves)
    kind = "mixture" if isinstance(computes, Experts) else "transformer"
    if halves[0].is_post:
        kind = f"{kind}.post_norm"
    windowed = isinstance(attends, Attention) and attends.window is not None
    return f"{kind}.windowed" if windowed else kind
