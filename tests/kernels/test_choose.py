"""Which backend computes an operator: chosen, forced, or refused with the reason and a remedy."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lightning_dhellam.kernels import choose

CPU = torch.device("cpu")


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Hides a package, whether it is installed or not."""
    find = importlib.util.find_spec

    def hide(package: str) -> None:
        def without(name: str, *args: Any) -> Any:
            return None if name == package else find(name, *args)

        monkeypatch.setattr(importlib.util, "find_spec", without)

    return hide


def test_the_cpu_computes_with_the_references_and_says_so() -> None:
    kernels = choose.choose(CPU, torch.bfloat16)
    assert set(kernels.names) == set(choose.CANDIDATES)
    assert kernels.names["attention"] == "cpu"
    assert {name for o, name in kernels.names.items() if o != "attention"} == {"reference"}
    assert str(kernels) == (
        "kernels: cpu for attention; reference for cross_entropy, dropout, gelu, layer_norm,"
        " rms_norm, rope, swiglu"
    )
    assert kernels.swiglu.forward(torch.ones(1, 4)).shape == (1, 2)


def test_the_interpreter_is_never_chosen_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "triton" not in choose.choose(CPU, torch.float32).names.values()


@pytest.mark.parametrize("name", ["flash_attn", "transformer_engine"])
def test_a_forced_backend_that_is_not_installed(name: str, missing: Callable[[str], None]) -> None:
    missing(name)
    with pytest.raises(ValueError) as error:
        choose.choose(CPU, torch.bfloat16, {"attention": name})
    assert str(error.value) == (
        f"kernels={{attention: {name}}} cannot be used here: it needs the package {name}: pip"
        " install 'lightning-dhellam[cuda]'; or use cpu, or leave attention out"
    )


@pytest.mark.parametrize(
    ("forced", "message"),
    [
        ({"attention": "flash"}, "attention has no backend 'flash'; did you mean 'flash_attn'?"),
        ({"atention": "cudnn"}, "there is no operator 'atention'; did you mean 'attention'?"),
        ({"attention": "cudnn"}, "needs a GPU, and the device is cpu"),
        ({"swiglu": "cutlass"}, "swiglu has no backend 'cutlass'; known: triton, reference"),
    ],
    ids=str,
)
def test_a_forced_backend_that_cannot_be(forced: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError) as error:
        choose.choose(CPU, torch.bfloat16, forced)
    assert message in str(error.value)


def test_sixteen_bit_backends_refuse_fp32() -> None:
    with pytest.raises(ValueError, match="the activations are float32"):
        choose.choose(CPU, torch.float32, {"attention": "cudnn"})


@pytest.mark.gpu
def test_the_gpu_takes_the_fastest_that_is_there() -> None:
    device = torch.device("cuda", 0)
    kernels = choose.choose(device, torch.bfloat16)
    assert kernels.names["attention"] == "cudnn"
    assert {n for o, n in kernels.names.items() if o != "attention"} == {"triton"}
    assert choose.choose(device, torch.float32).names["attention"] == "efficient"
    forced = choose.choose(device, torch.bfloat16, {"rms_norm": "reference"})
    assert forced.names["rms_norm"] == "reference" and forced.names["rope"] == "triton"
