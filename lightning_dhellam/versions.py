"""What differs between the versions of torch and megatron-core that are supported.

Torch 2.11 to 2.15 and megatron-core 0.16.1 and 0.19 are used through the names of this module; all
other code is the same for every version.
"""

from __future__ import annotations

import logging
import warnings
from functools import partial
from typing import Any

import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

# Torch 2.13 renamed both; 2.11 has only the old names.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""Concatenates equal tensors of all ranks into one."""

reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
"""Sums tensors of all ranks, and gives each rank an equal part."""

# 0.19 lays out the buffers of a sharded optimizer as 0.16 did, and tells the user to do it himself.
logging.getLogger(DistributedDataParallel.__module__).addFilter(
    lambda record: "full_param_layout not provided" not in record.getMessage()
)
# It also warns whoever opens a data set before, or without, torch.distributed, to log one line.
warnings.filterwarnings("ignore", message="Could not determine rank from torch.distributed")

# Routers of 0.16 ask whether this is None. Where transformer-engine is not, nothing defines it.
moe_utils.te_general_gemm = getattr(moe_utils, "te_general_gemm", None)

_RENAMED = hasattr(TransformerConfig, "cuda_graph_modules")
QUIET_FIELDS: dict[str, Any] = {"cuda_graph_modules" if _RENAMED else "cuda_graph_scope": []}
"""Fields of a TransformerConfig whose own defaults it warns of, with what they stand for."""


def mlp_spec(submodules: MLPSubmodules, **parameters: Any) -> Any:
    """The `mlp` of a layer's specification: an MLP of `submodules`.

    Args:
        submodules: the linear layers of the MLP.
        parameters: of its constructor, such as `ffn_hidden_size`.
    """
    if hasattr(MLP, "as_mlp_submodule"):
        # 0.19 takes a ModuleSpec as well, but warns, and writes into the caller's specification.
        return partial(MLP.as_mlp_submodule, submodules=submodules, **parameters)
    return ModuleSpec(module=MLP, submodules=submodules, params=parameters)


def moe_spec(router: Any, submodules: MLPSubmodules) -> Any:
    """The `mlp` of a layer's specification: a mixture of experts.

    Each expert is an MLP with its own weights, the one kind that needs no transformer-engine.

    Args:
        router: what builds the router.
        submodules: the linear layers of an expert, and of the shared ones.
    """
    experts: Any = ModuleSpec(module=SequentialMLP, submodules=submodules)
    shared: Any = ModuleSpec(module=SharedExpertMLP, submodules=submodules)
    if hasattr(MLP, "as_mlp_submodule"):
        experts = partial(SequentialMLP, submodules=submodules)
        shared = partial(SharedExpertMLP, submodules=submodules)
    parts = MoESubmodules(experts=experts, shared_experts=shared, router=router)
    if hasattr(MLP, "as_mlp_submodule"):
        return partial(MoELayer, submodules=parts)
    return ModuleSpec(module=MoELayer, submodules=parts)
