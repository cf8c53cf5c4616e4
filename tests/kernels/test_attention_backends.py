"""Which implementation of attention is taken on a GPU: what a table says. No GPU is needed to choose one."""

from __future__ import annotations

import json

import pytest
import torch
from ava_kernels import rope_attention, tiles
from ava_kernels.attention import op
from torch._subclasses import FakeTensorMode

pytest.importorskip("triton")
from ava_kernels import hopper


@pytest.fixture(autouse=True)
def on_a_hopper(monkeypatch, tmp_path):
    monkeypatch.setenv("AVA_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(tiles, "capability", lambda device: (9, 0))
    monkeypatch.setattr(hopper, "_has_capability_9", lambda index: True)
    monkeypatch.setattr(op, "runs_on_triton", lambda q: True)
    tiles.forget()
    yield
    tiles.forget()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "hopper"),
        ({"return_lse": True, "softcap": 5.0}, "hopper"),
        ({"D": 36}, "sdpa"),  # rows that TMA cannot fetch
        ({"D": 36, "deterministic": True}, "triton"),
        ({"D": 32}, "triton"),  # "any"
        ({"causal": False}, "triton"),
        ({"window_size": (4, 0)}, "triton"),  # the table's only one has no windows
    ],
)
def test_the_first_in_the_table_that_has_what_is_asked_for(monkeypatch, tmp_path, options, expected):
    table = {"16 bit, 64, causal": ["hopper", "sdpa"], "16 bit, 64, window": ["sdpa"], "any": ["triton"]}
    (tmp_path / "tiles.json").write_text(json.dumps({"sm_90": {"attention": table}}))
    ran = []
    kernels = op.attention
    monkeypatch.setattr(op, "attention", lambda *a: ran.append("hopper" if a[-1] else "triton") or kernels(*a))
    monkeypatch.setattr(op.sdpa, "attention", lambda q, *_: ran.append("sdpa") or q)
    with FakeTensorMode():
        q = torch.empty(1, 16, 2, options.pop("D", 64), dtype=torch.float16, device="cuda")
        out = rope_attention(q, q, q, **options)
    assert ran == [expected]
    assert (out[0] if isinstance(out, tuple) else out).shape == q.shape


def test_a_name_that_is_no_implementation(tmp_path):
    (tmp_path / "tiles.json").write_text('{"sm_90": {"attention": {"any": ["cudnn"]}}}')
    with FakeTensorMode():
        q = torch.empty(1, 16, 2, 64, dtype=torch.float16, device="cuda")
        with pytest.raises(ValueError, match=r"is no table.*\['cudnn'\] are not some of triton, hopper, sdpa"):
            rope_attention(q, q, q)


def test_what_ships_is_sdpa_and_triton_for_the_rest():
    for problem in ("16 bit, 128, causal", "32 bit, 64, packed"):
        assert op._order(0, problem) == ("sdpa", "triton")


@pytest.mark.skipif(
    torch.version.cuda is not None and not torch.cuda.is_available(),
    reason="a torch that was built for CUDA asks the driver how it would attend",
)
def test_torch_compile_chooses_once_and_follows_into_one_graph():
    def attend(q):
        return rope_attention(q, q, q), rope_attention(q, q, q, softcap=5.0), rope_attention(q, q, q, backend="hopper")

    with FakeTensorMode(allow_non_fake_inputs=True):
        q = torch.empty(1, 16, 2, 64, dtype=torch.float16, device="cuda")
        graph = torch._dynamo.export(attend, aten_graph=False, assume_static_by_default=True)(q).graph_module.graph
    calls = [node for node in graph.nodes if "attention" in str(node.target) and node.op == "call_function"]
    ours = [node.args[-1] for node in calls if "ava_kernels" in str(node.target)]
    assert ours == [False, True]  # softcap by Triton, the other by Hopper's
    assert any("scaled_dot_product_attention" in str(node.target) for node in calls)
