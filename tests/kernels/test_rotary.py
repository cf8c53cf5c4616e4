"""The rotation against multiplication of complex numbers in float64."""

from __future__ import annotations

import pytest
import torch
from ava_kernels import apply_rotary, rope_table

pytestmark = pytest.mark.usefixtures("small_and_seeded")


def angles_SP(length, pairs):
    return torch.randn(length, pairs, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 10


def rotated(x, angles, interleaved):
    """(a + ib) · exp(i·angle) for every pair (a, b)."""
    x, pairs = x.double().clone(), angles.shape[1]
    first = slice(0, 2 * pairs, 2) if interleaved else slice(0, pairs)
    second = slice(1, 2 * pairs, 2) if interleaved else slice(pairs, 2 * pairs)
    z = torch.complex(x[..., first], x[..., second]) * torch.polar(torch.ones_like(angles), angles)[:, None, :]
    x[..., first], x[..., second] = z.real, z.imag
    return x


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "pairs"), [(10, 5), (12, 3), (7, 3), (2, 1)])
def test_rotation_is_complex_multiplication(interleaved, head_dim, pairs):
    x = torch.randn(2, 5, 3, head_dim, dtype=torch.float64)
    angles = angles_SP(8, pairs)  # more positions than are needed
    out = apply_rotary(x, angles.cos(), angles.sin(), interleaved=interleaved)
    torch.testing.assert_close(out, rotated(x, angles[:5], interleaved), rtol=0, atol=1e-14)
    assert torch.equal(out[..., 2 * pairs :], x[..., 2 * pairs :])


@pytest.mark.parametrize("interleaved", [False, True])
def test_conjugate_is_the_inverse_and_the_gradient(interleaved):
    x = torch.randn(2, 5, 3, 12, dtype=torch.float64, requires_grad=True)
    angles = angles_SP(5, 4)
    tables = angles.cos(), angles.sin()
    out = apply_rotary(x, *tables, interleaved=interleaved)
    back = apply_rotary(out, *tables, interleaved=interleaved, conjugate=True)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-14)
    upstream = torch.randn_like(out)
    out.backward(upstream)
    expected = apply_rotary(upstream, *tables, interleaved=interleaved, conjugate=True)
    torch.testing.assert_close(x.grad, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_rounded_once(dtype):
    x = torch.randn(2, 5, 3, 8).to(dtype)
    angles = angles_SP(5, 4)
    cos, sin = angles.cos().float(), angles.sin().float()
    out = apply_rotary(x, cos, sin)
    assert out.dtype == dtype
    assert torch.equal(out, apply_rotary(x.float(), cos, sin).to(dtype))


def test_strided_input_gives_the_same_bits():
    x = torch.randn(2, 3, 5, 8)
    angles = angles_SP(5, 4)
    tables = angles.cos().float(), angles.sin().float()
    assert torch.equal(apply_rotary(x.transpose(1, 2), *tables), apply_rotary(x.transpose(1, 2).contiguous(), *tables))


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


@pytest.mark.parametrize(("cos_shape", "sin_shape"), [((4, 2), (4, 2)), ((5, 5), (5, 5)), ((5, 2), (5, 1))])
def test_tables_that_do_not_fit_are_refused(cos_shape, sin_shape):
    with pytest.raises(ValueError, match=r"do not fit x|positions; x has"):
        apply_rotary(torch.zeros(1, 5, 1, 8), torch.zeros(cos_shape), torch.zeros(sin_shape))
