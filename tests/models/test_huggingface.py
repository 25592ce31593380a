"""Import and export of Hugging Face tensors: exact round trip, clear refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

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
    import_llama(model, hugging_face_llama(SMALL))
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


@pytest.mark.parametrize("given", ["llama.bin", 7, CPU])
def test_what_holds_no_weights_is_refused_by_name(given: Any) -> None:
    model = CausalLM(SMALL, ParallelContext.single(CPU))
    shown = "'llama.bin'" if isinstance(given, str) else f"a {type(given).__name__}"
    with pytest.raises(ValueError, match=f"^import_llama takes a folder.* not {shown}$"):
        import_llama(model, given)
    with pytest.raises(ValueError, match=r"^export_llama takes tensors by their names"):
        export_llama(model, given)


ROPE: dict[str, Any] = {"rope_theta": 500_000.0, "rope_type": "default"}
LLAMA_3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "factor": 8.0}
LLAMA_3 |= {"rope_theta": 500_000.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"rope_parameters": {**ROPE, "rope_theta": 1e4}},
            "rope_theta=10000.0, and the model has rotary_base=500000.0",
        ),
        ({"rope_parameters": None, "rope_theta": 1e4}, "rope_theta=10000.0, and the model has"),
        ({"rope_parameters": None}, "rope_theta=10000.0, and the model has"),
        (
            {"rms_norm_eps": 1e-6},
            "rms_norm_eps=1e-06, and the model has norm_epsilon=1e-05",
        ),
        (
            {"rope_parameters": {**ROPE, "rope_type": "proportional", "factor": 2.0}},
            "rope_type='proportional' (factor=2.0), and only 'llama3' or 'linear' or 'dynamic' or"
            " 'yarn' or 'longrope' can be expressed here",
        ),
        (
            {"rope_parameters": {**ROPE, "rope_type": "linear", "factor": 2.0}},
            "rope_type='linear', and the model has rope_scaling='llama3'; factor of rope_type"
            " 'linear'=2.0, and the model has rope_scaling_factor=None",
        ),
        (
            {"rope_parameters": None, "rope_theta": 5e5, "rope_scaling": {"type": "dynamic"}},
            "rope_type='dynamic'",
        ),
        (
            {"rope_parameters": LLAMA_3},
            "factor of rope_type 'llama3'=8.0, and the model has rope_scaling_factor=None",
        ),
        (
            {"rope_parameters": {**LLAMA_3, "high_freq_factor": 8.0}},
            "high_freq_factor=8.0 of its rope scaling, and only 4.0 can be expressed",
        ),
        (
            {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4},
            "num_attention_heads=8, and the model has num_attention_heads=4; num_key_value_heads=4,"
            " and the model has num_query_groups=2; head_dim=4, and the model has head_dim=8",
        ),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True, and the model has"),
        ({"attention_bias": True}, "attention_bias=True, and only False can be expressed here"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu', and only 'silu' can be expressed here"),
        ({"model_type": "qwen2"}, "model_type='qwen2', and only 'llama' can be expressed here"),
    ],
)
def test_another_configuration_is_refused_by_field_and_nothing_is_written(
    changes: dict[str, Any], words: str
) -> None:
    model = CausalLM(SMALL, ParallelContext.single(CPU))
    before = export_llama(model)
    theirs = hugging_face_llama(SMALL)
    config = {**theirs.config.to_dict(), **changes}
    with pytest.raises(ValueError, match="configuration of the weights does not fit") as caught:
        import_llama(model, theirs.state_dict(), config)
    assert words in str(caught.value)
    assert all(torch.equal(before[n], tensor) for n, tensor in export_llama(model).items())


@pytest.mark.parametrize("changes", [{}, {"rope_scaling_factor": 8.0}, {"tie_embeddings": True}])
@pytest.mark.parametrize("size", ["1GB", "10KB"], ids=["one-file", "several-files"])
def test_a_saved_folder_brings_weights_and_configuration(
    changes: dict[str, Any], size: str, tmp_path: Path
) -> None:
    config = replace(SMALL, **changes)
    theirs = hugging_face_llama(config)
    theirs.save_pretrained(tmp_path, max_shard_size=size)
    assert (tmp_path / "model.safetensors").exists() == (size == "1GB")
    model = CausalLM(config, ParallelContext.single(CPU))
    import_llama(model, tmp_path)
    state = theirs.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in export_llama(model).items())
    other = CausalLM(replace(config, norm_epsilon=0.5), ParallelContext.single(CPU))
    with pytest.raises(ValueError, match=r"rms_norm_eps=1e-05, and .* norm_epsilon=0\.5"):
        import_llama(other, str(tmp_path))
    import_llama(other, tmp_path, {**theirs.config.to_dict(), "rms_norm_eps": 0.5})


def test_weights_that_torch_has_saved_and_folders_that_are_not_whole(tmp_path: Path) -> None:
    model = CausalLM(SMALL, ParallelContext.single(CPU))
    theirs = hugging_face_llama(SMALL)
    with pytest.raises(ValueError, match=r"has none of model\.safetensors, pytorch_model\.bin"):
        import_llama(model, tmp_path)
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"config\.json cannot be read as a file of .*: No such"):
        import_llama(model, tmp_path)
    import_llama(model, tmp_path, theirs.config)
    state = theirs.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in export_llama(model).items())


def test_tensors_alone_are_taken_on_trust_which_is_said() -> None:
    model = CausalLM(SMALL, ParallelContext.single(CPU))
    state = hugging_face_llama(SMALL).state_dict()
    with pytest.warns(UserWarning, match=r"import_llama was given tensors without their config"):
        import_llama(model, state)
    assert all(torch.equal(state[name], tensor) for name, tensor in export_llama(model).items())


def test_export_of_other_tensors_needs_all_of_them() -> None:
    model = CausalLM(SMALL, ParallelContext.single(CPU))
    with pytest.raises(ValueError, match=r"lack embedding\.word_embeddings\.weight"):
        export_llama(model, {})
