"""Which backend computes an operator: chosen, forced, or refused with the reason and a remedy."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from importlib import metadata
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_dhellam.kernels import choose, packages, protocols
from lightning_dhellam.kernels.attention import Backend
from lightning_dhellam.kernels.candidate import Candidate
from lightning_dhellam.kernels.candidates import CANDIDATES
from lightning_dhellam.kernels.deterministic import deterministic

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
    assert set(kernels.names) == set(CANDIDATES)
    attends = {o: kernels.names[o] for o in ("attention", "packed_attention")}
    assert attends == {"attention": "cpu", "packed_attention": "cpu"}
    assert {name for o, name in kernels.names.items() if o not in attends} == {"reference"}
    assert str(kernels) == (
        "kernels: cpu for attention, packed_attention; reference for cross_entropy, dropout,"
        " dropped_attention,"
        " embedding, fp8, gelu, gelu_tanh, grouped, layer_norm, linear, merge, permute, rms_norm,"
        " rope, swiglu"
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


def test_attention_is_chosen_by_the_size_of_heads() -> None:
    flash = Candidate(lambda: None, lambda device, dtype: None, largest_head=128)
    assert flash.obstacle(CPU, torch.bfloat16, 64) is None
    for size in (4, 36, 256):
        assert flash.obstacle(CPU, torch.bfloat16, size) == (
            f"its heads are multiples of 8 up to 128, and these are {size}"
        )
    assert choose.choose(CPU, torch.bfloat16, head=4).names["attention"] == "cpu"
    fp32 = Candidate(lambda: None, lambda device, dtype: None, multiple=4)
    assert fp32.obstacle(CPU, torch.float32, 12) is None
    assert fp32.obstacle(CPU, torch.float32, 6) == "its heads are multiples of 4, and these are 6"


@pytest.mark.parametrize("operator", ["attention", "packed_attention"])
@pytest.mark.parametrize("name", ["flash_attn", "flash_attn_3", "transformer_engine"])
def test_a_backend_without_a_log_sum_exp_takes_no_blocks(name: str, operator: str) -> None:
    with pytest.raises(ValueError) as error:
        choose.choose(CPU, torch.bfloat16, {operator: name}, in_blocks=True)
    assert str(error.value) == (
        f"kernels={{{operator}: {name}}} cannot be used here: with context parallelism attention is"
        " merged from blocks of keys, and it keeps their log-sum-exp to itself; or use cpu, or"
        f" leave {operator} out"
    )
    assert choose.choose(CPU, torch.bfloat16, in_blocks=True).names["attention"] == "cpu"


@pytest.mark.parametrize("name", ["cudnn", "flash_attn_4"])
def test_a_backend_that_takes_no_window_says_so(name: str) -> None:
    with pytest.raises(ValueError) as error:
        choose.choose(CPU, torch.bfloat16, {"attention": name}, in_window=True)
    assert str(error.value) == (
        f"kernels={{attention: {name}}} cannot be used here: it attends to all tokens before, and"
        " layers here to a sliding window of them; or use cpu, or leave attention out"
    )
    assert choose.choose(CPU, torch.bfloat16, in_window=True).names["attention"] == "cpu"


def test_a_folder_that_another_package_shares_is_not_a_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # What is found of flash-attn 2 where only flash-attn 4 is installed.
    shared = ModuleSpec("flash_attn", None, is_package=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: shared)
    with pytest.raises(ValueError, match="it needs the package flash_attn: pip install"):
        choose.choose(CPU, torch.bfloat16, {"attention": "flash_attn"})


@pytest.fixture
def flash_attn_4(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One source file of an installed flash-attn 4."""
    source = tmp_path / "flash_attn" / "cute" / "interface.py"
    source.parent.mkdir(parents=True)
    source.write_text("newer = 1\n")
    info = tmp_path / "flash_attn_4-4.0.0b36.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.4\nName: flash-attn-4\nVersion: 4.0.0b36\n")
    (info / "RECORD").write_text("flash_attn/cute/interface.py,,10\n")
    monkeypatch.syspath_prepend(tmp_path)
    return source


FORCED = "kernels={attention: flash_attn_4} cannot be used here: "


def test_flash_attn_4_is_known_by_its_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    with pytest.raises(ValueError) as error:
        choose.choose(CPU, torch.bfloat16, {"attention": "flash_attn_4"})
    assert str(error.value) == (
        f"{FORCED}it needs the package flash-attn-4: pip install"
        " 'lightning-dhellam[flash-attn-4]'; or use cpu, or leave attention out"
    )


def test_flash_attn_4_is_refused_when_flash_attn_2_replaced_its_files(flash_attn_4: Path) -> None:
    def message() -> str:
        with pytest.raises(ValueError) as error:
            choose.choose(CPU, torch.bfloat16, {"attention": "flash_attn_4"})
        return str(error.value).removeprefix(FORCED)

    assert message().startswith("it needs a GPU")
    flash_attn_4.write_text("older = 1.0\n")
    replaced = (
        "another package has replaced files of flash-attn-4: pip install --force-reinstall"
        " --no-deps flash-attn-4;"
    )
    assert message().startswith(replaced)
    flash_attn_4.unlink()
    assert message().startswith(replaced)


@pytest.mark.parametrize(
    ("capability", "obstacle"),
    [
        ((8, 0), "it needs compute capability 9.0 (H100) to 11.x, and this GPU has 8.0"),
        ((9, 0), None),
        ((10, 3), None),
        ((12, 0), "it needs compute capability 9.0 (H100) to 11.x, and this GPU has 12.0"),
    ],
    ids=str,
)
def test_gpus_of_flash_attn_4(
    capability: tuple[int, int],
    obstacle: str | None,
    flash_attn_4: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    device = torch.device("cuda", 0)
    assert dict(choose.available("attention", device, torch.bfloat16))["flash_attn_4"] == obstacle


def test_what_a_gpu_gets_by_itself(flash_attn_4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)

    def first(capability: tuple[int, int]) -> str:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        return choose._first("attention", device, torch.bfloat16, 0)

    assert first((9, 0)) == "flash_attn_4"
    # Not measured there.
    assert first((10, 0)) == first((8, 0)) == "cudnn"
    flash_attn_4.unlink()
    assert first((9, 0)) == "cudnn"
    with deterministic():
        assert first((9, 0)) == "torch_flash"
        obstacle = dict(choose.available("attention", device, torch.bfloat16))["cudnn"]
        assert obstacle and "torch.use_deterministic_algorithms is on" in obstacle


@pytest.mark.parametrize(
    ("forced", "message"),
    [
        ({"attention": "flash"}, "attention has no backend 'flash'; did you mean 'flash_attn'?"),
        ({"atention": "cudnn"}, "there is no operator 'atention'; did you mean 'attention'?"),
        ({"attention": "cudnn"}, "needs a GPU, and the device is cpu"),
        ({"linear": "cublas"}, "needs a GPU, and the device is cpu; or use reference, or leave"),
        ({"embedding": "triton"}, "embedding has no backend 'triton'; known: reference"),
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
    usable = [n for n, why in choose.available("attention", device, torch.bfloat16) if not why]
    assert kernels.names["attention"] == usable[0]
    others = {"attention": usable[0], "embedding": "reference", "linear": "cublas"}
    others |= {"packed_attention": "torch_flash", "dropped_attention": "reference"}
    others |= {"fp8": "cublaslt" if importlib.util.find_spec("nvmath") else "cublas"}
    assert kernels.names == {o: others.get(o, "triton") for o in CANDIDATES}
    of_fp32 = choose.choose(device, torch.float32).names
    assert of_fp32["attention"] == of_fp32["packed_attention"] == "efficient"
    forced = choose.choose(device, torch.bfloat16, {"rms_norm": "reference"})
    assert forced.names["rms_norm"] == "reference" and forced.names["rope"] == "triton"


PROTOCOLS = {
    name: getattr(protocols, hint.removeprefix("protocols."))
    for name, hint in choose.Kernels.__annotations__.items()
    if hint.startswith("protocols.")
}


@pytest.mark.parametrize(
    ("operator", "backend"),
    [(o, name) for o in PROTOCOLS for name in CANDIDATES[o]],
)
def test_a_backend_has_what_its_operator_promises(operator: str, backend: str) -> None:
    pytest.importorskip(CANDIDATES[operator][backend].package or "torch")
    module = CANDIDATES[operator][backend].load()
    protocol = PROTOCOLS[operator]
    promised = [*protocol.__annotations__, *(n for n in vars(protocol) if not n.startswith("_"))]
    assert promised
    for name in dict.fromkeys(promised):
        found, wanted = getattr(module, name), getattr(protocol, name, None)
        if wanted is None:  # a constant
            continue
        ours, theirs = inspect.signature(found), inspect.signature(wanted)
        # The protocol's functions have `self`; names count where they may be used.
        parameters = list(theirs.parameters.values())[1:]
        assert len(ours.parameters) == len(parameters), name
        assert ours.return_annotation == theirs.return_annotation, name
        for one, other in zip(ours.parameters.values(), parameters, strict=True):
            assert (one.default, one.annotation) == (other.default, other.annotation), name
            assert other.kind is other.POSITIONAL_ONLY or one.name == other.name, name


def test_attention_is_a_backend() -> None:
    assert isinstance(choose.choose(CPU, torch.float32).attention, Backend)


@pytest.mark.parametrize("name", [n for n in CANDIDATES["attention"] if n != "cpu"])
def test_libraries_that_cannot_drop_by_counters_say_so(name: str) -> None:
    with pytest.raises(ValueError) as error:
        choose.choose(CPU, torch.float32, {"dropped_attention": name})
    assert str(error.value).startswith(f"kernels={{dropped_attention: {name}}} cannot be used here")
    assert "drops" in str(error.value) and "or use reference, or leave" in str(error.value)


def test_every_backend_of_attention_says_whether_it_drops_by_counters() -> None:
    assert {*CANDIDATES["attention"]} < {*CANDIDATES["dropped_attention"]}


def test_loaded_libraries_are_found_by_their_whole_names() -> None:
    found = packages.loaded("torch_cpu")
    assert [Path(path).name for path in found] == ["libtorch_cpu.so"]
    assert not packages.loaded("torch_c")
