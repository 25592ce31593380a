"""How parameters lie on ranks, for any sizes: pure functions, without ranks."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise
from math import prod

import pytest
import torch
from torch import Tensor

from lightning_dhellam.checkpoint.shares import Share, boxes, shares_of
from lightning_dhellam.models import CausalLM, ModelConfig
from lightning_dhellam.models.families import family_of
from lightning_dhellam.models.layout import conversions
from lightning_dhellam.parallel import ParallelContext, Topology
from lightning_dhellam.parallel.experts import is_expert

CPU = torch.device("cpu")
DENSE = ModelConfig(
    num_layers=1,
    hidden_size=16,
    ffn_hidden_size=32,
    num_attention_heads=8,
    num_query_groups=4,
    vocab_size=21,
    max_sequence_length=16,
)
MOE = replace(DENSE, num_experts=4, experts_per_token=2, expert_ffn_hidden_size=8)


@pytest.mark.parametrize("seed", range(8))
def test_a_range_of_elements_is_boxes_in_their_order(seed: int) -> None:
    draw = random.Random(seed)
    shape = tuple(draw.randint(1, 4) for _ in range(draw.randint(0, 3)))
    numbers = torch.arange(prod(shape)).view(shape)
    for start in range(numbers.numel() + 1):
        for end in range(start, numbers.numel() + 1):
            found = []
            for at, size in boxes(shape, start, end):
                places = tuple(slice(a, a + s) for a, s in zip(at, size, strict=True))
                assert numbers[places].shape == size
                found += numbers[places].flatten().tolist()
            assert found == list(range(start, end))
            assert len(list(boxes(shape, start, end))) <= max(1, 2 * len(shape) - 1)


def _cut(whole: Tensor, share: Share) -> Tensor:
    """The part of `whole` that a rank has, strip by strip: independent of `Share.pieces`."""
    if share.axis is None:
        return whole
    strips = whole.chunk(share.strips, dim=share.axis)
    own = [strip.chunk(share.places, dim=share.axis)[share.place] for strip in strips]
    return torch.cat(own, dim=share.axis)


def _ranks(draw: random.Random, share: Share) -> list[tuple[Share, list[tuple[int, int] | None]]]:
    """Shares of all ranks of a random run, and of which elements each of its replicas has state."""
    places = draw.choice([n for n in (1, 2, 4, 8) if share.axis is not None or n == 1])
    found = []
    for place in range(places):
        own = replace(share, place=place, places=places if share.axis is not None else 1)
        count = prod(own.local)
        cuts = sorted(draw.randint(0, count) for _ in range(draw.choice((0, 1, 3))))
        ends = [0, *cuts, count]
        parts = list(pairwise(ends))
        found.append((own, [None] if draw.random() < 0.3 else parts))
    return found


@pytest.mark.parametrize("seed", range(60))
def test_what_any_sizes_save_any_other_load(seed: int) -> None:
    draw = random.Random(seed)
    strips = draw.choice((1, 2, 3))
    dims = draw.randint(1, 3)
    axis = draw.choice([None, *range(dims)])
    shape = [draw.randint(1, 4) for _ in range(dims)]
    if axis is not None:
        shape[axis] = 8 * strips * draw.randint(1, 2)
    share = Share(tuple(shape), axis, strips)
    whole = torch.arange(prod(shape)).view(shape)
    stored = torch.full_like(whole, -1)
    for own, parts in _ranks(draw, share):
        local = _cut(whole, own)
        assert tuple(local.shape) == own.local
        for part in parts:
            held = local if part is None else local.flatten()[part[0] : part[1]]
            for at, piece in own.pieces(held, part):
                places = tuple(slice(a, a + s) for a, s in zip(at, piece.shape, strict=True))
                assert (stored[places] == -1).all()  # no element twice
                stored[places] = piece
    assert torch.equal(stored, whole)
    for own, parts in _ranks(draw, share):
        local = _cut(whole, own)
        for part in parts:
            held = local if part is None else local.flatten()[part[0] : part[1]]
            loaded = torch.full_like(held, -1)
            for at, piece in own.pieces(loaded, part):
                places = tuple(slice(a, a + s) for a, s in zip(at, piece.shape, strict=True))
                piece.copy_(stored[places])
            assert torch.equal(loaded, held)


def test_rows_of_padding_that_were_not_saved_are_not_asked_for() -> None:
    saved = torch.arange(1, 11)[:, None].expand(10, 3)
    for place, expected in enumerate(([1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 0, 0])):
        share = Share((12, 3), 0, place=place, places=2, rows=9)
        assert share.fits((10, 3)) and not share.fits((8, 3)) and not share.fits((10, 4))
        loaded = torch.zeros(6, 3, dtype=torch.long)
        for at, piece in share.pieces(loaded, saved_rows=10):
            piece.copy_(saved[at[0] : at[0] + len(piece)])
        assert loaded[:, 0].tolist() == expected
    assert not replace(share, rows=None).fits((10, 3))


@pytest.mark.parametrize("config", [DENSE, MOE], ids=["dense", "experts"])
@pytest.mark.parametrize("size", [2, 4])
def test_parts_are_those_of_the_layout_that_imports_use(config: ModelConfig, size: int) -> None:
    """Fused queries, keys and values, gate and up, experts, and a padded vocabulary."""
    model = CausalLM(config, ParallelContext.single(CPU))
    for name, parameter in model.named_parameters():
        if is_expert(parameter) and "weight" in name:  # as where experts are split
            parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
    shares = shares_of(model, Topology())
    family = family_of(config)
    seen = set()
    for conversion in conversions(config, family.names, 8 * size * 3, config.num_experts or 1):
        theirs = [torch.rand(shape) for shape in conversion.theirs.values()]
        whole, share = conversion.shard(theirs, 0, 1), shares[conversion.ours]
        share = replace(share, shape=tuple(whole.shape))
        for place in range(size):
            own = replace(share, place=place, places=size if share.axis is not None else 1)
            assert torch.equal(conversion.shard(theirs, place, size), _cut(whole, own))
        seen.add(conversion.ours)
    assert seen == shares.keys()
    assert {shares[name].rows for name in seen if "output_layer" in name} == {config.vocab_size}
