"""Adapters of a model: under plain autograd, in peft's files, and what is refused of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_dhellam.kernels import dropout
from lightning_dhellam.layers import lower
from lightning_dhellam.layers.adapted import SALTS
from lightning_dhellam.layers.adapter import Adapter
from lightning_dhellam.models import (
    CausalLM,
    LoRA,
    ModelConfig,
    add_lora,
    export_llama,
    import_llama,
    load_adapters,
    lora_of,
    save_adapters,
)
from lightning_dhellam.models.adapters import adapters_of
from lightning_dhellam.parallel import ParallelContext
from tests.engine.harness import CPU, add_main_grads, batch_of, engine_of, pieces, train
from tests.models.llama import SMALL, hugging_face_llama, relative_error
from tests.models.lora import adapted, peft_tensors
from tests.models.mixtures import MIXTURES

LORA = LoRA(rank=3, alpha=6, targets=("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"))


def _model(lora: LoRA = LORA, config: ModelConfig = SMALL, seed: int = 1) -> CausalLM:
    model = CausalLM(config, ParallelContext.single(CPU))
    return add_lora(model, lora, seed)


def _with_numbers(model: CausalLM) -> CausalLM:
    """Adapters as after some training, rather than such that add nothing."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora.up" in name:
                parameter.normal_(0, 0.2, generator=generator)
                own = model.get_submodule(name.removesuffix(".up"))
                parameter.mul_(own.fold(torch.ones(len(parameter), len(own.down))).clamp(max=1))
    return model


def test_it_starts_as_the_model_it_was_whatever_is_drawn() -> None:
    model, plain = _model(), CausalLM(SMALL, ParallelContext.single(CPU))
    tokens = batch_of(SMALL)["tokens"]
    assert torch.equal(model(tokens), plain(tokens))
    downs = [p for name, p in model.named_parameters() if name.endswith(".down")]
    for down in downs:
        assert 0.5 < down.abs().max() * down.shape[1] ** 0.5 <= 1
        assert relative_error(down.std() * down.shape[1] ** 0.5, torch.tensor(3**-0.5)) < 0.15
    others = dict(_model(seed=2).named_parameters())
    assert not any(torch.equal(p, others[n]) for n, p in model.named_parameters() if "down" in n)
    assert [p.requires_grad for p in model.parameters()] == [
        ".lora." in name for name, _ in model.named_parameters()
    ]


def test_plain_autograd_computes_what_the_operators_do() -> None:
    model = _with_numbers(_model())
    batch = batch_of(SMALL)
    losses = model(batch["tokens"], batch["labels"])
    (losses.sum() / (batch["labels"] != -100).sum()).backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    add_main_grads(model)
    micro_batches = pieces(batch, 2, model.context)
    loss, found = train(engine_of(lower(model), poison=True), model, micro_batches)
    assert relative_error(loss, losses.sum() / (batch["labels"] != -100).sum()) <= 1e-6
    assert found.keys() == expected.keys()
    assert max(relative_error(found[n], expected[n]) for n in expected) <= 1e-5


def test_both_directions_drop_the_same_which_the_key_and_the_places_say(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lora = LoRA(rank=3, alpha=6, dropout=0.3)
    model, batch = _with_numbers(_model(lora)), batch_of(SMALL)
    (micro_batch,) = pieces(batch, len(batch["tokens"]), model.context)
    names = {id(adapter): name for name, adapter in adapters_of(model).items()}

    def dropped(adapter: Adapter, x: Tensor) -> Tensor:
        _, layer, *_, linear = names[id(adapter)].split(".")
        counters = int(layer), SALTS[linear.removeprefix("linear_")]
        key = dropout.derive_key(micro_batch.slots["batch.whole_key"], *counters)
        # Rows are tokens: of each place those of all samples.
        return x * dropout.forward(torch.ones(len(x) * x.shape[1], x.shape[2]), 0.3, key).view_as(x)

    monkeypatch.setattr(Adapter, "dropped", dropped)
    losses = model(batch["tokens"], batch["labels"])
    mean = losses.sum() / (batch["labels"] != -100).sum()
    mean.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    add_main_grads(model)
    loss, found = train(engine_of(lower(model), poison=True), model, [micro_batch])
    assert relative_error(loss, mean) <= 1e-6
    assert max(relative_error(found[n], expected[n]) for n in expected) <= 1e-5


def test_plain_autograd_drops_in_training_alone() -> None:
    model, plain = _with_numbers(_model(LoRA(rank=3, dropout=0.3))), _with_numbers(_model(LoRA(3)))
    tokens = batch_of(SMALL)["tokens"]
    assert relative_error(model(tokens), plain(tokens)) > 0.01
    assert torch.equal(model.eval()(tokens), plain(tokens))


def test_adapters_come_back_from_a_folder_of_pefts(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    saved_as = replace(LORA, dropout=0.1, rslora=True)
    model = _with_numbers(_model(saved_as))
    save_adapters(model, tmp_path / "adapters", base="meta-llama/Llama-3.1-8B")
    config = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (3, 6, "LORA")
    assert config["target_modules"] == sorted(LORA.targets or ())
    assert config["base_model_name_or_path"] == "meta-llama/Llama-3.1-8B"
    saved = load_file(tmp_path / "adapters" / "adapter_model.safetensors")
    theirs = peft_tensors(adapted(hugging_face_llama(SMALL), LORA, LORA.targets or ()))
    assert {n: t.shape for n, t in saved.items()} == {n: t.shape for n, t in theirs.items()}
    assert (config["lora_dropout"], config["use_rslora"], config["bias"]) == (0.1, True, "none")
    lora = lora_of(tmp_path / "adapters")
    assert lora == replace(saved_as, targets=tuple(sorted(LORA.targets or ())))
    other = _model(lora, seed=2)
    load_adapters(other, tmp_path / "adapters")
    parameters = dict(other.named_parameters())
    assert all(torch.equal(p, parameters[n]) for n, p in model.named_parameters())
    save_adapters(other, tmp_path / "adapters")
    again = load_file(tmp_path / "adapters" / "adapter_model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in saved.items())


def test_pefts_adapters_give_pefts_logits(tmp_path: Path) -> None:
    """Saved by hand as peft saves them, of a model that has them around its linear layers."""
    from safetensors.torch import save_file

    reference = adapted(hugging_face_llama(SMALL), LORA, LORA.targets or ())
    model = CausalLM(SMALL, ParallelContext.single(CPU))
    import_llama(model, hugging_face_llama(SMALL))
    save_adapters(add_lora(model, LORA), tmp_path)
    save_file(peft_tensors(reference), tmp_path / "adapter_model.safetensors")
    load_adapters(model, tmp_path)
    tokens = batch_of(SMALL)["tokens"]
    expected = reference(tokens).logits.detach()
    assert relative_error(model(tokens).detach(), expected) <= 1e-5
    merged = hugging_face_llama(SMALL)
    merged.load_state_dict(export_llama(model))
    assert relative_error(merged(tokens).logits.detach(), expected) <= 1e-5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoRA(rank=0), r"rank=0 must be greater than 0"),
        (lambda: LoRA(alpha=-1.0), r"alpha=-1\.0 must be greater than 0"),
        (lambda: LoRA(dropout=1.0), r"dropout=1\.0 must be in \[0, 1\)"),
        (lambda: LoRA(rank="16"), r"rank='16' must be a whole number"),
        (lambda: LoRA(targets=()), r"targets names no layer"),
        (lambda: LoRA(targets="q_proj"), r"targets='q_proj' must be a list"),
        (
            lambda: _model(LoRA(targets=("q_porj",))),
            r"'q_porj', which no linear layer of the model is called; did you mean 'q_proj'\?",
        ),
        (
            lambda: _model(LoRA(targets=("lm_head",))),
            r"'lm_head', which no linear layer .* There are q_proj, k_proj, v_proj, linear_qkv",
        ),
        (
            lambda: _model(LoRA(targets=("q_proj", "w1")), MIXTURES["mixtral"]),
            r"'w1', which experts have: they get no adapters here; leave it out, and name some of"
            r" q_proj, k_proj, v_proj, linear_qkv, o_proj, linear_proj$",
        ),
        (lambda: add_lora(_model(), LORA), r"has adapters already"),
        (
            lambda: save_adapters(CausalLM(SMALL, ParallelContext.single(CPU)), "x"),
            r"no adapters to save",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_mixtures_attention_gets_adapters_and_its_experts_none() -> None:
    model = _model(LoRA(rank=2), MIXTURES["mixtral"])
    trained = {n.split(".", 2)[2] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        f"self_attention.linear_{name}.lora.{part}"
        for name in ("qkv", "proj")
        for part in ("down", "up")
    }


def test_adapters_that_do_not_fit_are_refused_and_nothing_is_changed(tmp_path: Path) -> None:
    save_adapters(_with_numbers(_model()), tmp_path)
    model = _model()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    config = json.loads((tmp_path / "adapter_config.json").read_text())

    def refused(message: str, other: CausalLM, **changes: Any) -> None:
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(ValueError, match=message):
            load_adapters(other, tmp_path)

    refused(r"rank=3, and the model has 4", _model(replace(LORA, rank=4, alpha=8)))
    refused(r"scale=4\.0, and the model has 2\.0", model, lora_alpha=12)
    targets = r"targets=\['q_proj'\], and the model has \['down_proj', "
    refused(targets, model, target_modules=["q_proj"])
    refused(r"use_dora=True, and only False can be expressed", model, use_dora=True)
    refused(r"bias='all', and only 'none' can be expressed", model, bias="all")
    refused(r"modules_to_save=\['lm_head'\], and only None", model, modules_to_save=["lm_head"])
    refused(r"peft_type='LOHA', and only 'LORA'", model, peft_type="LOHA")
    refused(r"target_modules='\.\*', and only a list", model, target_modules=".*")
    deeper = _model(LORA, replace(SMALL, num_layers=3))
    refused(r"it lacks base_model\.model\.model\.layers\.2\.self_attn\.q_proj\.lora_", deeper)
    wider = _model(LORA, replace(SMALL, ffn_hidden_size=64))
    refused(r"gate_proj\.lora_B\.weight is \(48, 3\) instead of \(64, 3\)", wider)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"half")
    refused(r"adapter_model\.safetensors cannot be read", model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    with pytest.raises(ValueError, match=r"adapter_config\.json cannot be read as a config"):
        load_adapters(model, tmp_path / "nowhere")
