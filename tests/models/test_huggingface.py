"""Import and export of Hugging Face tensors: exact round trip, clear refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod

import pytest
import torch
from torch import Tensor

from lightning_dhellam.models import CausalLM, export_llama, import_llama
from lightning_dhellam.parallel import ParallelContext
from tests.models.llama import SMALL, hugging_face_llama
from tests.ranks import run_ranks

CPU = torch.device("cpu")
ODD = replace(SMALL, vocab_size=53, head_dim=6)


def _round_trip(rank: int, sizes: dict[str, int]) -> list[str]:
    """Names that come back changed."""
    context = ParallelContext.create(CPU, **sizes)
    state = hugging_face_llama(ODD).state_dict()
    model = CausalLM(ODD, context)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    import_llama(model, state)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    exported = export_llama(model)
    assert exported.keys() == state.keys()
    return [name for name in state if not torch.equal(state[name], exported[name])]


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"tensor_parallel_size": 2},
        {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
    ],
)
def test_round_trip_is_exact(sizes: dict[str, int]) -> None:
    world = prod(sizes.values())
    assert run_ranks(world, _round_trip, sizes) == [[]] * world


def test_layout_of_two_ranks_is_megatrons() -> None:
    """Each rank: its groups' queries, key, value; its gate rows, then its up rows."""
    shards = run_ranks(2, _fused_shards)
    state = hugging_face_llama(SMALL).state_dict()
    layer = "model.layers.0."
    q, k, v = (state[f"{layer}self_attn.{letter}_proj.weight"] for letter in "qkv")
    gate, up = (state[f"{layer}mlp.{part}_proj.weight"] for part in ("gate", "up"))
    for rank, (qkv, fc1) in enumerate(shards):
        queries, keys = slice(16 * rank, 16 * rank + 16), slice(8 * rank, 8 * rank + 8)
        rows = slice(24 * rank, 24 * rank + 24)
        assert torch.equal(qkv, torch.cat([q[queries], k[keys], v[keys]]))
        assert torch.equal(fc1, torch.cat([gate[rows], up[rows]]))


def _fused_shards(rank: int) -> tuple[Tensor, Tensor]:
    model = CausalLM(SMALL, ParallelContext.create(CPU, tensor_parallel_size=2))
    import_llama(model, hugging_face_llama(SMALL).state_dict())
    weights = model.state_dict()
    return (
        weights["layers.0.self_attention.linear_qkv.weight"],
        weights["layers.0.mlp.linear_fc1.weight"],
    )


def _drop(state: dict[str, Tensor]) -> None:
    del state["model.layers.1.mlp.up_proj.weight"]


def _add(state: dict[str, Tensor]) -> None:
    state["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)


def _reshape(state: dict[str, Tensor]) -> None:
    state["model.norm.weight"] = torch.ones(33)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop, r"missing: model\.layers\.1\.mlp\.up_proj\.weight"),
        (_add, r"unexpected: model\.layers\.0\.self_attn\.q_proj\.bias"),
        (_reshape, r"of another shape: model\.norm\.weight \(33,\) instead of \(32,\)"),
    ],
)
def test_state_dicts_that_do_not_fit_are_refused_and_nothing_is_written(
    change: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    model = CausalLM(SMALL, ParallelContext.single(CPU))
    before = export_llama(model)
    state = hugging_face_llama(SMALL).state_dict()
    change(state)
    with pytest.raises(ValueError, match=message):
        import_llama(model, state)
    after = export_llama(model)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_tied_model_takes_an_equal_output_layer_and_refuses_another() -> None:
    config = replace(SMALL, tie_embeddings=True)
    model = CausalLM(config, ParallelContext.single(CPU))
    state = dict(hugging_face_llama(config).state_dict())
    assert "lm_head.weight" in state
    import_llama(model, state)
    assert "lm_head.weight" not in export_llama(model)
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    with pytest.raises(ValueError, match=r"tie_embeddings=True.*set tie_embeddings=False"):
        import_llama(model, state)


@pytest.mark.parametrize("function", [import_llama, export_llama])
def test_what_is_no_state_dict_is_refused_by_name(function: Callable[..., object]) -> None:
    model = CausalLM(SMALL, ParallelContext.single(CPU))
    for given, shown in (("llama.bin", "'llama.bin'"), (hugging_face_llama(SMALL), "a Llama")):
        with pytest.raises(ValueError, match=rf"^{function.__name__} takes .*, not {shown}.*load"):
            function(model, given)


def test_export_of_other_tensors_needs_all_of_them() -> None:
    model = CausalLM(SMALL, ParallelContext.single(CPU))
    with pytest.raises(ValueError, match=r"lack embedding\.word_embeddings\.weight"):
        export_llama(model, {})
