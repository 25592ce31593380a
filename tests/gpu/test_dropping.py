"""Dropout on a GPU drops what it does on the CPU, by kernels of other kinds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lightning_dhellam.layers import lower
from lightning_dhellam.models import CausalLM, import_huggingface
from lightning_dhellam.parallel import ParallelContext
from tests.engine.harness import CPU, add_main_grads, batch_of, engine_of, pieces, train
from tests.models.dense import DENSE, hugging_face_dense
from tests.models.llama import relative_error

CONFIG = replace(DENSE["gpt2"], hidden_dropout=0.1, embedding_dropout=0.2, attention_dropout=0.3)


def outcome(device: torch.device, dtype: torch.dtype) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one step."""
    context = ParallelContext.single(device)
    model = CausalLM(CONFIG, context, dtype)
    import_huggingface(model, hugging_face_dense(DENSE["gpt2"]))
    add_main_grads(model)
    micro_batches = pieces(batch_of(CONFIG, 3, 24), 2, context)
    loss, gradients = train(engine_of(lower(model), device), model, micro_batches)
    return loss.item(), {name: gradient.cpu() for name, gradient in gradients.items()}


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)], ids=["fp32", "bf16"]
)
def test_a_gpu_drops_what_the_cpu_does(dtype: torch.dtype, tolerance: float) -> None:
    expected_loss, expected = outcome(CPU, torch.float32)
    loss, gradients = outcome(torch.device("cuda", 0), dtype)
    assert abs(loss - expected_loss) <= tolerance * expected_loss
    errors = {name: relative_error(gradients[name], x) for name, x in expected.items()}
    assert max(errors.values()) <= tolerance, errors
