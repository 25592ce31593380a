"""Dense families of transformers: both ways, and what both compute of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config

from lightning_dhellam.models import (
    config_of,
    export_huggingface,
    import_huggingface,
    parameter_count,
    preset,
)
from lightning_dhellam.models.described import config_json
from lightning_dhellam.models.families import family_of
from tests.models.dense import DENSE, configuration_of, hugging_face_dense
from tests.models.folders import pair_of
from tests.models.llama import random_batch

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", DENSE)
def test_folders_of_transformers_come_and_go(name: str, tmp_path: Path) -> None:
    model, theirs = pair_of(DENSE[name])
    theirs.save_pretrained(tmp_path)
    described = config_of(tmp_path)
    assert replace(described, head_dim=DENSE[name].head_dim) == DENSE[name]
    assert described.kv_channels == DENSE[name].kv_channels
    import_huggingface(model, tmp_path)
    tensors = export_huggingface(model)
    state = theirs.state_dict()
    if DENSE[name].tie_embeddings:
        state.pop("lm_head.weight")
    assert tensors.keys() == state.keys()
    assert all(torch.equal(tensors[n], tensor) for n, tensor in state.items())
    folder = tmp_path / "exported"
    theirs.config.save_pretrained(folder)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    loaded = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    tokens, _ = random_batch(DENSE[name])
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, theirs(tokens).logits)
    greedy: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    ours, begun = tokens[:1, :8], tokens[:1, :8]
    for _ in range(8):
        with torch.no_grad():
            ours = torch.cat([ours, model(ours)[:, -1].argmax(-1, keepdim=True)], dim=1)
    mask = torch.ones_like(begun)
    for one in (theirs, loaded):
        assert torch.equal(one.generate(begun, attention_mask=mask, **greedy), ours)


@pytest.mark.parametrize("name", DENSE)
def test_a_model_alone_is_described_so_that_it_comes_back(name: str) -> None:
    config = DENSE[name]
    described = config_json(config, family_of(config), None, "float32")
    assert replace(config_of(described), head_dim=config.head_dim) == config
    theirs = AutoConfig.for_model(**described)
    assert replace(config_of(theirs), head_dim=config.head_dim) == config


@pytest.mark.parametrize("name", DENSE)
def test_configurations_of_transformers_4_say_the_same(name: str) -> None:
    theirs = hugging_face_dense(DENSE[name]).config.to_dict()
    assert config_of(_as_in_4(theirs)) == config_of(theirs)


def _as_in_4(theirs: dict[str, Any]) -> dict[str, Any]:
    """What transformers 4 writes: a base beside the scaling, and no kind of each layer."""
    old = {name: value for name, value in theirs.items() if name != "layer_types"}
    if "rope_parameters" not in old:
        return old
    rope = dict(old.pop("rope_parameters"))
    old["rope_theta"] = rope.pop("rope_theta")
    old["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    return old


PUBLISHED = {
    "mistral-7b": 7_241_732_096,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-8b": 8_190_735_360,
    "phi-3-mini": 3_821_079_552,
    "olmo-2-7b": 7_298_617_344,
}
"""Parameters, by preset."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_as_many_parameters_as_the_models_that_they_are_named_for(name: str) -> None:
    config = preset(name)
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(configuration_of(config))
    counts = parameter_count(config), sum(p.numel() for p in theirs.parameters())
    assert counts == (PUBLISHED[name],) * 2


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("qwen2", {"model_type": "llama"}, "model_type='llama', and only 'qwen2'"),
        ("qwen3-biased", {"attention_bias": False}, "the model has attention_bias=True"),
        ("qwen3", {"head_dim": 12}, "head_dim=12, and the model has head_dim=10"),
        ("mistral", {"sliding_window": 6}, "sliding_window=6, and the model has sliding_window=5"),
        ("mistral", {"sliding_window": None}, "sliding_window=None, and the model has"),
        (
            "qwen2",
            {
                "use_sliding_window": True,
                "sliding_window": 3,
                "layer_types": ["sliding_attention"] * 4,
            },
            "sliding_window=3, and the model has sliding_window=None",
        ),
        (
            "qwen2-last-layers",
            {"layer_types": None, "max_window_layers": 1},
            r"sliding_window=\(None, 3, 3, 3\), and .* sliding_window=\(None, None, 3, 3\)",
        ),
        ("qwen2", {"layer_types": ["chunked_attention"]}, "layer_types='chunked_attention', and"),
        ("qwen2", {"hidden_act": "gelu"}, "hidden_act='gelu', and only 'silu'"),
        (
            "gpt2",
            {"n_inner": None},
            "n_inner, or 4 times n_embd, of=144, and the model",
        ),
        ("gpt2", {"activation_function": "gelu"}, "='gelu', .* the model has activation='gelu_t"),
        ("gpt2", {"activation_function": "relu"}, "='relu', and only 'gelu_new' or .* expressed"),
        ("gpt2", {"n_positions": 32}, "n_positions=32, and the model has max_sequence_length=64"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "_inverse_layer_idx=True, and only F"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights=False, and only True"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention=True, and only False"),
    ],
)
def test_other_configurations_are_refused_by_field(
    name: str, changes: dict[str, Any], words: str
) -> None:
    model, theirs = pair_of(DENSE[name])
    before = export_huggingface(model)
    config = {**theirs.config.to_dict(), **changes}
    with pytest.raises(ValueError, match=words):
        import_huggingface(model, theirs.state_dict(), config)
    after = export_huggingface(model)
    assert all(torch.equal(before[n], tensor) for n, tensor in after.items())


@pytest.mark.parametrize("dropped", [{"attn_pdrop": 0.3, "resid_pdrop": 0.2}, {"n_inner": None}])
def test_what_gpt_2_leaves_to_training_is_taken_over_but_not_compared(
    dropped: dict[str, Any],
) -> None:
    model, theirs = pair_of(DENSE["gpt2-exact"])
    config = {**theirs.config.to_dict(), **dropped, "reorder_and_upcast_attn": True}
    import_huggingface(model, theirs.state_dict(), config)
    described = config_of(config)
    assert described.attention_dropout == config["attn_pdrop"]
    assert described.hidden_dropout == config["resid_pdrop"]
    assert (described.embedding_dropout, described.ffn_hidden_size) == (0.0, 4 * 36)


def test_the_first_files_of_gpt_2_have_masks_and_no_prefix() -> None:
    model, theirs = pair_of(DENSE["gpt2"])
    old = {name.removeprefix("transformer."): x for name, x in theirs.state_dict().items()}
    del old["lm_head.weight"]
    old |= {"h.0.attn.bias": torch.ones(1, 1, 64, 64), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    import_huggingface(model, old, theirs.config)
    found = export_huggingface(model)
    assert all(torch.equal(found[n], x) for n, x in theirs.state_dict().items() if n in found)
    with pytest.raises(ValueError, match=r"missing: transformer\.h\.1\.attn\.c_attn\.weight\. "):
        import_huggingface(model, {n: x for n, x in old.items() if n != "h.1.attn.c_attn.weight"})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"activation": "swiglu"}, "activation='swiglu': GPT2LMHeadModel has LayerNorm, GELU"),
        ({"num_query_groups": 3}, "num_query_groups=3: GPT2"),
        ({"head_dim": 8}, "head_dim=8: GPT2"),
    ],
)
def test_models_that_gpt_2_cannot_have_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"^{words}.* nothing to convert$"):
        family_of(replace(DENSE["gpt2"], **changes))


def test_the_preset_of_gpt_2_is_what_transformers_takes_by_itself() -> None:
    found = config_of(GPT2Config())
    assert found.embedding_dropout == 0.1
    assert replace(found, head_dim=None, embedding_dropout=None) == preset("gpt2")
