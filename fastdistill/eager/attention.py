"""Attention with its tangent, and both its backward passes, in plain PyTorch and O(N D + N block) memory.

Work goes by blocks of query rows. A block holds its rows' logits S and their tangent T against ALL keys, so it needs no
online softmax, and T is centred by its exact mean mu before anything is summed:

    S = c q kT + mask    T = c (t_q kT + q t_kT) + t_mask    P = softmax S    mu = rowsum(P T)    Z = T - mu
    o = P v              t_o = (P Z) v + P t_v

The primal backward, at cotangent do, is dv = PT do; dP = do vT; dS = P (dP - rowsum(P dP)); dq = c dS k; dk = c dST q.
The mixed backward is the same map at cotangent dt_o, together with its tangent along (t_q, t_k, t_v; do): its value is
(dt_q, dt_k, dt_v), its tangent is (dq, dk, dv). So one routine serves both, and everything is a product of pairs
(value, tangent). Stored side by side, pairs make such products fewer and larger: t_q kT + q t_kT is ONE matmul of
[t_q | q] with [k | t_k], and P [v | t_v] is o beside half of t_o. Queries that share a key head are rows of one block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Logits in one block. On a CPU a block should stay in the cache; a GPU wants few and large launches.
_BLOCK_SIZE = {"cpu": 1 << 20, "cuda": 1 << 24}
_LEAST_ROWS = 32  # with fewer, a matmul only waits for its keys
_CAUSAL_BLOCKS = 8  # at least so many: a block computes its logits up to its last row's diagonal


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    t_q: Tensor | None,
    t_k: Tensor | None,
    t_v: Tensor | None,
    attn_mask: Tensor | None,
    t_attn_mask: Tensor | None,
    *,
    is_causal: bool,
    scale: float,
    tangent_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Attention and its tangent: (o, t_o, lse, mu, o_acc, t_o_acc).

    q (B, H, N, D), k (B, Hkv, M, D), v (B, Hkv, M, Dv), any strides; masks expanded to (B, H, N, M). o (B, H, N, Dv) in
    q's dtype; lse, mu (B, H, N) and o_acc, t_o_acc in float32 (float64 for float64). t_o and mu are None without any
    tangent; o_acc and t_o_acc are None unless a 16-bit tangent is to be differentiated. A row that sees no key has
    o = t_o = mu = 0 and lse = -inf.

    Equivalent to: `torch.func.jvp(reference.attention, (q, k, v, attn_mask), (t_q, t_k, t_v, t_attn_mask))`.
    """
    has_tangent = any(t is not None for t in (t_q, t_k, t_v, t_attn_mask))
    blocks = _Blocks(q, k, attn_mask, t_attn_mask, is_causal)
    keep = tangent_grad and has_tangent and blocks.dtype != q.dtype
    o = q.new_zeros(*q.shape[:-1], v.shape[-1], dtype=blocks.dtype if keep else q.dtype)
    lse = q.new_full(q.shape[:-1], -math.inf, dtype=blocks.dtype)
    t_o = torch.zeros_like(o) if has_tangent else None
    mu = torch.zeros_like(lse) if has_tangent else None

    # An enclosing autocast would cast the operands of the matmuls back to 16 bits.
    with torch.autocast(q.device.type, enabled=False):
        for heads in blocks.heads():
            keys, values = blocks.column_pair("keys", k, t_k, heads), blocks.column_pair("values", v, t_v, heads)
            for at in blocks.rows(heads):
                queries, seen = blocks.row_pair("queries", q, t_q, at, scale), keys.narrow(at.visible)
                weights, z = blocks.logits(queries, seen, at)
                blocks.put(lse, _softmax_(weights), at)
                if z is not None:
                    blocks.put(mu, blocks.centre_(z, weights), at)
                    z.mul_(weights)
                sums = blocks.sums("sums", (*weights.shape[:2], v.shape[3]), (True, has_tangent), flip=False)
                sums.add_product(weights, z, values.narrow(at.visible))
                blocks.put(o, sums.value, at)
                blocks.put(t_o, sums.tangent, at)
    if not keep:
        return o, t_o, lse, mu, None, None
    return o.to(q.dtype), None if t_o is None else t_o.to(q.dtype), lse, mu, o, t_o


def attention_backward(
    do: Tensor | None,
    dt_o: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    t_q: Tensor | None,
    t_k: Tensor | None,
    t_v: Tensor | None,
    attn_mask: Tensor | None,
    t_attn_mask: Tensor | None,
    o: Tensor | None,
    t_o: Tensor | None,
    lse: Tensor | None,
    mu: Tensor | None,
    *,
    is_causal: bool,
    scale: float,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of <do, o> + <dt_o, t_o>: (dq, dk, dv, d_attn_mask, dt_q, dt_k, dt_v, dt_attn_mask).

    `needs` says which of the eight, in that order; the others are None. Without dt_o this is the primal backward, and
    no tangent is read; with dt_o, do may be None. Gradients of masks, (B, H, N, M), are the only tensors that grow with
    N M. o, t_o, lse and mu serve implementations that see a tile of the keys at a time. Here a block sees all keys and
    takes those sums again, so they carry no rounding of a stored result.
    """
    if dt_o is None:
        cotangent, t_cotangent, t_q, t_k, t_v, t_attn_mask = do, None, None, None, None, None
        wants = [(need, False) for need in needs[:4]]
    else:
        cotangent, t_cotangent = dt_o, do
        wants = list(zip(needs[4:], needs[:4], strict=True))
    if cotangent is None:
        raise ValueError("do: expected a tensor where dt_o is None, got None")
    blocks = _Blocks(q, k, attn_mask, t_attn_mask, is_causal)
    # For each of q, k, v, attn_mask the (value, tangent) of the map that the module's docstring speaks of.
    results = [_zeros(x, want) for x, want in zip((q, k, v, attn_mask), wants, strict=True)]
    want_q, want_k, want_v, want_mask = wants
    want_logits = (want_q[0] or want_k[0] or want_mask[0], want_q[1] or want_k[1] or want_mask[1])

    with torch.autocast(q.device.type, enabled=False):
        for heads in blocks.heads():
            keys, values = blocks.column_pair("keys", k, t_k, heads), blocks.column_pair("values", v, t_v, heads)
            k_sums = blocks.sums("k_sums", keys.value.shape, want_k, flip=True)
            v_sums = blocks.sums("v_sums", values.value.shape, want_v, flip=True)
            for at in blocks.rows(heads):
                queries, seen = blocks.row_pair("queries", q, t_q, at, scale), keys.narrow(at.visible)
                cotangents = blocks.row_pair("cotangents", cotangent, t_cotangent, at)
                weights, z = blocks.logits(queries, seen, at)
                _softmax_(weights)
                if z is not None:
                    blocks.centre_(z, weights)
                d_logits = blocks.logit_gradients(weights, z, cotangents, values.narrow(at.visible), want_logits)
                q_sums = blocks.sums("q_sums", queries.value.shape, want_q, flip=False)
                q_sums.add_product(*d_logits, seen)
                k_sums.narrow(at.visible).add_product(_mT(d_logits[0]), _mT(d_logits[1]), queries)
                t_weights = None if z is None else z.mul_(weights)
                v_sums.narrow(at.visible).add_product(weights.mT, _mT(t_weights), cotangents)
                for i in (0, 1):
                    blocks.put(results[0][i], q_sums[i], at, scale)
                    blocks.put(results[3][i], d_logits[i], at)
            for i in (0, 1):
                _put_columns(results[1][i], k_sums[i], heads)
                _put_columns(results[2][i], v_sums[i], heads)
    of_value, of_tangent = zip(*results, strict=True)
    return (*of_value, *of_tangent) if dt_o is None else (*of_tangent, *of_value)


class _At(NamedTuple):
    """Where a block lies: slices of the batch, of the heads of k and of the query rows, and how many keys it sees."""

    batch: slice
    heads: slice
    rows: slice
    visible: int


class _Pair(NamedTuple):
    """A block (Z, R, W) of a tensor, its tangent, and both side by side; without a tangent only the value.

    Side by side is [value | tangent] for k and v, flipped to [tangent | value] for what is multiplied with them.
    """

    value: Tensor
    tangent: Tensor | None
    both: Tensor | None

    def narrow(self, length: int) -> _Pair:
        """The first `length` rows."""
        return _Pair(self.value[:, :length], _first(self.tangent, length), _first(self.both, length))


class _Sums(NamedTuple):
    """Accumulators (Z, R, W) for the product of two pairs: its value and its tangent, each only where wanted."""

    value: Tensor | None
    tangent: Tensor | None
    both: Tensor | None

    def narrow(self, length: int) -> _Sums:
        """The first `length` rows."""
        return _Sums(*(_first(x, length) for x in self))

    def add_product(self, a: Tensor | None, t_a: Tensor | None, x: _Pair) -> None:
        """value += a x and tangent += a t_x + t_a x, where wanted; what meets a is one matmul if all of it is."""
        if a is not None and self.both is not None and x.both is not None:
            _add_matmul_(self.both, a, x.both)
        elif a is not None:
            _add_matmul_(self.value, a, x.value)
            _add_matmul_(self.tangent, a, x.tangent)
        if t_a is not None:
            _add_matmul_(self.tangent, t_a, x.value)


class _Blocks:
    """Cuts the problem into blocks, brings their operands to the form (Z, rows, width), and puts results back.

    Z counts pairs of a batch entry and a head of k; rows are those of all queries that share this head. Small problems
    go many heads to a block, large ones some rows of one head.
    """

    def __init__(
        self, q: Tensor, k: Tensor, attn_mask: Tensor | None, t_attn_mask: Tensor | None, is_causal: bool
    ) -> None:
        self.dtype, self._device = torch.promote_types(q.dtype, torch.float32), q.device
        self._attn_mask, self._t_attn_mask, self._is_causal = attn_mask, t_attn_mask, is_causal
        self._batch, self._kv_heads, self._m, _ = k.shape
        self._group, self._n = q.shape[1] // k.shape[1], q.shape[2]
        self._size = _BLOCK_SIZE["cpu" if q.device.type == "cpu" else "cuda"]
        self._memory: dict[str, Tensor] = {}

    def heads(self) -> Iterator[tuple[slice, slice]]:
        """Slices of the batch and of the heads of k: as many as fit into one block with all their logits."""
        fit = self._size // max(1, self._group * self._n * self._m)
        batches, heads = max(1, fit // self._kv_heads), max(1, fit)
        for b in range(0, self._batch, batches):
            for h in range(0, self._kv_heads, heads):
                yield slice(b, min(b + batches, self._batch)), slice(h, min(h + heads, self._kv_heads))

    def rows(self, heads: tuple[slice, slice]) -> Iterator[_At]:
        """The blocks of these heads, of about equally many rows each; none where there are no keys.

        The last rows come first: under is_causal they see most keys, so the buffers start at their full size.
        """
        if self._n == 0 or self._m == 0:
            return
        width = self._group * self._m * math.prod(part.stop - part.start for part in heads)
        most = max(self._size // width, _LEAST_ROWS // self._group, 1)
        if self._is_causal:
            most = min(most, max(_LEAST_ROWS, self._n // _CAUSAL_BLOCKS))
        step = math.ceil(self._n / math.ceil(self._n / most))
        for start in reversed(range(0, self._n, step)):
            stop = min(start + step, self._n)
            yield _At(*heads, slice(start, stop), min(stop, self._m) if self._is_causal else self._m)

    def column_pair(self, name: str, x: Tensor, t_x: Tensor | None, heads: tuple[slice, slice]) -> _Pair:
        """k or v of these heads."""
        return self._pair(name, x[heads], None if t_x is None else t_x[heads], flip=False)

    def row_pair(self, name: str, x: Tensor, t_x: Tensor | None, at: _At, scale: float = 1.0) -> _Pair:
        """q or a cotangent in the rows of a block, times `scale`; flipped."""
        return self._pair(name, self._part(x, at), None if t_x is None else self._part(t_x, at), flip=True, scale=scale)

    def _pair(self, name: str, x: Tensor, t_x: Tensor | None, *, flip: bool, scale: float = 1.0) -> _Pair:
        z, width = x.shape[0] * x.shape[1], x.shape[-1]
        rows = x.numel() // (z * width)
        whole = self._buffer(name, (z, rows, width if t_x is None else 2 * width))
        pair = _Pair(whole, None, None) if t_x is None else _Pair(*_halves(whole, flip))
        pair.value.view(x.shape).copy_(x)
        if pair.tangent is not None and t_x is not None:
            pair.tangent.view(x.shape).copy_(t_x)
        if scale != 1:
            whole.mul_(scale)
        return pair

    def sums(self, name: str, shape: Sequence[int], wants: tuple[bool, bool], *, flip: bool) -> _Sums:
        """Zeros (Z, R, W) where wanted; flipped if the pairs that will be multiplied from the right are."""
        whole = self._buffer(name, (*shape[:-1], sum(wants) * shape[-1])).zero_()
        if all(wants):
            return _Sums(*_halves(whole, flip))
        return _Sums(whole if wants[0] else None, whole if wants[1] else None, None)

    def logits(self, queries: _Pair, keys: _Pair, at: _At) -> tuple[Tensor, Tensor | None]:
        """S and T of a block, masked; T is None where it is zero. The scale is in `queries`."""
        shape = (*queries.value.shape[:2], at.visible)
        logits = torch.bmm(queries.value, keys.value.mT, out=self._buffer("logits", shape))
        t_logits = _product_tangent(queries, keys, self._buffer("t_logits", shape))
        if self._attn_mask is not None:
            self._unfold(logits, at).add_(_addend(self._part(self._attn_mask, at)[..., : at.visible], self.dtype))
        if self._t_attn_mask is not None:
            t_logits = self._buffer("t_logits", shape).zero_() if t_logits is None else t_logits
            self._unfold(t_logits, at).add_(self._part(self._t_attn_mask, at)[..., : at.visible])
        if self._is_causal and at.visible > at.rows.start:
            size = at.rows.stop - at.rows.start, at.visible - at.rows.start
            hidden = torch.ones(size, dtype=torch.bool, device=logits.device).triu(1)
            self._unfold(logits, at)[..., at.rows.start :].masked_fill_(hidden, -math.inf)
        return logits, t_logits

    def centre_(self, x: Tensor, weights: Tensor) -> Tensor:
        """Subtract each row's weighted mean in place; returns that mean (Z, R, 1).

        The mean is itself rounded, to the size of a common mode of x, and what is left of it would be multiplied by a
        common mode of v or k. So it is taken out in two steps.
        """
        product = self._buffer("product", x.shape)
        mean = torch.mul(x, weights, out=product).sum(dim=-1, keepdim=True)
        rest = torch.mul(x.sub_(mean), weights, out=product).sum(dim=-1, keepdim=True)
        x.sub_(rest)
        return mean + rest

    def logit_gradients(
        self, weights: Tensor, z: Tensor | None, cotangents: _Pair, values: _Pair, wants: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """dS = P (dP - rowsum(P dP)) with dP = cotangent @ v.mT, and its tangent along Z; each where wanted."""
        value, tangent = None, None
        if wants[1]:
            tangent = _product_tangent(cotangents, values, self._buffer("t_d_logits", weights.shape))
        if wants[0] or (wants[1] and z is not None):
            value = torch.bmm(cotangents.value, values.value.mT, out=self._buffer("d_logits", weights.shape))
            self.centre_(value, weights)
            if wants[1] and z is not None:
                tangent = self._buffer("t_d_logits", weights.shape).zero_() if tangent is None else tangent
                tangent.addcmul_(value, z)
            value.mul_(weights)
        if tangent is not None:
            self.centre_(tangent, weights)
            tangent.mul_(weights)
        return value, tangent

    def put(self, whole: Tensor | None, block: Tensor | None, at: _At, scale: float = 1.0) -> None:
        """Write a block's rows, times `scale`, to where they belong; of a tensor over keys, to the visible ones."""
        if whole is not None and block is not None:
            part = self._part(whole, at)
            part = part.unsqueeze(-1) if part.dim() == 4 else part[..., : block.shape[-1]]
            part.copy_(_times(block, scale).reshape(part.shape))

    def _buffer(self, name: str, shape: Sequence[int]) -> Tensor:
        """Uninitialised memory that all blocks share: half the peak of a fresh allocation each."""
        size = math.prod(shape)
        if name not in self._memory or self._memory[name].numel() < size:
            self._memory[name] = torch.empty(size, dtype=self.dtype, device=self._device)
        return self._memory[name][:size].view(shape)

    def _part(self, x: Tensor, at: _At) -> Tensor:
        return x.unflatten(1, (self._kv_heads, self._group))[at.batch, at.heads, :, at.rows]

    def _unfold(self, block: Tensor, at: _At) -> Tensor:
        z, rows, width = block.shape
        batches, rows = at.batch.stop - at.batch.start, rows // self._group
        return block.view(batches, z // batches, self._group, rows, width)


def _softmax_(logits: Tensor) -> Tensor:
    """Softmax in place; returns lse (Z, R, 1). A row of -inf becomes zeros, with lse = -inf."""
    row_max = logits.amax(dim=-1, keepdim=True)
    logits.sub_(row_max.masked_fill(row_max == -math.inf, 0.0)).exp_()
    total = logits.sum(dim=-1, keepdim=True)
    total.masked_fill_(total == 0, 1.0)
    logits.div_(total)
    return row_max + total.log()


def _product_tangent(left: _Pair, right: _Pair, out: Tensor) -> Tensor | None:
    """Tangent of left @ right.mT by the product rule; `left` is flipped, so that two tangents need only one matmul."""
    if left.both is not None and right.both is not None:
        return torch.bmm(left.both, right.both.mT, out=out)
    if left.tangent is not None:
        return torch.bmm(left.tangent, right.value.mT, out=out)
    return None if right.tangent is None else torch.bmm(left.value, right.tangent.mT, out=out)


def _add_matmul_(into: Tensor | None, a: Tensor, b: Tensor | None) -> None:
    if into is None or b is None:
        return
    if into.shape[0] == 1 or into.is_contiguous():
        into.baddbmm_(a, b)
    else:  # on a CPU, baddbmm_ into a strided result is a loop over the batch
        into.add_(a @ b)


def _addend(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What a mask adds to the logits, in size 1 where it is broadcast: key padding costs next to nothing."""
    for dim, stride in enumerate(mask.stride()):
        if stride == 0:
            mask = mask.narrow(dim, 0, 1)
    addend = mask.to(dtype)
    if mask.dtype == torch.bool:
        return 1 - addend.reciprocal_()  # True -> 0, False -> -inf, in half the time of a masked fill
    return addend


def _put_columns(whole: Tensor | None, block: Tensor | None, heads: tuple[slice, slice]) -> None:
    if whole is not None and block is not None:
        part = whole[heads]
        part.copy_(block.reshape(part.shape))


def _times(x: Tensor, scale: float) -> Tensor:
    return x if scale == 1 else x * scale


def _halves(both: Tensor, flip: bool) -> tuple[Tensor, Tensor, Tensor]:
    first, second = both.chunk(2, dim=-1)
    return (second, first, both) if flip else (first, second, both)


def _zeros(x: Tensor | None, wants: tuple[bool, bool]) -> tuple[Tensor | None, Tensor | None]:
    value, tangent = (x.new_zeros(x.shape) if x is not None and want else None for want in wants)
    return value, tangent


def _first(x: Tensor | None, length: int) -> Tensor | None:
    return None if x is None else x[:, :length]


def _mT(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.mT
