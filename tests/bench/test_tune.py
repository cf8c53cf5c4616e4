"""The search for tiles, on interpreted kernels: which of them are fast does not matter here, but what becomes of it."""

from __future__ import annotations

import json
import os
import time
from itertools import islice

import gluon_on_cpu
import pytest
import torch
from ava_kernels import tiles
from ava_kernels.attention import hopper

from bench import tune

pytestmark = pytest.mark.usefixtures("small_and_seeded")


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """main(options) → exit code, and what was printed where; tiles are kept in tmp_path. A pass is timed by the
    processor time it takes: on a busy machine the clock may find many small tiles faster than a large one."""
    monkeypatch.setenv("AVA_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setenv("AVA_KERNELS_BACKEND", "triton")
    if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
        pytest.skip("Triton was told not to interpret")

    def processor_time(action, device):
        start = time.process_time()
        action()
        return time.process_time() - start

    monkeypatch.setattr(tune.machine, "timed", processor_time)

    def run(*options: str) -> tuple[int, str, str]:
        tiles.forget()
        monkeypatch.setattr("sys.argv", ["tune", *options])
        return tune.main(), *capsys.readouterr()

    yield run
    tiles.forget()


@pytest.fixture
def first_candidates(monkeypatch):
    """Only so many of them are tried."""

    def limit(count: int) -> None:
        for kind in (tune.Experts, tune.Attention):
            every = kind.candidates
            monkeypatch.setattr(kind, "candidates", lambda *asked, every=every: islice(every(*asked), count))

    return limit


def test_a_better_tile_is_kept_and_others_entries_stay(tmp_path, run, first_candidates):
    slow = [16, 16, 16, 4, 2, 8, 1]  # many small tiles: every candidate is faster in the interpreter
    entry = {"sm_90": {"up": {"2×128×32 float16": slow, "16 bit": slow}}}
    (tmp_path / "tiles.json").write_text(json.dumps(entry))
    first_candidates(1)
    code, out, err = run("experts", "--shapes", "8,128,32,2,1", "--dtype", "float16", "--runs", "1")
    assert code == 0, err
    assert "2×128×32 float16 up: " in out
    assert out.count("1 tried, 0 failed") == 4
    table = json.loads((tmp_path / "tiles.json").read_text())
    assert table["sm_90"]["up"]["2×128×32 float16"] != slow
    assert table["sm_90"]["up"]["16 bit"] == slow
    assert [path.name for path in tmp_path.iterdir()] == ["tiles.json"]


def test_attention_is_searched_kernel_by_kernel(tmp_path, run, first_candidates):
    """A problem that had its turn has no second one, and one that cannot run does not end the rest."""
    slow = [16, 16, 4, 1]
    entry = {"sm_90": {kernel: {"16 bit, 32": slow, "16 bit, 32, full": slow} for kernel in ("forward", "dkdv")}}
    (tmp_path / "tiles.json").write_text(json.dumps(entry))
    shapes = ["1,64,3,2,32,causal", "1,64,2,1,32,causal", "1,32,1,1,20,packed"]
    first_candidates(1)
    code, out, err = run("attention", "--shapes", *shapes, "--dtype", "float16", "--runs", "1")
    assert code == 1
    (line,) = err.splitlines()
    assert line.startswith("(1, 64, 3, 2, 32, 'causal'): ValueError: 3 query heads cannot share 2 key/value heads")
    for kernel in ("forward", "dkdv", "dq"):
        assert f"16 bit, 32, causal {kernel}: " in out
    assert "16 bit, 32, causal: (1, 32, 1, 1, 20, 'packed') has the tiles of (1, 64, 2, 1, 32, 'causal')" in out
    assert out.count("1 tried, 0 failed") == 3
    table = json.loads((tmp_path / "tiles.json").read_text())
    assert table["sm_90"]["forward"]["16 bit, 32, causal"] != slow
    assert table["sm_90"]["dkdv"]["16 bit, 32, causal"] != slow
    assert table["sm_90"]["dkdv"]["16 bit, 32, full"] == table["sm_90"]["forward"]["16 bit, 32"] == slow


def test_a_candidate_with_another_result_is_passed_over(run, monkeypatch):
    """Planted: one that leaves the last value out."""
    from ava_kernels.attention import kernels

    wrong, right = kernels.Tile(64, 128, 4, 1), kernels.Tile(64, 64, 4, 1)
    monkeypatch.setattr(tune.Attention, "candidates", lambda self, kernel: iter([wrong, right]))
    forward = kernels.forward

    def cut(q, k, v, *rest):
        if kernels.tile_for("forward", q, -1, -1) == wrong:
            v = v.clone()
            v[:, -1] = 0
        return forward(q, k, v, *rest)

    monkeypatch.setattr(kernels, "forward", cut)
    code, out, _ = run("attention", "--shapes", "1,32,1,1,16,full", "--dtype", "float32", "--runs", "2")
    assert code == 0
    assert "  forward (64, 128, 4, 1): WRONG RESULT" in out
    assert "2 tried, 1 failed" in out
    assert "full forward: (64, 128, 4, 1)" not in out


def test_a_problem_ends_when_time_is_up(run):
    code, out, _ = run("attention", "--shapes", "1,16,1,1,16,full", "--runs", "1", "--budget", "0")
    assert (code, out.splitlines()[0]) == (0, "the budget is spent; --budget gives more")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_candidates_have_the_shared_memory_and_hold_the_tile_that_ships(dtype):
    for D in (64, 128):
        problem = tune.Attention(tune.Size(1, 32, 1, 1, D, "causal"), dtype, "cpu")
        for kernel in problem.PASSES:
            found = list(problem.candidates(kernel))
            assert len(found) == len(set(found)) >= 8
            for BM, BN, _, stages in found:
                operands = {"forward": BM, "dq": 2 * BM, "dkdv": 2 * BN}[kernel]
                operands += 2 * stages * (BM if kernel == "dkdv" else BN)
                assert operands * D * dtype.itemsize <= 227 * 1024
            if dtype == torch.bfloat16:
                assert problem.tile_for(kernel) in found


def test_a_shape_of_another_operation_is_refused(run, capsys):
    for shape in ("8,128,32,2,1", "1,2,3,4,5,6", "1,2,3,4,causal"):
        with pytest.raises(SystemExit):
            run("attention", "--shapes", shape)
        expected = f"{shape} is no shape of attention; it must be B,S,H_q,H_kv,D,causal|full|packed"
        assert expected in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_what_is_missing_without_a_gpu(tmp_path, run, monkeypatch):
    monkeypatch.delenv("AVA_KERNELS_BACKEND")
    assert run("attention") == (2, "", "bench.tune needs a GPU, and torch finds none here\n")
    assert not list(tmp_path.iterdir())


def test_rings_of_hopper_are_searched(tmp_path, run, monkeypatch):
    """Its kernels run warp by warp on this CPU."""
    monkeypatch.setattr(hopper, "runs_on", lambda q: True)
    monkeypatch.setattr(tune.Hopper, "candidates", lambda self, kernel: iter([tune.attention_tiles.Ring(32, 3)]))
    slow = [16, 2]
    entry = {"sm_90": {kernel: {"16 bit, 32": slow} for kernel in tune.Hopper.PASSES}}
    (tmp_path / "tiles.json").write_text(json.dumps(entry))
    with gluon_on_cpu.emulated():
        code, out, err = run("hopper", "--shapes", "1,200,2,1,32,causal", "--dtype", "float16", "--runs", "1")
    assert code == 0, err
    for kernel in tune.Hopper.PASSES:
        assert f"16 bit, 32 {kernel}: " in out
    assert out.count("1 tried, 0 failed") == 3
    table = json.loads((tmp_path / "tiles.json").read_text())
    assert table["sm_90"]["hopper_forward"]["16 bit, 32"] in (slow, [32, 3])
