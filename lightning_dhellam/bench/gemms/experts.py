"""Times the GEMMs of all experts of a layer at once, by each backend that there is for them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

import torch
from torch import Tensor

from lightning_dhellam.bench.gemms.report import row_of
from lightning_dhellam.bench.report import Row
from lightning_dhellam.bench.timing import seconds
from lightning_dhellam.kernels import choose
from lightning_dhellam.kernels.candidates import CANDIDATES
from lightning_dhellam.kernels.protocols import GroupedKernel
from lightning_dhellam.models import ModelConfig


def expert_rows(config: ModelConfig, tokens: int, device: torch.device) -> Iterator[Row]:
    """Each linear layer of the experts, with even and uneven shares of the tokens' choices."""
    if config.num_experts is None:
        return
    wide = config.expert_ffn_hidden_size or config.ffn_hidden_size
    shapes = {"fc1": (2 * wide, config.hidden_size), "fc2": (config.hidden_size, wide)}
    for name, why in choose.available("grouped", device, torch.bfloat16):
        backend = CANDIDATES["grouped"][name].load()
        for gemm, shape in shapes.items() if why is None else ():
            for share in ("even", "uneven"):
                sizes = _sizes(tokens * config.experts_per_token, config.num_experts, share)
                rates = _rates(backend, sizes, *shape, device)
                yield row_of(f"{name}, {share}", f"experts {gemm}", sum(sizes), shape, rates)


def _sizes(rows: int, groups: int, share: str) -> list[int]:
    """Rows of each group: as many, or from half to one and a half times as many."""
    low, high = (rows, rows) if share == "even" else (rows // 2, rows * 3 // 2)
    step = (high - low) / max(1, groups - 1)
    shares = ((low + step * group) / groups for group in range(groups))
    ends = [round(end) for end in accumulate(shares)]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def _rates(
    backend: GroupedKernel, sizes: list[int], outputs: int, inputs: int, device: torch.device
) -> dict[str, float]:
    """FLOP/s of the three GEMMs by kind; the weight gradients are added to fp32."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16)

    rows, groups = sum(sizes), len(sizes)
    x, dy = draw(rows, inputs), draw(rows, outputs)
    weights = [draw(outputs, inputs) for _ in range(groups)]
    grads = [torch.zeros(outputs, inputs, device=device) for _ in range(groups)]
    ends = torch.tensor(sizes).cumsum(0).to(device, torch.int32)
    # Sizes that the host knows let each backend do its best.
    calls = {
        "forward": lambda: backend.forward(x, weights, ends, sizes),
        "dgrad": lambda: backend.data_grad(dy, weights, ends, sizes),
        "wgrad": lambda: backend.weight_grad(dy, x, grads, [False] * groups, ends, sizes),
    }
    work = 2 * rows * outputs * inputs
    with torch.no_grad():
        return {kind: work / seconds([call] * 4, device) for kind, call in calls.items()}
