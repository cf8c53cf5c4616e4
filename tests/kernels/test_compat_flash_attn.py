"""flash-attn's functions against softmax under a written-out mask, in PyTorch and on the interpreted kernels."""

from __future__ import annotations

import inspect
import itertools

import ava_kernels.compat.flash_attn as flash
import pytest
import torch

pytestmark = pytest.mark.usefixtures("small_and_seeded")

D = 16


def visible(S_q, S_k, causal, window):
    seen = torch.zeros(S_q, S_k, dtype=torch.bool)
    for i, j in itertools.product(range(S_q), range(S_k)):
        at = i + S_k - S_q
        first = 0 if window[0] == -1 else at - window[0]
        last = S_k if window[1] == -1 else at + window[1]
        seen[i, j] = first <= j <= (min(at, last) if causal else last)
    return seen


def written_out(q, k, v, causal=False, window_size=(-1, -1), softcap=0.0, softmax_scale=None):
    """(S, H, D) all, in float64 → out, lse (H, S_q)"""
    q, k, v = (t.double() for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * (D**-0.5 if softmax_scale is None else softmax_scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    seen = visible(len(q), len(k), causal, window_size)
    blind = ~seen.any(-1, keepdim=True)  # a softmax of nothing has no gradient
    scores = scores.masked_fill(~(seen | blind), float("-inf"))
    weights, lse = scores.softmax(-1).masked_fill(~seen, 0), scores.logsumexp(-1)
    return torch.einsum("hqk,khd->qhd", weights, v), lse.masked_fill(blind[:, 0], float("-inf"))


def random(*shape):
    return torch.randn(*shape, requires_grad=True)


OPTIONS = [
    {},
    {"causal": True},
    {"window_size": (4, 2)},
    {"window_size": (-1, 3)},
    {"causal": True, "window_size": (5, 9)},
    {"causal": True, "softcap": 2.0, "softmax_scale": 0.7},
]
CLOSE = {"rtol": 1e-5, "atol": 2e-5}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("S_q", "S_k"), [(11, 11), (5, 18), (18, 7)])
def test_batches(backend, S_q, S_k, options):
    q, k, v = random(2, S_q, 4, D), random(2, S_k, 2, D), random(2, S_k, 2, D)
    out, lse, probabilities = flash.flash_attn_func(q, k, v, **options, return_attn_probs=True)
    assert probabilities is None
    exact = [written_out(*parts, **options) for parts in zip(q, k, v, strict=True)]
    truth, true_lse = (torch.stack(parts) for parts in zip(*exact, strict=True))
    torch.testing.assert_close(out.double(), truth, **CLOSE)
    torch.testing.assert_close(lse.double(), true_lse, **CLOSE)
    plain = flash.flash_attn_func(q, k, v, **options, deterministic=True)
    torch.testing.assert_close(plain, out)
    upstream = torch.randn_like(out)
    got = torch.autograd.grad(plain, (q, k, v), upstream)
    expected = torch.autograd.grad(truth, (q, k, v), upstream.double())
    for mine, other in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def ends(*lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


@pytest.mark.parametrize("options", OPTIONS)
def test_sequences_of_different_lengths(backend, options):
    """Queries and keys each packed, with other lengths of both."""
    lengths_q, lengths_k = (7, 1, 0, 18, 9), (7, 17, 4, 5, 0)
    cu_q, cu_k = ends(*lengths_q), ends(*lengths_k)
    q, k, v = random(sum(lengths_q) + 3, 4, D), random(sum(lengths_k) + 2, 2, D), random(sum(lengths_k) + 2, 2, D)
    given = cu_q, cu_k, max(lengths_q), max(lengths_k)
    out, lse, probabilities = flash.flash_attn_varlen_func(q, k, v, *given, **options, return_attn_probs=True)
    assert probabilities is None
    assert lse.shape == (4, len(q))
    plain = flash.flash_attn_varlen_func(q, k, v, *given, **options)
    torch.testing.assert_close(plain, out)
    upstream = torch.randn_like(out)
    got = torch.autograd.grad(plain, (q, k, v), upstream)
    assert not out[-3:].any()
    assert lse[:, -3:].isneginf().all()
    for i in range(5):
        rows_q, rows_k = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
        alone = [t.detach()[rows].requires_grad_() for t, rows in ((q, rows_q), (k, rows_k), (v, rows_k))]
        truth, true_lse = written_out(*alone, **options)
        torch.testing.assert_close(out[rows_q].double(), truth, **CLOSE)
        torch.testing.assert_close(lse[:, rows_q].double(), true_lse, **CLOSE)
        expected = torch.autograd.grad(truth, alone, upstream[rows_q].double())
        for mine, other, rows in zip(got, expected, (rows_q, rows_k, rows_k), strict=True):
            torch.testing.assert_close(mine[rows], other, rtol=1e-4, atol=1e-5)


def test_packed_projections(backend):
    options = {"causal": True, "window_size": (6, 0), "softcap": 3.0, "return_attn_probs": True}
    qkv, q, kv = random(2, 9, 3, 4, D), random(2, 9, 4, D), random(2, 9, 2, 2, D)
    flat = {name: t.detach().flatten(0, 1) for name, t in (("qkv", qkv), ("q", q), ("kv", kv))}
    cu = ends(9, 9)
    pairs = [
        (flash.flash_attn_qkvpacked_func(qkv, **options), flash.flash_attn_func(*qkv.unbind(2), **options)),
        (flash.flash_attn_kvpacked_func(q, kv, **options), flash.flash_attn_func(q, *kv.unbind(2), **options)),
        (
            flash.flash_attn_varlen_qkvpacked_func(flat["qkv"], cu, 9, **options),
            flash.flash_attn_varlen_func(*flat["qkv"].unbind(1), cu, cu, 9, 9, **options),
        ),
        (
            flash.flash_attn_varlen_kvpacked_func(flat["q"], flat["kv"], cu, cu, 9, 9, **options),
            flash.flash_attn_varlen_func(flat["q"], *flat["kv"].unbind(1), cu, cu, 9, 9, **options),
        ),
    ]
    for mine, other in pairs:
        assert mine[2] is None
        assert torch.equal(mine[0], other[0])
        assert torch.equal(mine[1], other[1])
    pairs[0][0][0].sum().backward()
    assert qkv.grad.any()


def rotated(x, angles, interleaved):
    """(…, S, H, D) by angles (…, S, pairs), in float64."""
    x, pairs = x.detach().double().clone(), angles.shape[-1]
    first = slice(0, 2 * pairs, 2) if interleaved else slice(0, pairs)
    second = slice(1, 2 * pairs, 2) if interleaved else slice(pairs, 2 * pairs)
    z = torch.complex(x[..., first], x[..., second]) * torch.polar(torch.ones_like(angles), angles).unsqueeze(-2)
    x[..., first], x[..., second] = z.real, z.imag
    return x


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("offsets", [0, 4, torch.tensor([3, 0, 13])])
def test_rotation_with_offsets(backend, interleaved, inplace, offsets):
    angles = torch.randn(20, 5, dtype=torch.float64) * 10
    cos, sin = angles.cos().float(), angles.sin().float()
    starts = offsets.tolist() if isinstance(offsets, torch.Tensor) else [offsets] * 3
    x = torch.randn(3, 7, 2, 12)
    expected = rotated(x, torch.stack([angles[at : at + 7] for at in starts]), interleaved)
    given = x.clone()
    out = flash.apply_rotary_emb(given, cos, sin, interleaved, inplace, offsets)
    torch.testing.assert_close(out.double(), expected, **CLOSE)
    assert (out is given) == inplace
    packed = torch.randn(40, 2, 12)  # rows behind the last sequence, more than the table has
    places = [at + i for at, length in zip(starts, (4, 0, 6), strict=True) for i in range(length)]
    expected = rotated(packed[:10], angles[places], interleaved)
    out = flash.apply_rotary_emb(packed.clone(), cos, sin, interleaved, inplace, offsets, ends(4, 0, 6), 6)
    torch.testing.assert_close(out[:10].double(), expected, **CLOSE)


def test_rotations_gradient(backend):
    angles = torch.randn(20, 5, dtype=torch.float64)
    x, upstream = random(3, 7, 2, 12), torch.randn(3, 7, 2, 12)
    flash.apply_rotary_emb(x, angles.cos().float(), angles.sin().float(), seqlen_offsets=2).backward(upstream)
    torch.testing.assert_close(x.grad.double(), rotated(upstream, -angles[2:9], False), **CLOSE)


def test_signatures_are_flash_attns():
    """As of 2.8.3."""
    common = "dropout_p=0.0 softmax_scale=None causal=False window_size=(-1,-1) softcap=0.0 alibi_slopes=None "
    common += "deterministic=False return_attn_probs=False"
    cu = "cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k"
    for name, parameters in {
        "flash_attn_func": f"q k v {common}",
        "flash_attn_kvpacked_func": f"q kv {common}",
        "flash_attn_qkvpacked_func": f"qkv {common}",
        "flash_attn_varlen_func": f"q k v {cu} {common} block_table=None",
        "flash_attn_varlen_kvpacked_func": f"q kv {cu} {common}",
        "flash_attn_varlen_qkvpacked_func": f"qkv cu_seqlens max_seqlen {common}",
        "apply_rotary_emb": "x cos sin interleaved=False inplace=False seqlen_offsets=0 "
        "cu_seqlens=None max_seqlen=None",
    }.items():
        found = inspect.signature(getattr(flash, name)).parameters.values()
        assert " ".join(
            p.name if p.default is p.empty else f"{p.name}={p.default!r}".replace(" ", "") for p in found
        ) == parameters  # fmt: skip


X, CU = torch.zeros(2, 4, 2, D), ends(4, 4)
F = X.flatten(0, 1)
TABLE = torch.zeros(5, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: flash.flash_attn_func(X, X, X, 0.1), "dropout_p is 0.1"),
        (lambda: flash.flash_attn_func(X, X, X, alibi_slopes=X[0, 0, :, 0]), "alibi_slopes is given"),
        (lambda: flash.flash_attn_func(X, X, X, window_size=(None, 0)), r"window_size is \(None, 0\); .*-1 for no"),
        (lambda: flash.flash_attn_func(X, X, X, window_size=None), "window_size is None; .*-1 for no"),
        (lambda: flash.flash_attn_func(X, X, X, dropout_p=None), "dropout_p is None"),
        (lambda: flash.apply_rotary_emb(X, TABLE, TABLE, max_seqlen=3), "max_seqlen is given without cu_seqlens"),
        (lambda: flash.flash_attn_func(X, X, X, window_size=(-2, 0)), r"window_size is \(-2, 0\)"),
        (lambda: flash.flash_attn_qkvpacked_func(X), r"qkv has the shape .* must be \(B, S, 3, H, D\)"),
        (lambda: flash.flash_attn_varlen_kvpacked_func(F, F, CU, CU, 4, 4), r"kv has .* must be \(T, 2, H, D\)"),
        (lambda: flash.flash_attn_varlen_func(F, F, F, CU, CU, 4, 4, 0.5), "dropout_p is 0.5"),
        (lambda: flash.flash_attn_varlen_func(F, F, F, CU, CU, 4, 4, alibi_slopes=CU), "alibi_slopes is given"),
        (lambda: flash.flash_attn_varlen_func(F, F, F, CU, CU, 4, 4, block_table=CU), "block_table is given"),
        (lambda: flash.flash_attn_varlen_func(F, F, F, CU, CU, 4, 4, window_size=(0, None)), "window_size is"),
        (lambda: flash.flash_attn_varlen_func(F, F, F, CU, CU, 4, 4, softcap=-1.0), "softcap is -1.0"),
        (lambda: flash.flash_attn_varlen_func(X, X, X, CU, CU, 4, 4), r"must be \(T, H, D\)"),
        (lambda: flash.flash_attn_varlen_func(F, F, F.half(), CU, CU, 4, 4), "the same float dtype"),
        (lambda: flash.flash_attn_varlen_func(F[:, :1], F, F, CU, CU, 4, 4), "q has 1 heads, k and v 2"),
        (lambda: flash.flash_attn_varlen_func(F, F, F, CU.long(), CU, 4, 4), "cu_seqlens_q is torch.int64"),
        (lambda: flash.flash_attn_varlen_func(F, F, F, CU, CU[:2], 4, 4), "cu_seqlens_q has 3 numbers, cu_seqlens_k 2"),
        (lambda: flash.apply_rotary_emb(X, TABLE, TABLE, seqlen_offsets=2), "seqlen_offsets is 2 .* have 5 positions"),
        (lambda: flash.apply_rotary_emb(X, TABLE, TABLE, seqlen_offsets=-1), "seqlen_offsets is -1"),
        (lambda: flash.apply_rotary_emb(X, TABLE, TABLE, seqlen_offsets=CU), r"seqlen_offsets .* integers \(2,\)"),
        (lambda: flash.apply_rotary_emb(F, TABLE, TABLE, cu_seqlens=CU, max_seqlen=6), "longest sequence has 6 tokens"),
    ],
)  # fmt: skip
def test_faults_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
