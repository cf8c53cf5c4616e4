"""The counting sort that routing is made of: counts per block, prefix sums over blocks, places within each block.

A pair goes behind the pairs of earlier blocks at the same expert, and behind the earlier pairs of its own block: the
order is stable, and nothing is compared but expert numbers for equality.
Constexpr sizes are powers of two: P pairs of a block, BINS ≥ the number of experts E, C columns, ROWS rows at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

CHUNK: tl.constexpr = tl.constexpr(16)  # pairs that a block is compared with at a time


@triton.jit
def count(expert_P, BINS: tl.constexpr):
    """→ how often each expert occurs (BINS,) int32; −1 is none."""
    return tl.histogram(tl.maximum(expert_P, 0), BINS, mask=expert_P >= 0)


@triton.jit
def prefix_sums(count_ptr, rows, first, E, C: tl.constexpr, ROWS: tl.constexpr):
    """Makes columns first … first+C of count (rows, E) exclusive prefix sums, in place → their totals (C,)."""
    column_C = first + tl.arange(0, C)
    total_C = tl.zeros([C], tl.int32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        at = count_ptr + row[:, None].to(tl.int64) * E + column_C[None, :]
        here = (row[:, None] < rows) & (column_C[None, :] < E)
        counts = tl.load(at, mask=here, other=0, cache_modifier=".cg")
        tl.store(at, tl.cumsum(counts, axis=0) - counts + total_C[None, :], mask=here)
        total_C += tl.sum(counts, axis=0)
    return total_C


@triton.jit
def ranks(expert_P, block_ptr, pairs, P: tl.constexpr):
    """→ how many earlier pairs of the block have the same expert. expert_P is what block_ptr … +pairs holds."""
    place_P = tl.arange(0, P)
    rank_P = tl.zeros([P], tl.int32)
    STEP: tl.constexpr = min(P, CHUNK)
    for start in range(0, P, STEP):
        place = start + tl.arange(0, STEP)
        expert = tl.load(block_ptr + place, mask=place < pairs, other=-2, cache_modifier=".cg")
        same = (expert[None, :] == expert_P[:, None]) & (place[None, :] < place_P[:, None])
        rank_P += tl.sum(same.to(tl.int32), axis=1)
    return rank_P


@triton.jit
def places(expert_ptr, before_ptr, total_ptr, start, pairs, E, BINS: tl.constexpr, P: tl.constexpr):
    """→ where the pairs start … start+pairs of a block come in the order of their experts (P,), and the experts' ends.

    before (E,): how many pairs of earlier blocks each expert has, total (E,): of all. Pairs without an expert (−1) come
    behind all others; `start` counts all pairs of earlier blocks, with these.
    """
    place_P = tl.arange(0, P)
    expert_P = tl.load(expert_ptr + start + place_P, mask=place_P < pairs, other=-2)
    bin_E = tl.arange(0, BINS)
    total_E = tl.load(total_ptr + bin_E, mask=bin_E < E, other=0)
    before_E = tl.load(before_ptr + bin_E, mask=bin_E < E, other=0)
    end_E = tl.cumsum(total_E, axis=0)
    base_P = tl.gather(end_E - total_E + before_E, tl.maximum(expert_P, 0), 0)
    behind = tl.sum(total_E, axis=0) + start - tl.sum(before_E, axis=0)
    base_P = tl.where(expert_P >= 0, base_P, behind)
    return base_P + ranks(expert_P, expert_ptr + start, pairs, P), end_E
