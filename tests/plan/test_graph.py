"""Operators, graphs and pairs: what they refuse and what they derive."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from lightning_dhellam.plan import Collective, GraphPair, Lane, Operator
from lightning_dhellam.plan.passes import CHOICES
from lightning_dhellam.search.measure.graphfile import fields_of, graph_from
from tests.plan.graphs import BACKWARD, FORWARD, graph, no_launch, toy_pair
from tests.plan.real_graphs import lowered

BAD_GRAPHS = {
    "operator a stands twice": ("a compute: x -> y\na compute: y -> z", "x", "z"),
    r"a reads \['z'\] before it is written": ("a compute: z -> y\nb compute: x -> z", "x", "y"),
    r"b writes \['y'\] a second time": ("a compute: x -> y\nb compute: x -> y", "x", "y"),
    r"a writes \['x'\] a second time": ("a compute: x -> x", "x", "x"),
    r"no operator writes the output \['z'\]": ("a compute: x -> y", "x", "z"),
}


@pytest.mark.parametrize("message", BAD_GRAPHS)
def test_a_graph_refuses(message: str) -> None:
    with pytest.raises(AssertionError, match=f"toy forward: .*{message}"):
        graph("forward", *BAD_GRAPHS[message])


BAD_PAIRS = {
    "reads unknown": ("a compute: elsewhere x -> y", "b compute: dy -> dx"),
    r"reads \['nowhere'\], which forward never writes": (
        "a compute: x -> y",
        "b compute: dy nowhere -> dx",
    ),
    r"writes slots of forward: \['mid'\]": (
        "a compute: x -> mid\nc compute: mid -> y",
        "b compute: dy -> mid\nd compute: mid -> dx",
    ),
}


@pytest.mark.parametrize("message", BAD_PAIRS)
def test_a_pair_refuses(message: str) -> None:
    forward, backward = BAD_PAIRS[message]
    with pytest.raises(AssertionError, match=message):
        GraphPair(graph("forward", forward, "x", "y"), graph("backward", backward, "dy", "dx"))


def test_a_pair_refuses_graphs_of_two_kinds() -> None:
    other = graph("backward", BACKWARD, "dy", "dx", name="other")
    with pytest.raises(AssertionError):
        GraphPair(toy_pair().forward, other)


def test_what_a_graph_derives() -> None:
    pair = toy_pair()
    assert pair.saved == ("normal", "x")
    assert pair.backward.foreign == ("normal", "x")
    assert pair.backward.predecessors == {
        "grad_gather": (),
        "dgrad": ("grad_gather",),
        "grad_scatter": ("dgrad",),
        "regather": (),
        "wgrad": ("grad_gather", "regather"),
        "norm.grad": ("grad_scatter",),
    }
    assert pair.forward.readers == {"x": 1, "normal": 1, "whole": 1, "partial": 1, "y": 1}
    assert pair.backward.readers["d_partial"] == 2


def test_slots_of_the_batch_are_never_saved() -> None:
    forward = graph("forward", "a compute: x batch.key -> y", "x", "y")
    backward = graph("backward", "b compute: dy batch.key -> dx", "dy", "dx")
    assert GraphPair(forward, backward).saved == ()


def test_an_operator_that_reads_a_slot_twice_is_one_reader() -> None:
    assert graph("forward", "square compute: x x -> y", "x", "y").readers["x"] == 1


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("norm compute", "norm2 compute"),
        ("gather tp: normal", "gather cp: normal"),
        ("gemm compute: whole ->", "gemm compute: whole x ->"),
        ("whole -> partial", "whole -> partial extra"),
    ],
)
def test_the_fingerprint_changes_with(old: str, new: str) -> None:
    same = graph("forward", FORWARD, "x", "y")
    changed = graph("forward", FORWARD.replace(old, new), "x", "y")
    assert same.fingerprint == toy_pair().forward.fingerprint != changed.fingerprint


def test_the_fingerprint_ignores_what_operators_do_and_cost() -> None:
    original = toy_pair().forward
    other = replace(
        original,
        operators=tuple(replace(o, run=print, cost=1.0) for o in original.operators),
        bytes_per_token={"y": 1.0},
    )
    assert other.fingerprint == original.fingerprint


def test_saved_bytes_count_every_saved_slot_inputs_included() -> None:
    pair = toy_pair()
    sizes = {"x": 4.0, "normal": 2.5, "whole": 100.0, "partial": 100.0, "y": 4.0}
    pair = GraphPair(replace(pair.forward, bytes_per_token=sizes), pair.backward)
    assert pair.saved_bytes(10) == 65


@pytest.mark.parametrize("tensor_parallel_size", [1, 2])
def test_choices_save_what_they_say(tensor_parallel_size: int) -> None:
    none, gathers, selective, full = (
        {*lowered(tensor_parallel_size, recompute=choice).layers[1].saved} for choice in CHOICES
    )
    common = {
        "x", "attention_rstd", "rotated", "context", "lse", "attention_state",
        "mid", "mlp_rstd", "gate_up", "act",
    }  # fmt: skip
    shards = {"attention_norm", "mlp_norm"}
    wholes = {f"{name}_full" for name in shards} if tensor_parallel_size > 1 else shards
    assert none == common | wholes
    assert gathers == common | shards
    assert selective == common - {"act", "attention_rstd", "mlp_rstd"}
    assert full == {"x"}


def test_an_operator_prints_its_name_and_knows_its_kind() -> None:
    operator = Operator("fc1.dgrad", Lane.COMPUTE, (), (), no_launch)
    assert str(operator) == "fc1.dgrad" and not operator.is_communication
    communicates = {lane for lane in Lane if replace(operator, lane=lane).is_communication}
    assert communicates == {*Lane} - {Lane.COMPUTE, Lane.OFFLOAD, Lane.FETCH, Lane.HOST}
    moves = {lane for lane in Lane if replace(operator, lane=lane).moves}
    assert moves == communicates | {Lane.OFFLOAD, Lane.FETCH}


def test_the_package_imports_no_torch() -> None:
    # The parent package may import what it likes: only plan/ itself is loaded here.
    code = """
import sys, types, pathlib, importlib.util
root = pathlib.Path(importlib.util.find_spec("lightning_dhellam").origin).parent
package = types.ModuleType("lightning_dhellam")
package.__path__ = [str(root)]
sys.modules["lightning_dhellam"] = package
import lightning_dhellam.plan
print(lightning_dhellam.plan.builder("dhellam").__name__)
allowed = ("lightning_dhellam.plan", "lightning_dhellam.nearest")
ours = {n for n in sys.modules if n.startswith("lightning_dhellam.")}
assert all(n.startswith(allowed) for n in ours), ours
assert "torch" not in sys.modules and "numpy" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout) == (0, "dhellam\n"), done.stderr


def test_communication_says_what_it_does_and_keeps_it_in_a_file() -> None:
    graphs = [each for pair in lowered(2).layers for each in (pair.forward, pair.backward)]
    for made in graphs:
        read = graph_from(fields_of(made))
        assert read.fingerprint == made.fingerprint
        for operator, again in zip(made.operators, read.operators, strict=True):
            assert (operator.collective is not None) == operator.is_communication, operator
            assert again.collective is operator.collective
            if "gather" in operator.name.rpartition(".")[2]:
                assert operator.collective is Collective.ALL_GATHER
            if "scatter" in operator.name:
                assert operator.collective is Collective.REDUCE_SCATTER
