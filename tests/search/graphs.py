"""Graphs of a Llama layer at the size of Llama-3-70B, TP 8, with times of an H200: never run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lightning_dhellam.plan import Graph, GraphPair
from lightning_dhellam.search.measure import Fingerprint, Samples, Target
from lightning_dhellam.search.model import Costs
from tests.plan.graphs import graph, toy_pair

TOKENS = 8192
TP, HIDDEN, FEED_FORWARD, HEADS, GROUPS, HEAD = 8, 8192, 28672, 64, 8, 128
FLOPS, ATTENTION_FLOPS, MEMORY = 700e12, 450e12, 4e12

FORWARD = """
attention.norm compute: x -> attention_norm attention_rstd
qkv.gather tp: attention_norm -> attention_norm_full
qkv.gemm compute: attention_norm_full -> qkv
rope compute: qkv -> rotated
attention compute: rotated -> context lse
proj.gemm compute: context -> proj_partial
proj.scatter tp: proj_partial -> proj
attention.residual compute: proj x -> mid
mlp.norm compute: mid -> mlp_norm mlp_rstd
fc1.gather tp: mlp_norm -> mlp_norm_full
fc1.gemm compute: mlp_norm_full -> gate_up
swiglu compute: gate_up -> act
fc2.gemm compute: act -> fc2_partial
fc2.scatter tp: fc2_partial -> fc2
mlp.residual compute: fc2 mid -> y
"""
BACKWARD = """
fc2.grad_gather tp: dy -> d_fc2_full
fc2.dgrad compute: d_fc2_full -> d_act
fc2.wgrad compute: d_fc2_full act ->
swiglu.grad compute: d_act gate_up -> d_gate_up
fc1.dgrad compute: d_gate_up -> d_mlp_norm_full
fc1.grad_scatter tp: d_mlp_norm_full -> d_mlp_norm
fc1.regather tp: mlp_norm -> mlp_norm_again
fc1.wgrad compute: d_gate_up mlp_norm_again ->
mlp.norm.grad compute: d_mlp_norm mid mlp_rstd dy -> d_mid
proj.grad_gather tp: d_mid -> d_proj_full
proj.dgrad compute: d_proj_full -> d_context
proj.wgrad compute: d_proj_full context ->
attention.grad compute: d_context rotated context lse -> d_rotated
rope.grad compute: d_rotated -> d_qkv
qkv.dgrad compute: d_qkv -> d_attention_norm_full
qkv.grad_scatter tp: d_attention_norm_full -> d_attention_norm
qkv.regather tp: attention_norm -> attention_norm_again
qkv.wgrad compute: d_qkv attention_norm_again ->
attention.norm.grad compute: d_attention_norm x attention_rstd d_mid -> dx
"""
EMBEDDING = (
    "embedding.lookup compute: batch.tokens -> found\nembedding.scatter tp: found -> y",
    "embedding.grad_gather tp: dy -> d_found\nembedding.wgrad compute: d_found batch.tokens ->",
)
HEAD_FORWARD = """
final.norm compute: x -> final_norm final_rstd
output.gather tp: final_norm -> final_norm_full
output.gemm compute: final_norm_full -> logits
loss.statistics compute: logits batch.labels -> statistics
loss.gather tp: statistics -> statistics_all
loss.combine compute: statistics_all batch.weights -> loss head_lse
"""
HEAD_BACKWARD = """
loss.grad compute: logits batch.labels head_lse -> d_logits
output.dgrad compute: d_logits -> d_final_norm_full
output.grad_scatter tp: d_final_norm_full -> d_final_norm
output.regather tp: final_norm -> final_norm_again
output.wgrad compute: d_logits final_norm_again ->
final.norm.grad compute: d_final_norm x final_rstd -> dx
"""

_QKV = (HEADS + 2 * GROUPS) * HEAD // TP
_WEIGHTS = {
    "qkv": _QKV * HIDDEN,
    "proj": HIDDEN * HIDDEN // TP,
    "fc1": 2 * FEED_FORWARD // TP * HIDDEN,
    "fc2": FEED_FORWARD // TP * HIDDEN,
    "output": 128256 // TP * HIDDEN,
}
_CHANNELS = {
    "qkv": _QKV,
    "rotated": _QKV,
    "context": HIDDEN // TP,
    "gate_up": 2 * FEED_FORWARD // TP,
    "act": FEED_FORWARD // TP,
    "logits": 128256 // TP,
    "lse": 2 * HEADS // TP,
}


def _slot_bytes(slot: str) -> float:
    """bf16: hidden states of every token, or of one rank's part of the sequence."""
    name = slot.removeprefix("d_")
    if name in _CHANNELS:
        return 2.0 * _CHANNELS[name]
    if name.endswith(("_full", "_again", "_partial")) or name == "found":
        return 2.0 * HIDDEN
    if name.endswith("rstd") or name.startswith(("statistics", "head_lse", "loss")):
        return 4 / TP
    return 2.0 * HIDDEN / TP


def sized(item: Graph) -> Graph:
    """The same graph with sizes of slots and nominal costs at 70B."""
    slots = {slot: _slot_bytes(slot) for slot in item.written}
    operators = tuple(
        replace(o, cost=_operator_seconds(o.name, o.lane, 370e9) / TOKENS) for o in item.operators
    )
    return replace(item, operators=operators, bytes_per_token=slots)


def pair(name: str, texts: tuple[str, str], outer: tuple[str, str, str, str]) -> GraphPair:
    """A layer from the text of its two graphs, their inputs and their outputs."""
    x, y, dy, dx = outer
    forward = graph("forward", texts[0], x, y, name)
    return GraphPair(sized(forward), sized(graph("backward", texts[1], dy, dx, name)))


def transformer() -> GraphPair:
    """A layer between the first and the last."""
    return pair("transformer", (FORWARD, BACKWARD), ("x", "y", "dy", "dx"))


def closed(layer: GraphPair) -> GraphPair:
    """A layer that takes in nothing: what comes from outside the only layer is not in a walk."""
    free = {"y": 0.0, "dx": 0.0}
    graphs = (layer.forward, layer.backward)
    return GraphPair(*(replace(g, bytes_per_token={**g.bytes_per_token, **free}) for g in graphs))


def model(layers: int) -> list[GraphPair]:
    """Embedding, transformer layers, head."""
    embedding = pair("embedding", EMBEDDING, ("", "y", "dy", ""))
    head = pair("head", (HEAD_FORWARD, HEAD_BACKWARD), ("x", "loss", "", "dx"))
    return [embedding, *[transformer()] * layers, head]


def _operator_seconds(name: str, lane: str, link: float) -> float:
    if lane != "compute":
        moved = 2.0 * HIDDEN * TOKENS * (TP - 1) / TP
        return 20e-6 if name == "loss.gather" else moved / link
    if name in ("attention", "attention.grad"):
        flops = 2.0 * HEADS * HEAD // TP * TOKENS * TOKENS
        return (2.5 if name.endswith("grad") else 1.0) * flops / ATTENTION_FLOPS
    part = name.split(".")[0]
    if name.endswith((".gemm", ".dgrad", ".wgrad")) and part in _WEIGHTS:
        return 2.0 * _WEIGHTS[part] * TOKENS / FLOPS
    channels = 3 * FEED_FORWARD // TP if "swiglu" in name else 3 * HIDDEN // TP
    return max(5e-6, 2.0 * channels * TOKENS / MEMORY)


_HEAVY = {"fc1.gemm": (3.2, 1.05), "qkv.gemm": (2.8, 1.1), "fc2.gemm": (1.2, 1.05)}


def costs(graphs: Sequence[Graph], link: float, slowdowns: bool = False) -> Costs:
    """Times at a link of so many bytes per second; with slowdowns those of a copy by SMs."""
    keys = {g.fingerprint: {o.name: o.name for o in g.operators} for g in graphs}
    operators = {o.name: o for g in graphs for o in g.operators}
    seconds = {name: _operator_seconds(name, o.lane, link) for name, o in operators.items()}
    slow = {
        (a.name, b.name): _HEAVY.get(b.name, (1.25, 1.06))
        for a in operators.values()
        for b in operators.values()
        if slowdowns and a.is_communication and not b.is_communication
    }
    return Costs(keys, seconds, slow)


def graphs_of(layers: Sequence[GraphPair]) -> list[Graph]:
    """Every distinct graph."""
    both = [graph for layer in layers for graph in (layer.forward, layer.backward)]
    return list({graph.fingerprint: graph for graph in both}.values())


def two_lanes() -> GraphPair:
    """A layer of eight operators that communicates on two lanes, tp and cp."""
    forward = graph(
        "forward",
        """
        norm compute: x -> n
        gather tp: n -> whole
        exchange cp: n -> keys
        gemm compute: whole keys -> y
        """,
        "x",
        "y",
        "lanes",
    )
    backward = graph(
        "backward",
        """
        dgrad compute: dy -> d_whole
        grad_scatter tp: d_whole -> d_n
        grad_exchange cp: dy -> d_keys
        norm.grad compute: d_n d_keys x -> dx
        """,
        "dy",
        "dx",
        "lanes",
    )
    return GraphPair(forward, backward)


def two_lanes_costs(seconds: dict[str, float], disturbed: float) -> tuple[GraphPair, Costs]:
    """The pair of `two_lanes`, whose lanes slow each other down by a factor of `disturbed`."""
    pair = two_lanes()
    graphs = (pair.forward, pair.backward)
    operators = [operator for item in graphs for operator in item.operators]
    slow = {
        (a.name, b.name): (disturbed, disturbed)
        for a in operators
        for b in operators
        if a.is_communication and b.is_communication and a.lane is not b.lane
    }
    keys = {item.fingerprint: {o.name: o.name for o in item.operators} for item in graphs}
    return pair, Costs(keys, {o.name: seconds.get(o.name, 1.0) for o in operators}, slow)


def toy_costs(seconds: dict[str, float], **options: float) -> tuple[GraphPair, Costs]:
    """The toy pair with given seconds; operators without one take 1."""
    toy = toy_pair()
    graphs = (toy.forward, toy.backward)
    keys = {g.fingerprint: {o.name: o.name for o in g.operators} for g in graphs}
    times = {o.name: seconds.get(o.name, 1.0) for g in graphs for o in g.operators}
    return toy, Costs(keys, times, **options)  # type: ignore[arg-type]


FINGERPRINT = Fingerprint(
    device="NVIDIA H200",
    versions={"torch": "2.11"},
    sizes={"world": 8, "tp": 8, "dp": 1},
    shapes={"hidden": HIDDEN, "tokens": TOKENS},
    dtype="bfloat16",
    graphs={},
)


class FakeBench:
    """Times operators by what `costs` says, with a spread around it."""

    def __init__(
        self, given: Costs, spread: float = 0.05, broken: str = "", lead: float = 0.0
    ) -> None:
        self.given = given
        self.spread = spread
        self.broken = broken
        self.measured: list[str] = []
        self.lead = lead

    def _around(self, seconds: float) -> Samples:
        return Samples(tuple(seconds * (1 + self.spread * x) for x in (-1, -0.5, 0, 0.5, 1)))

    def alone(self, target: Target) -> Samples:
        if target.operator.name == self.broken:
            raise RuntimeError("out of memory")
        self.measured.append(target.key)
        return self._around(self.given.alone(target.graph, target.operator.name))

    def beside(self, communication: Target, compute: Target) -> tuple[Samples, Samples]:
        together = _started_together(
            [self.given.alone(t.graph, t.operator.name) for t in (communication, compute)],
            self.given.slowdowns.get(
                (communication.operator.name, compute.operator.name), (1.0, 1.0)
            ),
        )
        return self._around(together[0]), self._around(together[1])

    def behind(
        self, communication: Target, compute: Target, lead: float
    ) -> tuple[Samples, Samples]:
        names = communication.operator.name, compute.operator.name
        first, second = (
            self.given.alone(t.graph, t.operator.name) for t in (communication, compute)
        )
        together = _started_together([first, second - lead], self.given.behind[names])
        return self._around(together[0]), self._around(together[1] + lead)


def _started_together(alone: list[float], slow: tuple[float, float]) -> list[float]:
    """Ends of two operators that start at once and disturb each other."""
    slowed = [seconds * factor for seconds, factor in zip(alone, slow, strict=True)]
    first = slowed.index(min(slowed))
    last = 1 - first
    ends = [0.0, 0.0]
    ends[first] = slowed[first]
    ends[last] = slowed[first] + alone[last] - slowed[first] / slow[last]
    return ends
