"""Attention against the softmax written out in float64 with its mask."""

from __future__ import annotations

import pytest
import torch
from ava_kernels import apply_rotary, rope_attention
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("small_and_seeded")

LENGTHS = [(7, 7), (1, 1), (1, 9), (2, 5), (3, 9), (9, 3), (4, 0), (0, 0)]


def written_out(q, k, v, *, causal, scale=None):
    groups = q.shape[2] // k.shape[2]
    k, v = (t.repeat_interleave(groups, dim=2) for t in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    S_q, S_k = scores.shape[-2:]
    visible = torch.tensor(
        [[not causal or j <= i + S_k - S_q for j in range(S_k)] for i in range(S_q)], dtype=torch.bool
    )
    weights = scores.exp() * visible.reshape(S_q, S_k)
    total = weights.sum(-1, keepdim=True)
    return torch.einsum("bhqk,bkhd->bqhd", weights / torch.where(total == 0, 1, total), v)


def inputs(S_q, S_k, heads=(6, 2), head_dim=10, dtype=torch.float64):
    generator = torch.Generator().manual_seed(S_q * 100 + S_k)
    shapes = (2, S_q, heads[0], head_dim), (2, S_k, heads[1], head_dim), (2, S_k, heads[1], head_dim)
    return [torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def with_gradients(function, tensors, upstream):
    out = function(*tensors)
    return [out, *torch.autograd.grad(out, tensors, upstream)]


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("S_q", "S_k"), LENGTHS)
def test_output_and_gradients_are_the_formula(S_q, S_k, causal, heads):
    tensors = inputs(S_q, S_k, heads)
    upstream = torch.randn(tensors[0].shape, dtype=torch.float64)
    ours = with_gradients(lambda *t: rope_attention(*t, causal=causal), tensors, upstream)
    exact = with_gradients(lambda *t: written_out(*t, causal=causal), tensors, upstream)
    for got, expected in zip(ours, exact, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_queries_without_keys_give_zeros_and_no_gradient(dtype):
    q, k, v = inputs(9, 3, dtype=dtype)
    out = rope_attention(q, k, v)
    assert not out[:, :6].any()
    assert out[:, 6:].all()
    out.sum().backward()
    assert not q.grad[:, :6].any()
    assert all(t.grad.isfinite().all() for t in (q, k, v))


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotates_queries_and_keys_by_their_positions(interleaved):
    q, k, v = inputs(7, 7)
    angles = torch.randn(9, 3, dtype=torch.float64)
    tables = angles.cos(), angles.sin()
    out = rope_attention(q, k, v, *tables, interleaved=interleaved)
    q, k = (apply_rotary(t, *tables, interleaved=interleaved) for t in (q, k))
    torch.testing.assert_close(out, written_out(q, k, v, causal=True), rtol=1e-12, atol=1e-12)


def test_softmax_scale():
    q, k, v = inputs(5, 5)
    out = rope_attention(q, k, v, softmax_scale=0.7)
    torch.testing.assert_close(out, written_out(q, k, v, causal=True, scale=0.7), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("S_q", "S_k"), [(7, 7), (3, 9)])
def test_error_is_that_of_the_formula_in_the_same_precision(S_q, S_k, dtype):
    tensors = inputs(S_q, S_k, dtype=dtype)
    upstream = torch.randn(tensors[0].shape).to(dtype)
    exact_tensors = [t.detach().double().requires_grad_() for t in tensors]
    ours = with_gradients(rope_attention, tensors, upstream)
    same = with_gradients(lambda *t: written_out(*t, causal=True), tensors, upstream)
    exact = with_gradients(lambda *t: written_out(*t, causal=True), exact_tensors, upstream.double())
    for got, peer, truth in zip(ours, same, exact, strict=True):
        assert got.dtype == dtype
        assert (got - truth).norm() <= 4 * (peer - truth).norm()


def test_strided_heads_of_one_projection():
    packed = torch.randn(2, 5, 10, 8, dtype=torch.float64)
    q, k, v = packed.split((6, 2, 2), dim=2)
    contiguous = [t.contiguous() for t in (q, k, v)]
    torch.testing.assert_close(rope_attention(q, k, v), rope_attention(*contiguous), rtol=1e-14, atol=1e-14)


def test_refuses_heads_that_do_not_fit_and_half_a_table():
    q = torch.zeros(1, 2, 4, 8)
    for heads in (3, 0):
        k = torch.zeros(1, 2, heads, 8)
        with pytest.raises(ValueError, match=f"4 query heads cannot share {heads} key/value heads"):
            rope_attention(q, k, k)
    with pytest.raises(ValueError, match="cos and sin belong together"):
        rope_attention(q, q, q, cos=torch.zeros(2, 4))


packings = st.lists(st.integers(0, 6), min_size=1, max_size=8)


@settings(max_examples=40, deadline=None)
@given(packings, st.booleans(), st.booleans(), st.booleans())
def test_packed_documents_are_each_document_alone(lengths, causal, rotated, own_positions):
    generator, tokens = torch.Generator().manual_seed(len(lengths)), sum(lengths)
    q, k, v = (torch.randn(tokens, heads, 8, dtype=torch.float64, generator=generator) for heads in (4, 2, 2))
    tensors = [t.requires_grad_() for t in (q, k, v)]
    upstream = torch.randn(tokens, 4, 8, dtype=torch.float64, generator=generator)
    angles = torch.randn(20, 3, dtype=torch.float64, generator=generator)
    tables = (angles.cos(), angles.sin()) if rotated else (None, None)
    positions = torch.randint(0, 20, (tokens,), generator=generator) if own_positions and rotated else None
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()

    def packed(q, k, v):
        options = {"causal": causal, "cu_seqlens": cu_seqlens, "max_seqlen": 6, "position_ids": positions}
        return rope_attention(q, k, v, *tables, **options)

    def alone(q, k, v):
        parts = [t.split(lengths) for t in (q, k, v)]
        where = [None] * len(lengths) if positions is None else positions.split(lengths)
        return torch.cat(
            [
                rope_attention(*(t[None] for t in own), *tables, causal=causal, position_ids=place)[0]
                for *own, place in zip(*parts, where, strict=True)
            ]
        )

    for got, expected in zip(
        with_gradients(packed, tensors, upstream), with_gradients(alone, tensors, upstream), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_refuses_offsets_and_positions_that_do_not_fit():
    q, cos = torch.zeros(5, 2, 4), torch.zeros(4, 2)

    def refused(match, offsets, dtype=torch.int32, **options):
        with pytest.raises(ValueError, match=match):
            rope_attention(q, q, q, cu_seqlens=torch.tensor(offsets, dtype=dtype), **options)

    refused("cu_seqlens must be int32 offsets that rise from 0, not torch.int64", [0, 5], torch.int64)
    for offsets in ([0, 4, 3, 5], [1, 5], []):
        refused("offsets that rise from 0", offsets)
    refused("cu_seqlens end at 4, but there are 5 queries and 5 keys", [0, 4])
    refused("max_seqlen is 2, but a document has 3 tokens", [0, 2, 5], max_seqlen=2)
    refused("cos and sin have 4 rows, but a position is 4", [0, 5], cos=cos, sin=cos)
    with pytest.raises(ValueError, match="position_ids need cos, sin and as many keys as queries; there are 5 and 5"):
        rope_attention(q[None], q[None], q[None], position_ids=torch.arange(5))
