"""Gradient statistics and clipping against float64 formulas; the extension and plain PyTorch are held to the same."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from ava_kernels import GradStats, clip_, clip_coefficient, grad_stats
from ava_kernels.gradients import op, reference
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("small_and_seeded")

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
CHUNK = 65536  # as in csrc/grad_stats.h
NAN, INF = float("nan"), float("inf")


@pytest.fixture(params=["torch", "extension"])
def backend(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setenv("AVA_KERNELS_BACKEND", "torch")
    else:
        request.getfixturevalue("extension")
    return request.param


def test_a_large_tensor_is_gone_through_in_pieces(monkeypatch):
    """Views of it, in plain PyTorch: each element once, in any layout."""
    monkeypatch.setenv("AVA_KERNELS_BACKEND", "torch")
    monkeypatch.setattr(reference, "PIECE", 10)
    around = torch.randn(12, 9, 14)
    tensors = [torch.randn(33), torch.randn(9, 5).mT, around[2:9, ::2, 1:13], torch.randn(10), torch.randn(2, 0)]
    tensors[2][3, 2, 5], tensors[1][0, 1] = NAN, -7.0
    for t in tensors:
        pieces = reference._pieces(t)
        assert sum(piece.numel() for piece in pieces) == t.numel()
        assert all(piece._base is t or piece is t or piece._base is t._base for piece in pieces)
    check(tensors, grad_stats(tensors, per_tensor=True))
    tensors[2][3, 2, 5] = 0.5
    expected = [t * 0.25 for t in tensors]
    clip_(tensors, torch.tensor(0.25))
    assert same_bits(tensors, expected)


@pytest.fixture
def extension(monkeypatch):
    monkeypatch.delenv("AVA_KERNELS_BACKEND", raising=False)
    if op._load():
        pytest.skip(op._load())


def same_bits(a, b):
    pairs = [(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8)) for x, y in zip(a, b, strict=True)]
    return all(torch.equal(x, y) for x, y in pairs)


def as_tuple(stats: GradStats):
    found = (stats.norm, stats.max_abs, stats.nonfinite, stats.first_nonfinite)
    each = (stats.tensor_norm, stats.tensor_max_abs, stats.tensor_nonfinite)
    return [t.reshape(-1) for t in (*found, *each) if t is not None]


def check(tensors, stats):
    """Against float64, one tensor at a time, to one rounding of the result's type."""
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    rtol = 2.0**-23 if dtype == torch.float32 else 1e-14
    values = [t.double().numpy().reshape(-1) for t in tensors]
    counts = [int((~np.isfinite(v)).sum()) for v in values]
    norms = [math.sqrt(math.fsum(v * v)) if not c else sum(v * v) ** 0.5 for v, c in zip(values, counts, strict=True)]
    largest = [float(np.abs(v).max(initial=0)) for v in values]  # numpy's max is NaN if a value is
    norm = float(np.linalg.norm(np.array(norms)))
    expected = (norm, np.array(largest).max(), sum(counts), next((i for i, c in enumerate(counts) if c), -1))
    found = (stats.norm, stats.max_abs, stats.nonfinite, stats.first_nonfinite)
    for value, wanted, kind in zip(found, expected, (dtype, dtype, torch.int64, torch.int64), strict=True):
        wanted = torch.tensor(wanted, dtype=torch.float64).to(kind)
        assert value.shape == ()
        torch.testing.assert_close(value, wanted, rtol=rtol, atol=2.0**-149, equal_nan=True)
    if stats.tensor_norm is not None:
        torch.testing.assert_close(
            stats.tensor_norm, torch.tensor(norms, dtype=dtype), rtol=rtol, atol=2.0**-149, equal_nan=True
        )
        torch.testing.assert_close(
            stats.tensor_max_abs, torch.tensor(largest, dtype=dtype), rtol=0, atol=0, equal_nan=True
        )
        assert stats.tensor_nonfinite.tolist() == counts


SIZES = st.one_of(st.integers(0, 70), st.sampled_from([CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 17]))


@st.composite
def tensor_lists(draw):
    tensors = []
    for _ in range(draw(st.integers(1, 6))):
        dtype, size = draw(st.sampled_from(DTYPES)), draw(SIZES)
        scale = draw(st.sampled_from([1.0, 1e-3, 60.0] if dtype == torch.float16 else [1.0, 1e-30, 1e30]))
        x = (torch.randn(size, dtype=torch.float64) * scale).to(dtype)
        match draw(st.sampled_from(["whole", "transposed", "strided", "shifted", "expanded", "scalar"])):
            case "transposed":
                x = x[: size // 3 * 3].view(3, -1, 1).permute(2, 1, 0)
            case "strided":
                x = x[: size // 4 * 4].view(-1, 4)[::2, 1:3]
            case "shifted":
                x = x[1:]
            case "expanded":
                x = x[:50].expand(3, -1)
            case "scalar":
                x = (torch.randn(()) * scale).to(dtype)
        if x.numel() and draw(st.booleans()) and x.stride() and 0 not in x.stride():
            index = draw(st.integers(0, x.numel() - 1))
            x[np.unravel_index(index, x.shape)] = draw(st.sampled_from([NAN, INF, -INF, 0.0]))
        tensors.append(x)
    return tensors


@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("name", ["torch", "extension"])
def test_equals_float64(name, per_tensor, request, monkeypatch):
    if name == "torch":
        monkeypatch.setenv("AVA_KERNELS_BACKEND", "torch")
    else:
        request.getfixturevalue("extension")

    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(tensor_lists())
    def run(tensors):
        check(tensors, grad_stats(tensors, per_tensor=per_tensor))

    run()


@pytest.mark.parametrize(
    ("values", "norm", "max_abs"),
    [([1.0, NAN, INF], NAN, NAN), ([INF, 1.0, 2.0], INF, INF), ([3.0, -INF, 4.0], INF, INF), ([NAN, 0, 0], NAN, NAN)],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_non_finite_values_are_counted_and_found(backend, dtype, values, norm, max_abs):
    x = torch.zeros(CHUNK + 40, dtype=dtype)
    x[CHUNK + 36 : CHUNK + 39] = torch.tensor(values, dtype=dtype)
    x[3] = values[1]
    count = sum(not math.isfinite(v) for v in [*values, values[1]])
    stats = grad_stats([torch.ones(5), torch.zeros(0), x, x], per_tensor=True)
    np.testing.assert_equal([stats.norm.item(), stats.max_abs.item()], [norm, max_abs])
    assert (stats.nonfinite.item(), stats.first_nonfinite.item()) == (2 * count, 2)
    assert stats.tensor_nonfinite.tolist() == [0, 0, count, count]
    assert stats.tensor_norm[0].item() == pytest.approx(5**0.5)


@pytest.mark.parametrize("value", [1e30, 1e-30, 2.0**-149, 2.0**-126, torch.finfo(torch.float32).max / 4])
def test_neither_overflows_nor_vanishes(backend, value):
    stats = grad_stats([torch.full((5, 2), value), torch.full((6,), -value)])
    assert stats.norm.item() == np.float32(4 * np.float64(np.float32(value)))
    assert stats.max_abs.item() == np.float32(value)
    assert stats.nonfinite.item() == 0


def test_a_norm_beyond_float32_is_infinite_though_no_value_is(backend):
    stats = grad_stats([torch.full((4,), 3e38)])
    assert (stats.norm.item(), stats.nonfinite.item()) == (INF, 0)
    assert clip_coefficient(stats, 1.0).item() == 1.0


def test_every_half_is_read_right(extension):
    """All 65,536 bit patterns of both 16-bit types, one a tensor."""
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype)
        for part in x.split(8192):
            stats = grad_stats(list(part.split(1)), per_tensor=True)
            assert torch.equal(stats.tensor_nonfinite, (~part.isfinite()).long())
            torch.testing.assert_close(stats.tensor_max_abs, part.float().abs(), rtol=0, atol=0, equal_nan=True)
            torch.testing.assert_close(stats.tensor_norm, part.float().abs(), rtol=0, atol=0, equal_nan=True)


def test_ten_thousand_tensors(backend):
    tensors = list(torch.randn(30_000).split(3))
    tensors[7777] = torch.tensor([1.0, INF])
    check(tensors, grad_stats(tensors, per_tensor=True))


def test_any_number_of_threads_gives_the_same_bits(extension):
    tensors = [torch.randn(size).to(dtype) for size in (1, 7, 300_000, 65_537) for dtype in DTYPES]
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        clipped = [t.clone() for t in tensors]
        clip_(clipped, torch.tensor(0.3))
        found.append([*as_tuple(grad_stats(tensors, per_tensor=True)), *clipped])
    assert same_bits(found[0], found[1])
    assert same_bits(found[0], found[2])


def test_more_than_two_to_the_31_elements(extension):
    """Untouched pages of zeros take no memory, so 4 GiB of them can be read."""
    size = 2**31 + 70_000
    zeros = torch.from_numpy(np.zeros(size, dtype=np.float16))
    zeros[-1] = 3.0
    zeros[2**31 + 5] = -4.0
    torch.set_num_threads(2)
    stats = grad_stats([torch.zeros(1), zeros])
    assert (stats.norm.item(), stats.max_abs.item(), stats.nonfinite.item()) == (5.0, 4.0, 0)


def test_an_empty_list_and_empty_tensors(backend):
    for tensors in ([], [torch.zeros(0), torch.zeros(3, 0, 2)]):
        stats = grad_stats(tensors, per_tensor=True)
        assert [t.tolist() for t in as_tuple(stats)[:4]] == [[0.0], [0.0], [0], [-1]]
        assert stats.tensor_norm.tolist() == [0.0] * len(tensors)
        clip_(tensors, torch.tensor(0.5))
    assert grad_stats([]).tensor_norm is None
    assert grad_stats([torch.ones(1)]).tensor_nonfinite is None


def test_the_op_is_sound():
    tensors = [torch.randn(3, 4).to(dtype) for dtype in DTYPES] + [torch.randn(4, 6)[:, ::2]]
    for per_tensor in (False, True):
        torch.library.opcheck(torch.ops.ava_kernels.grad_stats.default, (tensors, per_tensor))
        torch.library.opcheck(torch.ops.ava_kernels.grad_stats.default, (tensors[2:4], per_tensor))
    torch.library.opcheck(torch.ops.ava_kernels.clip_.default, (tensors, torch.tensor(0.5)))


def test_it_compiles_whole(backend):
    def step(tensors):
        stats = grad_stats(tensors, per_tensor=True)
        clip_(tensors, clip_coefficient(stats, 0.5))
        clip_(tensors, 0.3)
        return [*as_tuple(stats), tensors[0] + 1]

    eager, traced = ([torch.randn(5, generator=torch.Generator().manual_seed(1)) for _ in range(2)] for _ in range(2))
    expected = step(eager)
    assert same_bits(torch.compile(step, backend="aot_eager", fullgraph=True)(traced), expected)
    assert same_bits(eager, traced)


def test_tensors_without_memory_give_results_without(backend):
    tensors = [torch.ones(3, device="meta"), torch.ones(2, dtype=torch.float64, device="meta")]
    stats = grad_stats(tensors, per_tensor=True)
    assert [t.device.type for t in as_tuple(stats)] == ["meta"] * 7
    assert (stats.norm.dtype, stats.nonfinite.dtype, stats.tensor_norm.shape) == (torch.float64, torch.int64, (2,))
    clip_(tensors, clip_coefficient(stats, 1.0))
    clip_(tensors, 0.5)


def test_any_iterable_will_do(backend):
    tensors = {"a": torch.tensor([3.0]), "b": torch.tensor([-4.0])}
    for several in (tensors.values(), tuple(tensors.values()), (t for t in tensors.values())):
        assert grad_stats(several).norm.item() == 5.0
    clip_((t for t in tensors.values()), torch.tensor(0.5))
    clip_(tensors.values(), torch.tensor(0.5))
    assert [t.item() for t in tensors.values()] == [0.75, -1.0]
    assert grad_stats(t for t in ()).norm.item() == 0.0


def test_gradients_of_parameters_are_fine_as_they_are(backend):
    parameter = torch.nn.Parameter(torch.ones(4))
    version = parameter._version
    stats = grad_stats([parameter])
    assert not stats.norm.requires_grad
    clip_([parameter], clip_coefficient(stats, 1.0))
    assert parameter._version > version  # autograd notices if it had kept the old values
    assert parameter.norm().item() == pytest.approx(1.0)


def test_what_cannot_be_is_refused_by_name():
    one, meta = torch.ones(1), torch.ones(1, device="meta")
    with pytest.raises(ValueError, match=r"tensors\[2\] is on meta, tensors\[0\] on cpu"):
        grad_stats([one, one, meta])
    with pytest.raises(ValueError, match=r"tensors\[1\] is torch.int64"):
        grad_stats([one, torch.ones(1, dtype=torch.int64)])
    with pytest.raises(ValueError, match=r"tensors\[0\] is torch.float32, torch.sparse_coo; it must be strided"):
        clip_([one.to_sparse()], torch.tensor(1.0))
    with pytest.raises(ValueError, match="coefficient is on cpu, the tensors on meta"):
        clip_([meta], torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"coefficient is torch.float32 of shape \(1,\)"):
        clip_([one], torch.ones(1))
    for number in (None, "0.5"):
        with pytest.raises(ValueError, match=f"coefficient is {number!r}; it must be a number, or a tensor of one"):
            clip_([one], number)
    for function in (grad_stats, lambda given: clip_(given, 1.0)):
        with pytest.raises(ValueError, match=r"tensors\[1\] is None: leave out parameters that have no gradient"):
            function([one, None, one])
        with pytest.raises(ValueError, match=r"tensors\[0\] is None"):
            function([None, one])
        with pytest.raises(ValueError, match=r"tensors\[0\] is 1.0; it must be a tensor"):
            function([1.0])
        with pytest.raises(ValueError, match=r"tensors is one tensor of shape \(4, 2\); it must be a list of them"):
            function(torch.ones(4, 2))
    for max_norm in (0, -1.0, NAN, None, "1"):
        with pytest.raises(ValueError, match=f"max_norm is {max_norm!r}; it must be a number above 0"):
            clip_coefficient(grad_stats([one]), max_norm)


def test_a_tensor_whose_elements_share_memory_cannot_be_clipped(backend):
    one = torch.ones(1)
    for expanded in (one.expand(4), one.expand(3, 2), torch.ones(2, 1, 3).expand(2, 5, 3)):
        with pytest.raises(ValueError, match=r"tensors\[1\] is expanded, .* its elements share memory"):
            clip_([one, expanded], 0.5)
    assert one.item() == 1.0
    strided = torch.ones(4).as_strided((1, 2), (0, 2))
    clip_([one.expand(1, 1), strided, torch.ones(0).expand(2, 0)], 0.5)
    assert [one.item(), *strided[0].tolist()] == [0.5] * 3


def test_an_unknown_backend_is_refused(monkeypatch):
    monkeypatch.setenv("AVA_KERNELS_BACKEND", "pytorch")
    with pytest.raises(ValueError, match="AVA_KERNELS_BACKEND is 'pytorch'"):
        grad_stats([torch.ones(1)])


# --- clipping ---


@pytest.mark.parametrize("max_norm", [0.1, 3.0, 1e9, INF])
def test_clips_as_torch_does(backend, max_norm):
    parameters = [torch.nn.Parameter(torch.zeros(n)) for n in (5, 300, 1)]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    ours = [parameter.grad.clone() for parameter in parameters]
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    stats = grad_stats(ours)
    torch.testing.assert_close(stats.norm, norm, rtol=2.0**-22, atol=0)
    clip_(ours, clip_coefficient(stats, max_norm))
    for mine, parameter in zip(ours, parameters, strict=True):
        torch.testing.assert_close(mine, parameter.grad, rtol=2.0**-22, atol=0)


@pytest.mark.parametrize("norm", [NAN, INF])
def test_a_step_that_is_not_finite_is_left_as_it_is(backend, norm):
    tensors = [torch.tensor([1.0, norm, 2.0])]
    coefficient = clip_coefficient(grad_stats(tensors), 0.5)
    assert coefficient.item() == 1.0
    clip_(tensors, coefficient)
    np.testing.assert_equal(tensors[0].tolist(), [1.0, norm, 2.0])


@pytest.mark.parametrize("factor", [0.3, 1e-6, 1 / 3, 1.7])
def test_products_are_rounded_once(backend, factor):
    """Every 16-bit value, and strides of all kinds."""
    halves = torch.arange(65536, dtype=torch.int32).to(torch.uint16)
    coefficient = torch.tensor(factor)
    tensors = [halves.clone().view(torch.float16), halves.view(torch.bfloat16), torch.randn(7, 5)]
    tensors += [torch.randn(1001)[1:], torch.randn(6, 8)[::2, 1::3], torch.randn(9, 4).T, torch.randn(())]
    tensors += [torch.zeros(0), torch.randn(9).double()]
    expected = []
    for t in tensors:
        work = torch.promote_types(t.dtype, torch.float32)
        expected.append((t.to(work) * coefficient.to(work)).to(t.dtype))
    around = tensors[4]._base.clone()
    clip_(tensors, coefficient)
    for t, wanted in zip(tensors, expected, strict=True):
        torch.testing.assert_close(t, wanted, rtol=0, atol=0, equal_nan=True)
    around[::2, 1::3] = expected[4]
    assert torch.equal(tensors[4]._base, around)  # what lies between the elements is untouched


def test_a_double_coefficient(backend):
    tensors = [torch.randn(40).to(dtype) for dtype in DTYPES]
    coefficient = torch.tensor(1 / 3, dtype=torch.float64)
    work = [torch.promote_types(t.dtype, torch.float32) for t in tensors]
    expected = [(t.to(w) * coefficient.to(w)).to(t.dtype) for t, w in zip(tensors, work, strict=True)]
    clip_(tensors, coefficient)
    assert same_bits(tensors, expected)


def test_a_number_as_coefficient(backend):
    tensors = [torch.randn(40).to(dtype) for dtype in DTYPES]
    expected = [t.clone() for t in tensors]
    clip_(expected, torch.tensor(1 / 3, dtype=torch.float64))
    clip_(tensors, 1 / 3)
    assert same_bits(tensors, expected)
    clip_(tensors, 0)
    assert not any(t.any() for t in tensors)


def test_a_coefficient_of_one_touches_nothing(extension):
    """A product, even by 1, would make these signalling NaNs quiet."""
    bits = torch.full((1000,), 0x7F800001, dtype=torch.int32)
    clip_([bits.view(torch.float32)], torch.tensor(1.0))
    assert (bits == 0x7F800001).all()
    clip_([bits.view(torch.float32)], torch.tensor(0.5))
    assert (bits == 0x7FC00001).all()
