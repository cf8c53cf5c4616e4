"""The checks that are meant for a GPU: all pass on the CPU, and each notices a kernel that is wrong."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from ava_kernels import Routing

from bench import check

pytestmark = pytest.mark.usefixtures("small_and_seeded")


def outcomes(name):
    return list(check.run_group(name, "cpu", True, check.dtypes_of("cpu")))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", check.GROUPS)
def test_all_kernels_are_right(monkeypatch, name, backend):
    if backend == "triton":
        pytest.importorskip("triton")
    monkeypatch.setenv("AVA_KERNELS_BACKEND", backend)
    most = 4 if (name, backend) == ("routing", "triton") else None  # slow in the interpreter, and tested elsewhere
    found = list(itertools.islice(check.run_group(name, "cpu", True, check.dtypes_of("cpu")), most))
    assert [case for case in found if not case["ok"]] == []
    assert found


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", ["moe_mlp", "rotary", "attention"])
def test_tensors_that_reach_far_are_checked_where_there_is_room(monkeypatch, name, backend):
    if backend == "triton":
        pytest.importorskip("triton")
    monkeypatch.setenv("AVA_KERNELS_BACKEND", backend)
    monkeypatch.setattr(check, "FAR", 2**20)
    monkeypatch.setattr(check, "has_room_for_far", lambda *_: True)
    cases = check.GROUPS[name]("cpu", True, check.dtypes_of("cpu"))
    (run,) = (run for case, run in cases if "far" in case or "more than" in case)
    run()
    spread = check.far(torch.arange(30.0).view(2, 5, 3), 1)
    assert spread.stride() == (3, 2**18, 1)
    assert torch.equal(spread, torch.arange(30.0).view(2, 5, 3))


def shifted(function):
    """The same results, the last number of the first one wrong, but for the exact ones in float64."""

    def run(*args, **kwargs):
        found = function(*args, **kwargs)
        first = found if isinstance(found, torch.Tensor) else found[0]
        if first.numel() and first.dtype != torch.float64:
            first = first.clone()
            first.view(-1)[-1] += 1
        return first if isinstance(found, torch.Tensor) else (first, *found[1:])

    return run


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("counting_sort", "counting_sort"),
        ("rows", "sum_rows"),
        ("moe_mlp", "moe_mlp"),
        ("grouped_mm", "grouped_mm"),
        ("rotary", "apply_rotary"),
        ("attention", "rope_attention"),
    ],
)
def test_one_wrong_number_is_noticed(monkeypatch, name, function):
    monkeypatch.setattr(check, function, shifted(getattr(check, function)))
    found = outcomes(name)
    right = [case["case"] for case in found if case["ok"]]
    assert all("T 0," in case or case.startswith("0 keys") for case in right)
    assert len(right) < len(found)


def test_a_wrong_choice_is_noticed(monkeypatch):
    route = check.route

    def swapped(logits, top_k, **options):
        found = route(logits, top_k, **options)
        if logits.dtype == torch.float64:
            return found
        return Routing(**{**vars(found), "expert": found.expert.flip(1)})

    monkeypatch.setattr(check, "route", swapped)
    assert not any(case["ok"] for case in outcomes("routing"))


def test_other_bits_the_second_time_are_noticed(monkeypatch):
    function, calls = check.moe_mlp, []

    def noisy(*args, **options):
        calls.append(1)
        return function(*args, **options) * (1 + 2.0**-20 * (len(calls) % 2))

    monkeypatch.setattr(check, "moe_mlp", noisy)
    assert "other bits" in outcomes("moe_mlp")[0]["error"]


def test_an_exception_is_one_failed_case_and_a_lost_device_ends_the_group(monkeypatch):
    for message, cases in (("no registers left", 12), ("CUDA error: an illegal memory access was encountered", 1)):

        def broken(*args, message=message, **kwargs):
            raise RuntimeError(message)

        monkeypatch.setattr(check, "grouped_mm", broken)
        found = outcomes("grouped_mm")
        assert [case["ok"] for case in found] == [False] * cases
        assert message in found[0]["error"]


@pytest.mark.parametrize("load", check.LOADS[:3])
def test_loads_are_what_they_are_called(load):
    T, E, K = 512, 16, 4
    expert = check.logits_of(load, T, E, K, "cpu").topk(K).indices
    count = torch.bincount(expert.flatten(), minlength=E)
    heaviest = count.max() * E / (T * K)
    assert {"even": heaviest == 1, "zipf": 1.5 < heaviest < 3, "one": count.max() == T}[load]


def test_the_command_writes_one_line_a_case(tmp_path, monkeypatch, capsys):
    path = tmp_path / "cases.jsonl"
    arguments = [
        "check",
        "--device",
        "cpu",
        "--tiny",
        "--only",
        "grouped_mm",
        "--dtype",
        "float32",
        "--json",
        str(path),
    ]
    monkeypatch.setattr("sys.argv", arguments)
    assert check.main() == 0
    cases = [json.loads(line) for line in path.read_text().splitlines()]
    assert [case["ok"] for case in cases] == [True] * 6
    monkeypatch.setattr(check, "grouped_mm", shifted(check.grouped_mm))
    assert check.main() == 1
    assert "FAILED" in capsys.readouterr().out
