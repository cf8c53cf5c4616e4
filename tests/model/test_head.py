"""The chunked loss against torch's own over whole logits: value, both gradients, ignored labels, precision, memory."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ava_fast.model import head as head_module
from ava_fast.model.head import Head

T, M, V = 37, 12, 29


def both(dtype: torch.dtype, labels: torch.Tensor, upstream: float = 1.0) -> list[tuple[torch.Tensor, ...]]:
    """(loss, dx, dweight) of ours in `dtype`, of torch's in `dtype` and in float64."""
    torch.manual_seed(0)
    x, weight = torch.randn(T, M, dtype=torch.float64), torch.randn(V, M, dtype=torch.float64)
    results = []
    for kind, precision in (("ours", dtype), ("torch", dtype), ("torch", torch.float64)):
        x_TM = x.to(dtype).to(precision).requires_grad_()
        head = Head(M, V).to(precision)
        head.weight.data = weight.to(dtype).to(precision)
        loss = head(x_TM, labels) if kind == "ours" else F.cross_entropy(head(x_TM).to(_wide(precision)), labels)
        (loss * upstream).backward()
        results.append((loss.detach(), x_TM.grad, head.weight.grad))
    return results


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


@pytest.fixture(params=[1, 100, 2**20], ids=lambda elements: f"chunk{elements}")
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(head_module.CHUNK_ELEMENTS, "cpu", request.param)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("upstream", [1.0, 0.25])
def test_loss_and_gradients_equal_torchs(dtype: torch.dtype, upstream: float) -> None:
    labels = torch.randint(V, (T,), generator=torch.Generator().manual_seed(1))
    labels[::5] = -100
    for mine, same_dtype, truth in zip(*both(dtype, labels, upstream), strict=True):
        allowed = 4 * (same_dtype.double() - truth).abs().max() + 1e-12
        if dtype == torch.bfloat16:  # a tensor's error may be nothing by luck; it is stored in 8 bits
            allowed = allowed + truth.abs().max() * 2**-8
        assert (mine.double() - truth).abs().max() <= allowed + truth.abs().max() * torch.finfo(_wide(dtype)).eps * 4


def test_nothing_scored_is_nan_as_in_torch() -> None:
    labels = torch.full((T,), -100)
    assert Head(M, V)(torch.randn(T, M), labels).isnan()
    assert F.cross_entropy(torch.randn(T, V), labels).isnan()


def test_large_logits_stay_finite() -> None:
    head = Head(M, V)
    x = (1e4 * torch.randn(T, M)).requires_grad_()
    head(x, torch.zeros(T, dtype=torch.int64)).backward()
    assert x.grad.isfinite().all()
    assert head.weight.grad.isfinite().all()


def test_no_tensor_holds_all_logits_and_no_gradient_is_made_without_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(head_module.CHUNK_ELEMENTS, "cpu", 4 * V)
    head, x = Head(M, V), torch.randn(T, M)
    labels = torch.zeros(T, dtype=torch.int64)

    class Sizes(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.products, self.largest = 0, 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            self.products += "mm" in str(func)
            if isinstance(result, torch.Tensor):
                self.largest = max(self.largest, result.numel())
            return result

    with Sizes() as trained:
        head(x.requires_grad_(), labels).backward()
    assert trained.largest < T * V
    with torch.no_grad(), Sizes() as evaluated:
        head(x, labels)
    assert evaluated.products == -(-T // 4)
    assert trained.products == 3 * evaluated.products
