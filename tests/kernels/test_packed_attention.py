"""Attention among documents against attention with a mask, in float64 under autograd."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import pairwise
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from lightning_dhellam.kernels import choose, merge
from lightning_dhellam.kernels.attention.heads import Heads
from lightning_dhellam.kernels.deterministic import deterministic
from lightning_dhellam.kernels.packed_attention import PackedBackend, Runs
from lightning_dhellam.kernels.packed_attention.masked import sees
from lightning_dhellam.kernels.packed_attention.reference import OneByOne
from tests.kernels.checks import assert_close, drawn, truth

CPU = torch.device("cpu")


class Shape(NamedTuple):
    """Documents, and their tokens here and elsewhere.

    Attributes:
        own: by sample the tokens of each document that attend to each other and those elsewhere.
        others: by sample the keys that each document has elsewhere.
        heads: of all.
        late: whether the later half of the tokens alone attends to the keys elsewhere.
    """

    own: list[list[int]]
    others: list[list[int]]
    heads: Heads
    late: bool = False


SHAPES = {
    "grouped": Shape([[5, 1, 12], [18, 0, 0]], [[9, 3, 0], [0, 12, 0]], Heads(2, 3, 16)),
    "one-token-each": Shape([[1] * 6], [[1] * 6], Heads(1, 4, 32)),
    "later-half": Shape([[3, 5, 16]], [[7, 8, 9]], Heads(2, 2, 8), late=True),
    # A document that has only keys here, one that has only queries, and a long one.
    "long": Shape(
        [[0, 300, 40, 172], [512, 0, 0, 0]], [[100, 0, 1, 411], [0, 0, 512, 0]], Heads(2, 4, 64)
    ),
    "wide-heads": Shape([[130, 126]], [[64, 64]], Heads(1, 2, 128)),
}


def _ends(lengths: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    flat = torch.tensor([0, *(count for sample in lengths for count in sample)])
    return flat.cumsum(0).int().to(device)


def _numbers(lengths: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """The document of each token, [B, S]."""
    rows = [[n for n, count in enumerate(sample) for _ in range(count)] for sample in lengths]
    return torch.tensor(rows, device=device)


def _longest(*ends: Tensor) -> int:
    return max(int(one.diff().max()) for one in ends)


def check(
    backend: PackedBackend,
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    tolerance: float,
    *,
    blocks: bool = True,
    window: int | None = None,
) -> None:
    """Output and gradients of causal attention, and of that merged with a block of other keys.

    With a `window` of causal attention alone.
    """
    heads, own = shape.heads, _numbers(shape.own, device)
    b, s = own.shape
    far = _numbers(shape.others, device)
    q, dout = (
        drawn((s, b, heads.queries, heads.size), dtype, device),
        drawn((s, b, heads.queries * heads.size), dtype, device, 2),
    )
    k, v = drawn((2, far.shape[1] + s, b, heads.groups, heads.size), dtype, device, 1)
    scale, early = 1.3 * heads.size**-0.5, s // 2 if shape.late else 0
    near = (own[:, :, None] == own[:, None]).tril()
    if window is not None:
        near = near.triu(1 - window)
    elsewhere = own[:, :, None] == far[:, None]
    elsewhere[:, :early] = False
    split = far.shape[1]
    ends = _ends(shape.own, device)
    runs = Runs(ends, ends, _longest(ends))

    def reference(mask: Tensor) -> Any:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
            out = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask[:, None], scale=scale, enable_gqa=True
            )
            return out.permute(2, 0, 1, 3).flatten(2)

        return attend

    def compare(actual: Sequence[Tensor], mask: Tensor, keys: slice) -> None:
        expected, grads = truth(reference(mask), (q, k[keys], v[keys]), dout)
        names = ("out", "dq", "dk", "dv")
        wanted = dict(zip(names, (expected, *grads), strict=True))
        found = dict(zip(names, actual, strict=True))
        assert {x.dtype for x in actual} == {dtype}
        for name in ("dq", "dk"):  # of one key each: the scores cannot matter
            if wanted[name].norm() < 1e-9:
                assert found.pop(name).abs().max() < 1e-2 and wanted.pop(name) is not None
        assert_close(found, wanted, tolerance)

    near_k, near_v = k[split:], v[split:]
    out, lse, state = backend.forward(q, near_k, near_v, scale, runs, window=window)
    assert not out.requires_grad and out.is_contiguous()
    grads = backend.backward(dout, q, near_k, near_v, out, lse, state, scale, runs, window=window)
    compare((out, *grads), near, slice(split, None))
    if not blocks or window is not None:
        return
    late, (far_k, far_v) = slice(early, None), (k[:split], v[:split])
    counts = [row.bincount(minlength=len(shape.own[0])).tolist() for row in own[:, late].cpu()]
    queries, keys = _ends(counts, device), _ends(shape.others, device)
    hop = Runs(queries, keys, _longest(queries, keys))
    more, more_lse, more_state = backend.forward(q[late], far_k, far_v, scale, hop, causal=False)
    lonely = ~elsewhere[:, late].any(dim=2)
    assert (more.unflatten(2, (heads.queries, -1))[lonely.t()] == 0).all()
    assert ((more_lse == -torch.inf) == lonely[:, None]).all()
    both, both_lse = merge.forward(out, lse, more, more_lse, dtype)
    dq, *own_grads = backend.backward(dout, q, near_k, near_v, both, both_lse, state, scale, runs)
    part = (dout[late], q[late], far_k, far_v, both[late], both_lse[..., late].contiguous())
    more_dq, *far_grads = backend.backward(*part, more_state, scale, hop, causal=False)
    dq = dq.clone()
    dq[late] += more_dq
    merged = (torch.cat(pair) for pair in zip(far_grads, own_grads, strict=True))
    compare((both, dq, *merged), torch.cat([elsewhere, near], dim=2), slice(None))


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_reference(shape: str, window: int | None, dtype: torch.dtype) -> None:
    tolerance = 3e-6 if dtype is torch.float32 else 1.5e-2
    check(OneByOne(), SHAPES[shape], dtype, CPU, tolerance, window=window)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["torch_flash", "efficient"])
def test_windows_on_a_gpu(name: str) -> None:
    backend = choose.CANDIDATES["packed_attention"][name].load()
    for shape in SHAPES.values():
        check(backend, shape, torch.bfloat16, torch.device("cuda", 0), 1.5e-2, window=4)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["torch_flash", "efficient"])
def test_blocks_on_a_gpu(name: str, shape: str) -> None:
    device = torch.device("cuda", 0)
    for dtype in (torch.bfloat16,) if name == "torch_flash" else (torch.float32, torch.bfloat16):
        backend = choose.choose(device, dtype, {"packed_attention": name}).packed_attention
        limit = 3e-6 if dtype is torch.float32 else 1.5e-2
        check(backend, SHAPES[shape], dtype, device, limit)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["flash_attn", "flash_attn_3", "transformer_engine"])
def test_packages_on_a_gpu(name: str) -> None:
    device, dtype = torch.device("cuda", 0), torch.bfloat16
    obstacle = dict(choose.available("packed_attention", device, dtype))[name]
    if obstacle is not None:
        pytest.skip(obstacle)
    backend = choose.choose(device, dtype, {"packed_attention": name}).packed_attention
    for shape in ("long", "wide-heads"):
        check(backend, SHAPES[shape], dtype, device, 1.5e-2, blocks=False)


@pytest.mark.gpu
def test_gradients_are_reproducible_where_torch_must_be() -> None:
    device, dtype, heads = torch.device("cuda", 0), torch.bfloat16, Heads(1, 8, 128)
    backend = choose.choose(device, dtype).packed_attention
    s = 4096
    q, k, v = heads.split(drawn((s, 1, heads.channels), dtype, device))
    dout = drawn((s, 1, heads.queries * heads.size), dtype, device, 1)
    ends = torch.tensor([0, 100, 3900, s], dtype=torch.int32, device=device)
    runs, found = Runs(ends, ends, 3800), []
    with deterministic():
        for _ in range(3):
            out, lse, state = backend.forward(q, k, v, 0.1, runs)
            found.append((out, *backend.backward(dout, q, k, v, out, lse, state, 0.1, runs)))
    for again in found[1:]:
        assert [torch.equal(a, b) for a, b in zip(found[0], again, strict=True)] == [True] * 4


@pytest.mark.parametrize("causal", [True, False])
def test_the_mask_is_of_the_documents(causal: bool) -> None:
    queries, keys = torch.tensor([0, 2, 2, 4, 8]).int(), torch.tensor([0, 1, 3, 4, 8]).int()
    found = sees(Runs(queries, keys, 4), 4, 4, 2, causal=causal)
    # The second document has no queries.
    rows = [[1, 0, 0, 0]] * 2 + [[0, 0, 0, 1]] * 2
    wanted = torch.tensor([rows, [[1] * 4] * 4]).bool()
    assert torch.equal(found, wanted.tril() if causal else wanted)


def _one_by_one(
    q: Tensor, k: Tensor, v: Tensor, ends: Tensor, scale: float, window: tuple[int, int]
) -> Tensor:
    """Causal attention in each part of rows [N, heads, D]; `window` as flash-attn is told."""
    assert window[1] == (-1 if window[0] == -1 else 0)
    parts = []
    for start, stop in pairwise(ends.tolist()):
        heads = (x[start:stop].transpose(0, 1) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(
            *heads, attn_mask=_seen(stop - start, window[0]), scale=scale, enable_gqa=True
        )
        parts.append(out.transpose(0, 1))
    return torch.cat(parts)


def _seen(length: int, before: int) -> Tensor:
    """Which tokens see which: themselves and so many before them, all with -1."""
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    return seen if before < 0 else seen.triu(-before)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    deterministic: bool = False,
) -> Tensor:
    """What we use of flash-attn 2.8.3, and all but `dropout_p` of flash-attn 3."""
    assert causal and softmax_scale is not None and cu_seqlens_q.dtype == torch.int32
    assert torch.equal(cu_seqlens_q, cu_seqlens_k) and max_seqlen_q == max_seqlen_k
    assert deterministic is torch.are_deterministic_algorithms_enabled()
    return _one_by_one(q, k, v, cu_seqlens_q, softmax_scale, window_size)


def flash_attn_varlen_func_of_a_beta(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """That of early betas of flash-attn 3, which gives the log-sum-exp as well."""
    return flash_attn_varlen_func(*args, **options), torch.empty(0)


class DotProductAttention(torch.nn.Module):
    """What we use of transformer-engine 2.20.2 in the layout `thd`."""

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int,
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        qkv_format: str = "sbhd",
        attn_mask_type: str = "causal",
        window_size: tuple[int, int] | None = None,
        softmax_scale: float | None = None,
    ) -> None:
        super().__init__()
        assert attention_dropout == 0 and (qkv_format, attn_mask_type) == ("thd", "padding_causal")
        assert softmax_scale is not None
        self.sizes, self.scale = (num_attention_heads, num_gqa_groups, kv_channels), softmax_scale
        self.window = window_size or (-1, -1)

    def forward(
        self,
        query_layer: Tensor,
        key_layer: Tensor,
        value_layer: Tensor,
        *,
        cu_seqlens_q: Tensor,
        cu_seqlens_kv: Tensor,
        max_seqlen_q: int,
        max_seqlen_kv: int,
    ) -> Tensor:
        assert self.sizes == (query_layer.shape[1], key_layer.shape[1], key_layer.shape[2])
        assert torch.equal(cu_seqlens_q, cu_seqlens_kv) and max_seqlen_q == max_seqlen_kv
        rows = (query_layer, key_layer, value_layer)
        return _one_by_one(*rows, cu_seqlens_q, self.scale, self.window).flatten(1)


STAND_INS: dict[str, tuple[str, str, dict[str, dict[str, Any]]]] = {
    "flash_attn": (
        "flash_attn",
        "PackedFlashAttention",
        {"flash_attn": {"flash_attn_varlen_func": flash_attn_varlen_func}},
    ),
    "flash_attn_3": (
        "flash_attn_3",
        "PackedFlashAttention3",
        {"flash_attn_interface": {"flash_attn_varlen_func": flash_attn_varlen_func}},
    ),
    "flash_attn_3-beta": (
        "flash_attn_3",
        "PackedFlashAttention3",
        {"flash_attn_interface": {"flash_attn_varlen_func": flash_attn_varlen_func_of_a_beta}},
    ),
    "transformer_engine": (
        "transformer_engine",
        "PackedTransformerEngineAttention",
        {
            "transformer_engine": {},
            "transformer_engine.pytorch": {"DotProductAttention": DotProductAttention},
        },
    ),
}
"""Module and class of each backend, and what is in the modules of its package."""


@pytest.fixture(params=list(STAND_INS))
def stand_in(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The backend, made from a stand-in for its package."""
    file, backend, modules = STAND_INS[request.param]
    for name, members in modules.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    path = f"lightning_dhellam.kernels.packed_attention.{file}"
    # What it shares with attention to whole samples is made from the stand-in as well.
    made = (path, f"lightning_dhellam.kernels.attention.{file}")
    for each in made:
        monkeypatch.delitem(sys.modules, each, raising=False)
    yield getattr(importlib.import_module(path), backend)()
    for each in made:
        sys.modules.pop(each, None)


@pytest.mark.parametrize("shape", ["grouped", "one-token-each"])
def test_what_we_make_of_the_published_interface(stand_in: Any, shape: str) -> None:
    for ordered in (False, True):
        with deterministic() if ordered else nullcontext():
            for window in (None, 3):
                check(
                    stand_in,
                    SHAPES[shape],
                    torch.float32,
                    CPU,
                    3e-6,
                    blocks=False,
                    window=window,
                )


@pytest.mark.parametrize("name", ["cudnn", "flash_attn_4"])
def test_a_backend_that_keeps_no_documents_apart_says_so(name: str) -> None:
    with pytest.raises(ValueError) as error:
        choose.choose(CPU, torch.bfloat16, {"packed_attention": name})
    message = str(error.value)
    assert message.startswith(f"kernels={{packed_attention: {name}}} cannot be used here: ")
    assert message.endswith("; or use cpu, or leave packed_attention out") and "\n" not in message


def test_another_kernel_keeps_documents_apart_than_attends_to_whole_samples() -> None:
    kernels = choose.choose(CPU, torch.bfloat16, {"attention": "cpu"})
    assert kernels.names["packed_attention"] == "cpu"
    with pytest.raises(ValueError, match="build flash-attn 3 from the folder `hopper`"):
        choose.choose(torch.device("cpu"), torch.bfloat16, {"packed_attention": "flash_attn_3"})
