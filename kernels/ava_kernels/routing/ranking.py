"""How a token ranks its experts, as one integer an expert: the larger the key, the better the candidate.

A key is the score's bits, made monotone, above the expert's number. So the top-k is a partial sort of integers in
registers, "the next candidate after this one" is the largest smaller key, and ties go to the lower expert.

Shape suffixes: R rows (tokens) in registers, E experts, G groups, S experts of a group; GROUPS and SIZE are the powers
of two that hold them, so that a row's columns are GROUPS · SIZE, not all of which are experts.
"""

from __future__ import annotations

import triton
import triton.language as tl

NEVER: tl.constexpr = tl.constexpr(-(2**63))  # the key of what a token may not ask
LARGEST: tl.constexpr = tl.constexpr(3.4028234663852886e38)


@triton.jit
def pack(value, index):
    """float32 value, index < 4096 → int64 key."""
    value = tl.where(value == 0.0, 0.0, value)  # −0 ties with 0
    bits = value.to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (bits.to(tl.int64) << 32) | (4095 - index).to(tl.int64)


@triton.jit
def unpack(key):
    """→ the index in a key."""
    return 4095 - (key & 4095).to(tl.int32)


@triton.jit
def columns(E, num_groups, GROUPS: tl.constexpr, SIZE: tl.constexpr):
    """→ the expert in each column, and which columns hold one."""
    column_E = tl.arange(0, GROUPS * SIZE)
    size = E // num_groups
    expert_E = column_E // SIZE * size + column_E % SIZE
    return expert_E, (column_E % SIZE < size) & (column_E // SIZE < num_groups)


@triton.jit
def scores(logits_RE, SIGMOID: tl.constexpr):
    """→ scores, log-sum-exp, and whether it is finite; where it is not, both are 0. Unused columns hold −Inf."""
    top_R = tl.max(logits_RE, axis=1)
    exp_RE = tl.exp(logits_RE - top_R[:, None])
    sum_R = tl.sum(exp_RE, axis=1)
    lse_R = top_R + tl.log(sum_R)
    valid_R = tl.abs(lse_R) < float("inf")  # NaN is not
    if SIGMOID:
        score_RE = 1.0 / (1.0 + tl.exp(-logits_RE))
    else:
        score_RE = exp_RE / sum_R[:, None]
    return tl.where(valid_R[:, None], score_RE, 0.0), tl.where(valid_R, lse_R, 0.0), valid_R


@triton.jit
def keys(
    logits_RE,
    score_RE,
    bias_E,
    expert_E,
    real_E,
    group_top_k,
    HAS_BIAS: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """→ every column's key. Without bias `score_RE` is read only with groups, with one `logits_RE` is not read."""
    if HAS_BIAS:
        choice_RE = score_RE + bias_E[None, :]
        choice_RE = tl.where(choice_RE == choice_RE, choice_RE, -LARGEST)
        choice_RE = tl.minimum(tl.maximum(choice_RE, -LARGEST), LARGEST)
        key_RE = pack(choice_RE, expert_E[None, :])
    else:
        choice_RE = score_RE
        key_RE = pack(logits_RE, expert_E[None, :])
    key_RE = tl.where(real_E[None, :], key_RE, NEVER)
    if GROUPS > 1:
        choice_RE = tl.where(real_E[None, :], choice_RE, -float("inf"))
        key_RE = tl.where(_in_best_groups(choice_RE, real_E, group_top_k, GROUPS, SIZE), key_RE, NEVER)
    return key_RE


@triton.jit
def _in_best_groups(choice_RE, real_E, group_top_k, GROUPS: tl.constexpr, SIZE: tl.constexpr):
    """→ which columns belong to their row's group_top_k best groups by the sum of the two best choices of each."""
    R: tl.constexpr = choice_RE.shape[0]
    choice_RGS = tl.reshape(choice_RE, [R, GROUPS, SIZE])
    worth_RG = tl.max(choice_RGS, axis=2)
    if SIZE > 1:
        is_first_RGS = choice_RGS == worth_RG[:, :, None]
        ties_RG = tl.sum(is_first_RGS.to(tl.int32), axis=2)
        below_RG = tl.max(tl.where(is_first_RGS, -float("inf"), choice_RGS), axis=2)
        worth_RG += tl.where(ties_RG > 1, worth_RG, below_RG)
    real_G = tl.max(tl.reshape(real_E.to(tl.int32), [GROUPS, SIZE]), axis=1) > 0
    group_G = tl.arange(0, GROUPS)
    key_RG = tl.where(real_G[None, :], pack(worth_RG, group_G[None, :]), NEVER)
    ranked_RG = tl.sort(key_RG, descending=True)
    last_R = tl.max(tl.where(group_G[None, :] == group_top_k - 1, ranked_RG, NEVER), axis=1)
    best_RG = key_RG >= last_R[:, None]
    return tl.reshape(tl.broadcast_to(best_RG[:, :, None], [R, GROUPS, SIZE]), [R, GROUPS * SIZE])
