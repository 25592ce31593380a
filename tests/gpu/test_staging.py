"""What is saved beside training is copied to the host while the device computes."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor

from lightning_dhellam.checkpoint.staging import Staging

pytestmark = pytest.mark.gpu


def copies_of(device: str, size: int) -> list[tuple[Tensor, Tensor]]:
    """Copies of tensors that change as soon as they may, and what they are to be; twice."""
    staging, found = Staging(torch.device(device)), []
    for value in (1.0, 2.0):
        tensors = {
            "weight": torch.full((size, size), value, device=device),
            "optimizer/moment": torch.full((size, 2 * size), value + 1, device=device),
            "half": torch.full((3,), value, device=device, dtype=torch.bfloat16),
            "count": torch.tensor(value, device=device),
            "none": torch.empty(0, 4, device=device),
        }
        wanted = {name: tensor.cpu().clone() for name, tensor in tensors.items()}
        copies = staging.copy(tensors, {"optimizer/moment"})
        for name, tensor in tensors.items():
            if name != "optimizer/moment":
                tensor.zero_()
        product = tensors["optimizer/moment"] @ tensors["optimizer/moment"].T  # a step's work
        staging.hold()
        tensors["optimizer/moment"].zero_()
        staging.wait()
        assert product.shape == (size, size)
        found += [(copies[name].clone(), wanted[name]) for name in tensors]
    staging.close()
    return found


@pytest.mark.parametrize("free", [None, 0])
def test_copies_are_what_was_there_when_they_were_asked_for(
    device: torch.device, free: int | None
) -> None:
    """Whether or not the device has room for copies of its own."""
    known = torch.cuda.mem_get_info if free is None else lambda *_: (free, free)
    with mock.patch.object(torch.cuda, "mem_get_info", known):
        for found, wanted in copies_of("cuda", 4096):
            assert torch.equal(found, wanted)


def test_nothing_waits_for_copies_where_the_device_has_room(device: torch.device) -> None:
    """The stream that computes goes on before what may change at once has reached the host."""
    staging, weight = Staging(device), torch.ones(2**28, device=device)
    staging.copy({"weight": weight}, set())  # which takes the host memory
    staging.wait()
    (copy,) = staging.copy({"weight": weight}, set()).values()
    weight.zero_()
    zeroed = torch.cuda.Event()
    zeroed.record()
    zeroed.synchronize()
    assert staging._copied is not None and not staging._copied.query()
    staging.wait()
    assert bool((copy == 1).all())
    staging.close()


def test_host_memory_is_pinned_and_not_rounded_up(device: torch.device) -> None:
    staging = Staging(device)
    tensor = torch.ones(2**20 + 4, device=device)
    (copy,) = staging.copy({"weight": tensor}, set()).values()
    assert copy.is_pinned() and staging.size == tensor.numel() * 4
    staging.wait()
    staging.close()
    assert staging.size == 0
