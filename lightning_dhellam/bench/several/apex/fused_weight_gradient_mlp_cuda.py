"""What Megatron-core calls of Apex when it adds weight gradients to its buffers.

Apex is built from source with a compiler of the GPU; torch can do the same in one cuBLAS call. With
this folder on the path Megatron-core trains with `gradient_accumulation_fusion`, as its users do.
"""

from __future__ import annotations

from torch import Tensor

from lightning_dhellam.kernels.linear import cublas


def wgrad_gemm_accum_fp32(total_input: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
    """Add `grad_output` [N, O] transposed times `total_input` [N, I] to `main_grad` [O, I]."""
    cublas.accumulate_wgrad(main_grad, grad_output, total_input)


wgrad_gemm_accum_fp16 = wgrad_gemm_accum_fp32
