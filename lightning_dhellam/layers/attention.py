"""Self-attention as operators: projection, rotary embedding if there is one, attention, projection.

    forward   gather|qkv  (head_norm)  (rope)  attention  proj|scatter
    backward  gather|proj  attention  (rope)  (head_norm)  qkv|scatter

Shapes: S sequence, B batch, H query heads, G key and value heads of this rank, D head size. With
rotary embedding the kernel that turns the heads also puts them in order; without, attention reads
the heads where the projection has left them. Where samples hold several documents, attention is
within each (`among`); where ranks share sequences, it is that of `shared`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor
from torch.nn import Parameter

from lightning_dhellam.kernels.attention.heads import Heads, Parts
from lightning_dhellam.layers.among import Among, Dropping
from lightning_dhellam.layers.block import Setting, Supported, check_config
from lightning_dhellam.layers.fields import window_of
from lightning_dhellam.layers.head_norm import HeadNorm
from lightning_dhellam.layers.linear import ColumnLinear, RowLinear
from lightning_dhellam.layers.rules import of_documents, on_tp
from lightning_dhellam.layers.shared import SharedAttention
from lightning_dhellam.layers.shared_window import SharedWindow
from lightning_dhellam.layers.ways import Gathered
from lightning_dhellam.layers.wide_norm import SharedNorm
from lightning_dhellam.layers.writer import GraphWriter
from lightning_dhellam.plan.layout import Held

SUPPORTED: Supported = {
    "apply_query_key_layer_scaling": (False,),
    "attention_output_gate": (False,),
    "experimental_attention_variant": (None,),
    "linear_attention_freq": (None,),
    "multi_latent_attention": (False,),
    "no_rope_freq": (None,),
    "qk_clip": (False,),
    "qk_l2_norm": (False,),
    "rotary_interleaved": (False,),
    "softmax_type": ("vanilla",),
}

SALT = 3
"""Counter of the dropout of weights: the sums of the layer have others."""

READ = frozenset({"window_attn_skip_freq", "window_size"})
"""Fields of which a layer's window is made."""

_BACKWARD = 2.5
"""FLOPs of backward in those of forward: the scores are computed again."""


@dataclass(frozen=True)
class Attention:
    """A Megatron-core `SelfAttention`, causal.

    Attributes:
        qkv: from hidden states to queries, keys and values.
        proj: from what the heads have found to hidden states.
        heads: of this rank.
        setting: what it is lowered with.
        norm: of queries and keys, if there is one.
        given_scale: factor on the scores, where it does not follow from the heads' width.
        drops: probability of dropping a weight that a query gives to a key.
        window: tokens that each attends to, of itself and those before it; None for all.
    """

    qkv: ColumnLinear
    proj: RowLinear
    heads: Heads
    setting: Setting
    norm: HeadNorm | SharedNorm | None = None
    given_scale: float | None = None
    drops: float = 0.0
    window: int | None = None

    @classmethod
    def of(cls, module: Any, setting: Setting) -> Attention:
        """What lowers `module`; what it would compute otherwise is refused by name."""
        check_config(module.config, SUPPORTED)
        ranks = (setting.sizes.context.topology.cp_size,)
        check_config(module.config, {"context_parallel_size": ranks})
        _check_module(module, setting.index)
        groups = module.num_query_groups_per_partition
        heads = Heads(
            groups,
            module.num_attention_heads_per_partition // groups,
            module.hidden_size_per_attention_head,
        )
        return cls(
            ColumnLinear.of(module.linear_qkv, "qkv", Held.HEADS, setting),
            RowLinear.of(module.linear_proj, "proj", Held.HEADS, setting),
            heads,
            setting,
            HeadNorm.of(module, heads, setting.kernels, setting.index),
            module.config.softmax_scale,
            float(module.config.attention_dropout),
            _window(module, setting),
        )

    @property
    def output(self) -> str:
        """The name of the result, which is that of its last linear layer."""
        return self.proj.name

    @property
    def bias(self) -> Parameter | None:
        """The bias of its last linear layer, which joins with the residual stream."""
        return self.proj.bias

    @property
    def scale(self) -> float:
        """Factor on the attention scores."""
        return float(self.heads.size**-0.5 if self.given_scale is None else self.given_scale)

    def forward(self, w: GraphWriter, read: str) -> str:
        """Add the operators of forward. Returns the slot of the result [s, B, hidden]."""
        self.qkv.forward(w, read, "qkv")
        if self.norm is not None:
            self.norm.forward(w, "qkv", self._heads)
        self._rope(w)
        if self._shared is not None:
            self._shared.forward(w)
        else:
            self._attend(w)
        return self.proj.forward(w, "context")

    def written(self, w: GraphWriter) -> str:
        """The slot of the result that `forward` returned."""
        return self.proj.written(w)

    def backward(self, w: GraphWriter, grad: str, read: str) -> str:
        """Add the operators of backward. Returns the slot of the gradient by `read`."""
        self.proj.backward(w, grad, "context")
        if self._shared is not None:
            self._shared.backward(w)
        elif self.setting.rotary is None:
            self._attend_grad(w)
        else:
            self._attend_grad_of_parts(w)
        if self.setting.rotary is not None:
            self._rope_grad(w)
        elif self._shared is not None:
            self._join(w)
        if self.norm is not None:
            self.norm.backward(w, f"d_{self._heads}", "qkv", "d_qkv")
        return self.qkv.backward(w, "d_qkv", read)

    @cached_property
    def _shared(self) -> SharedAttention | SharedWindow | None:
        """What attends where context-parallel ranks share sequences."""
        kernels, way = self.setting.kernels, self.setting.way
        if way is None:
            return None
        if self.window is not None:
            wide = replace(way.travelling, narrow=False)
            gathered = Gathered(way.rank, way.ranks, way.dtype, wide)
            return SharedWindow(self.heads, self._among, self._read, self._cut, gathered, _BACKWARD)
        return SharedAttention(
            self.heads, self._among, self._read, self._cut, kernels, way, _BACKWARD
        )

    @property
    def _heads(self) -> str:
        """The slot of the heads as the projection lays them, normalised if they are."""
        return "qkv" if self.norm is None else "heads"

    @property
    def _read(self) -> str:
        """The slot of the heads that attention reads."""
        return self._heads if self.setting.rotary is None else "rotated"

    def _cut(self, heads: Tensor) -> Parts:
        """Queries, keys and values of what attention reads."""
        return self.heads.cut(heads) if self.setting.rotary is None else self.heads.split(heads)

    def _rope(self, w: GraphWriter) -> None:
        rope, rotary, heads = self.setting.kernels.rope, self.setting.rotary, self.heads
        if rotary is None:
            return
        size = w.sizes.wide(heads.channels)
        w.compute(
            "rope",
            (self._heads, "batch.positions"),
            {"rotated": size},
            lambda qkv, positions: rope.forward(qkv, positions, *rotary(qkv), heads),
            moved=2 * size,
            rule=on_tp((Held.HEADS, Held.REPLICATED), Held.HEADS),
        )

    def _rope_grad(self, w: GraphWriter) -> None:
        rope, rotary, heads = self.setting.kernels.rope, self.setting.rotary, self.heads
        assert rotary is not None
        size = w.sizes.wide(heads.channels)
        w.compute(
            "rope.grad",
            ("dq", "dk", "dv", "batch.positions"),
            {f"d_{self._heads}": size},
            lambda dq, dk, dv, positions: rope.backward(dq, dk, dv, positions, *rotary(dq), heads),
            moved=2 * size,
            rule=on_tp((*[Held.HEADS] * 3, Held.REPLICATED), Held.HEADS),
        )

    def _join(self, w: GraphWriter) -> None:
        """Put gradients by queries, keys and values where the projection has the heads."""
        size = w.sizes.wide(self.heads.channels)
        join = self.heads.join
        write = {f"d_{self._heads}": size}
        w.compute("attention.join", ("dq", "dk", "dv"), write, join, moved=2 * size)

    def _attend(self, w: GraphWriter) -> None:
        among, queries = self._among, self.heads.queries

        def run(*read: Any) -> tuple[Tensor, Tensor, Any]:
            told, (heads,) = among.apart(read)
            return among.forward(*self._cut(heads), told)

        w.compute(
            "attention",
            (*among.told, self._read),
            {
                "context": w.sizes.wide(queries * self.heads.size),
                "lse": 4 * queries,
                "attention_state": 0,
            },
            run,
            **self._cost(w),
            records=("attention_state",) if among.records else (),
            rule=of_documents(Held.HEADS, 1, among.told),
        )

    def _cost(self, w: GraphWriter, times: float = 1.0) -> dict[str, Any]:
        """What it costs: with a window it does not grow with the sequence."""
        if self.window is None:
            return {"growing": times * self.heads.flops(1)}
        return {"flops": times * self.heads.flops(w.sizes.length, self.window)}

    @cached_property
    def _among(self) -> Among:
        """What attends: within documents, where samples hold several."""
        return Among(self.setting.kernels, self.scale, self._dropping, self.window)

    @property
    def _dropping(self) -> Dropping | None:
        if not self.drops:
            return None
        topology, here = self.setting.sizes.context.topology, self.heads.queries
        return Dropping(
            self.drops,
            (self.setting.index, SALT),
            topology.tp_rank * here,
            topology.tp_size * here,
            topology.cp_rank,
            topology.cp_size,
        )

    def _grads(self, *read: Any) -> Parts:
        told, (dout, heads, out, lse, state) = self._among.apart(read)
        return self._among.backward(dout, *self._cut(heads), out, lse, state, told)

    def _attend_grad_of_parts(self, w: GraphWriter) -> None:
        """Gradients by queries, keys and values, each in a slot of its own."""
        query = w.sizes.wide(self.heads.queries * self.heads.size)
        key = w.sizes.wide(self.heads.groups * self.heads.size)
        self._add_grad(w, {"dq": query, "dk": key, "dv": key}, self._grads)

    def _attend_grad(self, w: GraphWriter) -> None:
        """The gradient by the projection, with the heads where it has them."""

        join, size = self.heads.join, w.sizes.wide(self.heads.channels)
        self._add_grad(w, {f"d_{self._heads}": size}, lambda *read: join(*self._grads(*read)))

    def _add_grad(self, w: GraphWriter, writes: dict[str, float], run: Any) -> None:
        w.compute(
            "attention.grad",
            (*self._among.told, "d_context", self._read, "context", "lse", "attention_state"),
            writes,
            run,
            **self._cost(w, _BACKWARD),
            rule=of_documents(Held.HEADS, 5, self._among.told),
        )


def _window(module: Any, setting: Setting) -> int | None:
    """The window of a layer's attention, of Megatron-core's configuration."""
    window = window_of(module.config, module.layer_number)
    dropped = float(module.config.attention_dropout)
    if window is not None and dropped:
        raise ValueError(
            f"layer {setting.index}: its attention has a window of {window} tokens, which one that"
            f" drops weights does not keep: set attention_dropout={dropped} to 0, or leave the"
            " window out"
        )
    return window


def _check_module(module: Any, index: int) -> None:
    """Refuse what the configuration does not tell."""
    if module.attn_mask_type is not AttnMaskType.causal:
        raise ValueError(
            f"layer {index}: its attention has the mask {module.attn_mask_type.name}: use"
            " attn_mask_type=AttnMaskType.causal"
        )
