"""Training in 8 bits on one rank and on two is near fp32: parallel sizes change rounding alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_dhellam.models import export_huggingface, import_huggingface
from lightning_dhellam.plan import Lane
from lightning_dhellam.runner import Runner
from tests.engine.harness import CPU, batch_of
from tests.models.llama import SMALL, hugging_face_llama, relative_error
from tests.ranks import run_ranks

CONFIG = replace(SMALL, hidden_size=256, ffn_hidden_size=256, num_layers=2)
"""Every rank of two has 128 channels of what they share, as blocks are wide."""
FORMATS = {"current": 0.3, "blockwise": 0.25}
"""Relative error of any gradient, of bf16 besides; two roundings differ by more than each errs."""
SIZES: dict[str, dict[str, int]] = {
    "tp": {"tensor_parallel_size": 2},
    "pp": {"pipeline_parallel_size": 2},
    "cp": {"context_parallel_size": 2},
    "dp": {},
}
Outcome = tuple[Tensor, dict[str, Tensor], float]
"""Losses of two steps, gradients of the first, and the norm of the last."""


def _weights() -> Any:
    """A model that rounding does not throw off its course, with weights of usual size."""
    model = hugging_face_llama(CONFIG)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(0.15)
    return model


def outcome(
    name: str | None, device: str, sizes: dict[str, int], kernel: str = "reference", **options: Any
) -> Outcome:
    """What this rank finds of two steps."""
    kernels = {"fp8": kernel} if kernel else None
    given = {"micro_batch_size": 1, "precision": "bf16-mixed", "fp8": name, "kernels": kernels}
    with Runner.create(CONFIG, torch.device(device), **sizes, **(given | options)) as runner:
        import_huggingface(runner.model, _weights())
        optimizer = runner.optimizer(
            torch.optim.SGD(runner.model.parameters(), lr=0.05), distributed_optimizer=False
        )
        topology, losses, gradients = runner.context.topology, [], {}
        for step in range(2):
            batch = batch_of(CONFIG, 2, 32)
            own = {n: t.chunk(topology.dp_size)[topology.dp_rank] for n, t in batch.items()}
            losses.append(runner.mean(runner.train(own)))
            norm = optimizer.grad_norm()
            if step == 0:
                found = {n: p.main_grad.clone() for n, p in runner.model.named_parameters()}
                gradients = export_huggingface(runner.model, found)
            optimizer.step()
        return torch.stack(losses).cpu(), {n: t.cpu() for n, t in gradients.items()}, float(norm)


def check(found: Outcome, expected: Outcome, limit: float, where: Any) -> None:
    """Refuse losses and gradients that are farther apart than formats explain."""
    torch.testing.assert_close(found[0], expected[0], rtol=0.01, atol=0.0)
    errors = {n: relative_error(found[1][n].float(), t.float()) for n, t in expected[1].items()}
    assert max(errors.values()) < limit, (where, errors)
    assert abs(found[2] - expected[2]) < limit * expected[2], where


GATHERED: dict[str, dict[str, Any]] = {
    "gathered": {},
    "gathered, kept": {"recompute": "none", "plan": "dhellam"},
    "gathered, made again": {"recompute": "full", "plan": "megatron"},
}
"""How ranks of two gather in 8 bits."""
KEYS: dict[str, dict[str, Any]] = {
    "keys": {},
    "keys, made again": {"recompute": "full", "plan": "megatron"},
    "keys, at once": {"context_exchange": "all_gather"},
}
"""How keys travel in 8 bits between two ranks that share sequences."""


def _outcomes(rank: int) -> dict[tuple[str, str], Outcome]:
    found = {
        (name, where): outcome(name, "cpu", sizes)
        for name in FORMATS
        for where, sizes in SIZES.items()
        if name == "current" or where == "tp"
    }
    return (
        found
        | {
            (name, where): outcome(name, "cpu", SIZES["tp"], fp8_all_gather=True, **options)
            for name in FORMATS
            for where, options in GATHERED.items()
        }
        | {
            ("current", where): outcome(
                "current", "cpu", SIZES["cp"], context_fp8_keys=True, **options
            )
            for where, options in KEYS.items()
        }
    )


def _sent(name: str, *, all_gather: bool) -> Counter[torch.dtype]:
    """Numbers of each type that this rank gives to gathers of a step."""
    options = {"fp8": name, "kernels": {"fp8": "reference"}, "fp8_all_gather": all_gather}
    sizes = {"tensor_parallel_size": 2, "precision": "bf16-mixed", "recompute": "none"}
    counts: Counter[torch.dtype] = Counter()
    with Runner.create(CONFIG, CPU, **sizes, **options) as runner:
        runner.optimizer(torch.optim.SGD(runner.model.parameters(), lr=0.05))
        transport = runner.context.communicators[Lane.TP].transport
        gather = transport.all_gather

        def counted(x: Tensor, out: Tensor) -> Any:
            counts[x.dtype] += x.numel()
            return gather(x, out)

        transport.all_gather = counted  # type: ignore[method-assign]
        runner.train(batch_of(CONFIG, 2, 32))
    return counts


def _both(rank: int) -> tuple[dict[tuple[str, str], Outcome], Any]:
    sent = {name: _sent(name, all_gather=True) for name in FORMATS}
    return _outcomes(rank), {None: _sent("current", all_gather=False), **sent}


def test_on_one_rank_and_on_two() -> None:
    exact = outcome(None, "cpu", {}, precision="32-true")
    alone = {name: outcome(name, "cpu", {}) for name in FORMATS}
    for name, limit in FORMATS.items():
        check(alone[name], exact, limit, name)
    for outcomes, sent in run_ranks(2, _both):
        for (name, where), found in outcomes.items():
            check(found, alone[name], FORMATS[name], (name, where))
        _check_gathered(outcomes, sent)
        first, again, at_once = (outcomes["current", where] for where in KEYS)
        assert _differing(first, again) == []
        assert first[0][0].equal(at_once[0][0])  # the same bits come either way
        assert _differing(first, outcomes["current", "cp"])


def _check_gathered(outcomes: dict[tuple[str, str], Outcome], sent: Any) -> None:
    """One scale of all ranks changes no bit; blocks none that is not made of what was turned."""
    for name in FORMATS:
        plain, (first, *others) = (
            outcomes[name, "tp"],
            [outcomes[name, where] for where in GATHERED],
        )
        for other in (*others, *([plain] if name == "current" else [])):
            assert _differing(first, other) == []
        assert first[0][0].equal(plain[0][0])  # forward reads the same bits
        assert name == "current" or _differing(first, plain)
    linear = sent[None][torch.bfloat16] - sent["current"][torch.bfloat16]
    assert sent["current"][torch.uint8] == sent["blockwise"][torch.uint8] == linear > 0
    layers = CONFIG.num_layers
    # A scale for each 128 numbers; or of each gather, forward and backward, one number.
    assert sent["blockwise"][torch.float32] - sent[None][torch.float32] == linear / 128
    assert sent["current"][torch.float32] - sent[None][torch.float32] == 2 * 4 * layers


def _differing(one: Outcome, other: Outcome) -> list[str]:
    names = [n for n, t in one[1].items() if not t.equal(other[1][n])]
    return names if one[0].equal(other[0]) else ["loss", *names]
