"""Serving requests under a capacity, in one persistent kernel: as many rounds as it takes, none of the host's business.

Every round has three phases, and the whole grid meets at a barrier after each:
    count and sum   how many requests each expert has from each block, as prefix sums in the order of service
    accept          a request whose rank at its expert is below the expert's room is held there
    move            a token's rejected requests take its next candidates, lower slots first
All programs of the grid must be resident at once, hence the cooperative launch. A row of counts is one slot of one
block of tokens, so that rows are in the order of service. With `BY_PROBABILITY` that order is by falling score: the
requests are first gathered by expert, and each expert finds the score at which it is full, digit by digit.

What one program writes and another reads passes through the second-level cache (".cg").
"""

from __future__ import annotations

import triton
import triton.language as tl

from ava_kernels.routing import ranking, sorting

SPAN: tl.constexpr = tl.constexpr(1024)  # requests of one expert that are read at a time


@triton.jit
def serve(
    logits_ptr,
    stride_t,
    stride_e,
    bias_ptr,
    probs_ptr,
    asked_ptr,  # (K, T): the expert that a request names in this round, −1 where it is not pending
    cursor_ptr,  # (T,): the key of the token's last candidate so far
    expert_ptr,  # (T, K): the expert that holds the request, −1 where none does
    count_ptr,  # (rows, E): a round's requests
    total_ptr,  # (E,): a round's requests
    room_ptr,  # (E,): what each expert can accept in a round
    left_ptr,  # (E,): and after it
    served_ptr,  # (K·T,): a round's requests by expert; with BY_PROBABILITY
    held_ptr,  # (held blocks, E): the pairs that each expert holds at the end, by block of HELD tokens
    pending_ptr,  # (max_reroutes + 1,): a round's requests, 0 at first
    rerouted_ptr,  # 0 at first
    arrivals_ptr,  # 0 at first
    T,
    E,
    top_k,
    num_groups,
    group_top_k,
    capacity,
    max_reroutes,
    programs,
    BY_PROBABILITY: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    BINS: tl.constexpr,
    K: tl.constexpr,
    B: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    HELD: tl.constexpr,
    HELD_P: tl.constexpr,
):
    program = tl.program_id(0)
    blocks = (T + B - 1) // B
    rows = blocks * top_k
    for block in range(program, blocks, programs):
        _count_asked(asked_ptr, count_ptr, block, blocks, T, E, top_k, BINS, B)
    barriers = 1
    _meet(arrivals_ptr, barriers * programs)

    round_ = 0
    pending = rows
    while pending > 0:
        for first in range(program * C, E, programs * C):
            total_C = sorting.prefix_sums(count_ptr, rows, first, E, C, ROWS)
            column_C = first + tl.arange(0, C)
            here_C = column_C < E
            left_C = tl.load(left_ptr + column_C, mask=here_C & (round_ > 0), other=0)
            room_C = tl.where(round_ > 0, left_C, capacity)
            tl.store(room_ptr + column_C, room_C, mask=here_C)
            tl.store(left_ptr + column_C, tl.maximum(room_C - total_C, 0), mask=here_C)
            tl.store(total_ptr + column_C, total_C, mask=here_C)
            tl.atomic_add(pending_ptr + round_, tl.sum(total_C, axis=0))
        barriers += 1
        _meet(arrivals_ptr, barriers * programs)

        pending = tl.load(pending_ptr + round_, cache_modifier=".cg").to(tl.int32)
        if pending > 0:
            accepted = 0
            if BY_PROBABILITY:
                for row in range(program, rows, programs):
                    _gather_by_expert(asked_ptr, count_ptr, total_ptr, served_ptr, row, blocks, T, E, BINS, B)
                barriers += 1
                _meet(arrivals_ptr, barriers * programs)
                for expert in range(program, E, programs):
                    accepted += _accept_best(
                        asked_ptr, expert_ptr, probs_ptr, total_ptr, room_ptr, served_ptr, expert, T, E, top_k, BINS
                    )
            else:
                for row in range(program, rows, programs):
                    accepted += _accept_first(
                        asked_ptr, expert_ptr, count_ptr, room_ptr, row, blocks, T, E, top_k, BINS, B
                    )
            if round_ > 0:
                tl.atomic_add(rerouted_ptr, tl.cast(accepted, tl.int64))
            barriers += 1
            _meet(arrivals_ptr, barriers * programs)

        round_ += 1
        pending = tl.where(round_ > max_reroutes, 0, pending)
        if pending > 0:
            for block in range(program, blocks, programs):
                _move(
                    logits_ptr,
                    stride_t,
                    stride_e,
                    bias_ptr,
                    probs_ptr,
                    asked_ptr,
                    cursor_ptr,
                    block,
                    T,
                    E,
                    top_k,
                    num_groups,
                    group_top_k,
                    HAS_BIAS,
                    GROUPS,
                    SIZE,
                    K,
                    B,
                    R,
                )
                tl.debug_barrier()
                _count_asked(asked_ptr, count_ptr, block, blocks, T, E, top_k, BINS, B)
            barriers += 1
            _meet(arrivals_ptr, barriers * programs)

    pair_P = tl.arange(0, HELD_P)
    bin_E = tl.arange(0, BINS)
    for block in range(program, (T + HELD - 1) // HELD, programs):
        at_P = tl.cast(block, tl.int64) * HELD * top_k + pair_P
        here_P = (pair_P < HELD * top_k) & (at_P < tl.cast(T, tl.int64) * top_k)
        expert_P = tl.load(expert_ptr + at_P, mask=here_P, other=-1, cache_modifier=".cg")
        tl.store(held_ptr + tl.cast(block, tl.int64) * E + bin_E, sorting.count(expert_P, BINS), mask=bin_E < E)


@triton.jit
def _meet(arrivals_ptr, expected):
    """Waits until every program of the grid has come here; `expected` arrivals count all meetings so far."""
    tl.debug_barrier()
    arrived = tl.atomic_add(arrivals_ptr, 1, sem="acq_rel", scope="gpu") + 1
    while arrived < expected:
        arrived = tl.atomic_add(arrivals_ptr, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()


@triton.jit
def _count_asked(asked_ptr, count_ptr, block, blocks, T, E, top_k, BINS: tl.constexpr, B: tl.constexpr):
    bin_E = tl.arange(0, BINS)
    token_B = block * B + tl.arange(0, B)
    for slot in range(top_k):
        asked_B = tl.load(
            asked_ptr + tl.cast(slot, tl.int64) * T + token_B, mask=token_B < T, other=-1, cache_modifier=".cg"
        )
        row = tl.cast(slot, tl.int64) * blocks + block
        tl.store(count_ptr + row * E + bin_E, sorting.count(asked_B, BINS), mask=bin_E < E)


@triton.jit
def _accept_first(
    asked_ptr, expert_ptr, count_ptr, room_ptr, row, blocks, T, E, top_k, BINS: tl.constexpr, B: tl.constexpr
):
    """Each expert accepts as many of the row's requests, in order, as the rows before leave room for → how many."""
    slot, start = row // blocks, row % blocks * B
    at_B = start + tl.arange(0, B)
    row_ptr = asked_ptr + tl.cast(slot, tl.int64) * T
    asked_B = tl.load(row_ptr + at_B, mask=at_B < T, other=-1, cache_modifier=".cg")
    accepted = 0
    if tl.max(asked_B, axis=0) >= 0:
        bin_E = tl.arange(0, BINS)
        before_E = tl.load(
            count_ptr + tl.cast(row, tl.int64) * E + bin_E, mask=bin_E < E, other=0, cache_modifier=".cg"
        )
        room_E = tl.load(room_ptr + bin_E, mask=bin_E < E, other=0, cache_modifier=".cg")
        rank_B = sorting.ranks(asked_B, row_ptr + start, T - start, B)
        room_B = tl.gather(room_E - before_E, tl.maximum(asked_B, 0), 0)
        accepted_B = (asked_B >= 0) & (rank_B < room_B)
        tl.debug_barrier()  # ranks() has read the row
        tl.store(expert_ptr + at_B.to(tl.int64) * top_k + slot, asked_B, mask=accepted_B)
        tl.store(row_ptr + at_B, -1, mask=accepted_B)
        accepted = tl.sum(accepted_B.to(tl.int32), axis=0)
    return accepted


@triton.jit
def _gather_by_expert(
    asked_ptr, count_ptr, total_ptr, served_ptr, row, blocks, T, E, BINS: tl.constexpr, B: tl.constexpr
):
    """Writes the row's requests behind those of the earlier rows at the same expert."""
    slot, start = row // blocks, row % blocks * B
    at_B = start + tl.arange(0, B)
    row_ptr = asked_ptr + tl.cast(slot, tl.int64) * T
    asked_B = tl.load(row_ptr + at_B, mask=at_B < T, other=-1, cache_modifier=".cg")
    if tl.max(asked_B, axis=0) >= 0:
        bin_E = tl.arange(0, BINS)
        total_E = tl.load(total_ptr + bin_E, mask=bin_E < E, other=0, cache_modifier=".cg")
        before_E = tl.load(
            count_ptr + tl.cast(row, tl.int64) * E + bin_E, mask=bin_E < E, other=0, cache_modifier=".cg"
        )
        base_E = tl.cumsum(total_E, axis=0) - total_E + before_E
        to_B = tl.gather(base_E, tl.maximum(asked_B, 0), 0) + sorting.ranks(asked_B, row_ptr + start, T - start, B)
        tl.store(served_ptr + to_B, slot * T + at_B, mask=asked_B >= 0)


@triton.jit
def _accept_best(
    asked_ptr, expert_ptr, probs_ptr, total_ptr, room_ptr, served_ptr, expert, T, E, top_k, BINS: tl.constexpr
):
    """The expert accepts its best-scored requests, among equals the earlier ones → how many."""
    bin_E = tl.arange(0, BINS)
    total_E = tl.load(total_ptr + bin_E, mask=bin_E < E, other=0, cache_modifier=".cg")
    start = tl.sum(tl.where(bin_E < expert, total_E, 0), axis=0)
    total = tl.sum(tl.where(bin_E == expert, total_E, 0), axis=0)
    room = tl.minimum(tl.load(room_ptr + expert, cache_modifier=".cg"), total)
    if room > 0:
        # The bits of the last score that is accepted, and how many requests with these bits are: from the highest
        # digit (of 8 bits) down. Scores are not negative, so their bits are in their order.
        bits, equals = 0, room
        digit_D = tl.arange(0, 256)
        for place in range(4):
            shift = 24 - 8 * place
            count_D = tl.zeros([256], tl.int32)
            for offset in range(0, total, SPAN):
                _, score_S, here_S = _read(probs_ptr, served_ptr, start, offset, total, expert, T, E)
                # The digits above must be those found; for the first there are none.
                here_S = here_S & ((place == 0) | (((score_S ^ bits) >> (shift + 7)) >> 1 == 0))
                count_D += tl.histogram((score_S >> shift) & 255, 256, mask=here_S)
            above_D = tl.sum(count_D, axis=0) - tl.cumsum(count_D, axis=0)
            digit = tl.min(tl.where(above_D < equals, digit_D, 255), axis=0)
            equals -= tl.sum(tl.where(digit_D == digit, above_D, 0), axis=0)
            bits = bits | (digit << shift)
        for offset in range(0, total, SPAN):
            request_S, score_S, here_S = _read(probs_ptr, served_ptr, start, offset, total, expert, T, E)
            equal_S = (here_S & (score_S == bits)).to(tl.int32)
            accepted_S = here_S & ((score_S > bits) | ((equal_S > 0) & (tl.cumsum(equal_S, axis=0) <= equals)))
            equals -= tl.sum(equal_S, axis=0)
            token_S, slot_S = request_S % T, request_S // T
            tl.store(expert_ptr + token_S.to(tl.int64) * top_k + slot_S, expert, mask=accepted_S)
            tl.store(asked_ptr + request_S, -1, mask=accepted_S)
    return room


@triton.jit
def _read(probs_ptr, served_ptr, start, offset, total, expert, T, E):
    """→ SPAN requests of an expert, the bits of their scores, and which are there."""
    place_S = offset + tl.arange(0, SPAN)
    here_S = place_S < total
    request_S = tl.load(served_ptr + start + place_S, mask=here_S, other=0, cache_modifier=".cg")
    score_S = tl.load(probs_ptr + (request_S % T).to(tl.int64) * E + expert, mask=here_S, other=0.0)
    return request_S, score_S.to(tl.int32, bitcast=True), here_S


@triton.jit
def _move(
    logits_ptr,
    stride_t,
    stride_e,
    bias_ptr,
    probs_ptr,
    asked_ptr,
    cursor_ptr,
    block,
    T,
    E,
    top_k,
    num_groups,
    group_top_k,
    HAS_BIAS: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    K: tl.constexpr,
    B: tl.constexpr,
    R: tl.constexpr,
):
    """What is still pending was rejected: it asks the best expert that its token has not asked, or gives up."""
    expert_E, real_E = ranking.columns(E, num_groups, GROUPS, SIZE)
    bias_E = tl.zeros([GROUPS * SIZE], tl.float32)
    if HAS_BIAS:
        bias_E = tl.load(bias_ptr + expert_E, mask=real_E, other=0.0).to(tl.float32)
    slot_K = tl.arange(0, K)
    for row in range(0, B, R):
        token_R = tl.cast(block, tl.int64) * B + row + tl.arange(0, R)
        here_R = token_R < T
        asked_RK = tl.load(
            asked_ptr + slot_K[None, :].to(tl.int64) * T + token_R[:, None],
            mask=here_R[:, None] & (slot_K[None, :] < top_k),
            other=-1,
            cache_modifier=".cg",
        )
        if tl.max(tl.max(asked_RK, axis=1), axis=0) >= 0:
            pending_R = tl.max(asked_RK, axis=1) >= 0
            here_RE = pending_R[:, None] & real_E[None, :]
            logits_RE = tl.zeros([R, GROUPS * SIZE], tl.float32)
            score_RE = logits_RE
            if not HAS_BIAS:
                logits_RE = tl.load(
                    logits_ptr + token_R[:, None] * stride_t + expert_E[None, :].to(tl.int64) * stride_e,
                    mask=here_RE,
                    other=0.0,
                ).to(tl.float32)
            if HAS_BIAS or GROUPS > 1:
                score_RE = tl.load(probs_ptr + token_R[:, None] * E + expert_E[None, :], mask=here_RE, other=0.0)
            key_RE = ranking.keys(logits_RE, score_RE, bias_E, expert_E, real_E, group_top_k, HAS_BIAS, GROUPS, SIZE)
            cursor_R = tl.load(cursor_ptr + token_R, mask=here_R, other=0)
            for slot in range(top_k):
                at_R = asked_ptr + tl.cast(slot, tl.int64) * T + token_R
                rejected_R = tl.load(at_R, mask=here_R, other=-1, cache_modifier=".cg") >= 0
                next_R = tl.max(tl.where(key_RE < cursor_R[:, None], key_RE, ranking.NEVER), axis=1)
                found_R = next_R > ranking.NEVER
                tl.store(at_R, tl.where(found_R, ranking.unpack(next_R), -1), mask=rejected_R)
                cursor_R = tl.where(rejected_R & found_R, next_R, cursor_R)
            tl.store(cursor_ptr + token_R, cursor_R, mask=here_R)
