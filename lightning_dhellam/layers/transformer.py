"""A Megatron-core `TransformerLayer` without biases as operators: Llama's, and GPT's MLP and norms.

Shapes: S sequence, s = S / TP its part on this rank, B batch, H hidden; q, k, v heads are this
rank's. With TP > 1 activations between the linear layers are split along the sequence, so every
column-parallel linear gathers its input and every row-parallel linear scatters its output:

    forward   norm  gather|qkv  rope  attention  proj|scatter  residual
              norm  gather|fc1  swiglu           fc2 |scatter  residual

With TP = 1 the gathers and scatters are left out, and their neighbours share a slot.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_dhellam.kernels import rope
from lightning_dhellam.kernels.choose import Kernels
from lightning_dhellam.layers.norm import NormLowering
from lightning_dhellam.layers.rotary import RotaryTable
from lightning_dhellam.layers.writer import GraphWriter, Sizes
from lightning_dhellam.plan import GraphPair, Strand

ATTENTION_SALT, MLP_SALT = 1, 2
"""Distinguish the random numbers of the two residual dropouts of one layer."""


@dataclass(frozen=True)
class TransformerLowering:
    """Everything that the operators of one layer are made from.

    Attributes:
        layer: a Megatron-core TransformerLayer; its weights are read and accumulated in place.
        sizes: of slots and costs.
        heads: of this rank.
        rotary: cosines and sines of the positions.
        kernels: what computes the operators.
        regather: gather a column-parallel input again in backward, instead of keeping it.
        index: of the layer in the model, which enters its random numbers.
    """

    layer: Any
    sizes: Sizes
    heads: rope.Heads
    rotary: RotaryTable
    kernels: Kernels
    regather: bool
    index: int

    @property
    def scale(self) -> float:
        """Factor on the attention scores."""
        return float(self.heads.size**-0.5)

    @property
    def dropout(self) -> float:
        """Probability of dropping an element before a residual sum."""
        return float(self.layer.hidden_dropout)

    def lower(self) -> GraphPair:
        """Both directions of the layer."""
        return GraphPair(self._forward().graph({"x": self.sizes.shard}, ("y",)), self._backward())

    def _forward(self) -> GraphWriter:
        w = GraphWriter("transformer", Strand.FORWARD, self.sizes)
        sizes, attn, mlp = self.sizes, self.layer.self_attention, self.layer.mlp
        self._norm(w, "attention", "x", self._input_norm)
        read = w.gather("qkv.gather", "attention_norm", "attention_norm_full", sizes.hidden)
        w.gemm("qkv.gemm", read, "qkv", attn.linear_qkv.weight)
        self._attention(w)
        w.gemm("proj.gemm", "context", "proj_partial", attn.linear_proj.weight)
        read = w.scatter("proj.scatter", "proj_partial", "proj", sizes.hidden)
        if self._mlp_norm.fuses and not self.dropout:
            self._residual_norm(w, (read, "x"), "mid", self._mlp_norm)
        else:
            self._residual(w, "attention.residual", (read, "x"), "mid", ATTENTION_SALT)
            self._norm(w, "mlp", "mid", self._mlp_norm)
        read = w.gather("fc1.gather", "mlp_norm", "mlp_norm_full", sizes.hidden)
        fc1, fc2 = mlp.linear_fc1.weight, mlp.linear_fc2.weight
        w.gemm("fc1.gemm", read, self._inner, fc1)
        w.compute(
            self._activation,
            (self._inner,),
            {"act": sizes.wide(fc2.shape[1])},
            getattr(self.kernels, self._activation).forward,
            moved=sizes.wide(fc1.shape[0] + fc2.shape[1]),
        )
        w.gemm("fc2.gemm", "act", "fc2_partial", fc2)
        read = w.scatter("fc2.scatter", "fc2_partial", "fc2", sizes.hidden)
        self._residual(w, "mlp.residual", (read, "mid"), "y", MLP_SALT)
        return w

    @property
    def _input_norm(self) -> NormLowering:
        return NormLowering(self.layer.input_layernorm, self.kernels)

    @property
    def _mlp_norm(self) -> NormLowering:
        return NormLowering(self.layer.pre_mlp_layernorm, self.kernels)

    @property
    def _activation(self) -> str:
        """The operator that stands between the two linear layers of the MLP."""
        return "swiglu" if self.layer.config.gated_linear_unit else "gelu"

    @property
    def _inner(self) -> str:
        """The slot of what the activation reads."""
        return "gate_up" if self._activation == "swiglu" else "up"

    def _norm(self, w: GraphWriter, name: str, read: str, norm: NormLowering) -> None:
        w.compute(
            f"{name}.norm",
            (read,),
            {f"{name}_norm": self.sizes.shard, f"{name}_rstd": self._statistic(norm)},
            norm.forward,
            moved=2 * self.sizes.shard,
        )

    def _residual_norm(
        self, w: GraphWriter, reads: tuple[str, str], write: str, norm: NormLowering
    ) -> None:
        shard = self.sizes.shard
        w.compute(
            "mlp.residual_norm",
            reads,
            {write: shard, "mlp_norm": shard, "mlp_rstd": self._statistic(norm)},
            norm.residual_forward,
            moved=4 * shard,
        )

    def _statistic(self, norm: NormLowering) -> float:
        return norm.statistics * self.sizes.statistic

    def _attention(self, w: GraphWriter) -> None:
        heads, scale = self.heads, self.scale
        rope, backend = self.kernels.rope, self.kernels.attention
        width = self.sizes.wide(heads.queries * heads.size)
        rotated = self.sizes.wide((heads.queries + 2 * heads.groups) * heads.size)
        w.compute(
            "rope",
            ("qkv",),
            {"rotated": rotated},
            lambda qkv: rope.forward(qkv, *self.rotary(qkv), heads),
            moved=2 * rotated,
        )
        w.compute(
            "attention",
            ("rotated",),
            {"context": width, "lse": 4 * heads.queries, "attention_state": 0},
            lambda rotated: backend.forward(*rope.split(rotated, heads), scale),
            flops=self._attention_flops,
        )

    @property
    def _attention_flops(self) -> float:
        """Per token, causal: half of the full square of the longest sequence."""
        return 2.0 * self.heads.queries * self.heads.size * self.rotary.length

    def _residual(
        self, w: GraphWriter, name: str, reads: tuple[str, str], write: str, salt: int
    ) -> None:
        p, salts, dropout = self.dropout, (self.index, salt), self.kernels.dropout

        def run(x: Tensor, residual: Tensor, key: int | None) -> Tensor:
            if key is None:
                return residual + x
            added: Tensor = dropout.forward_add(x, residual, p, dropout.derive_key(key, *salts))
            return added

        w.compute(
            name,
            (*reads, "batch.key") if p else reads,
            {write: self.sizes.shard},
            run if p else lambda x, residual: residual + x,
            moved=3 * self.sizes.shard,
        )

    def _backward(self) -> Any:
        w = GraphWriter("transformer", Strand.BACKWARD, self.sizes)
        sizes, attn, mlp = self.sizes, self.layer.self_attention, self.layer.mlp
        fc1, fc2 = mlp.linear_fc1.weight, mlp.linear_fc2.weight
        grad = self._dropout_grad(w, "mlp.dropout.grad", "dy", "d_fc2", MLP_SALT)
        grad = w.gather("fc2.grad_gather", grad, "d_fc2_full", sizes.hidden)
        w.dgrad("fc2.dgrad", grad, "d_act", fc2)
        w.wgrad("fc2.wgrad", grad, "act", fc2)
        w.compute(
            f"{self._activation}.grad",
            ("d_act", self._inner),
            {f"d_{self._inner}": sizes.wide(fc1.shape[0])},
            getattr(self.kernels, self._activation).backward,
            moved=sizes.wide(2 * fc1.shape[0] + fc2.shape[1]),
        )
        grad = self._column_backward(w, "fc1", f"d_{self._inner}", "mlp_norm", fc1)
        self._norm_grad(w, "mlp", grad, "mid", "dy", "d_mid", self._mlp_norm)

        proj, qkv = attn.linear_proj.weight, attn.linear_qkv.weight
        grad = self._dropout_grad(w, "attention.dropout.grad", "d_mid", "d_proj", ATTENTION_SALT)
        grad = w.gather("proj.grad_gather", grad, "d_proj_full", sizes.hidden)
        w.dgrad("proj.dgrad", grad, "d_context", proj)
        w.wgrad("proj.wgrad", grad, "context", proj)
        self._attention_grad(w)
        grad = self._column_backward(w, "qkv", "d_qkv", "attention_norm", qkv)
        self._norm_grad(w, "attention", grad, "x", "d_mid", "dx", self._input_norm)
        return w.graph({"dy": self.sizes.shard}, ("dx",))

    def _column_backward(self, w: GraphWriter, name: str, grad: str, read: str, weight: Any) -> str:
        """Gradients of a column-parallel linear. Returns the slot of its input's gradient."""
        hidden = self.sizes.hidden
        w.dgrad(f"{name}.dgrad", grad, f"d_{read}_full", weight)
        scattered = w.scatter(f"{name}.grad_scatter", f"d_{read}_full", f"d_{read}", hidden)
        if not weight.requires_grad:
            return scattered  # nothing else reads the input again
        if self.regather:
            whole = w.gather(f"{name}.regather", read, f"{read}_again", hidden)
        else:
            whole = f"{read}_full" if self.sizes.tp > 1 else read
        w.wgrad(f"{name}.wgrad", grad, whole, weight)
        return scattered

    def _norm_grad(
        self,
        w: GraphWriter,
        name: str,
        grad: str,
        x: str,
        residual: str,
        write: str,
        norm: NormLowering,
    ) -> None:
        w.compute(
            f"{name}.norm.grad",
            (grad, x, f"{name}_rstd", residual),
            {write: self.sizes.shard},
            norm.backward,
            moved=4 * self.sizes.shard,
            accumulates=norm.parameters,
        )

    def _dropout_grad(self, w: GraphWriter, name: str, read: str, write: str, salt: int) -> str:
        p, salts, dropout = self.dropout, (self.index, salt), self.kernels.dropout
        if not p:
            return read
        w.compute(
            name,
            (read, "batch.key"),
            {write: self.sizes.shard},
            lambda dy, key: dropout.backward(dy, p, dropout.derive_key(key, *salts)),
            moved=2 * self.sizes.shard,
        )
        return write

    def _attention_grad(self, w: GraphWriter) -> None:
        heads, scale = self.heads, self.scale
        rope, backend = self.kernels.rope, self.kernels.attention
        query = self.sizes.wide(heads.queries * heads.size)
        key = self.sizes.wide(heads.groups * heads.size)

        def run(
            dout: Tensor, rotated: Tensor, out: Tensor, lse: Tensor, state: Any
        ) -> tuple[Tensor, Tensor, Tensor]:
            q, k, v = rope.split(rotated, heads)
            grads: tuple[Tensor, Tensor, Tensor]
            grads = backend.backward(dout, q, k, v, out, lse, state, scale)
            return grads

        w.compute(
            "attention.grad",
            ("d_context", "rotated", "context", "lse", "attention_state"),
            {"dq": query, "dk": key, "dv": key},
            run,
            flops=2.5 * self._attention_flops,
        )
        w.compute(
            "rope.grad",
            ("dq", "dk", "dv"),
            {"d_qkv": query + 2 * key},
            lambda dq, dk, dv: rope.backward(dq, dk, dv, *self.rotary(dq), heads),
            moved=2 * (query + 2 * key),
        )
