"""Adapters alone, in the files of peft: `adapter_model.safetensors` and `adapter_config.json`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_dhellam.files import read_json, staged_directory
from lightning_dhellam.models.adapters import adapter_conversions
from lightning_dhellam.models.causal_lm import CausalLM
from lightning_dhellam.models.huggingface import fill, gathered, own_of
from lightning_dhellam.models.lora import LoRA, product, targets_of
from lightning_dhellam.parallel.collectives import together

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
Folder = str | PathLike[str]

_FIXED: dict[str, Any] = {
    "peft_type": "LORA",
    "bias": "none",
    "use_dora": False,
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "layers_to_transform": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "lora_bias": False,
}
"""Fields of peft's configuration of which only one value can be expressed here."""

_UNKNOWN = (
    "alora_invocation_tokens",
    "arrow_config",
    "exclude_modules",
    "kasa_config",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
"""Those that must be empty here, since they make something else of an adapter."""


def save_adapters(model: CausalLM, folder: Folder, *, base: str | None = None) -> None:
    """Write a model's adapters as peft does, whole or not at all.

    Collective: every rank must call this, and rank 0 writes. What the folder had is replaced.

    Args:
        model: with adapters.
        folder: to be written.
        base: the path or name of the model that they were trained beside, which peft looks for.

    Raises:
        ValueError: the model has no adapters.
        OSError: there is no room, or the disk fails.
    """
    lora = _lora_of(model, "save")
    every = list(adapter_conversions(model.config, lora))
    writes = model.context.topology.rank == 0
    tensors = dict(gathered(every, model, dict(model.named_parameters()), writes))
    config = _config(model, lora, base)

    def write() -> None:
        if not writes:
            return
        from safetensors.torch import save_file

        target = Path(folder)
        with staged_directory(target, replace=True) as partial:
            own = {name: tensor.contiguous() for name, tensor in tensors.items()}
            save_file(own, partial / TENSORS, metadata={"format": "pt"})
            (partial / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    together(write, model.context.host_group)


def load_adapters(model: CausalLM, folder: Folder) -> None:
    """Take adapters that `save_adapters` or peft has written. Nothing is changed unless all fits.

    Args:
        model: with adapters of the same rank, scale and targets (`lora_of` reads them).
        folder: that was written.

    Raises:
        ValueError: what the folder holds does not fit the model; by field or tensor.
    """
    lora = _lora_of(model, "load")
    saved = lora_of(folder)
    every = list(adapter_conversions(model.config, lora))
    theirs = {product(t) for one in targets_of(model.config, saved) for t in one.products}
    ours = {product(t) for one in targets_of(model.config, lora) for t in one.products}
    pairs = (
        ("rank", lora.rank, saved.rank),
        ("scale", lora.scale, saved.scale),
        ("targets", sorted(ours), sorted(theirs)),
    )
    other = [
        f"{name}={found}, and the model has {own}" for name, own, found in pairs if own != found
    ]
    if other:
        raise ValueError(
            f"the adapters in {folder} do not fit the model: {'; '.join(other)}. Give the model"
            " lora=lora_of(folder)"
        )
    tensors = _read(Path(folder) / TENSORS)
    problems = list(_misfits({n: s for one in every for n, s in one.theirs.items()}, tensors))
    if problems:
        raise ValueError(f"{Path(folder) / TENSORS} does not fit the model: {'; '.join(problems)}")
    fill(model, own_of(every, model), tensors)


def lora_of(folder: Folder) -> LoRA:
    """What adapters a folder of peft holds, by its `adapter_config.json`.

    Raises:
        ValueError: it is no such folder, or asks for what cannot be expressed here; by field.
    """
    file = Path(folder) / CONFIG
    theirs = read_json(file, "configuration of peft", "save the adapters again")
    wrong = [
        f"{name}={theirs[name]!r}, and only {only!r} can be expressed"
        for name, only in (_FIXED | dict.fromkeys(_UNKNOWN)).items()
        if (theirs.get(name) or only) != only
    ]
    targets = theirs.get("target_modules")
    names = targets if isinstance(targets, list) else []
    if names is not targets:
        wrong.append(f"target_modules={targets!r}, and only a list of names can be expressed")
    if wrong:
        raise ValueError(f"{file}: {'; '.join(wrong)}")
    return LoRA(
        rank=theirs.get("r", 8),
        alpha=theirs.get("lora_alpha", 8),
        targets=tuple(sorted(name.rpartition(".")[2] for name in names)),
        rslora=theirs.get("use_rslora", False),
        dropout=theirs.get("lora_dropout", 0.0),
    )


def _lora_of(model: CausalLM, verb: str) -> LoRA:
    if model.lora is None:
        raise ValueError(
            f"the model has no adapters to {verb}: give it lora, such as LoRA(rank=16)"
        )
    return model.lora


def _config(model: CausalLM, lora: LoRA, base: str | None) -> dict[str, Any]:
    targets = {product(name) for one in targets_of(model.config, lora) for name in one.products}
    return {
        **_FIXED,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "init_lora_weights": True,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "target_modules": sorted(targets),
    }


def _read(file: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{file} cannot be read ({type(error).__name__}: {reason})") from error


def _misfits(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, Tensor]) -> Iterator[str]:
    for name, shape in expected.items():
        if name not in found:
            yield f"it lacks {name}"
        elif tuple(found[name].shape) != shape:
            yield f"{name} is {tuple(found[name].shape)} instead of {shape}"
    for name in found:
        if name not in expected:
            yield f"it has {name}, which the model does not"
