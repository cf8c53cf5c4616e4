"""What the guard times on a CPU: each of our operations and paths beside a peer, small enough for every change.

`PAIRS` names a function that prepares ours and the peer, each a call without arguments. The peers are the benchmarks'
own. One thread: the guard counts the processor's seconds, and threads that wait for each other use some up.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from ava_kernels import grad_stats, route

from bench import attention, expert_peers, gradients, loss, norm, rotary, routing

Action = Callable[[], object]
PAIRS: dict[str, Callable[[], Iterator[tuple[Action, Action]]]] = {}


def pair(name: str) -> Callable[[Callable[[], Iterator[tuple[Action, Action]]]], None]:
    def add(prepare: Callable[[], Iterator[tuple[Action, Action]]]) -> None:
        PAIRS[name] = prepare

    return add


@contextmanager
def prepared(name: str) -> Iterator[tuple[Action, Action]]:
    """Ours and the peer's of one pair, ready to be called, as long as this lasts."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ready = PAIRS[name]()
    try:
        yield next(ready)
    finally:
        ready.close()  # type: ignore[attr-defined]  # a generator
        torch.set_num_threads(threads)


@pair("gradient statistics / _foreach_norm")
def _gradients() -> Iterator[tuple[Action, Action]]:
    tensors = gradients.make_tensors(4_000_000, 100, torch.float32, "cpu")
    yield (lambda: grad_stats(tensors)), (lambda: gradients.foreach(tensors))


@pair("routing / softmax, top-k, sort")
def _routing() -> Iterator[tuple[Action, Action]]:
    logits, upstream = torch.randn(4096, 64), torch.randn(4096, 8)

    def step(weights: Callable[[torch.Tensor], torch.Tensor]) -> None:
        weights(logits.detach().requires_grad_()).backward(upstream)

    ours = functools.partial(step, lambda x: route(x, 8).weight)
    yield ours, functools.partial(step, lambda x: routing.composition(x, 8)[0])


@pair("experts / grouped_mm")
def _experts() -> Iterator[tuple[Action, Action]]:
    problem = expert_peers.make_problem(1024, 256, 64, 64, 8, "zipf", "cpu", torch.float32)

    def both_ways(contender: expert_peers.Contender) -> None:
        contender.backward(contender.forward(problem.x), [problem.x, *contender.leaves])

    ours, peer = expert_peers.ours(problem), expert_peers.composition(problem)
    yield functools.partial(both_ways, ours), functools.partial(both_ways, peer)


@pair("attention / plain rotation, SDPA")
def _attention() -> Iterator[tuple[Action, Action]]:
    size = attention.Size(2, 256, 8, 2, 64, "causal")
    problem = attention.make_problem(size, "cpu", torch.float32)
    ours, peer = attention.contenders("cpu", "causal").values()
    run = functools.partial(attention.results_of, problem=problem, size=size, dtype=torch.float32)
    yield functools.partial(run, ours), functools.partial(run, peer)


@pair("rotary / plain rotation")
def _rotary() -> Iterator[tuple[Action, Action]]:
    size = attention.Size(4, 512, 8, 2, 64, "causal")
    problem = attention.make_problem(size, "cpu", torch.float32)
    ours, plain = (rotary.action(rotate, problem, size) for rotate in rotary.CONTENDERS.values())
    yield ours, plain


@pair("norm / F.rms_norm")
def _norm() -> Iterator[tuple[Action, Action]]:
    """Tensors of 32 MB have new pages every time. Smaller ones do or do not, and the ratio has two levels."""
    problem = norm.problem_of(norm.Size(16384, 512, "alone"), "cpu", torch.float32)
    ours, peer = (functools.partial(norm.with_sum, one) for one in (norm.rms_norm, norm.by_torch))
    yield functools.partial(norm.results_of, ours, *problem), functools.partial(norm.results_of, peer, *problem)


@pair("loss / linear, cross_entropy")
def _loss() -> Iterator[tuple[Action, Action]]:
    problem = loss.problem_of(loss.Size(1024, 128, 4096), "cpu", torch.float32)
    yield (lambda: loss.results_of(loss.ours, *problem)), (lambda: loss.results_of(loss.plain, *problem))


@pair("loader / rows of a file")
def _loader() -> Iterator[tuple[Action, Action]]:
    """The peer copies as many rows, one behind the other, and knows no order."""
    from ava_fast.data.loader import TokenLoader
    from bench.loader import write_random

    rows, length = 16, 512
    with tempfile.TemporaryDirectory() as folder:
        write_random(Path(folder), 1_000_000)
        loader = TokenLoader(Path(folder), max_length=length, batch_size=rows, seed=0)
        tokens = np.memmap(Path(folder) / "train" / "00000.bin", np.uint16, "r")
        starts = np.arange(rows)[:, None] * length + np.arange(length + 1)

        def read() -> None:
            found = torch.from_numpy(tokens[starts].astype(np.int64))
            found[:, :-1].contiguous(), found[:, 1:].contiguous()

        def many(action: Action) -> None:
            for _ in range(100):
                action()

        yield functools.partial(many, loader.next_batch), functools.partial(many, read)


@pair("training step / transformers' Mixtral")
def _training_step() -> Iterator[tuple[Action, Action]]:
    from bench import training_step  # imports transformers, which takes seconds

    size = training_step.SIZES["demo"]
    known = training_step.contenders(training_step.config_of(size), size["batch"])
    select, peer = known["transformers grouped_mm"]
    select()
    yield known["ava-fast"][1], peer
