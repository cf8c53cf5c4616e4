"""Routing in Triton: three launches a forward pass, four with a capacity, one for the gradient; none depends on data.

    _select        by block of tokens: scores, top-k, and how often each expert is named
    rounds.serve   with a capacity: which expert holds which request at the end
    _sum_columns   by block of experts: prefix sums of the counts over the blocks of tokens
    _place         by block of tokens: where its pairs come in expert order, and their weights

The same counting sort is there for any keys: _count_keys, _sum_columns, _order_keys.

Every sum has a fixed order and atomics only add integers, so the same input gives the same bits. Traffic for float32
logits without a capacity: 8·T·E bytes forward (logits in, probs out) and 8·T·E backward, besides O(T·K).

Shape suffixes: T tokens, E experts, K choices, R rows in registers, C experts of a column block, P pairs of a block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ava_kernels.routing import ranking, rounds, sorting
from ava_kernels.routing.reference import Outputs

# Block sizes, powers of two.
TOKENS = 64  # most tokens of a block
PAIRS = 512  # most of its pairs
ROUND_TOKENS = 256  # tokens of a block of a round
ELEMENTS = 2048  # scores in registers at a time
COLUMNS, ROWS = 16, 64  # counts in registers at a time


def forward(
    logits: Tensor,
    expert_bias: Tensor | None,
    top_k: int,
    capacity: int | None,
    max_reroutes: int,
    by_probability: bool,
    sigmoid: bool,
    normalize: bool,
    num_groups: int,
    group_top_k: int,
    scale: float,
) -> Outputs:
    """`reference.forward` on the device, without waiting for it."""
    (T, E), N = logits.shape, logits.shape[0] * top_k

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    probs, lse, mean_prob = (empty(*shape, dtype=torch.float32) for shape in ((T, E), (T,), (E,)))
    expert, weight = empty(T, top_k), empty(T, top_k, dtype=torch.float32)
    requested, offsets, token, slot = empty(E), empty(E + 1), empty(N), empty(N)
    rerouted, dropped = torch.zeros((), dtype=torch.int64, device=logits.device), empty(dtype=torch.int64)
    outputs = Outputs(weight, expert, probs, lse, mean_prob, requested, offsets, token, slot, rerouted, dropped)
    if T == 0:
        for zero in (mean_prob, requested, offsets, dropped):
            zero.zero_()
        return outputs

    K = triton.next_power_of_2(top_k)
    B = min(TOKENS, max(1, PAIRS // K), triton.next_power_of_2(T))
    layout = _layout(E, num_groups)
    R = min(B, max(1, ELEMENTS // (layout["GROUPS"] * layout["SIZE"])))
    blocks = triton.cdiv(T, B)
    count, mass = empty(blocks, E), empty(blocks, E, dtype=torch.float32)
    held = count if capacity is None else empty(blocks, E)
    asked = cursor = expert  # not used without a capacity
    if capacity is not None:
        asked, cursor = empty(top_k, T), empty(T, dtype=torch.int64)
    common = dict(HAS_BIAS=expert_bias is not None, BINS=triton.next_power_of_2(E), **layout)
    _select[(blocks,)](
        logits,
        *logits.stride(),
        expert_bias,
        asked,
        cursor,
        expert,
        probs,
        lse,
        count,
        mass,
        T,
        E,
        top_k,
        num_groups,
        group_top_k,
        CAPACITY=capacity is not None,
        SIGMOID=sigmoid,
        K=K,
        B=B,
        R=R,
        num_warps=8,
        **common,
    )
    if capacity is not None:
        round_tokens = min(ROUND_TOKENS, triton.next_power_of_2(T))
        rows = top_k * triton.cdiv(T, round_tokens)
        programs = min(rows, _processors(logits.device))
        counters = torch.zeros(max_reroutes + 2, dtype=torch.int64, device=logits.device)
        pending, arrivals = counters[:-1], counters[-1:]
        rounds.serve[(programs,)](
            logits,
            *logits.stride(),
            expert_bias,
            probs,
            asked,
            cursor,
            expert,
            empty(rows, E),
            empty(E),
            empty(E),
            empty(E),
            empty(N) if by_probability else expert,
            held,
            pending,
            rerouted,
            arrivals,
            T,
            E,
            top_k,
            num_groups,
            group_top_k,
            min(capacity, T),
            max_reroutes,
            programs,
            BY_PROBABILITY=by_probability,
            K=K,
            B=round_tokens,
            R=min(R, round_tokens),
            C=COLUMNS,
            ROWS=ROWS,
            HELD=B,
            HELD_P=B * K,
            num_warps=8,
            maxnreg=255,  # one program a processor: without it the assembler saves registers and spills
            launch_cooperative_grid=True,
            **common,
        )
    total = empty(E)
    _sum_columns[(triton.cdiv(E, COLUMNS),)](
        count, held, mass, requested, total, mean_prob, T, E, blocks, SHARED=capacity is None, C=COLUMNS, ROWS=ROWS
    )
    _place[(blocks,)](
        logits,
        *logits.stride(),
        expert,
        probs,
        held,
        total,
        weight,
        offsets,
        token,
        slot,
        dropped,
        T,
        E,
        top_k,
        scale,
        SIGMOID=sigmoid,
        NORMALIZE=normalize,
        BINS=triton.next_power_of_2(E),
        K=K,
        B=B,
        num_warps=8,
    )
    return outputs


def backward(
    logits: Tensor | None,
    probs: Tensor,
    lse: Tensor,
    expert: Tensor,
    weight: Tensor | None,
    dweight: Tensor | None,
    dprobs: Tensor | None,
    dlse: Tensor | None,
    dmean_prob: Tensor | None,
    sigmoid: bool,
    normalize: bool,
    scale: float,
) -> Tensor:
    """`reference.backward` in one launch."""
    T, E = probs.shape
    dlogits = torch.empty_like(probs)
    if T == 0:
        return dlogits
    top_k = expert.shape[1]
    columns = triton.next_power_of_2(E)
    R = max(1, ELEMENTS // columns)
    _gradient[(triton.cdiv(T, R),)](
        logits,
        *(logits.stride() if logits is not None else (0, 0)),
        probs,
        lse,
        expert,
        weight,
        None if dweight is None else dweight.contiguous(),
        dprobs,
        *(dprobs.stride() if dprobs is not None else (0, 0)),
        None if dlse is None else dlse.contiguous(),
        None if dmean_prob is None else dmean_prob.contiguous(),
        dlogits,
        T,
        E,
        top_k,
        scale,
        SIGMOID=sigmoid,
        NORMALIZE=normalize,
        COLUMNS=columns,
        K=triton.next_power_of_2(top_k),
        R=R,
    )
    return dlogits


def counting_sort(key: Tensor, bins: int, counts_only: bool) -> tuple[Tensor, Tensor]:
    """The custom op of this name in three launches, without the order in two. 4·N bytes of scratch hold the bins."""
    N = len(key)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=key.device)

    order, total = empty(0 if counts_only else N), empty(bins)
    if N == 0:
        return order, total.zero_()
    P = min(PAIRS, triton.next_power_of_2(N))
    blocks, BINS = triton.cdiv(N, P), triton.next_power_of_2(bins)
    bin, count = None if counts_only else empty(N), empty(blocks, bins)
    _count_keys[(blocks,)](key, key.stride(0), bin, count, N, bins, BINS=BINS, P=P, num_warps=8)
    _sum_columns[(triton.cdiv(bins, COLUMNS),)](
        count, count, None, None, total, None, N, bins, blocks, SHARED=True, C=COLUMNS, ROWS=ROWS
    )
    if not counts_only:
        _order_keys[(blocks,)](bin, count, total, order, N, bins, BINS=BINS, P=P, num_warps=8)
    return order, total


def _layout(E: int, num_groups: int) -> dict[str, int]:
    return {
        "GROUPS": triton.next_power_of_2(num_groups),
        "SIZE": triton.next_power_of_2(E // num_groups),
    }


def _processors(device: torch.device) -> int:
    """How many programs a persistent grid has whose programs wait for each other: one on each of three quarters of the
    processors, as a collective may hold some of the others for as long as another rank is not there. Without a GPU: an
    H200's, or in the interpreter, which runs one after the other, one."""
    if device.type == "cuda":
        return max(1, torch.cuda.get_device_properties(device).multi_processor_count * 3 // 4)
    return 99 if device.type == "meta" else 1


@triton.jit
def _select(
    logits_ptr,
    stride_t,
    stride_e,
    bias_ptr,
    asked_ptr,  # (K, T): the expert that each request names, for rounds.serve
    cursor_ptr,  # (T,): the key of the token's last request, for rounds.serve
    expert_ptr,  # (T, K): the expert that each request names, or −1 with CAPACITY
    probs_ptr,
    lse_ptr,
    count_ptr,  # (blocks, E): how often a block's requests name each expert
    mass_ptr,  # (blocks, E): the sums of its probabilities
    T,
    E,
    top_k,
    num_groups,
    group_top_k,
    CAPACITY: tl.constexpr,
    SIGMOID: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    BINS: tl.constexpr,
    K: tl.constexpr,
    B: tl.constexpr,
    R: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    expert_E, real_E = ranking.columns(E, num_groups, GROUPS, SIZE)
    bias_E = tl.zeros([GROUPS * SIZE], tl.float32)
    if HAS_BIAS:
        bias_E = tl.load(bias_ptr + expert_E, mask=real_E, other=0.0).to(tl.float32)
    slot_K = tl.arange(0, K)
    count_E = tl.zeros([BINS], tl.int32)
    mass_E = tl.zeros([GROUPS * SIZE], tl.float32)
    for row in range(0, B, R):
        token_R = block * B + row + tl.arange(0, R)
        here_R = token_R < T
        here_RE = here_R[:, None] & real_E[None, :]
        logits_RE = tl.load(
            logits_ptr + token_R[:, None] * stride_t + expert_E[None, :].to(tl.int64) * stride_e,
            mask=here_RE,
            other=-float("inf"),
        ).to(tl.float32)
        score_RE, lse_R, valid_R = ranking.scores(logits_RE, SIGMOID)
        score_RE = tl.where(here_RE, score_RE, 0.0)
        tl.store(probs_ptr + token_R[:, None] * E + expert_E[None, :], score_RE, mask=here_RE)
        tl.store(lse_ptr + token_R, lse_R, mask=here_R)
        mass_E += tl.sum(score_RE, axis=0)

        key_RE = ranking.keys(logits_RE, score_RE, bias_E, expert_E, real_E, group_top_k, HAS_BIAS, GROUPS, SIZE)
        if K == 1:
            best_RK = tl.max(key_RE, axis=1)[:, None]
        elif K == GROUPS * SIZE:
            best_RK = tl.sort(key_RE, descending=True)
        else:
            best_RK = tl.topk(key_RE, K)
        here_RK = here_R[:, None] & (slot_K[None, :] < top_k)
        asked_RK = tl.where(here_RK & valid_R[:, None], ranking.unpack(best_RK), -1)
        at_RK = token_R[:, None] * top_k + slot_K[None, :]
        if CAPACITY:
            tl.store(asked_ptr + slot_K[None, :].to(tl.int64) * T + token_R[:, None], asked_RK, mask=here_RK)
            tl.store(expert_ptr + at_RK, -1, mask=here_RK)
            last_RK = tl.where(slot_K[None, :] == top_k - 1, best_RK, ranking.NEVER)
            tl.store(cursor_ptr + token_R, tl.max(last_RK, axis=1), mask=here_R)
        else:
            tl.store(expert_ptr + at_RK, asked_RK, mask=here_RK)
        count_E += sorting.count(tl.reshape(asked_RK, [R * K]), BINS)
    bin_E = tl.arange(0, BINS)
    tl.store(count_ptr + block * E + bin_E, count_E, mask=bin_E < E)
    tl.store(mass_ptr + block * E + expert_E, mass_E, mask=real_E)


@triton.jit
def _sum_columns(
    count_ptr,
    held_ptr,  # the same as count where SHARED
    mass_ptr,  # may be None, with mean_prob
    requested_ptr,  # may be None where SHARED
    total_ptr,  # (E,): how many pairs each expert holds
    mean_prob_ptr,
    T,
    E,
    blocks,
    SHARED: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Makes `held` exclusive prefix sums over the blocks, and sums up the columns of all three."""
    first = tl.program_id(0) * C
    column_C = first + tl.arange(0, C)
    requested_C = tl.zeros([C], tl.int32)
    mass_C = tl.zeros([C], tl.float32)
    for start in range(0, blocks, ROWS):
        row = start + tl.arange(0, ROWS)
        at = row[:, None].to(tl.int64) * E + column_C[None, :]
        here = (row[:, None] < blocks) & (column_C[None, :] < E)
        if mass_ptr is not None:
            mass_C += tl.sum(tl.load(mass_ptr + at, mask=here, other=0.0), axis=0)
        if not SHARED:
            requested_C += tl.sum(tl.load(count_ptr + at, mask=here, other=0), axis=0)
    total_C = sorting.prefix_sums(held_ptr, blocks, first, E, C, ROWS)
    here_C = column_C < E
    tl.store(total_ptr + column_C, total_C, mask=here_C)
    if mass_ptr is not None:
        tl.store(mean_prob_ptr + column_C, mass_C / T, mask=here_C)
    if requested_ptr is not None:
        tl.store(requested_ptr + column_C, total_C if SHARED else requested_C, mask=here_C)


@triton.jit
def _place(
    logits_ptr,
    stride_t,
    stride_e,
    expert_ptr,
    probs_ptr,
    held_ptr,  # (blocks, E): the pairs that each expert holds of earlier blocks
    total_ptr,
    weight_ptr,
    offsets_ptr,
    token_ptr,
    slot_ptr,
    dropped_ptr,
    T,
    E,
    top_k,
    scale,
    SIGMOID: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BINS: tl.constexpr,
    K: tl.constexpr,
    B: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    pairs = tl.cast(T, tl.int64) * top_k

    # Kept pairs go to their expert's rows, dropped ones behind all of them.
    start = block * B * top_k
    here = tl.minimum(pairs - start, B * top_k)
    to_P, end_E = sorting.places(expert_ptr, held_ptr + block * E, total_ptr, start, here, E, BINS, B * K)
    place_P = tl.arange(0, B * K)
    pair_P = start + place_P
    tl.store(token_ptr + to_P, (pair_P // top_k).to(tl.int32), mask=place_P < here)
    tl.store(slot_ptr + to_P, (pair_P % top_k).to(tl.int32), mask=place_P < here)
    if block == 0:
        bin_E = tl.arange(0, BINS)
        tl.store(offsets_ptr + 1 + bin_E, end_E, mask=bin_E < E)
        tl.store(offsets_ptr, 0)
        tl.store(dropped_ptr, pairs - tl.max(end_E, axis=0))

    token_B = block * B + tl.arange(0, B)
    slot_K = tl.arange(0, K)
    here_BK = (token_B[:, None] < T) & (slot_K[None, :] < top_k)
    at_BK = token_B[:, None] * top_k + slot_K[None, :]
    expert_BK = tl.load(expert_ptr + at_BK, mask=here_BK, other=-1)
    if NORMALIZE:
        logits_BK = tl.load(
            logits_ptr + token_B[:, None] * stride_t + expert_BK.to(tl.int64) * stride_e,
            mask=expert_BK >= 0,
            other=-float("inf"),
        ).to(tl.float32)
        share_BK = _shares(logits_BK, SIGMOID)
    else:
        share_BK = tl.load(probs_ptr + token_B[:, None] * E + expert_BK, mask=expert_BK >= 0, other=0.0)
    tl.store(weight_ptr + at_BK, share_BK * scale, mask=here_BK)


@triton.jit
def _count_keys(key_ptr, stride, bin_ptr, count_ptr, N, bins, BINS: tl.constexpr, P: tl.constexpr):
    """bin (N,): the key, or −1 where it is in no bin; count (blocks, bins): how often a block's keys are in each."""
    block = tl.program_id(0).to(tl.int64)
    at_P = block * P + tl.arange(0, P)
    key_P = tl.load(key_ptr + at_P * stride, mask=at_P < N, other=-1)
    bin_P = tl.where((key_P >= 0) & (key_P < bins), key_P, -1).to(tl.int32)
    if bin_ptr is not None:
        tl.store(bin_ptr + at_P, bin_P, mask=at_P < N)
    bin_E = tl.arange(0, BINS)
    tl.store(count_ptr + block * bins + bin_E, sorting.count(bin_P, BINS), mask=bin_E < bins)


@triton.jit
def _order_keys(bin_ptr, count_ptr, total_ptr, order_ptr, N, bins, BINS: tl.constexpr, P: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    start = block * P
    here = tl.minimum(N - start, P)
    to_P, _ = sorting.places(bin_ptr, count_ptr + block * bins, total_ptr, start, here, bins, BINS, P)
    place_P = tl.arange(0, P)
    tl.store(order_ptr + to_P, (start + place_P).to(tl.int32), mask=place_P < here)


@triton.jit
def _shares(logits_RK, SIGMOID: tl.constexpr):
    """`reference._shares` in float32."""
    top_R = tl.maximum(tl.max(logits_RK, axis=1), -ranking.LARGEST)
    if SIGMOID:
        small_RK = tl.exp(tl.minimum(logits_RK, 0.0) - tl.minimum(top_R, 0.0)[:, None])
        score_RK = small_RK / (1.0 + tl.exp(-tl.abs(logits_RK)))
    else:
        score_RK = tl.exp(logits_RK - top_R[:, None])
    return score_RK / tl.maximum(tl.sum(score_RK, axis=1), 0.5)[:, None]


@triton.jit
def _gradient(
    logits_ptr,
    logits_stride_t,
    logits_stride_e,
    probs_ptr,
    lse_ptr,
    expert_ptr,
    weight_ptr,
    dweight_ptr,
    dprobs_ptr,
    dprobs_stride_t,
    dprobs_stride_e,
    dlse_ptr,
    dmean_prob_ptr,
    dlogits_ptr,
    T,
    E,
    top_k,
    scale,
    SIGMOID: tl.constexpr,
    NORMALIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
):
    """Gradients that are None are zero, and cost nothing."""
    token_R = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    here_R = token_R < T
    column_E = tl.arange(0, COLUMNS)
    here_RE = here_R[:, None] & (column_E[None, :] < E)
    at_RE = token_R[:, None] * E + column_E[None, :]
    probs_RE = tl.load(probs_ptr + at_RE, mask=here_RE, other=0.0)
    d_RE = tl.zeros([R, COLUMNS], tl.float32)
    if dprobs_ptr is not None:
        strided_RE = token_R[:, None] * dprobs_stride_t + column_E[None, :].to(tl.int64) * dprobs_stride_e
        d_RE += tl.load(dprobs_ptr + strided_RE, mask=here_RE, other=0.0)
    if dmean_prob_ptr is not None:
        d_RE += (tl.load(dmean_prob_ptr + column_E, mask=column_E < E, other=0.0) / T)[None, :]
    if dweight_ptr is not None and not NORMALIZE:
        for slot in range(top_k):
            expert_R = tl.load(expert_ptr + token_R * top_k + slot, mask=here_R, other=-1)
            dweight_R = tl.load(dweight_ptr + token_R * top_k + slot, mask=expert_R >= 0, other=0.0) * scale
            d_RE += tl.where(column_E[None, :] == expert_R[:, None], dweight_R[:, None], 0.0)
    if SIGMOID:
        dlogits_RE = d_RE * probs_RE * (1.0 - probs_RE)
        if dlse_ptr is not None:
            logits_RE = tl.load(
                logits_ptr + token_R[:, None] * logits_stride_t + column_E[None, :].to(tl.int64) * logits_stride_e,
                mask=here_RE,
                other=-float("inf"),
            ).to(tl.float32)
            _, lse_R, valid_R = ranking.scores(logits_RE, False)
            dlse_R = tl.load(dlse_ptr + token_R, mask=here_R, other=0.0)
            softmax_RE = tl.exp(logits_RE - lse_R[:, None])
            dlogits_RE += tl.where(valid_R[:, None], softmax_RE * dlse_R[:, None], 0.0)
    else:
        inner_R = tl.sum(d_RE * probs_RE, axis=1)
        if dlse_ptr is not None:
            inner_R -= tl.load(dlse_ptr + token_R, mask=here_R, other=0.0)
        dlogits_RE = probs_RE * (d_RE - inner_R[:, None])
    if dweight_ptr is not None and NORMALIZE:
        slot_K = tl.arange(0, K)
        at_RK = token_R[:, None] * top_k + slot_K[None, :]
        here_RK = here_R[:, None] & (slot_K[None, :] < top_k)
        kept_RK = tl.load(expert_ptr + at_RK, mask=here_RK, other=-1) >= 0
        weight_RK = tl.load(weight_ptr + at_RK, mask=kept_RK, other=0.0)
        dweight_RK = tl.load(dweight_ptr + at_RK, mask=kept_RK, other=0.0)
        total_R = tl.sum(weight_RK, axis=1)
        mean_R = tl.sum(dweight_RK * weight_RK, axis=1) / tl.where(total_R == 0.0, 1.0, total_R)
        for slot in range(top_k):
            at_R = token_R * top_k + slot
            expert_R = tl.load(expert_ptr + at_R, mask=here_R, other=-1)
            kept_R = expert_R >= 0
            weight_R = tl.load(weight_ptr + at_R, mask=kept_R, other=0.0)
            dlogits_R = weight_R * (tl.load(dweight_ptr + at_R, mask=kept_R, other=0.0) - mean_R)
            add_RE = dlogits_R[:, None] * (1.0 - probs_RE) if SIGMOID else dlogits_R[:, None]
            dlogits_RE += tl.where(column_E[None, :] == expert_R[:, None], add_RE, 0.0)
    tl.store(dlogits_ptr + at_RE, dlogits_RE, mask=here_RE)
