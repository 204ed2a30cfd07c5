"""Attention with its tangent, and both its backward passes, in plain PyTorch and O(N D + N block) memory.

Work goes by blocks of query rows. A block holds its rows' logits S and their tangent T against ALL keys that they see,
so it needs no online softmax, and T is centred by its exact mean mu before anything is summed:

    S = c q kT + mask    T = c (t_q kT + q t_kT) + t_mask    P = softmax S    mu = rowsum(P T)    Z = T - mu
    o = P v              t_o = (P Z) v + P t_v               lse = log rowsum(exp S), whose tangent is mu

The primal backward, at cotangents do and d_lse, is dv = PT do; dP = do vT; dS = P (dP - rowsum(P dP) + d_lse);
dq = c dS k; dk = c dST q. The mixed backward is the same map at cotangents dt_o and d_mu, together with its tangent
along (t_q, t_k, t_v; do, d_lse): its value is (dt_q, dt_k, dt_v), its tangent is (dq, dk, dv). So one routine serves
both, and everything is a product of pairs (value, tangent). Stored side by side, pairs make such products fewer and
larger: t_q kT + q t_kT is ONE matmul of [t_q | q] with [k | t_k], and P [v | t_v] is o beside half of t_o. Queries that
share a key head are rows of one block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastdistill.ops.attention.logit_blocks import Blocks, Two, accumulator_dtype, put_columns, sequences, softmax_
from fastdistill.ops.protocol.pair import Needs, Pair, Pairs, moves, transposed, without_tangents


def attention_forward(
    inputs: Pairs,
    *,
    window: tuple[int, int],
    lower_right: bool,
    cu_seqlens: tuple[Tensor, Tensor, int, int] | None,
    scale: float,
    grad: bool = False,
    tangent_grad: bool = False,
) -> tuple[tuple[Pair, Pair], tuple[None, None]]:
    """Return attention and its tangent: (((o, t_o), (lse, mu)), (o_rest, t_o_rest)).

    Args:
        inputs: the pairs of q (B, H, N, D), k (B, Hkv, M, D), v (B, Hkv, M, Dv), any strides, and of the mask, None or
            expanded to (B, H, N, M).
        window, lower_right: query i sees the keys i + shift - left ... i + shift + right of `window` (left, right), -1
            being no limit; shift is M - N if `lower_right`, else 0.
        cu_seqlens: (cu_n, cu_m, max_n, max_m), with a B of 1 and no mask: sequence z has the queries cu_n[z] ...
            cu_n[z + 1] - 1 and the keys cu_m[z] ... cu_m[z + 1] - 1, and a window of its own.
        grad, tangent_grad: ignored. They ask for o_rest and t_o_rest, what a backward may need of o and t_o beyond
            their dtype; the backward below needs nothing, so both are None.

    Returns:
        o, t_o (B, H, N, Dv) in q's dtype; lse, mu (B, H, N) in float32 (float64 for float64). t_o and mu are None
        without any tangent. A row that sees no key has o = t_o = mu = 0 and lse = -inf.

    Equivalent to:
        `torch.func.jvp` of `reference.attention` and `reference.attention_lse`, a sequence at a time
    """
    (q, t_q), (k, t_k), (v, t_v), mask = inputs
    o = q.new_zeros(*q.shape[:-1], v.shape[-1])
    lse = q.new_full(q.shape[:-1], -math.inf, dtype=accumulator_dtype(q))
    t_o, mu = (torch.zeros_like(o), torch.zeros_like(lse)) if moves(inputs) else (None, None)

    # An enclosing autocast would cast the operands of the matmuls back to 16 bits.
    with torch.autocast(q.device.type, enabled=False):
        for queries, keys in sequences(cu_seqlens):
            blocks = Blocks(queries(q)[0], keys(k)[0], mask, window, lower_right)
            _forward(blocks, queries(q, t_q), keys(k, t_k), keys(v, t_v), queries(o, t_o, lse, mu), scale)
    return (Pair(o, t_o), Pair(lse, mu)), (None, None)


def _forward(blocks: Blocks, q: Two, k: Two, v: Two, results: Sequence[Tensor | None], scale: float) -> None:
    """Fill (o, t_o, lse, mu) where rows see a key."""
    o, t_o, lse, mu = results
    assert o is not None
    for heads in blocks.heads():
        keys, values = blocks.column_pair("keys", k, heads), blocks.column_pair("values", v, heads)
        for at in blocks.rows(heads):
            queries, seen = blocks.row_pair("queries", q, at, scale), keys.narrow(at.columns)
            weights, z = blocks.logits(queries, seen, at)
            blocks.put(lse, softmax_(weights), at)
            if z is not None:
                blocks.put(mu, blocks.centre_(z, weights), at)
                z.mul_(weights)
            shape = (*weights.shape[:2], o.shape[3])
            sums = blocks.sums("sums", shape, (True, t_o is not None), flip=False)
            sums.add_product(weights, z, values.narrow(at.columns))
            blocks.put(o, sums.value, at)
            blocks.put(t_o, sums.tangent, at)


def attention_backward(
    cotangents: Pairs,
    inputs: Pairs,
    saved: tuple[Pairs, Sequence[Tensor | None]],
    *,
    window: tuple[int, int],
    lower_right: bool,
    cu_seqlens: tuple[Tensor, Tensor, int, int] | None,
    scale: float,
    needs: Needs,
) -> list[Pair]:
    """Return the gradients of <do, o> + <dt_o, t_o> + <d_lse, lse> + <d_mu, mu>, in pairs as `needs`.

    Args:
        cotangents: (do, dt_o) and (d_lse, d_mu); None is zero. Without dt_o and d_mu this is the primal backward, and
            no tangent is read.
        inputs, window, lower_right, cu_seqlens, scale: as in `attention_forward`.
        saved: what it returned. It serves implementations that see a tile of the keys at a time; here a block sees all
            its keys and takes those sums again, so that they carry no rounding of a stored result.
        needs: which gradients of q, k, v, the mask and of their tangents are wanted; the others are None.

    Returns:
        (dq, dt_q), (dk, dt_k), (dv, dt_v), (d_mask, dt_mask). Those of masks, (B, H, N, M), are the only tensors that
        grow with N M.
    """
    (do, dt_o), (d_lse, d_mu) = cotangents
    mixed = dt_o is not None or d_mu is not None
    if mixed:
        of_output, of_statistic = (dt_o, do), (d_mu, d_lse)
        wants = [(of_tangent, of_primal) for of_primal, of_tangent in needs]
    else:
        of_output, of_statistic = (do, None), (d_lse, None)
        wants = [(of_primal, False) for of_primal, _ in needs]
        inputs = without_tangents(inputs)
    (q, t_q), (k, t_k), (v, t_v), mask = inputs
    # For each of q, k, v, mask the (value, tangent) of the map that the module's docstring speaks of.
    results = [_zeros(x, want) for (x, _), want in zip(inputs, wants, strict=True)]

    with torch.autocast(q.device.type, enabled=False):
        for queries, keys in sequences(cu_seqlens):
            blocks = Blocks(queries(q)[0], keys(k)[0], mask, window, lower_right)
            arguments = queries(q, t_q), keys(k, t_k), keys(v, t_v), queries(*of_output), queries(*of_statistic)
            into = queries(*results[0]), keys(*results[1]), keys(*results[2]), results[3]
            _backward(blocks, *arguments, into, wants, scale)
    return [Pair(tangent, value) if mixed else Pair(value, tangent) for value, tangent in results]


def _backward(
    blocks: Blocks,
    q: Two,
    k: Two,
    v: Two,
    cotangents: Two,
    d_statistics: Two,
    results: Sequence[Two],
    wants: Sequence[tuple[bool, bool]],
    scale: float,
) -> None:
    """Fill the results of q, k, v and mask: of each the value and the tangent that it wants."""
    want_q, want_k, want_v, want_mask = wants
    want_logits = (want_q[0] or want_k[0] or want_mask[0], want_q[1] or want_k[1] or want_mask[1])
    for heads in blocks.heads():
        keys, values = blocks.column_pair("keys", k, heads), blocks.column_pair("values", v, heads)
        k_sums = blocks.sums("k_sums", keys.shape, want_k, flip=True)
        v_sums = blocks.sums("v_sums", values.shape, want_v, flip=True)
        for at in blocks.rows(heads):
            queries, seen = blocks.row_pair("queries", q, at, scale), keys.narrow(at.columns)
            d_rows = blocks.row_pair("cotangents", cotangents, at)
            weights, z = blocks.logits(queries, seen, at)
            lse = softmax_(weights)
            if z is not None:
                blocks.centre_(z, weights)
            d_stats = blocks.statistic(d_statistics[0], at, lse), blocks.statistic(d_statistics[1], at, lse)
            d_logits = blocks.logit_gradients(weights, z, d_rows, values.narrow(at.columns), d_stats, want_logits)
            q_sums = blocks.sums("q_sums", queries.shape, want_q, flip=False)
            q_sums.add_product(*d_logits, seen)
            k_sums.narrow(at.columns).add_product(transposed(d_logits[0]), transposed(d_logits[1]), queries)
            t_weights = None if z is None else z.mul_(weights)
            v_sums.narrow(at.columns).add_product(weights.mT, transposed(t_weights), d_rows)
            for i in (0, 1):
                blocks.put(results[0][i], q_sums[i], at, scale)
                blocks.put(results[3][i], d_logits[i], at, columns=at.columns)
        for i in (0, 1):
            put_columns(results[1][i], k_sums[i], heads)
            put_columns(results[2][i], v_sums[i], heads)


def _zeros(x: Tensor | None, wants: tuple[bool, bool]) -> Two:
    value, tangent = (x.new_zeros(x.shape) if x is not None and want else None for want in wants)
    return value, tangent
