"""Routing in plain PyTorch: the definition that the kernels must equal, and what runs where they cannot.

Scores (float32; float64 for float64 logits): softmax or sigmoid of a token's logits.
Ranking: by logit, or by score + expert_bias where there is a bias; ties to the lower expert. With groups a token only
ranks the experts of its `group_top_k` best groups, a group being worth the sum of its two best scores (+ bias)
(DeepSeek-AI, 2024, "DeepSeek-V3"). A score + bias that is not finite counts as the nearest finite number, NaN as the
lowest.
Rounds: a token's K best are its requests, slot 0 the best. A round serves what is pending in order of (slot, token), or
of falling score, and an expert accepts while it holds fewer than `capacity`. A token's rejected requests move, lower
slot first, to the candidates it ranks next, and are served in the next round. What is left at the end is dropped.
Token-level ranking with hard capacity is that of GShard (Lepikhin et al., 2020), which dropped the overflow.
Weights: the scores of the experts finally held. Normalised, they are taken from the logits of these experts alone, so
that scores too small for their dtype still have their shares.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Outputs(NamedTuple):
    """What `forward` finds; `ava_kernels.Routing` describes the fields."""

    weight: Tensor  # a float comes first: torch.library.opcheck adds up what an op returns, starting with it
    expert: Tensor
    probs: Tensor
    lse: Tensor
    mean_prob: Tensor
    requested: Tensor
    offsets: Tensor
    token: Tensor
    slot: Tensor
    rerouted: Tensor
    dropped: Tensor


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
    """Reads on the host, once a round, how many requests are still pending."""
    T, E = logits.shape
    logits_TE = logits.to(torch.promote_types(logits.dtype, torch.float32)).contiguous()
    if sigmoid:
        probs_TE, lse_T = logits_TE.sigmoid(), logits_TE.logsumexp(-1)
    else:
        probs_TE = logits_TE.softmax(-1)
        lse_T = logits_TE.amax(-1) - probs_TE.amax(-1).log_()  # a sum of exponentials is the largest over its softmax
    valid_T = lse_T.isfinite()  # false where a logit is NaN or +Inf, or all of them are −Inf
    if not valid_T.all():
        probs_TE[~valid_T], lse_T[~valid_T] = 0.0, 0.0

    choice_TE = probs_TE
    if expert_bias is not None:
        choice_TE = (probs_TE + expert_bias.to(probs_TE.dtype)).nan_to_num_(torch.finfo(probs_TE.dtype).min)
    key_TE = logits_TE if expert_bias is None else choice_TE

    def candidates(token: Tensor | slice, ranks: int) -> Tensor:
        """The best experts of these tokens, best first; all that they may ask if those are fewer."""
        if num_groups == 1:
            return _ranking(key_TE[token], ranks)
        return _within_groups(_ranking(key_TE[token], E), choice_TE[token], num_groups, group_top_k)[:, :ranks]

    first_TK = candidates(slice(None), top_k).int().masked_fill_(~valid_T[:, None], -1)
    requested_E = torch.bincount(first_TK[valid_T].flatten(), minlength=E)
    if capacity is None:
        expert_TK = first_TK
    else:
        expert_TK = _serve(first_TK, candidates, probs_TE, by_probability, capacity, max_reroutes)

    kept_TK = expert_TK >= 0
    held_TK = expert_TK.clamp_min(0).long()
    if normalize:
        share_TK = _shares(torch.where(kept_TK, logits_TE.gather(1, held_TK), -torch.inf), sigmoid)
    else:
        share_TK = torch.where(kept_TK, probs_TE.gather(1, held_TK), 0.0)

    by_expert_N = torch.where(kept_TK, expert_TK, E).flatten().sort(stable=True).indices.int()
    token_N = by_expert_N // top_k
    offsets = torch.zeros(E + 1, dtype=torch.int32, device=logits.device)
    offsets[1:] = torch.bincount(expert_TK[kept_TK], minlength=E).cumsum(0)
    return Outputs(
        expert=expert_TK,
        weight=share_TK * scale,
        probs=probs_TE,
        lse=lse_T,
        mean_prob=probs_TE.sum(0) / max(T, 1),
        requested=requested_E.int(),
        offsets=offsets,
        token=token_N,
        slot=by_expert_N - token_N * top_k,
        rerouted=(kept_TK & (expert_TK != first_TK)).sum(),
        dropped=(~kept_TK).sum(),
    )


def backward(
    logits: Tensor | None,
    probs_TE: Tensor,
    lse_T: Tensor,
    expert_TK: Tensor,
    weight_TK: Tensor | None,
    dweight_TK: Tensor | None,
    dprobs_TE: Tensor | None,
    dlse_T: Tensor | None,
    dmean_prob_E: Tensor | None,
    sigmoid: bool,
    normalize: bool,
    scale: float,
) -> Tensor:
    """The gradient of the logits, in probs' dtype. `logits` are needed for sigmoid scores with dlse, `weight` with
    `normalize`."""
    # dense: what reaches all scores; sparse: what reaches those of the experts that hold the token, times the score, or
    # with `normalize` what reaches the logits of these experts.
    dense_TE = dprobs_TE
    if dmean_prob_E is not None:
        row_E = dmean_prob_E / max(len(probs_TE), 1)
        dense_TE = row_E.expand_as(probs_TE) if dense_TE is None else dense_TE + row_E
    held_TK, sparse_TK = None, None
    if dweight_TK is not None:
        kept_TK, held_TK = expert_TK >= 0, expert_TK.clamp_min(0).long()
        score_TK = torch.where(kept_TK, probs_TE.gather(1, held_TK), 0.0)
        if normalize:
            assert weight_TK is not None
            dweight_TK = torch.where(kept_TK, dweight_TK, 0.0)
            sparse_TK = weight_TK * (dweight_TK - _mean(dweight_TK, weight_TK))
        else:
            sparse_TK = torch.where(kept_TK, dweight_TK * scale, 0.0) * score_TK

    if sigmoid:
        dlogits_TE = torch.zeros_like(probs_TE) if dense_TE is None else dense_TE * probs_TE * (1.0 - probs_TE)
        if held_TK is not None and sparse_TK is not None:
            dlogits_TE.scatter_add_(1, held_TK, sparse_TK * (1.0 - score_TK))
        if dlse_T is not None:
            assert logits is not None
            logits_TE = logits.to(probs_TE.dtype)
            softmax_TE = (logits_TE - lse_T[:, None]).exp_().mul_(dlse_T[:, None])
            dlogits_TE += torch.where(logits_TE.logsumexp(-1).isfinite()[:, None], softmax_TE, 0.0)
        return dlogits_TE

    inner_T1 = torch.zeros_like(lse_T)[:, None]
    if dense_TE is not None:
        inner_T1 = (dense_TE * probs_TE).sum(-1, keepdim=True)
    if sparse_TK is not None and not normalize:  # shares of the held logits know no other scores
        inner_T1 += sparse_TK.sum(-1, keepdim=True)
    if dlse_T is not None:
        inner_T1 -= dlse_T[:, None]
    dlogits_TE = probs_TE * -inner_T1 if dense_TE is None else (dense_TE - inner_T1).mul_(probs_TE)
    if held_TK is not None and sparse_TK is not None:
        dlogits_TE.scatter_add_(1, held_TK, sparse_TK)
    return dlogits_TE


def _ranking(key_TE: Tensor, ranks: int) -> Tensor:
    """Each row's `ranks` largest, the largest first; ties to the lower expert."""
    E = key_TE.shape[1]
    if 2 * ranks > E:
        return key_TE.sort(dim=-1, descending=True, stable=True).indices[:, :ranks]
    # topk is faster but leaves the order of ties open: rows that have one among their best are sorted after all.
    best_TR, ranking_TR = key_TE.topk(ranks + 1)
    tied = (best_TR[:, 1:] == best_TR[:, :-1]).any(-1).nonzero().flatten()
    ranking_TR = ranking_TR[:, :ranks]
    if len(tied):
        ranking_TR[tied] = key_TE[tied].sort(dim=-1, descending=True, stable=True).indices[:, :ranks]
    return ranking_TR


def _within_groups(ranking_TE: Tensor, choice_TE: Tensor, num_groups: int, group_top_k: int) -> Tensor:
    """The ranking without the experts of all but each token's `group_top_k` best groups."""
    T, E = choice_TE.shape
    size = E // num_groups
    worth_TG = choice_TE.view(T, num_groups, size).topk(min(2, size), dim=-1).values.sum(-1)
    best_TG = worth_TG.sort(dim=-1, descending=True, stable=True).indices[:, :group_top_k]
    barred_TG = torch.ones_like(worth_TG, dtype=torch.bool).scatter_(1, best_TG, False)
    barred_TE = barred_TG.gather(1, ranking_TE // size)
    barred_last_TE = barred_TE.int().sort(dim=-1, stable=True).indices
    return ranking_TE.gather(1, barred_last_TE)[:, : group_top_k * size]


def _serve(
    first_TK: Tensor,
    candidates: Callable[[Tensor, int], Tensor],
    score_TE: Tensor,
    by_probability: bool,
    capacity: int,
    max_reroutes: int,
) -> Tensor:
    """Rounds of requests until nothing is pending → the expert that each request is held by, or −1.

    A request's number is slot · T + token: rising numbers are the order of (slot, token).
    """
    (T, K), E = first_TK.shape, score_TE.shape[1]
    asked_N = first_TK.T.flatten().long()
    held_N = torch.full_like(asked_N, -1)
    pending = (asked_N >= 0).nonzero().flatten()
    room_E = torch.full((E,), capacity, device=first_TK.device)
    next_rank_T = torch.full((T,), K, device=first_TK.device)
    for round_ in range(max_reroutes + 1):
        if not len(pending):
            break
        served = pending
        if by_probability:
            score = score_TE[pending % T, asked_N[pending]]
            served = pending[score.sort(descending=True, stable=True).indices]
        served = served[asked_N[served].sort(stable=True).indices]  # by expert, each in the order of service
        expert = asked_N[served]
        count_E = torch.bincount(expert, minlength=E)
        place = torch.arange(len(served), device=served.device) - (count_E.cumsum(0) - count_E)[expert]
        accepted = place < room_E[expert]
        held_N[served[accepted]] = expert[accepted]
        room_E -= torch.minimum(count_E, room_E)

        rejected = served[~accepted]
        if round_ == max_reroutes or not len(rejected):
            break
        rejected = rejected[(rejected % T * K + rejected // T).sort().indices]  # by token, lower slots first
        token = rejected % T
        count_T = torch.bincount(token, minlength=T)
        turn = torch.arange(len(rejected), device=rejected.device) - (count_T.cumsum(0) - count_T)[token]
        rank = next_rank_T[token] + turn
        next_rank_T += count_T
        if round_ == 0:  # only these tokens will ever ask on
            ranking_RC = candidates(count_T.nonzero().flatten(), E)
            row_T = (count_T > 0).cumsum(0) - 1
        moved = rank < ranking_RC.shape[1]
        asked_N[rejected[moved]] = ranking_RC[row_T[token[moved]], rank[moved]]
        pending = rejected[moved].sort().values
    return held_N.view(K, T).T.int().contiguous()


def _shares(logits_TK: Tensor, sigmoid: bool) -> Tensor:
    """The scores of these logits over their sum; 0 for −Inf, also where there is nothing else.

    They may be too small for their dtype, so all are made e^−c times as large, c being the largest logit, but for
    sigmoid scores 0 at most. The largest is then at least 1/2.
    """
    top_T1 = logits_TK.amax(-1, keepdim=True).clamp_min(torch.finfo(logits_TK.dtype).min)
    if sigmoid:
        score_TK = (logits_TK.clamp_max(0.0) - top_T1.clamp_max(0.0)).exp() / (1.0 + (-logits_TK.abs()).exp())
    else:
        score_TK = (logits_TK - top_T1).exp()
    return score_TK / score_TK.sum(-1, keepdim=True).clamp_min(0.5)


def _mean(value_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """Each row's mean (T, 1) by these weights, whatever they add up to; 0 where they are all 0."""
    total_T1 = weight_TK.sum(-1, keepdim=True)
    return (value_TK * weight_TK).sum(-1, keepdim=True) / torch.where(total_T1 == 0.0, 1.0, total_T1)
