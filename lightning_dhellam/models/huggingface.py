"""Tensors of Hugging Face's models to and from this rank's shards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from lightning_dhellam.models.adapters import MergedWeights
from lightning_dhellam.models.carried import check_vocabulary
from lightning_dhellam.models.causal_lm import CausalLM
from lightning_dhellam.models.conversion import Conversion
from lightning_dhellam.models.families import LLAMA, Family, check_shape, family_of
from lightning_dhellam.models.fitting import check_tensors, check_tied
from lightning_dhellam.models.fused import fused, unfused
from lightning_dhellam.models.progress import progress
from lightning_dhellam.models.source import check_config, open_weights, read_config
from lightning_dhellam.models.stored import Readable, listed
from lightning_dhellam.parallel.collectives import together

Source = Mapping[str, Tensor] | torch.nn.Module | str | PathLike[str]
"""The folder of a saved model, such a model itself, or its state dict."""


def import_huggingface(model: CausalLM, source: Source, config: Any = None) -> None:
    """Copy the weights of a model of Hugging Face into this rank's parameters.

    Which family it must be of follows from the model (`families.FAMILIES`). Every rank must call
    this and pass the whole, of which it takes its layers' and its experts' shards; of safetensors
    files it reads nothing else, a parameter at a time. Experts may be tensors of their own, as
    files have them, or in one tensor for all of a layer, as transformers 5 has them in memory.
    Nothing is written unless everything fits.

    Args:
        model: to be written.
        source: the folder of a saved model, with its `config.json` and its tensors in safetensors
            or `.bin` files; such a model itself; or its state dict.
        config: what the weights were made with: what `config.json` holds, its path, or the
            configuration itself. A folder or a model brings its own; a state dict alone is taken on
            trust, with a warning.

    Raises:
        ValueError: the configuration differs from the model's or cannot be expressed, or tensors
            are missing, unexpected or mis-shaped; all are named.
    """
    _import("import_huggingface", None, model, source, config)


def import_llama(model: CausalLM, source: Source, config: Any = None) -> None:
    """Copy the weights of a `LlamaForCausalLM`, and of no other: see `import_huggingface`."""
    check_shape(LLAMA, model.config)
    _import("import_llama", LLAMA, model, source, config)


def export_huggingface(
    model: CausalLM,
    tensors: Mapping[str, Tensor] | None = None,
    *,
    in_memory: bool = False,
    everywhere: bool = True,
) -> dict[str, Tensor]:
    """The model's weights, whole, by their names in Hugging Face's files; on the host.

    Args:
        model: whose weights they are.
        tensors: exports something else of the same shapes instead, by our parameters' names: for
            example ``{name: parameter.main_grad}``.
        in_memory: by the names of a model's `state_dict()` in transformers 5 instead, in which all
            experts of a layer are one tensor.
        everywhere: whether every rank gets them. Otherwise rank 0 does, and all others get an empty
            dictionary.

    A tied output layer is left out, as in Hugging Face's files. Beside the model a device holds one
    whole parameter at a time. Collective over the tensor-parallel, the expert and the pipeline
    group, so that every rank must call this.
    """
    family = family_of(model.config)
    exported = _export("export_huggingface", family, model, tensors, everywhere)
    if not in_memory or not exported:
        return exported
    return fused(exported, family, model.config)


def huggingface_tensors(
    model: CausalLM, tensors: Mapping[str, Tensor] | None = None, *, everywhere: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """What `export_huggingface` gives, with names as in files, one tensor after the other.

    So no host has to hold them all. Ranks bring each parameter together when it is its turn: every
    rank must go through all of them, also one that gets none.
    """
    family = family_of(model.config)
    return _each("huggingface_tensors", family, model, tensors, everywhere)


def export_llama(
    model: CausalLM, tensors: Mapping[str, Tensor] | None = None, *, everywhere: bool = True
) -> dict[str, Tensor]:
    """The weights of a `LlamaForCausalLM`, and of no other: see `export_huggingface`."""
    check_shape(LLAMA, model.config)
    return _export("export_llama", LLAMA, model, tensors, everywhere)


def leaving(model: CausalLM) -> Mapping[str, Tensor]:
    """This rank's weights, by our parameters' names, as they leave it for Hugging Face.

    The one place where a weight for export is made: what a file is to hold otherwise than the
    parameter does, is made here.
    """
    return MergedWeights(model)


def _import(
    function: str, only: Family | None, model: CausalLM, source: Source, config: Any
) -> None:
    """Import weights of a family, or of that of the model which they are of."""
    # Where every process has a whole model, each may do as it likes.
    world = model.context.world_group if model.context.topology.world_size > 1 else None
    like = only or family_of(model.config)

    def fitting() -> tuple[Family, list[Conversion], Mapping[str, Readable]]:
        tensors, described = open_weights(function, like.architecture, source, config)
        family = like
        if described is not None:
            family = only or family_of(model.config, read_config(described).get("model_type"))
            check_config(described, model.config, family)
        if isinstance(source, str | PathLike):
            check_vocabulary(Path(source), model.config.vocab_size)
        tensors = unfused(tensors, family)
        every = list(_conversions(family, model))
        check_tensors(model.config, every, tensors)
        own = own_of(every, model)
        _check_parameters(own, model)
        return family, own, tensors

    family, own, tensors = together(fitting, world)
    together(lambda: check_tied(family, model.config, tensors, model.context.topology), world)
    together(lambda: fill(model, own, tensors), world)
    if isinstance(source, str | PathLike):
        model.origin = Path(source).absolute()


def fill(model: CausalLM, own: list[Conversion], tensors: Mapping[str, Readable]) -> None:
    """Read this rank's share of each tensor, one parameter's at a time: of `own`, which it has."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for conversion in progress(own, "reading weights", model.context.topology):
            whole = [tensors[name] for name in conversion.theirs]
            conversion.write(parameters[conversion.ours], whole, *_share(conversion, model))


def _check_parameters(own: list[Conversion], model: CausalLM) -> None:
    known = {name for name, _ in model.named_parameters()}
    missing = [conversion.ours for conversion in own if conversion.ours not in known]
    if missing:
        raise ValueError(
            f"the model has no {listed(missing)}: layers of your own take no weights of Hugging"
            " Face; read these before they are put in"
        )


def _export(
    function: str,
    family: Family,
    model: CausalLM,
    tensors: Mapping[str, Tensor] | None,
    everywhere: bool,
) -> dict[str, Tensor]:
    return dict(_each(function, family, model, tensors, everywhere))


def _each(
    function: str,
    family: Family,
    model: CausalLM,
    tensors: Mapping[str, Tensor] | None,
    everywhere: bool,
) -> Iterator[tuple[str, Tensor]]:
    """The tensors that this rank is to have, one parameter's at a time."""
    if tensors is None:
        tensors = leaving(model)
    if not isinstance(tensors, Mapping):
        raise ValueError(
            f"{function} takes tensors by their names, such as a model's state_dict(), not a"
            f" {type(tensors).__name__}"
        )
    every = list(_conversions(family, model))
    missing = [
        conversion.ours for conversion in own_of(every, model) if conversion.ours not in tensors
    ]
    if missing:
        raise ValueError(f"tensors to export lack {listed(missing)}: pass every parameter's")
    keeps = everywhere or model.context.topology.rank == 0
    return gathered(every, model, tensors, keeps)


def table_of(model: CausalLM) -> list[Conversion]:
    """The conversions of all parameters of a model, of whatever rank, in the order of export."""
    return list(_conversions(family_of(model.config), model))


def whole_parameters(model: CausalLM) -> Iterator[dict[str, Tensor]]:
    """The Hugging Face tensors of each conversion of `table_of`, on rank 0; nothing on others.

    They may be the model's own memory: whoever keeps them copies them. Ranks bring each together
    when it is its turn, so all must ask for as many.
    """
    keeps = model.context.topology.rank == 0
    return _wholes(table_of(model), model, leaving(model), keeps)


def _wholes(
    every: list[Conversion], model: CausalLM, tensors: Mapping[str, Tensor], keeps: bool
) -> Iterator[dict[str, Tensor]]:
    for conversion in every:
        found = _whole(conversion, model, tensors)
        yield found if keeps else {}
        del found  # before the next one comes to the device


def gathered(
    every: list[Conversion], model: CausalLM, tensors: Mapping[str, Tensor], keeps: bool
) -> Iterator[tuple[str, Tensor]]:
    """Whole tensors, one parameter's at a time, on the host; nothing unless this rank `keeps` it.

    `tensors` are this rank's, by our names. Every rank must go through all of them.
    """
    for found in _wholes(every, model, tensors, keeps):
        for name in list(found):
            yield name, _copied(found.pop(name))


def _copied(tensor: Tensor) -> Tensor:
    """A tensor of its own, on the host."""
    return tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)


def _conversions(family: Family, model: CausalLM) -> Iterator[Conversion]:
    config = model.config
    own_experts = (config.num_experts or 1) // model.context.topology.ep_size
    return family.table(config, family.names, model.padded_vocab_size, own_experts)


def _stage(conversion: Conversion, model: CausalLM) -> int:
    """The pipeline stage that has the parameter of a conversion."""
    placement = model.context.placement
    if model.context.topology.pp_size == 1:
        return 0
    if conversion.layer is None:
        return placement.first if conversion.ours.startswith("embedding.") else placement.last
    return placement.stage_of[model.chunk_of(conversion.layer)]


def _owner(conversion: Conversion, model: CausalLM) -> int:
    """The expert-parallel rank that has what a conversion makes; this one's, if all have it."""
    topology, experts = model.context.topology, model.config.num_experts
    if conversion.expert is None or experts is None:
        return topology.ep_rank
    return conversion.expert // (experts // topology.ep_size)


def _is_here(conversion: Conversion, model: CausalLM) -> bool:
    """Whether this rank has a share of the parameter of a conversion."""
    topology = model.context.topology
    return (
        _stage(conversion, model) == topology.pp_rank
        and _owner(conversion, model) == topology.ep_rank
    )


def own_of(every: list[Conversion], model: CausalLM) -> list[Conversion]:
    """The conversions of what this rank has a share of."""
    return [conversion for conversion in every if _is_here(conversion, model)]


def _share(conversion: Conversion, model: CausalLM) -> tuple[int, int]:
    """Which share of its parameter this rank has, and how many there are."""
    topology = model.context.topology
    if conversion.expert is None:
        return topology.tp_rank, topology.tp_size
    return topology.etp_rank, topology.etp_size


def _whole(
    conversion: Conversion, model: CausalLM, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The Hugging Face tensors of a conversion, from the ranks that have the parameter."""
    context, topology, groups = model.context, model.context.topology, model.context.groups
    like = next(iter(tensors.values()))
    sizes = topology.tp_size, topology.pp_size, topology.ep_size
    # NCCL carries nothing that is on the host.
    device = like.device if max(sizes) == 1 else context.device
    if _is_here(conversion, model):
        size = _share(conversion, model)[1]
        group = groups.tp if conversion.expert is None else groups.expt_tp
        found = list(
            conversion.split(_gather(tensors[conversion.ours].detach().to(device), size, group))
        )
    else:
        found = [like.new_empty(shape, device=device) for shape in conversion.theirs.values()]
    if (
        conversion.expert is not None
        and topology.ep_size > 1
        and _stage(conversion, model) == topology.pp_rank
    ):
        found = _spread(found, groups.ep, _owner(conversion, model))
    if topology.pp_size > 1:
        found = _spread(found, groups.pp, _stage(conversion, model))
    return dict(zip(conversion.theirs, found, strict=True))


def _gather(shard: Tensor, size: int, group: ProcessGroup) -> list[Tensor]:
    if size == 1:
        return [shard]
    shard = shard.contiguous()
    shards = [torch.empty_like(shard) for _ in range(size)]
    dist.all_gather(shards, shard, group=group)
    return shards


def _spread(found: list[Tensor], group: ProcessGroup, source: int) -> list[Tensor]:
    """What rank `source` of a group has, on all of its ranks."""
    found = [tensor.contiguous() for tensor in found]
    for tensor in found:
        dist.broadcast(tensor, group=group, group_src=source)
    return found
