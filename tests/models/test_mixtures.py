"""Mixtral, Qwen3-MoE and Phi-3.5-MoE of transformers: both ways, and what both compute of them."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lightning_dhellam.models import (
    CausalLM,
    config_of,
    export_huggingface,
    huggingface,
    huggingface_tensors,
    import_huggingface,
)
from lightning_dhellam.parallel import ParallelContext
from tests.models.folders import pair_of
from tests.models.llama import random_batch
from tests.models.mixtures import MIXTURES, ODD, hugging_face_mixture
from tests.ranks import run_ranks

CPU = torch.device("cpu")


def _round_trips(rank: int, several: list[dict[str, int]]) -> list[str]:
    """Names that come back changed, of every family."""
    changed: list[str] = []
    for sizes in several:
        context = ParallelContext.create(CPU, **sizes)
        for name in MIXTURES:
            changed += [f"{name} {tensor} {sizes}" for tensor in _changed(name, context)]
        context.destroy()
    return changed


def _changed(name: str, context: ParallelContext) -> list[str]:
    config = MIXTURES[name]
    if config.num_layers < 2 * context.topology.pp_size:
        config = replace(config, num_layers=4, moe_layer_freq=1)
    state = hugging_face_mixture(config).state_dict()
    model = CausalLM(config, context)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    import_huggingface(model, state)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    in_files = export_huggingface(model)
    import_huggingface(model, in_files)
    exported = export_huggingface(model, in_memory=True)
    if config.tie_embeddings:
        state.pop("lm_head.weight")
    assert exported.keys() == state.keys()
    changed = [tensor for tensor in state if not torch.equal(state[tensor], exported[tensor])]
    return changed + _of_one_at_a_time(model, in_files)


def _of_one_at_a_time(model: CausalLM, expected: dict[str, Tensor]) -> list[str]:
    """Names of those that differ when they come one at a time, or to rank 0 alone."""
    has_all, differing = model.context.topology.rank == 0, []
    for everywhere in (True, False):
        names = []
        for name, tensor in huggingface_tensors(model, everywhere=everywhere):
            names.append(name)
            if tensor.device != CPU or not torch.equal(tensor, expected[name]):
                differing.append(name)
        assert names == (list(expected) if everywhere or has_all else [])
    mine = export_huggingface(model, everywhere=False)
    assert mine.keys() == (expected.keys() if has_all else set())
    return differing + [name for name in mine if not torch.equal(mine[name], expected[name])]


def test_a_parameter_is_let_go_before_the_next_is_brought_together() -> None:
    model, _ = pair_of(MIXTURES["qwen3-moe"])
    whole, before = huggingface._whole, list[weakref.ref[Tensor]]()
    most = 0

    def watched(*given: Any) -> dict[str, Tensor]:
        nonlocal most
        assert all(tensor() is None for tensor in before), "of the parameter before"
        found = whole(*given)
        before[:] = map(weakref.ref, found.values())
        most = max(most, len(found))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface, "_whole", watched)
        count = 0
        for _, tensor in huggingface_tensors(model):
            count += tensor.device == CPU
            del tensor  # on the host it is what was brought together
    assert most == 3 and count == len(export_huggingface(model))


ROUND_TRIPS: dict[int, list[dict[str, int]]] = {
    2: [
        {"expert_parallel_size": 2},
        {"tensor_parallel_size": 2, "expert_parallel_size": 2, "expert_tensor_parallel_size": 1},
    ],
    4: [
        {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "expert_tensor_parallel_size": 1},
        {"tensor_parallel_size": 2, "expert_parallel_size": 2},
    ],
}


@pytest.mark.parametrize("world", ROUND_TRIPS)
def test_round_trip_is_exact(world: int) -> None:
    assert run_ranks(world, _round_trips, ROUND_TRIPS[world]) == [[]] * world


@pytest.mark.parametrize("name", MIXTURES)
def test_folders_of_transformers_come_and_go(name: str, tmp_path: Path) -> None:
    model, theirs = pair_of(MIXTURES[name])
    theirs.save_pretrained(tmp_path)
    described = config_of(tmp_path)
    assert described.expert_layers == MIXTURES[name].expert_layers
    assert described.kv_channels == MIXTURES[name].kv_channels
    written = {"moe_layer_freq": MIXTURES[name].moe_layer_freq, "head_dim": MIXTURES[name].head_dim}
    assert replace(described, **written) == MIXTURES[name]
    import_huggingface(model, tmp_path)
    tensors = export_huggingface(model)
    folder = tmp_path / "exported"
    theirs.config.save_pretrained(folder)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", experts_implementation="eager"
    )
    tokens, _ = random_batch(MIXTURES[name])
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, theirs(tokens).logits)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("mixtral", {"num_local_experts": 8}, "num_local_experts=8, and the model has"),
        ("mixtral", {"num_experts_per_tok": 1}, "the model has experts_per_token=2"),
        ("mixtral", {"intermediate_size": 24}, "the model has expert_ffn_hidden_size=20"),
        ("mixtral", {"sliding_window": 32}, "sliding_window=32, and the model has"),
        ("mixtral", {"router_jitter_noise": 0.1}, r"router_jitter_noise=0\.1, and only 0\.0"),
        ("mixtral", {"model_type": "llama"}, "model_type='llama', and only 'mixtral'"),
        ("qwen3-moe", {"norm_topk_prob": False}, "norm_topk_prob .* router_pre_softmax=False"),
        ("qwen3-moe", {"mlp_only_layers": []}, r"expert_layers=\(True, False, True\)"),
        ("qwen3-moe", {"decoder_sparse_step": 2}, r"give expert_layers=\(False, False, False\)"),
        ("qwen3-moe", {"moe_intermediate_size": 16}, "moe_intermediate_size=16, and the model"),
        (
            "qwen3-moe",
            {"use_sliding_window": True, "sliding_window": 16},
            "sliding_window=16, and the model has sliding_window=None",
        ),
        ("phi-moe", {"router_jitter_noise": 0.01}, r"router_jitter_noise=0\.01, .*=0\.2"),
        ("phi-moe", {"lm_head_bias": False}, "lm_head_bias=False, .* output_bias=True"),
        ("phi-moe", {"attention_bias": False}, "the model has attention_bias=True"),
        (
            "phi-moe",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
            r"rope_type='yarn' \(factor=4\.0\), and only 'longrope' can be expressed here",
        ),
        (
            "phi-moe-long",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
            r"short_factor=None, .* rope_short_factors=\(1\.0, .*short_mscale=1\.0, and the model",
        ),
        (
            "phi-moe-long",
            {"rope_parameters": {"short_mscale": 1.25, "long_mscale": 1.5}},
            r"short_mscale=1\.25 and long_mscale=1\.5 of its rope scaling, and only equal ones",
        ),
    ],
)
def test_other_configurations_are_refused_by_field(
    name: str, changes: dict[str, Any], words: str
) -> None:
    model, theirs = pair_of(MIXTURES[name])
    before = export_huggingface(model)
    config = {**theirs.config.to_dict(), **changes}
    with pytest.raises(ValueError, match=words):
        import_huggingface(model, theirs.state_dict(), config)
    after = export_huggingface(model)
    assert all(torch.equal(before[n], tensor) for n, tensor in after.items())


def test_configurations_of_no_family_or_that_cannot_be_expressed_are_refused() -> None:
    theirs = hugging_face_mixture(MIXTURES["mixtral"]).config.to_dict()
    with pytest.raises(ValueError, match=r"^model_type='bloom' is not known here: llama, "):
        config_of({**theirs, "model_type": "bloom"})
    assert config_of({**theirs, "sliding_window": 16}).windows == (16, 16)
    short = config_of({**theirs, "sliding_window": 16}, max_sequence_length=16)
    assert short == replace(MIXTURES["mixtral"], max_sequence_length=16)


def test_a_window_as_wide_as_the_longest_sequence_is_none() -> None:
    model, theirs = pair_of(MIXTURES["mixtral"])
    config = theirs.config.to_dict() | {"sliding_window": MIXTURES["mixtral"].max_sequence_length}
    import_huggingface(model, theirs.state_dict(), config)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shared_expert_ffn_hidden_size": 8}, "shared_expert_ffn_hidden_size=8: Mixtral"),
        ({"router_scores": "sigmoid"}, "router_scores='sigmoid': Mixtral"),
        ({"moe_layer_freq": (0, 1)}, r"moe_layer_freq=\(0, 1\): Mixtral"),
        ({"attention_bias": True, "qk_norm": True, "linear_bias": False}, None),
        ({"num_experts": None, "output_bias": True}, "output_bias=True: Llama"),
    ],
)
def test_models_of_no_family_are_refused_by_what_it_lacks(
    changes: dict[str, Any], words: str | None
) -> None:
    model = CausalLM(replace(ODD, **changes), ParallelContext.single(CPU))
    if words is None:
        assert "model.layers.0.self_attn.q_norm.weight" in export_huggingface(model)
        return
    with pytest.raises(ValueError, match=f"^{words}.* nothing to convert$"):
        export_huggingface(model)


def _drop(state: dict[str, Tensor]) -> None:
    del state["model.layers.1.mlp.experts.down_proj"]


def _narrow(state: dict[str, Tensor]) -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    state[name] = state[name][:, :-2]


def _flat(state: dict[str, Tensor]) -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    state[name] = state[name].flatten()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop, r"missing: model\.layers\.1\.block_sparse_moe\.experts\.0\.w2\.weight"),
        (_narrow, r"of another shape: .*experts\.0\.w1\.weight \(19, 32\) instead of \(20, 32\)"),
        (_flat, r"unexpected: model\.layers\.0\.block_sparse_moe\.experts\.gate_up_proj"),
    ],
)
def test_experts_that_do_not_fit_are_named(change: Any, message: str) -> None:
    model, theirs = pair_of(MIXTURES["mixtral"])
    state = dict(theirs.state_dict())
    change(state)
    with pytest.raises(ValueError, match=message):
        import_huggingface(model, state, theirs.config)
