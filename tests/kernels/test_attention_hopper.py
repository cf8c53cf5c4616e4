"""Hopper's attention, every warp group as a thread on this CPU, against the definition in float64."""

from __future__ import annotations

import gluon_on_cpu
import pytest
import torch
from ava_kernels import rope_attention

pytest.importorskip("triton")
from ava_kernels import hopper as shared
from ava_kernels.attention import hopper, hopper_backward, hopper_forward

pytestmark = pytest.mark.usefixtures("triton_backend", "on_this_cpu")


@pytest.fixture
def on_this_cpu(monkeypatch):
    monkeypatch.setattr(hopper, "runs_on", lambda q: True)
    torch.manual_seed(0)
    with gluon_on_cpu.emulated():
        yield


def inputs(S_q, S_k, heads=(2, 1), D=64, dtype=torch.float16, batch=1):
    shapes = (batch, S_q, heads[0], D), *[(batch, S_k, heads[1], D)] * 2
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def table(length, D, part=None):
    angles = 3 * torch.randn(length, (part or D) // 2)
    return angles.cos(), angles.sin()


def all_of(tensors, upstreams, **options):
    out, lse = rope_attention(*tensors, return_lse=True, **options)
    finite = lse.masked_fill(lse.isneginf(), 0)
    loss = (out * upstreams[0].to(out.dtype)).sum() + (finite * upstreams[1].to(lse.dtype)).sum()
    return [out, lse, *torch.autograd.grad(loss, tensors)]


def assert_right(tensors, cos_sin=(), end=None, **options):
    """Its errors against float64 are at most twice those of the definition in the same precision. Behind `end` there is
    no document, and NaN."""
    cos, sin = cos_sin or (None, None)
    upstreams = torch.randn(tensors[0].shape), torch.randn(tensors[0].shape[:-1]).transpose(-1, -2)
    if end is not None:
        for t in (*tensors, upstreams[0]):
            t.detach()[end:] = float("nan")
    ours = all_of(tensors, upstreams, cos=cos, sin=sin, backend="hopper", **options)
    same = all_of(tensors, upstreams, cos=cos, sin=sin, backend="torch", **options)
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    true = all_of(doubles, upstreams, cos=cos, sin=sin, backend="torch", **options)
    for name, got, other, exact in zip(("out", "lse", "dq", "dk", "dv"), ours, same, true, strict=True):
        assert got.shape == exact.shape, name
        hidden = exact.isneginf()
        assert torch.equal(got.isneginf(), hidden), name
        got, other, exact = (t.double().masked_fill(hidden, 0) for t in (got, other, exact))
        error, allowed = (got - exact).norm().item(), 2 * (other - exact).norm().item()
        assert error <= allowed + 2e-6 * exact.norm().item(), (name, error, allowed)
    return ours


def test_blocks_behind_a_short_document_fetch_nothing(on_this_cpu, monkeypatch):
    """The grid has as many for every document as the longest needs."""
    fetched = []
    for producer in (hopper_forward._forward_producer, hopper_backward._dkdv_producer):
        names = gluon_on_cpu.names_of(producer)
        fetch = names["fetch"]
        monkeypatch.setitem(names, "fetch", lambda *given, fetch=fetch: fetched.append(1) or fetch(*given))
    cu = torch.tensor([0, 100, 200], dtype=torch.int32)
    counts = []
    for longest in (100, 1000):
        tensors = [t[0].detach().requires_grad_() for t in inputs(200, 200)]
        fetched.clear()
        out = rope_attention(*tensors, cu_seqlens=cu, max_seqlen=longest, backend="hopper")
        forward = len(fetched)
        torch.autograd.grad(out.sum(), tensors)
        counts.append((forward, len(fetched) - forward))
    assert all(min(count) > 0 for count in counts)
    assert counts[0] == counts[1]


def test_tensors_that_tma_cannot_fetch_where_they_lie(on_this_cpu):
    """Cut out of a flat one, so that they begin in its midst; or with strides that say nothing, of one row."""
    tensors = inputs(70, 70)
    upstreams = torch.randn(tensors[0].shape), torch.randn(1, 2, 70)
    expected = all_of(tensors, upstreams, backend="hopper")
    cut = []
    for t in tensors:
        flat = torch.empty(t.numel() + 1, dtype=t.dtype)
        flat[1:] = t.detach().flatten()
        cut.append(flat[1:].view(t.shape).requires_grad_())
        assert cut[-1].is_contiguous()
        assert cut[-1].data_ptr() % 16
    for a, b in zip(all_of(cut, upstreams, backend="hopper"), expected, strict=True):
        assert torch.equal(a, b)
    one = torch.empty_strided((1, 64, 1, 64), (1, 64, 1, 1), dtype=torch.float16)
    assert hopper._for_tma(one).stride() == (4096, 64, 64, 1)


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize(
    ("S_q", "S_k", "options"),
    [
        (300, 300, {}),
        (129, 400, {"causal": False}),
        (400, 129, {}),  # the first queries see nothing
        (1, 300, {}),
        (260, 260, {"window_size": (70, 0), "softcap": 20.0}),
        (200, 330, {"causal": False, "window_size": (40, 90), "softmax_scale": 0.3}),
    ],
)
def test_output_and_gradients_are_the_definition(D, S_q, S_k, options):
    assert_right(inputs(S_q, S_k, D=D), **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (3, 1)])
def test_heads_share_keys(dtype, heads):
    rotation = (
        table(150, 64) if dtype == torch.float16 else ()
    )  # keys are rotated by Triton's interpreter, cutting bits off
    assert_right(inputs(150, 150, heads, dtype=dtype, batch=2), rotation)


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("part", [None, 32])
def test_rotation(D, interleaved, part):
    position = torch.randint(0, 140, (1, 140))
    assert_right(inputs(140, 140, D=D), table(140, D, part), interleaved=interleaved, position_ids=position)


def test_empty_sequences():
    for S_q, S_k in ((0, 5), (5, 0), (0, 0)):
        assert_right(inputs(S_q, S_k))


def test_strided_and_expanded_tensors():
    q, k, v = inputs(140, 140, (2, 2))
    q = q.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    k = k.detach()[:1, :, :1].expand(1, 140, 2, 64).requires_grad_()
    v = torch.randn(1, 140, 2, 65).half()[..., 1:].requires_grad_()  # rows that TMA cannot begin at
    assert_right([q, k, v], table(140, 64))


def test_offsets_beyond_31_bits():
    tensors = []
    for t in inputs(70, 70, (2, 2)):
        try:  # memory that is never touched costs nothing
            storage = torch.empty(70 * 2**25, dtype=t.dtype)
        except RuntimeError:
            pytest.skip("no 14 GiB of address space")
        tensors.append(storage.as_strided(t.shape, (0, 2**25, 64, 1)).copy_(t.detach()).requires_grad_())
    assert_right(tensors, table(70, 64))


def test_large_logits():
    q, k, v = inputs(150, 150)
    assert_right([(t.detach() * 30).requires_grad_() for t in (q, k)] + [v])


def test_what_lies_behind_a_sequence_is_not_read():
    """NaN in one sequence of a batch stays there."""
    q, k, v = inputs(130, 130, batch=2)
    with torch.no_grad():
        v[1], k[1] = float("nan"), float("nan")
    out, lse = rope_attention(q, k, v, return_lse=True, backend="hopper")
    gradients = torch.autograd.grad((out[0] * torch.randn_like(out[0])).sum() + lse[0].sum(), (q, k, v))
    assert all(t[0].isfinite().all() for t in (out, lse, *gradients))
    assert out[1].isnan().all()


def test_same_input_gives_same_bits():
    tensors, upstreams = inputs(300, 300), (torch.randn(1, 300, 2, 64), torch.randn(1, 2, 300))
    results = []
    for seed in (1, 2):  # other orders of what may happen in any
        with gluon_on_cpu.emulated(seed):
            results.append(all_of(tensors, upstreams, backend="hopper"))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


LENGTHS = 0, 70, 1, 200, 0, 129


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window_size": (50, 0), "softcap": 20.0}])
def test_packed_documents_are_each_alone_to_the_bit(D, options):
    """With NaN in one of them and behind the last."""
    T = sum(LENGTHS) + 50
    q, k, v = (t.detach()[0] for t in inputs(T, T, (4, 2), D=D))
    ends = torch.tensor(LENGTHS).cumsum(0).tolist()
    q[ends[0] : ends[1]], k[ends[0] : ends[1]], v[ends[0] : ends[1]] = (float("nan"),) * 3
    q[ends[-1] :], k[ends[-1] :], v[ends[-1] :] = (float("nan"),) * 3
    upstreams = torch.randn(q.shape), torch.randn(4, T)
    upstreams[0][ends[0] : ends[1]] = float("nan")
    cos, sin = table(T, D)
    options = {"cos": cos, "sin": sin, "backend": "hopper", **options}
    cu = torch.tensor([0, *ends], dtype=torch.int32)
    tensors = [t.requires_grad_() for t in (q, k, v)]
    out, lse, *gradients = all_of(tensors, upstreams, cu_seqlens=cu, max_seqlen=max(LENGTHS), **options)
    for first, last in zip([0, *ends], ends, strict=False):
        alone = [t.detach()[first:last][None].requires_grad_() for t in tensors]
        its = upstreams[0][None, first:last], upstreams[1][None, :, first:last]
        expected = all_of(alone, its, **options)
        found = out[first:last], lse[:, first:last], *(t[first:last] for t in gradients)
        for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), found, expected, strict=True):
            assert torch.equal(a.nan_to_num(7.0), b[0].nan_to_num(7.0)), (name, first)
        assert first == ends[0] or found[0].isfinite().all()
    assert not any(t[ends[-1] :].any() for t in (out, *gradients))
    assert lse[:, ends[-1] :].isneginf().all()


def test_packed_documents_are_the_definition():
    T = sum(LENGTHS)
    cu = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
    packed = [t.detach()[0].requires_grad_() for t in inputs(T, T, (4, 2))]
    assert_right(packed, table(T, 64), cu_seqlens=cu, position_ids=torch.randperm(T))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("D", "part"), [(8, 8), (32, 32), (40, 16), (96, 96)])
def test_other_heads(D, part, packed):
    options = {"cu_seqlens": torch.tensor([0, 70, 150], dtype=torch.int32)} if packed else {}
    tensors = inputs(150, 150, (2, 1), D=D)
    tensors = [t.detach()[0].requires_grad_() for t in tensors] if packed else tensors
    assert_right(tensors, table(150, D, part), **options)


def test_what_it_does_not_take(monkeypatch):
    q, k, v = inputs(10, 10)
    refused = "backend is 'hopper', which is for float16 and bfloat16, heads of a multiple of 8 up to 128"
    with pytest.raises(ValueError, match=refused):
        rope_attention(q.float(), k.float(), v.float(), backend="hopper")
    for D in (36, 136):
        with pytest.raises(ValueError, match=f"{refused}.* heads of {D}"):
            rope_attention(*inputs(10, 10, D=D), backend="hopper")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="on cpu"):
        rope_attention(q, k, v, backend="hopper")


FAULTS = {
    "values are given back before they are read": (
        hopper_forward._forward_consumer,
        "out_MD = hopper.warpgroup_mma_wait(0, deps=(adding,))\n            mbarrier.arrive(v_empty.index(last_stage))",
        "mbarrier.arrive(v_empty.index(last_stage))\n            out_MD = hopper.warpgroup_mma_wait(0, deps=(adding,))",
    ),
    "the token is not passed on": (
        hopper_forward._forward_consumer,
        "mbarrier.arrive(ping_pong.index(1 - NUMBER))",
        "pass",
    ),
    "no fence behind the queries": (hopper_forward._forward_consumer, "hopper.fence_async_shared()", "pass"),
    "no fence behind what is cleared": (shared.clear_behind, "hopper.fence_async_shared()", "pass"),
    "a row of the next document": (shared.clear_behind, "row_A < end", "row_A <= end"),
    "values that are not cleared": (
        hopper_forward._forward_consumer,
        "clear_behind(v_smem.index(last_stage).reshape([BN, D]), end)",
        "pass",
    ),
    "queries that are not cleared": (hopper_backward._dkdv_consumer, "clear_behind(q_MD, len_q - m)", "pass"),
    "gradients that are not cleared": (hopper_backward._dkdv_consumer, "clear_behind(dout_MD, len_q - m)", "pass"),
    "keys that are not cleared": (hopper_backward._dq_consumer, "clear_behind(k_ND, len_k - n)", "pass"),
    "a phase that is off by one": (
        hopper_forward._forward_producer,
        "k_empty.index(stage), phase ^ 1",
        "k_empty.index(stage), phase",
    ),
    "a product that is not waited for": (
        hopper_backward._dkdv_consumer,
        "hopper.warpgroup_mma_wait(0, deps=(dv_sum",
        "hopper.warpgroup_mma_wait(1, deps=(dv_sum",
    ),
    "bytes that are not expected": (
        hopper_backward._dq_producer,
        "k.block_type.nbytes + v.block_type.nbytes)\n        fetch",
        "k.block_type.nbytes)\n        fetch",
    ),
    "rows' numbers that are told of before they are there": (
        hopper_backward._dkdv_producer,
        "delta_smem.index(stage).store(delta_M)\n            mbarrier.arrive(full.index(stage))",
        "mbarrier.arrive(full.index(stage))\n            delta_smem.index(stage).store(delta_M)",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_order_show(monkeypatch, fault):
    """Of the emulation itself: a kernel with one line changed is found out."""
    gluon_on_cpu.with_fault(monkeypatch, *FAULTS[fault])
    monkeypatch.setattr(gluon_on_cpu, "PATIENCE", 1.0)
    tensors, options = inputs(600, 600), {}
    if "clear" in fault or "document" in fault:
        tensors = [t.detach()[0].requires_grad_() for t in inputs(260, 260)]
        options = {"cu_seqlens": torch.tensor([0, 70, 140], dtype=torch.int32), "end": 140}

    def often_enough():
        for _ in range(20):
            assert_right(tensors, **options)

    with pytest.raises(AssertionError):
        often_enough()
