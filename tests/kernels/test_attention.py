"""Attention against the softmax written out in float64 with its mask, in PyTorch and on the interpreted kernels."""

from __future__ import annotations

import itertools

import pytest
import torch
from ava_kernels import apply_rotary, rope_attention, rope_table
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

pytestmark = pytest.mark.usefixtures("small_and_seeded")

LENGTHS = [(7, 7), (1, 1), (1, 9), (2, 5), (9, 3), (4, 0), (0, 4), (0, 0), (40, 40), (33, 50)]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """So that short sequences have many."""
    pytest.importorskip("triton")
    from ava_kernels.attention import kernels

    monkeypatch.setattr(kernels, "tile_for", lambda *_: kernels.Tile(16, 16, 4, 1))


def written_out(q, k, v, *, causal=True, scale=None, window=(-1, -1), softcap=0.0):
    """→ out (B, S_q, H, D), lse (B, H, S_q)"""
    groups = q.shape[2] // k.shape[2]
    k, v = (t.repeat_interleave(groups, dim=2) for t in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    S_q, S_k = scores.shape[-2:]
    visible = torch.ones(S_q, S_k, dtype=torch.bool)
    for i, j in itertools.product(range(S_q), range(S_k)):
        ahead = j - (i + S_k - S_q)
        visible[i, j] = not (causal and ahead > 0) and not (0 <= window[0] < -ahead) and not (0 <= window[1] < ahead)
    scores = scores.masked_fill(~visible, float("-inf"))
    most = scores.amax(-1, keepdim=True).detach().nan_to_num(neginf=0.0) if S_k else 0.0
    weights = (scores - most).exp()
    total = weights.sum(-1, keepdim=True)
    out = torch.einsum("bhqk,bkhd->bqhd", weights / torch.where(total == 0, 1, total), v)
    lse = (torch.where(total == 0, 1, total).log() + most)[..., 0]
    return out, lse.masked_fill(total[..., 0] == 0, float("-inf"))


def inputs(S_q, S_k, heads=(6, 2), head_dim=10, dtype=torch.float64, batch=2):
    generator = torch.Generator().manual_seed(S_q * 100 + S_k)
    shapes = (batch, S_q, heads[0], head_dim), *[(batch, S_k, heads[1], head_dim)] * 2
    return [torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def tables(length, pairs, dtype=torch.float32):
    angles = torch.randn(length, pairs, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * 10
    return angles.cos().to(dtype), angles.sin().to(dtype)


def with_gradients(function, tensors, upstreams):
    outs = function(*tensors)
    used = list(zip(outs, upstreams, strict=False))
    finite = [(out.masked_fill(out.isneginf(), 0), upstream.to(out.dtype)) for out, upstream in used]
    loss = sum((out * upstream).sum() for out, upstream in finite)
    return [*(out for out, _ in used), *torch.autograd.grad(loss, tensors)]


def assert_as_exact_as_written_out(ours, exact, tensors):
    """ours(*tensors) → (out, lse); its errors against float64 are at most four times those of the same formula in the
    tensors' precision."""
    upstreams = torch.randn(tensors[0].shape).to(tensors[0].dtype), torch.randn(exact(*tensors)[1].shape)
    got = with_gradients(ours, tensors, upstreams)
    same = with_gradients(exact, tensors, upstreams)
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    truth = with_gradients(exact, doubles, [u.double() for u in upstreams])
    for name, mine, other, true in zip(("out", "lse", "dq", "dk", "dv"), got, same, truth, strict=True):
        assert mine.shape == true.shape, name
        hidden = true.isneginf()
        assert torch.equal(mine.isneginf(), hidden), name
        mine, other, true = (t.double().masked_fill(hidden, 0) for t in (mine, other, true))
        error, allowed = (mine - true).norm(), 4 * (other - true).norm()
        assert error <= allowed + 2e-6 * true.norm(), (name, error, allowed)
    return got


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("S_q", "S_k"), LENGTHS)
def test_output_and_gradients_are_the_formula(backend, S_q, S_k, causal, heads):
    tensors = inputs(S_q, S_k, heads, dtype=torch.float64 if backend == "torch" else torch.float32, batch=1)
    if backend == "triton":
        assert_as_exact_as_written_out(
            lambda *t: rope_attention(*t, causal=causal, return_lse=True),
            lambda *t: written_out(*t, causal=causal),
            tensors,
        )
        return
    upstreams = torch.randn(tensors[0].shape, dtype=torch.float64), torch.randn(1, heads[0], S_q, dtype=torch.float64)
    exact = with_gradients(lambda *t: written_out(*t, causal=causal), tensors, upstreams)
    ours = with_gradients(lambda *t: rope_attention(*t, causal=causal, return_lse=True), tensors, upstreams)
    for got, expected in zip(ours, exact, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)
    exact = with_gradients(lambda *t: written_out(*t, causal=causal)[:1], tensors, upstreams)
    fused = with_gradients(lambda *t: (rope_attention(*t, causal=causal),), tensors, upstreams)
    for got, expected in zip(fused, exact, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


WINDOWS = [(-1, -1), (0, 0), (3, -1), (-1, 4), (20, 0), (5, 17), (100, 100)]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("S_q", "S_k"), [(40, 40), (33, 50), (50, 33)])
def test_windows(backend, S_q, S_k, causal, window):
    tensors = inputs(S_q, S_k, (2, 1), dtype=torch.float32, batch=1)
    assert_as_exact_as_written_out(
        lambda *t: rope_attention(*t, causal=causal, window_size=window, return_lse=True),
        lambda *t: written_out(*t, causal=causal, window=window),
        tensors,
    )


@pytest.mark.parametrize("head_dim", [8, 16, 24, 64, 80, 128, 200, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_head_dimensions(triton_backend, head_dim, dtype):
    tensors = inputs(20, 20, (2, 1), head_dim, dtype, batch=1)
    cos, sin = tables(20, head_dim // 2)

    def exact(q, k, v):
        q, k = (apply_rotary(t, cos, sin) for t in (q, k))
        return written_out(q, k, v)

    assert_as_exact_as_written_out(lambda *t: rope_attention(*t, cos, sin, return_lse=True), exact, tensors)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "pairs"), [(16, 8), (16, 4), (12, 6), (10, 3)])
@pytest.mark.parametrize("given_positions", [False, True])
def test_turns_queries_and_keys_by_their_positions(backend, interleaved, head_dim, pairs, given_positions):
    tensors = inputs(20, 20, (4, 2), head_dim, torch.float32)
    cos, sin = tables(50, pairs)
    position_ids = torch.randint(0, 50, (2, 20)) if given_positions else None

    def exact(q, k, v):
        q, k = (rotated(t, cos, sin, interleaved, position_ids) for t in (q, k))
        return written_out(q, k, v)

    def ours(q, k, v):
        options = {"interleaved": interleaved, "position_ids": position_ids, "return_lse": True}
        return rope_attention(q, k, v, cos, sin, **options)

    assert_as_exact_as_written_out(ours, exact, tensors)


def rotated(x, cos, sin, interleaved, position_ids=None):
    """(a + ib) · (cos + i·sin) for every pair (a, b)."""
    pairs, x = cos.shape[1], x.clone()
    first = slice(0, 2 * pairs, 2) if interleaved else slice(0, pairs)
    second = slice(1, 2 * pairs, 2) if interleaved else slice(pairs, 2 * pairs)
    places = torch.arange(x.shape[1])[None] if position_ids is None else position_ids
    c, s = (t[places][:, :, None].to(x.dtype) for t in (cos, sin))
    a, b = x[..., first].clone(), x[..., second].clone()
    x[..., first], x[..., second] = a * c - b * s, b * c + a * s
    return x


@pytest.mark.parametrize(
    "options",
    [
        *({"softmax_scale": scale} for scale in (0.7, -0.7, 0.0)),
        *({"softcap": 2.0, **more} for more in ({}, {"softmax_scale": -0.7}, {"window_size": (9, -1)})),
    ],
)
def test_softcap_and_scale(backend, options):
    tensors = inputs(35, 35, (2, 1), dtype=torch.float32, batch=1)
    names = {"softmax_scale": "scale", "window_size": "window"}
    exact = {names.get(name, name): value for name, value in options.items()}
    assert_as_exact_as_written_out(
        lambda *t: rope_attention(*t, return_lse=True, **options), lambda *t: written_out(*t, **exact), tensors
    )


@pytest.mark.parametrize("size", [100.0, 1e4])
def test_scores_of_any_size(backend, size):
    q, k, v = inputs(20, 20, (2, 1), dtype=torch.float32, batch=1)
    q = (q.detach() * size).requires_grad_()
    out, lse = rope_attention(q, k, v, return_lse=True)
    true_out, true_lse = written_out(*(t.double() for t in (q, k, v)))
    worst = size * 1e-6  # a score's rounding is its weight's relative error
    torch.testing.assert_close(out.double(), true_out, rtol=worst, atol=10 * worst)
    torch.testing.assert_close(lse.double(), true_lse, rtol=1e-5, atol=worst)
    gradients = torch.autograd.grad(out.sum(), [q, k, v])
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_queries_without_keys_give_zeros_and_no_gradient(backend, dtype):
    q, k, v = inputs(40, 18, dtype=dtype)
    out, lse = rope_attention(q, k, v, return_lse=True)
    assert not out[:, :22].any()
    assert lse[..., :22].isneginf().all()
    assert out[:, 22:].all()
    (out.sum() + lse[..., 22:].sum()).backward()
    assert not q.grad[:, :22].any()
    assert all(t.grad.isfinite().all() for t in (q, k, v))


# --- Packed documents ---


def documents_of(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


@pytest.mark.parametrize("lengths", [[20], [5, 16, 0, 17, 1], [0, 33, 0], [16, 16, 16]])
@pytest.mark.parametrize("rest", [0, 5])
def test_packed_documents_are_each_alone(backend, lengths, rest):
    """To the bit where the same kernel computes them, wherever they lie."""
    T = sum(lengths) + rest
    packed = [t.detach()[0].requires_grad_() for t in inputs(T, T, (4, 2), 16, torch.float32, batch=1)]
    cos, sin = tables(max(lengths), 8)
    upstream = torch.randn(T, 4, 16)
    cu_seqlens = documents_of(lengths)
    out, lse = rope_attention(*packed, cos, sin, cu_seqlens=cu_seqlens, max_seqlen=max(lengths), return_lse=True)
    got = [out, *torch.autograd.grad(out, packed, upstream)]
    assert lse.shape == (4, T)
    held = int(cu_seqlens[-1])
    assert not any(t[held:].any() for t in got)
    for start, end in itertools.pairwise(cu_seqlens.tolist()):
        alone = [t.detach()[None, start:end].requires_grad_() for t in packed]
        alone_out, alone_lse = rope_attention(*alone, cos, sin, return_lse=True)
        expected = [alone_out, *torch.autograd.grad(alone_out, alone, upstream[None, start:end])]
        for mine, other in zip(got, expected, strict=True):
            torch.testing.assert_close(mine[start:end], other[0], rtol=1e-5, atol=1e-6)
            if backend == "triton":
                assert torch.equal(mine[start:end], other[0])
        torch.testing.assert_close(lse[:, start:end], alone_lse[0])


def test_packed_documents_without_their_longest_length_and_with_positions_of_their_own(backend):
    T, lengths = 40, [9, 31]
    packed = [t.detach()[0] for t in inputs(T, T, (4, 2), 16, torch.float32, batch=1)]
    cos, sin = tables(100, 8)
    cu_seqlens, position_ids = documents_of(lengths), torch.randint(0, 100, (T,))
    plain = rope_attention(*packed, cos, sin, cu_seqlens=cu_seqlens, max_seqlen=31)
    assert torch.equal(rope_attention(*packed, cos, sin, cu_seqlens=cu_seqlens), plain)
    q, k = (rotated(t[None], cos, sin, False, position_ids[None])[0] for t in packed[:2])
    expected = rope_attention(q, k, packed[2], cu_seqlens=cu_seqlens)
    out = rope_attention(*packed, cos, sin, cu_seqlens=cu_seqlens, position_ids=position_ids)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape(backend, data):
    lengths = data.draw(st.lists(st.integers(0, 30), min_size=1, max_size=3), label="lengths")
    H_kv, group = data.draw(st.integers(1, 2), label="H_kv"), data.draw(st.integers(1, 3), label="group")
    D = data.draw(st.sampled_from([4, 10, 16]), label="D")
    window = data.draw(st.sampled_from(WINDOWS), label="window")
    causal, softcap = data.draw(st.booleans(), label="causal"), data.draw(st.sampled_from([0.0, 3.0]), label="softcap")
    T = sum(lengths)
    packed = [t.detach()[0].requires_grad_() for t in inputs(T, T, (H_kv * group, H_kv), D, torch.float32, batch=1)]
    cos, sin = tables(30, D // 2)
    cu_seqlens = documents_of(lengths)

    def ours(q, k, v):
        options = {"causal": causal, "window_size": window, "softcap": softcap, "return_lse": True}
        return rope_attention(q, k, v, cos, sin, cu_seqlens=cu_seqlens, max_seqlen=max(lengths), **options)

    def exact(q, k, v):
        outs, lses = [], []
        for start, end in itertools.pairwise(cu_seqlens.tolist()):
            document = [t[None, start:end] for t in (q, k, v)]
            document[:2] = [rotated(t, cos, sin, False) for t in document[:2]]
            out, lse = written_out(*document, causal=causal, window=window, softcap=softcap)
            outs.append(out[0])
            lses.append(lse[0])
        return torch.cat(outs), torch.cat(lses, dim=1)

    assert_as_exact_as_written_out(ours, exact, packed)


# --- Strides, offsets, bits ---


def test_strided_heads_of_one_projection(backend):
    whole = torch.randn(2, 20, 10, 16).requires_grad_()
    cos, sin = tables(20, 8)
    upstream = torch.randn(2, 6, 20, 16).transpose(1, 2)

    def results(parts):
        out = rope_attention(*parts, cos, sin)
        return [out, *torch.autograd.grad(out, parts, upstream)]

    strided = results(whole.split((6, 2, 2), dim=2))
    for parts in (
        [t.contiguous() for t in whole.split((6, 2, 2), dim=2)],
        [t.mT.contiguous().mT for t in whole.split((6, 2, 2), dim=2)],
    ):
        for mine, other in zip(results(parts), strided, strict=True):
            torch.testing.assert_close(mine, other)


def test_offsets_may_pass_31_bits(backend):
    try:  # memory that is never touched costs nothing
        storage = torch.empty(2**32 + 2**20, dtype=torch.float16)
    except RuntimeError:
        pytest.skip("no 8 GiB of address space")
    q, k, v = (t.detach() for t in inputs(3, 3, (2, 2), 16, torch.float16))
    # The second sequence is 2³² elements behind the first, its rows 2³⁰ apart; with 32 bits all would be elsewhere.
    far = [storage.as_strided((2, 3, 2, 16), (2**32, 2**12, 16, 1), 64 * i).copy_(t) for i, t in enumerate((q, k, v))]
    cos, sin = tables(3, 8)
    upstream = torch.randn(q.shape).half()

    def results(tensors):
        leaves = [t.requires_grad_() for t in tensors]
        out = rope_attention(*leaves, cos, sin)
        return [out, *torch.autograd.grad(out, leaves, upstream)]

    for mine, other in zip(results(far), results([q, k, v]), strict=True):
        torch.testing.assert_close(mine, other)


def test_same_input_same_bits(backend):
    tensors = inputs(40, 40, dtype=torch.float32)
    cos, sin = tables(40, 5)
    upstream = torch.randn(tensors[0].shape)
    first, second = (
        with_gradients(
            lambda *t: rope_attention(*t, cos, sin, return_lse=True), tensors, (upstream, torch.ones(2, 6, 40))
        )
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("S_q", "S_k"), [(20, 20), (9, 20), (1, 20)])
def test_torchs_attention_behind_our_rotation_gives_the_same(causal, S_q, S_k):
    tensors = inputs(S_q, S_k, (4, 2), 16, torch.float32)
    cos, sin = tables(20, 8)
    upstream = torch.randn(tensors[0].shape)
    results = [
        with_gradients(
            lambda *t, name=name: (rope_attention(*t, cos, sin, causal=causal, backend=name),), tensors, (upstream,)
        )
        for name in ("sdpa", "torch")
    ]
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other)


# --- Registration, memory, traffic ---


def test_operators_are_registered_in_full(triton_backend):
    q, k, v = inputs(5, 5, (2, 1), 16, torch.float32, batch=1)
    cos, sin = tables(5, 8)
    shape = 0.25, -1, 0, 0.0, False, 5, 5
    ops = torch.ops.ava_kernels
    torch.library.opcheck(ops.attention, (q, k, v, cos, sin, None, None, None, *shape, True, False))
    torch.library.opcheck(ops.attention, (q, k, v, None, None, None, None, None, *shape, True, False))
    plain = [t.detach() for t in (q, k, v)]
    cu = torch.tensor([0, 2, 5], dtype=torch.int32)
    torch.library.opcheck(ops.attention, (*plain, cos, sin, torch.arange(5)[None], cu, cu, *shape, False, False))
    out, lse, rotated_q, rotated_k = ops.attention(*plain, cos, sin, None, None, None, *shape, True, False)
    saved = rotated_q, rotated_k, plain[2], out, lse, cos, sin, None, None, None
    for dlse in (None, torch.randn_like(lse)):
        torch.library.opcheck(ops.attention_backward, (torch.randn_like(out), dlse, *saved, *shape, False))


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_the_definition_of_packed_documents_is_registered_in_full(softcap):
    q, k, v = inputs(6, 6, (4, 2), 8, torch.float32, batch=1)
    cu = documents_of([2, 3])
    ops, options = torch.ops.ava_kernels, (0.3, -1, 0, softcap)
    for return_lse in (False, True):
        torch.library.opcheck(ops.attention_by_document, (q, k, v, cu, cu, *options, return_lse))
    plain, dout = [t.detach() for t in (q, k, v)], torch.randn(q.shape)
    for dlse in (None, torch.randn(1, 4, 6)):
        torch.library.opcheck(ops.attention_by_document_backward, (dout, dlse, *plain, cu, cu, *options))


def test_compiles_as_a_whole_graph(backend):
    cos, sin = tables(20, 8)

    def block(q, k, v):
        return rope_attention(q * 2, k, v, cos, sin).square().sum()

    eager, compiled = (inputs(20, 20, (4, 2), 16, torch.float32) for _ in range(2))
    block(*eager).backward()
    torch.compile(block, fullgraph=True, backend="aot_eager")(*compiled).backward()
    for mine, other in zip(compiled, eager, strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


MASKS = [{}, {"causal": False}, {"window_size": (3, 0)}, {"softcap": 2.0}]


@pytest.mark.parametrize("options", MASKS, ids=str)
def test_compiles_once_for_all_lengths(backend, options):
    torch._dynamo.reset()  # which counts the compilations of all these cases as one function's
    cos, sin = tables(30, 8)
    compiled = torch.compile(
        lambda q, k, v: rope_attention(q, k, v, cos, sin, **options), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for S in (20, 27):
        tensors = inputs(S, S, (4, 2), 16, torch.float32)
        upstream = torch.randn(tensors[0].shape)
        mine = with_gradients(lambda *t: (compiled(*t),), tensors, (upstream,))
        other = with_gradients(lambda *t: (rope_attention(*t, cos, sin, **options),), tensors, (upstream,))
        for a, b in zip(mine, other, strict=True):
            torch.testing.assert_close(a, b)


def test_compiles_with_documents_that_are_elsewhere_each_time(backend):
    cos, sin = tables(30, 8)
    compiled = torch.compile(
        lambda q, k, v, cu: rope_attention(q, k, v, cos, sin, cu_seqlens=cu), fullgraph=True, backend="aot_eager"
    )
    packed = [t.detach()[0].requires_grad_() for t in inputs(40, 40, (4, 2), 16, torch.float32, batch=1)]
    for lengths in ([20, 20], [13, 27], [5, 30]):
        cu_seqlens, upstream = documents_of(lengths), torch.randn(40, 4, 16)
        mine = with_gradients(lambda *t, cu=cu_seqlens: (compiled(*t, cu),), packed, (upstream,))
        other = with_gradients(
            lambda *t, cu=cu_seqlens: (rope_attention(*t, cos, sin, cu_seqlens=cu),), packed, (upstream,)
        )
        for a, b in zip(mine, other, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("options", MASKS, ids=str)
def test_tells_shapes_without_numbers(backend, options):
    with FakeTensorMode():
        q, k = torch.empty(9, 4, 16, dtype=torch.float16, requires_grad=True), torch.empty(9, 2, 16).half()
        cos, cu_seqlens = torch.empty(9, 8), torch.empty(3, dtype=torch.int32)
        out, lse = rope_attention(q, k, k, cos, cos, cu_seqlens=cu_seqlens, max_seqlen=7, return_lse=True, **options)
        (dq,) = torch.autograd.grad(out.sum() + lse.sum(), [q])
    assert (out.shape, out.dtype, dq.shape, dq.dtype) == (q.shape, q.dtype, q.shape, q.dtype)
    assert (lse.shape, lse.dtype) == ((4, 9), torch.float32)


def test_positions_of_one_row_are_those_of_all(backend):
    q, k, v = (t.detach() for t in inputs(6, 6, (2, 1), 16, torch.float32))
    cos, sin = tables(20, 8)
    row = torch.randint(0, 20, (1, 6))
    expected = rope_attention(q, k, v, cos, sin, position_ids=row.expand(2, 6).contiguous())
    assert torch.equal(rope_attention(q, k, v, cos, sin, position_ids=row), expected)
    assert torch.equal(apply_rotary(q, cos, sin, position_ids=row), apply_rotary(q, cos, sin, position_ids=row[0]))


def test_float32_is_multiplied_as_torch_was_told_by_whichever_of_its_ways(triton_backend):
    """After one of them, the question that belongs to the other raises."""
    from ava_kernels.dot import float32_is_exact

    matmul = torch.backends.cuda.matmul
    tensors = [torch.randn(1, 20, 2, 16) for _ in range(3)]
    try:
        assert float32_is_exact()
        for told in ("tf32", "ieee"):
            matmul.fp32_precision = told
            assert float32_is_exact() == (told == "ieee")
            rope_attention(*tensors)
        matmul.fp32_precision = "none"
        for told in ("high", "highest"):
            torch.set_float32_matmul_precision(told)
            assert float32_is_exact() == (told == "highest")
    finally:
        matmul.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")


def test_keeps_rotated_queries_and_keys_instead_of_the_given_ones(triton_backend):
    q, k, v = inputs(20, 20, (4, 2), 16, torch.float16)
    cos, sin = tables(20, 8)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = rope_attention(q, k, v, cos, sin)
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    for t in (cos, sin, v, out):
        held.pop(t.untyped_storage().data_ptr())
    assert q.untyped_storage().data_ptr() not in held
    assert sorted(held.values()) == sorted([2 * q.numel(), 2 * k.numel(), 4 * 2 * 4 * 20])  # q, k and lse


def test_turning_costs_what_the_docstring_counts(triton_backend, monkeypatch):
    """Elements of rotated tensors that each launch reads and writes beside what attention itself would."""
    from ava_kernels.attention import kernels
    from ava_kernels.rotary import kernels as rotary

    moved = []
    rotate = rotary.rotate
    monkeypatch.setattr(
        rotary, "rotate", lambda x, *rest: moved.append(x.numel() + rest[-1].numel()) or rotate(x, *rest)
    )
    launch = kernels._forward

    class Launch:
        def __getitem__(self, grid):
            def run(*args, **kwargs):
                if torch.is_tensor(args[launch.arg_names.index("rotated_q_ptr")]):
                    moved.append(args[launch.arg_names.index("rotated_q_ptr")].numel())
                launch[grid](*args, **kwargs)

            return run

    monkeypatch.setattr(kernels, "_forward", Launch())
    B, S, H_q, H_kv, D = 2, 20, 4, 2, 16
    q, k, v = inputs(S, S, (H_q, H_kv), D, torch.float16)
    cos, sin = tables(S, D // 2)
    out = rope_attention(q, k, v, cos, sin)
    torch.autograd.grad(out, [q, k, v], torch.ones_like(out))
    assert sum(moved) == B * S * (2 * H_kv + H_q) * D
    moved.clear()
    with torch.no_grad():
        rope_attention(q, k, v, cos, sin)
    assert sum(moved) == B * S * 2 * H_kv * D
    moved.clear()
    out = rope_attention(q, k, v, *tables(S, D // 4))
    torch.autograd.grad(out, [q, k, v], torch.ones_like(out))
    assert sum(moved) == B * S * (2 * H_kv + H_q + 2 * (H_q + H_kv)) * D


# --- Refusals ---


def test_refuses_heads_that_do_not_fit_and_half_a_table():
    q = torch.zeros(1, 2, 4, 8)
    for heads in (3, 0):
        k = torch.zeros(1, 2, heads, 8)
        with pytest.raises(ValueError, match=f"4 query heads cannot share {heads} key/value heads"):
            rope_attention(q, k, k)
    with pytest.raises(ValueError, match="cos and sin belong together"):
        rope_attention(q, q, q, cos=torch.zeros(2, 4))


TABLE = {"cos": torch.zeros(2, 4), "sin": torch.zeros(2, 4)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(1, 2, 4, 16)}, "do not fit: they must be"),
        ({"v": torch.zeros(1, 2, 4, 8).half()}, "all three must be the same float dtype"),
        ({"q": torch.zeros(2, 2, 4, 8)}, "q has 2 sequences, k and v have 1"),
        ({"cu_seqlens": torch.zeros(2, dtype=torch.int32)}, r"they must be \(T, H, D\), as cu_seqlens is given"),
        ({"cos": torch.zeros(2, 5), "sin": torch.zeros(2, 5)}, "do not fit a head dimension of 8"),
        (
            {"cos": torch.zeros(1, 4), "sin": torch.zeros(1, 4)},
            "have 1 positions; the longest sequence has 2",
        ),
        ({"cos": torch.zeros(2, 4, requires_grad=True), "sin": torch.zeros(2, 4)}, "get none here: detach them"),
        ({"window_size": (-2, 0)}, r"window_size is \(-2, 0\); it must be"),
        ({"window_size": 3}, "window_size is 3; it must be"),
        ({"softcap": -1.0}, "softcap is -1.0; it must be 0"),
        ({"softcap": float("nan")}, "softcap is nan; it must be a finite number"),
        ({"softcap": None}, "softcap is None; it must be a finite number"),
        ({"softmax_scale": float("inf")}, "softmax_scale is inf; it must be a finite number"),
        ({"max_seqlen": 2}, "max_seqlen is given without cu_seqlens"),
        ({"position_ids": torch.zeros(2, dtype=torch.int64)}, "position_ids are given without cos and sin"),
        ({"cos": torch.zeros(2, 4).int(), "sin": torch.zeros(2, 4).int()}, "both must be floats"),
        ({"position_ids": torch.zeros(3, dtype=torch.int64), **TABLE}, r"position_ids is torch.int64 of shape \(3,\)"),
        (
            {"position_ids": torch.tensor([0, 2]), **TABLE},
            "are 0 to 2; cos and sin have the positions 0 to 1",
        ),
        ({"position_ids": torch.tensor([-1, 0]), **TABLE}, "position_ids are -1 to 0; cos and sin have the positions"),
        ({"backend": "flash"}, "backend is 'flash'; it must be"),
        ({"backend": "sdpa", "softcap": 1.0}, "backend is 'sdpa', which has no window_size, softcap"),
        ({"backend": "sdpa", "deterministic": True}, "take backend='triton'"),
    ],
)
def test_refuses_by_name(change, message):
    arguments = {name: torch.zeros(1, 2, 4, 8) for name in "qkv"} | change
    with pytest.raises(ValueError, match=message):
        rope_attention(**arguments)


@pytest.mark.parametrize(
    ("ends", "change", "message"),
    [
        ([0, 5], {}, r"cu_seqlens is \[0, 5\]; .* the last at most 4, the number of tokens"),
        ([1, 4], {}, r"cu_seqlens is \[1, 4\]; it must hold 0 and the documents' ends"),
        ([0, 3, 2, 4], {}, r"cu_seqlens is \[0, 3, 2, 4\]; .* each as large as the one before it"),
        ([0, 4], {"max_seqlen": 3}, "max_seqlen is 3, but a document of cu_seqlens has 4 tokens"),
        ([0, 4], {"max_seqlen": 4.5}, "max_seqlen is 4.5; it must be an int"),
        ([0, 4], TABLE, "cos and sin have 2 positions; the longest sequence has 4"),
    ],
)
def test_documents_that_are_not_there_are_refused(backend, ends, change, message):
    q = torch.zeros(4, 2, 8)
    with pytest.raises(ValueError, match=message):
        rope_attention(q, q, q, cu_seqlens=torch.tensor(ends, dtype=torch.int32), **change)


def test_kernels_that_cannot_run_are_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q = torch.zeros(1, 4, 2, 8)
    with pytest.raises(RuntimeError, match="backend is 'triton', but a tensor is on cpu: move it to a GPU, or set"):
        rope_attention(q, q, q, backend="triton")


def test_cu_seqlens_of_another_dtype_are_refused():
    q = torch.zeros(4, 2, 8)
    with pytest.raises(ValueError, match=r"cu_seqlens is torch.int64 of shape \(2,\); it must be int32"):
        rope_attention(q, q, q, cu_seqlens=torch.tensor([0, 4]))


def test_tables_of_positions():
    cos, sin = rope_table(5, 8)
    assert cos.shape == sin.shape == (5, 4)


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"window_size": (3, 0)}, {"return_lse": True}], ids=str)
def test_autocast_chooses_the_dtype_as_it_does_for_torchs(backend, options):
    q, k, v = (torch.randn(1, 5, 2, 16, requires_grad=True) for _ in range(3))
    with torch.autocast("cpu", dtype=torch.float16):
        mixed = rope_attention(q, k, v.half(), **options)  # norms and tables in float32 leave q and k so
        torchs = torch.nn.functional.scaled_dot_product_attention(q, k, v.half())
    plain = rope_attention(q.half(), k.half(), v.half(), **options)
    mixed, plain = (results if isinstance(results, tuple) else (results,) for results in (mixed, plain))
    assert mixed[0].dtype == torchs.dtype == torch.float16
    assert all(map(torch.equal, mixed, plain))
    assert [t.dtype for t in mixed] == [t.dtype for t in plain]
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(mixed[0].sum(), [q, k, v]))
