"""The rotation against multiplication of complex numbers in float64, in PyTorch and on the interpreted kernel."""

from __future__ import annotations

import pytest
import torch
from ava_kernels import apply_rotary, rope_table

pytestmark = pytest.mark.usefixtures("small_and_seeded")


def angles_SP(length, pairs):
    return torch.randn(length, pairs, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 10


def rotated(x, angles, interleaved):
    """(a + ib) · exp(i·angle) for every pair (a, b)."""
    x, pairs = x.double().clone(), angles.shape[-1]
    first = slice(0, 2 * pairs, 2) if interleaved else slice(0, pairs)
    second = slice(1, 2 * pairs, 2) if interleaved else slice(pairs, 2 * pairs)
    z = torch.complex(x[..., first], x[..., second]) * torch.polar(torch.ones_like(angles), angles).unsqueeze(-2)
    x[..., first], x[..., second] = z.real, z.imag
    return x


def tables(length, pairs):
    angles = angles_SP(length, pairs)
    return angles, angles.cos().float(), angles.sin().float()


def assert_turned(out, x, angles, interleaved=False):
    """As exact as float32, or the dtype that x has, allows; what is not rotated to the bit. angles (…, S, pairs)."""
    assert out.dtype == x.dtype
    assert out.shape == x.shape
    tolerance = max(torch.finfo(x.dtype).eps, torch.finfo(torch.float32).eps)
    torch.testing.assert_close(out.double(), rotated(x, angles, interleaved), rtol=tolerance, atol=8 * tolerance)
    assert torch.equal(out[..., 2 * angles.shape[-1] :], x[..., 2 * angles.shape[-1] :])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    "shape", [(2, 5, 3, 10, 5), (2, 5, 3, 12, 3), (1, 5, 1, 7, 3), (1, 1, 1, 2, 1), (0, 5, 3, 8, 4)]
)
def test_rotation_is_complex_multiplication(backend, shape, interleaved):
    *shape, pairs = shape
    x = torch.randn(shape)
    angles, cos, sin = tables(8, pairs)  # more positions than are needed
    out = apply_rotary(x, cos, sin, interleaved=interleaved)
    assert_turned(out, x, angles[: shape[1]], interleaved)


@pytest.mark.parametrize("interleaved", [False, True])
def test_float64_stays_exact(interleaved):
    x = torch.randn(2, 5, 3, 12, dtype=torch.float64)
    angles = angles_SP(5, 4)
    out = apply_rotary(x, angles.cos(), angles.sin(), interleaved=interleaved)
    torch.testing.assert_close(out, rotated(x, angles, interleaved), rtol=0, atol=1e-14)


def test_many_blocks_of_rows(triton_backend, monkeypatch):
    monkeypatch.setattr("ava_kernels.rotary.kernels.ELEMENTS", 64)
    x = torch.randn(2, 7, 3, 10)
    angles, cos, sin = tables(7, 4)
    assert_turned(apply_rotary(x, cos, sin), x, angles)


@pytest.mark.parametrize("interleaved", [False, True])
def test_conjugate_is_the_inverse_and_the_gradient(backend, interleaved):
    x = torch.randn(2, 5, 3, 12, requires_grad=True)
    angles, cos, sin = tables(5, 4)
    out = apply_rotary(x, cos, sin, interleaved=interleaved)
    back = apply_rotary(out.detach(), cos, sin, interleaved=interleaved, conjugate=True)
    torch.testing.assert_close(back, x.detach())
    upstream = torch.randn_like(out)
    out.backward(upstream)
    assert_turned(x.grad, upstream, -angles, interleaved)
    x.grad = None
    apply_rotary(x, cos, sin, interleaved=interleaved, conjugate=True).backward(upstream)
    assert_turned(x.grad, upstream, angles, interleaved)


@pytest.mark.parametrize("one_for_all", [False, True])
def test_positions_that_are_given(backend, one_for_all):
    x = torch.randn(2, 5, 3, 12)
    angles, cos, sin = tables(20, 4)
    position_ids = torch.randint(0, 20, (5,) if one_for_all else (2, 5))
    out = apply_rotary(x, cos, sin, position_ids=position_ids)
    assert_turned(out, x, angles[position_ids])


@pytest.mark.parametrize("given", [False, True])
def test_packed_documents_each_begin_anew(backend, given):
    x = torch.randn(9, 3, 12)
    angles, cos, sin = tables(20, 4)
    cu_seqlens = torch.tensor([0, 4, 4, 9], dtype=torch.int32)
    position_ids = torch.randint(0, 20, (9,)) if given else None
    out = apply_rotary(x, cos, sin, cu_seqlens=cu_seqlens, position_ids=position_ids)
    assert_turned(out, x, angles[position_ids if given else torch.tensor([*range(4), *range(5)])])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_in_place(backend, interleaved, packed):
    x = torch.randn(2, 5, 3, 12)
    angles, cos, sin = tables(5, 4)
    given, options = x.clone(), {}
    if packed:
        given, options = given.view(10, 3, 12), {"cu_seqlens": torch.tensor([0, 5, 10], dtype=torch.int32)}
    out = apply_rotary(given, cos, sin, interleaved=interleaved, inplace=True, **options)
    assert out is given
    assert_turned(out.view_as(x), x, angles, interleaved)


def test_in_place_writes_nothing_beside_x(backend):
    whole = torch.randn(2, 5, 4, 12)
    before = whole.clone()
    angles, cos, sin = tables(5, 4)
    apply_rotary(whole[:, :, 1:3], cos, sin, inplace=True)
    assert_turned(whole[:, :, 1:3], before[:, :, 1:3], angles)
    assert torch.equal(whole[:, :, ::3], before[:, :, ::3])


def test_in_place_has_a_gradient(backend):
    leaf = torch.randn(2, 5, 3, 12, requires_grad=True)
    angles, cos, sin = tables(5, 4)
    doubled = leaf * 2
    out = apply_rotary(doubled, cos, sin, inplace=True)
    assert out is doubled
    assert_turned(out.detach(), 2 * leaf.detach(), angles)
    upstream = torch.randn_like(out)
    out.backward(upstream)
    assert_turned(leaf.grad / 2, upstream, -angles)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_rounded_once(backend, dtype):
    if backend == "triton" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter cuts bfloat16 off instead of rounding")
    x = torch.randn(2, 5, 3, 10).to(dtype)
    _, cos, sin = tables(5, 4)
    out = apply_rotary(x, cos, sin)
    assert out.dtype == dtype
    assert torch.equal(out, apply_rotary(x.float(), cos, sin).to(dtype))


@pytest.mark.parametrize("interleaved", [False, True])
def test_any_strides_give_the_same_bits(backend, interleaved):
    _, cos, sin = tables(5, 4)
    x = torch.randn(2, 3, 5, 10).transpose(1, 2)
    expected = apply_rotary(x.contiguous(), cos, sin, interleaved=interleaved)
    wide = torch.randn(2, 5, 3, 20)
    wide[..., ::2] = x
    backwards = x.flip(1).contiguous()
    position_ids = torch.arange(5).flip(0)
    spread_tables = [torch.empty(10, 4)[::2].copy_(t) for t in (cos, sin)]
    columns = [t.T.contiguous().T for t in (cos, sin)]
    for other in (
        apply_rotary(x, cos, sin, interleaved=interleaved),
        apply_rotary(x.mT.contiguous().mT, cos, sin, interleaved=interleaved),
        apply_rotary(wide[..., ::2], cos, sin, interleaved=interleaved),
        apply_rotary(backwards, cos, sin, interleaved=interleaved, position_ids=position_ids).flip(1),
        apply_rotary(x, *spread_tables, interleaved=interleaved),
        apply_rotary(x, *columns, interleaved=interleaved),
    ):
        assert torch.equal(other, expected)


def test_gradients_that_are_strided(backend):
    x = torch.randn(2, 5, 3, 12, requires_grad=True)
    angles, cos, sin = tables(5, 4)
    upstream = torch.randn(1, 1, 3, 1).expand(2, 5, 3, 12)
    apply_rotary(x, cos, sin).backward(upstream)
    assert_turned(x.grad, upstream, -angles)


def test_offsets_may_pass_31_bits(backend):
    try:  # memory that is never touched costs nothing
        storage = torch.empty(2**32 + 2**20, dtype=torch.float16)
    except RuntimeError:
        pytest.skip("no 8 GiB of address space")
    x = torch.randn(2, 1, 3, 12).half()
    angles, cos, sin = tables(1, 4)
    # With 32 bits the second sequence would be the first.
    far = storage.as_strided(x.shape, (2**32, 2**31, 16, 1), 64).copy_(x)
    assert_turned(apply_rotary(far, cos, sin), x, angles)
    apply_rotary(far, cos, sin, inplace=True)
    assert_turned(far, x, angles)


def test_same_input_same_bits(backend):
    x = torch.randn(2, 5, 3, 12)
    _, cos, sin = tables(5, 4)
    assert torch.equal(apply_rotary(x, cos, sin), apply_rotary(x, cos, sin))


def test_operators_are_registered_in_full(triton_backend):
    x = torch.randn(2, 5, 3, 12, requires_grad=True)
    _, cos, sin = tables(20, 4)
    for position in (None, torch.randint(0, 20, (2, 5))):
        torch.library.opcheck(torch.ops.ava_kernels.rotate, (x, cos, sin, position, False, False))
        torch.library.opcheck(torch.ops.ava_kernels.rotate_, (x.detach(), cos, sin, position, True, True))
    strided = torch.randn(2, 3, 5, 12).transpose(1, 2).requires_grad_()
    torch.library.opcheck(torch.ops.ava_kernels.rotate, (strided, cos, sin, None, True, False))


@pytest.mark.parametrize("inplace", [False, True])
def test_compiles_as_a_whole_graph(backend, inplace):
    _, cos, sin = tables(5, 4)

    def block(x):
        return apply_rotary(x * 2, cos, sin, inplace=inplace).square().sum()

    eager = torch.randn(2, 5, 3, 12, requires_grad=True)
    compiled = eager.detach().clone().requires_grad_()
    block(eager).backward()
    torch.compile(block, fullgraph=True, backend="aot_eager")(compiled).backward()
    torch.testing.assert_close(compiled.grad, eager.grad)


def test_table_is_the_formula():
    cos, sin = rope_table(50, 6, theta=500.0)
    assert cos.shape == sin.shape == (50, 3)
    assert cos.dtype == torch.float32
    frequencies = 500.0 ** (-torch.arange(0, 6, 2, dtype=torch.float64) / 6)
    angles = torch.arange(50, dtype=torch.float64)[:, None] * frequencies
    torch.testing.assert_close(cos.double(), angles.cos(), rtol=0, atol=50 * 2**-22)
    torch.testing.assert_close(sin.double(), angles.sin(), rtol=0, atol=50 * 2**-22)


@pytest.mark.parametrize("rotary_dim", [0, 5, -2])
def test_table_needs_pairs(rotary_dim):
    with pytest.raises(ValueError, match=f"rotary_dim is {rotary_dim}; it must be even and positive"):
        rope_table(4, rotary_dim)


@pytest.mark.parametrize(("change", "message"), [({"length": -1}, "length is -1"), ({"theta": 0.0}, "theta is 0.0")])
def test_tables_of_no_sense_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        rope_table(**{"length": 4, "rotary_dim": 8} | change)


@pytest.mark.parametrize(("cos_shape", "sin_shape"), [((4, 2), (4, 2)), ((5, 5), (5, 5)), ((5, 2), (5, 1))])
def test_tables_that_do_not_fit_are_refused(cos_shape, sin_shape):
    with pytest.raises(ValueError, match=r"do not fit x|positions; the longest"):
        apply_rotary(torch.zeros(1, 5, 1, 8), torch.zeros(cos_shape), torch.zeros(sin_shape))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(1, 5, 1, 8, dtype=torch.int32)}, "x is torch.int32; it must be floats"),
        ({"cos": None}, "cos and sin are the tables to rotate by: give both"),
        ({"position_ids": torch.full((5,), 5)}, "position_ids are 5 to 5; cos and sin have the positions 0 to 4 alone"),
        ({"position_ids": torch.full((2, 5), 0)}, r"position_ids is torch.int64 of shape \(2, 5\)"),
        ({"x": torch.zeros(6, 1, 8), "cu_seqlens": torch.tensor([0, 6])}, "cu_seqlens is torch.int64"),
        ({"x": torch.zeros(6, 1, 8), "cu_seqlens": torch.tensor([0, 6]).int()}, "the longest sequence has 6"),
    ],
)
def test_refuses_by_name(backend, change, message):
    arguments = {"x": torch.zeros(1, 5, 1, 8), "cos": torch.zeros(5, 2), "sin": torch.zeros(5, 2)} | change
    with pytest.raises(ValueError, match=message):
        apply_rotary(**arguments)
