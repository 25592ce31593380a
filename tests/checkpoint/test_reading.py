"""What torch's distributed checkpoint has written is read into its place, however it lies."""

from __future__ import annotations

import warnings
from pathlib import Path
from unittest import mock

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp

from lightning_dhellam.checkpoint import reading
from lightning_dhellam.checkpoint.finite import Finiteness
from lightning_dhellam.checkpoint.pieces import Pieces, empty_place
from lightning_dhellam.checkpoint.reading import load_pieces, read_metadata

KINDS = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.complex64]
TENSORS = {
    "transposed": torch.arange(12.0).view(3, 4).t(),
    "scalar": torch.tensor(3.0),
    "none": torch.empty(0, 3),
    "eighths": torch.arange(8.0).to(torch.float8_e4m3fn),
    "rows of more": torch.arange(40.0).view(10, 4)[2:7],
    **{str(kind): torch.arange(24).view(2, 3, 4).to(kind) for kind in KINDS},
}
BY_TORCH = {"transposed", "eighths"}
"""What does not lie in a file as it does in memory, or is of a form of its own."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("tensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is no group
        dcp.save(dict(TENSORS), checkpoint_id=found, no_dist=True)
    return found


def _load(folder: Path, name: str, pieces: list[tuple[tuple[int, ...], Tensor]]) -> None:
    whole = TENSORS[name]
    load_pieces(folder, read_metadata(folder), {name: Pieces(whole.shape, whole.dtype, pieces)})


@pytest.mark.parametrize("name", TENSORS)
def test_whole_tensors(name: str, folder: Path) -> None:
    whole = TENSORS[name]
    found = empty_place(whole.shape, whole.dtype)
    assert found.shape == whole.shape and found.dtype == whole.dtype
    assert not found.view(torch.uint8).any() if whole.dim() else not found
    with mock.patch.object(torch, "load", wraps=torch.load) as by_torch:
        _load(folder, name, [((0,) * whole.dim(), found)])
    assert by_torch.called is (name in BY_TORCH)
    assert torch.equal(found.contiguous().view(-1), whole.contiguous().view(-1))


@pytest.mark.parametrize("name", ["transposed", "torch.float32", "torch.bfloat16"])
def test_parts_of_tensors_into_parts_of_others(name: str, folder: Path) -> None:
    whole = TENSORS[name]
    for first, last in ((0, whole.shape[0]), (1, 2)):
        for axis in range(1, whole.dim()):
            start = (first, *(int(a == axis) for a in range(1, whole.dim())))
            places = tuple(slice(at, None) for at in start)
            part = whole[places][: last - first]
            wider = torch.full((*part.shape[:-1], part.shape[-1] + 1), 7, dtype=whole.dtype)
            _load(folder, name, [(start, wider[..., 1:])])
            assert torch.equal(wider[..., 1:], part) and bool((wider[..., 0] == 7).all())


def test_a_file_that_ends_early_is_named(folder: Path, tmp_path: Path) -> None:
    whole = torch.ones(64, 64)
    dcp.save({"w": whole}, checkpoint_id=tmp_path / "cut", no_dist=True)
    with (
        mock.patch.object(reading, "_laid", lambda _: reading._Laid(2**20, (64, 64), whole.dtype)),
        pytest.raises(ValueError, match=r"cut cannot be read \(EOFError: .*16384 bytes early\)"),
    ):
        pieces = {"w": Pieces(whole.shape, whole.dtype, [((0, 0), torch.empty(64, 64))])}
        load_pieces(tmp_path / "cut", read_metadata(tmp_path / "cut"), pieces)


@pytest.mark.parametrize("value", [numpy.nan, numpy.inf, -numpy.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_weight_that_is_not_finite_is_found(value: float, dtype: torch.dtype) -> None:
    model = nn.ModuleDict({"a": nn.Linear(9, 7, dtype=dtype), "b": nn.Linear(0, 3, dtype=dtype)})
    Finiteness(model).check(Path("x.ckpt"))
    with torch.no_grad():
        model["a"].weight[3, 4] = value
    with pytest.raises(ValueError, match=r"x.ckpt is not written: 'a.weight' is not finite"):
        Finiteness(model).check(Path("x.ckpt"))
