"""Times routing beside the composition that it replaces: torch's softmax, top-k, sort, bincount, cumsum and indexing.

    OMP_NUM_THREADS=2 python -m bench.routing            # on the GPU where there is one

From logits (T, E) to weights, experts, offsets and the order of the pairs by expert, and back to the gradient of the
logits; float32, softmax, normalised. Contenders take turns, so that a machine whose speed drifts slows all of them.
`ratio` is the composition's time over ours. The composition knows no capacity, so what capacity costs is given as a
share of our own time without: at 1.25 × the even load for `even` logits (standard normal) and `skewed` ones (and a
standard normal per expert).

On a GPU, results are first compared with the reference, and the bytes that logits and probabilities must move (8·T·E
each way) over the time are given as a share of what a copy of as many reaches.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch
from ava_kernels import route
from ava_kernels.routing import reference
from torch import Tensor

from bench import machine

TOKENS = 32768
SIZES = [(64, 8), (128, 8), (256, 8)]  # E, K


def composition(logits: Tensor, top_k: int) -> tuple[Tensor, ...]:
    """→ weight, expert, offsets, token, slot"""
    probs = logits.softmax(-1)
    weight, expert = probs.topk(top_k, dim=-1)
    weight = weight / weight.sum(-1, keepdim=True)
    order = expert.flatten().sort(stable=True).indices
    ends = torch.bincount(expert.flatten(), minlength=logits.shape[1]).cumsum(0)
    offsets = torch.cat([ends.new_zeros(1), ends])
    return weight, expert, offsets, order // top_k, order % top_k


def main() -> None:
    parser = argparse.ArgumentParser(description="Times routing beside torch's softmax, top-k, sort and indexing.")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--budget", type=float, default=float("inf"), help="minutes; fewer runs if they need more")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for E, K in SIZES:
        row = _measure(options.tokens, E, K, device, options.runs, 60 * options.budget / len(SIZES))
        rows.append(row)
        print(f"{E} experts, {K} choices: {row['ratio']:.2f}× the composition", flush=True)
        for name, figures in row["contenders"].items():
            print(f"  {name:30} {figures['median_ms']:9.3f} ms  ({figures['q1_ms']:.3f} – {figures['q3_ms']:.3f})")
    print(machine.write(f"routing_{device}", {"tokens": options.tokens, "runs": options.runs, "sizes": rows}))


def _measure(T: int, E: int, K: int, device: str, runs: int, allotted: float) -> dict[str, Any]:
    torch.manual_seed(0)
    even = torch.randn(T, E, device=device)
    logits = {"even": even, "skewed": even + torch.randn(E, device=device)}
    dweight = torch.randn(T, K, device=device)
    capacity = -(-5 * T * K // (4 * E))
    if device == "cuda":
        for name, given in logits.items():
            _check(name, given, K, capacity)

    def step(find: Callable[[Tensor], Tensor], given: Tensor) -> None:
        leaf = given.detach().requires_grad_()
        find(leaf).backward(dweight)

    ours = functools.partial(route, top_k=K)
    contenders = {
        "composition": functools.partial(step, lambda x: composition(x, K)[0], logits["even"]),
        "ours": functools.partial(step, lambda x: ours(x).weight, logits["even"]),
    }
    for name, given in logits.items():
        for overflow in ("drop", "next_best"):
            contenders[f"ours, {name}, {overflow}"] = functools.partial(
                step, lambda x, overflow=overflow: ours(x, capacity=capacity, overflow=overflow).weight, given
            )
    if device == "cuda":
        source = torch.randn(2 * T, E, device=device)
        target = torch.empty_like(source)
        contenders["copy of the same bytes"] = lambda: target.copy_(source)
    seconds = machine.alternate(
        contenders, device, runs, label=f"{E} experts", allotted=allotted, before=machine.emptied_cache(device)
    )
    median = {name: statistics.median(times) for name, times in seconds.items()}
    row = {
        "experts": E,
        "top_k": K,
        "capacity": capacity,
        "bytes": 16 * T * E,
        "ratio": median["composition"] / median["ours"],
        "pair_ratios": machine.spread_of_ratios(seconds["composition"], seconds["ours"]),
        "cost_of_capacity": {
            name.removeprefix("ours, "): median[name] / median["ours"] - 1 for name in median if "ours, " in name
        },
        "contenders": {name: machine.spread(times) for name, times in seconds.items()},
    }
    if device == "cuda":
        row["share_of_copy_bandwidth"] = median["copy of the same bytes"] / median["ours"]
    return row


def _check(name: str, logits: Tensor, top_k: int, capacity: int) -> None:
    """The kernels' results on this GPU are the reference's."""
    for max_reroutes in (0, logits.shape[1]):
        for by_probability in (False, True):
            found = route(
                logits,
                top_k,
                capacity=capacity,
                max_reroutes=max_reroutes,
                priority="probability" if by_probability else "choice",
            )
            expected = reference.forward(
                logits, None, top_k, capacity, max_reroutes, by_probability, False, True, 1, 1, 1.0
            )
            case = f"{name} logits, {max_reroutes} reroutes, by probability: {by_probability}"
            different = int((found.expert != expected.expert).sum())
            # Two devices round scores differently, and so may serve near-equal ones in another order.
            if different > (found.expert.numel() // 1000 if by_probability else 0):
                raise RuntimeError(f"{case}: {different} of {found.expert.numel()} choices are not the reference's")
            if not different:
                for field in ("requested", "offsets", "token", "slot", "rerouted", "dropped"):
                    if not torch.equal(getattr(found, field), getattr(expected, field)):
                        raise RuntimeError(f"{case}: {field} is not the reference's")
                torch.testing.assert_close(found.weight, expected.weight, rtol=1e-5, atol=1e-7)


if __name__ == "__main__":
    main()
