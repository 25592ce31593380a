"""What the optimizer steps follows what becomes of the model's weights between its steps.

The optimizer steps copies of 16-bit weights in fp32 and, where it is sharded, parts of Megatron's
parameter buffer. An import, a callback, a hook that puts averages in for validation and takes them
out again: each writes the model's own weights, in ways that no counter of torch notices
(`weight.data.mul_(...)`). So before each step the two are compared, on the device: an element of a
weight that is not its master's rounded was changed, and its master becomes it. All others keep the
bits that they have in fp32, whatever has come and gone in between.
"""

from __future__ import annotations

from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import Tensor
from torch.nn import Parameter

from lightning_dhellam.kernels.masters import take_changes_
from lightning_dhellam.parallel.gradients import GradientBuffers


class StepsFollow:
    """Carries changes of a model's weights over to what an optimizer steps.

    Args:
        optimizer: Megatron's, which knows weights and masters.
        buffers: whose parameters it steps.
        sharded: weights lie in Megatron's buffer.
        master_weights: there are copies in fp32.
    """

    def __init__(
        self,
        optimizer: MegatronOptimizer,
        buffers: GradientBuffers,
        *,
        sharded: bool,
        master_weights: bool,
    ) -> None:
        self._optimizer = optimizer
        self._master_weights = master_weights
        parameters = buffers.ddp.params_with_grad if sharded else []
        self._places: list[tuple[Parameter, Tensor]] = [(p, p.data) for p in parameters]

    def take_changes(self) -> None:
        """Take over what was changed since the last step. Nothing is read on the host."""
        for parameter, place in self._places:
            if parameter.data_ptr() != place.data_ptr():  # `weight.data = ...`
                place.copy_(parameter.data)
                if parameter.device == place.device:  # else the run is over, and they were moved
                    parameter.data = place
        if self._master_weights:
            weights, masters = self._optimizer._get_model_and_main_params_data_float16()
            for weight, master in zip(weights, masters, strict=True):
                take_changes_(master, weight.to(master.device))
