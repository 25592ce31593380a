"""LoRA as its paper has it, around the linear layers of a Hugging Face model."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_dhellam.models.lora import LoRA

PREFIX = "base_model.model."


class Adapted(nn.Module):
    """A frozen linear layer, and A and B beside it."""

    def __init__(self, linear: nn.Linear, lora: LoRA, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = linear.weight.shape
        self.linear, self.scale = linear, lora.scale
        self.lora_A = nn.Linear(columns, lora.rank, bias=False)
        self.lora_B = nn.Linear(lora.rank, rows, bias=False)
        with torch.no_grad():
            self.lora_A.weight.normal_(0, 0.2, generator=generator)
            # Not zero, as at first: or else no gradient would reach A.
            self.lora_B.weight.normal_(0, 0.2, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.scale * self.lora_B(self.lora_A(x))


def adapted(model: PreTrainedModel, lora: LoRA, targets: tuple[str, ...]) -> PreTrainedModel:
    """`model` frozen, with adapters around the linear layers of these names."""
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(5)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in targets:
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], Adapted(module, lora, generator))
    return model


def peft_tensors(model: PreTrainedModel, *, grads: bool = False) -> dict[str, Tensor]:
    """The adapters of `model`, or their gradients, by the names that peft gives them."""
    found = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            tensor = parameter.grad if grads else parameter.detach()
            assert tensor is not None, name
            found[f"{PREFIX}{name}"] = tensor.clone()
    return found
