"""Routing decided one request at a time in plain Python: what `ava_kernels.route` must decide.

Written from the description of routing alone (docs/routing.md, "Routing, exactly"), with lists and loops, so that a
reader can check it sentence by sentence. It is given the scores that the tested implementation computed, and adds to
them in the same precision: a score's last bit then never decides a comparison. Which scores are right is another test's
question.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np


class Decision(NamedTuple):
    """The fields of `Routing` that are decisions; T tokens, E experts, K choices."""

    expert: list[list[int]]  # T × K, −1 = dropped
    requested: list[int]  # E
    offsets: list[int]  # E + 1
    token: list[int]  # T·K
    slot: list[int]  # T·K
    rerouted: int
    dropped: int


def decide(
    logits,  # T rows of E floats
    scores,  # the same for the scores, as computed by the implementation under test
    experts,  # E: T may be 0
    top_k,
    *,
    capacity=None,
    overflow="next_best",
    priority="choice",
    max_reroutes=None,
    expert_bias=None,
    num_groups=None,
    group_top_k=None,
    number=np.float32,  # in which scores are added up
) -> Decision:
    tokens = len(logits)
    if overflow == "drop":
        max_reroutes = 0
    # What each token has not asked yet, best first. Its K best are its requests, slot 0 the best.
    candidates = [
        ranking(logits[t], scores[t], expert_bias, num_groups, group_top_k, number) if asks(logits[t]) else []
        for t in range(tokens)
    ]
    asked = {}  # (slot, token) → the expert that it asks now
    for token in range(tokens):
        for slot in range(top_k):
            if candidates[token]:
                asked[slot, token] = candidates[token].pop(0)
    first_asked = dict(asked)
    requested = [list(first_asked.values()).count(expert) for expert in range(experts)]

    held = {}  # (slot, token) → the expert that holds it
    load = [0] * experts
    pending = list(asked)
    reroutes = 0
    while pending:
        if priority == "choice":
            pending.sort()
        else:
            pending.sort(key=lambda request: (-scores[request[1]][asked[request]], request))
        rejected = []
        for request in pending:
            expert = asked[request]
            if capacity is None or load[expert] < capacity:
                held[request] = expert
                load[expert] += 1
            else:
                rejected.append(request)
        pending = []
        if reroutes == max_reroutes:
            break
        reroutes += 1
        for slot, token in sorted(rejected):  # a token's lower slot takes the better candidate
            if candidates[token]:
                asked[slot, token] = candidates[token].pop(0)
                pending.append((slot, token))

    by_expert = [
        sorted((token, slot) for (slot, token), holder in held.items() if holder == expert) for expert in range(experts)
    ]
    kept = [pair for pairs in by_expert for pair in pairs]
    dropped = [(t, k) for t in range(tokens) for k in range(top_k) if (k, t) not in held]
    return Decision(
        expert=[[held.get((k, t), -1) for k in range(top_k)] for t in range(tokens)],
        requested=requested,
        offsets=[sum(load[:expert]) for expert in range(experts + 1)],
        token=[token for token, _ in kept + dropped],
        slot=[slot for _, slot in kept + dropped],
        rerouted=sum(expert != first_asked[request] for request, expert in held.items()),
        dropped=len(dropped),
    )


def asks(row) -> bool:
    """Whether a token with these logits asks at all."""
    return not any(math.isnan(x) or x == math.inf for x in row) and any(x > -math.inf for x in row)


def ranking(row, scores, bias, num_groups, group_top_k, number) -> list[int]:
    """The experts that a token may ask, best first; ties go to the lower index."""
    experts = range(len(row))
    biased = [number(x) for x in scores]
    if bias is not None:
        # The range of finite numbers is not left, so that groups with a shut expert still compare; NaN shuts too.
        limits = np.finfo(number)
        for e in experts:
            b = number(-math.inf if math.isnan(bias[e]) else bias[e])
            biased[e] = min(max(biased[e] + b, limits.min), limits.max)
    if num_groups is not None:
        size = len(row) // num_groups
        members = [[e for e in experts if e // size == group] for group in range(num_groups)]
        worth = [number(0)] * num_groups
        for group in range(num_groups):
            for value in sorted((biased[e] for e in members[group]), reverse=True)[:2]:
                with np.errstate(over="ignore"):  # two shut experts are worth −Inf
                    worth[group] += value
        best = sorted(range(num_groups), key=lambda group: (-worth[group], group))[:group_top_k]
        experts = [e for group in best for e in members[group]]
    value = row if bias is None else biased
    return sorted(experts, key=lambda e: (-value[e], e))
