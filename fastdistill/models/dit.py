"""Define one lean DiT for flow maps: adaLN-Zero blocks, class labels, and two times.

It follows Peebles and Xie, "Scalable Diffusion Models with Transformers" (arXiv:2212.09748), built on fused-tangent
ops. The same network serves flow matching, where s = t, and flow maps, so the jvp needs no second copy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastdistill import ops
from fastdistill.models.mlp import guidance_time
from fastdistill.nn import (
    Attention,
    GatedResidualAdaNorm,
    Linear,
    Mlp,
    Modulation,
    RMSNorm,
    Rotation,
    TimestepEmbedding,
    full_precision,
    sincos_2d,
)

POSITIONS = ("sincos", "rope")

# (gate, h) stands for the residual stream x + gate * h that is still to be computed.
Branch = tuple[Tensor, Tensor]


class DiTBlock(nn.Module):
    """Compute x + gate · attention(adaLN(x)), then x + gate · mlp(adaLN(x)), modulated by the condition.

    A block does not add its last branch to the residual stream. That sum and the norm that follows it are one op, which
    the next block runs, or the final layer.

    Args of forward:
        x: (B, N, C), the residual stream.
        pending: (gate, h), the branch that is still to be added to x; None in the first block.
        condition: (B, C).
        rotation: see `Attention`.

    Returns:
        x, with `pending` and the attention's branch; and the mlp's branch, (gate, h), which is pending now.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float, qk_norm: bool) -> None:
        super().__init__()
        self.modulation = Modulation(width, 6)
        self.before_attn = GatedResidualAdaNorm(width)
        self.attn = Attention(width, heads, qk_norm=qk_norm)
        self.before_mlp = GatedResidualAdaNorm(width)
        self.mlp = Mlp(width, int(mlp_ratio * width))

    def forward(
        self, x: Tensor, pending: Branch | None, condition: Tensor, rotation: Rotation | None
    ) -> tuple[Tensor, Branch]:
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = self.modulation(condition)
        x, y = _resumed(self.before_attn, x, pending, scale_attn, shift_attn)
        x, y = self.before_mlp(x, gate_attn, self.attn(y, rotation), scale_mlp, shift_mlp)
        return x, (gate_mlp, self.mlp(y))


class FinalLayer(nn.Module):
    """Compute the last gated residual, its modulated norm, and the projection to pixels, in the parameters' dtype."""

    def __init__(self, width: int, out_features: int) -> None:
        super().__init__()
        self.modulation = Modulation(width, 2)
        self.norm = GatedResidualAdaNorm(width)
        self.linear = Linear(width, out_features)

    def forward(self, x: Tensor, pending: Branch, condition: Tensor) -> Tensor:
        shift, scale = self.modulation(condition)
        gate, h = pending
        with full_precision(x.device):
            _, y = self.norm(x, gate, h.to(x.dtype), scale, shift)  # Here y has the dtype of h.
            return self.linear(y)


def _resumed(
    norm: GatedResidualAdaNorm, x: Tensor, pending: Branch | None, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor]:
    """Add what was pending to the residual stream, and return it with its modulated norm."""
    if pending is None:
        return x, ops.ada_layer_norm(x, scale, shift, eps=norm.eps)
    gate, h = pending
    return norm(x, gate, h, scale, shift)


class DiT(nn.Module):
    """Diffusion transformer u(x, t, s, y), which predicts the average velocity from time t to time s.

    The condition is emb_t(t) + emb_d(t - s) + emb_y(y), MeanFlow's best choice (arXiv:2505.13447, its ablation). The
    difference is taken here, inside the function that is differentiated, so that callers name t and s and the tangent
    follows by the chain rule. On the diagonal emb_d adds a constant: there the network is an ordinary DiT.

    Precision. Only attention and mlp follow autocast, from their first matmul to their last. The residual stream and
    its tangent, embeddings, condition, modulation and the final layer have the dtype of the parameters. Under bf16
    autocast that halves the error of the tangent: benchmarks/results/precision.md.

    Args:
        channels: channels of the image, in and out.
        patch_size: side of a patch; a token is one patch.
        width: C, a multiple of `heads` and of 4.
        depth: number of blocks.
        heads: H.
        num_classes: labels 0 .. num_classes - 1; `num_classes` itself is "no label".
        mlp_ratio: hidden width of the mlp over C.
        qk_norm: RMS-normalise queries and keys per head.
        pos: "sincos" adds a fixed embedding to the tokens, "rope" rotates queries and keys (needs C / H % 4 == 0).
        guidance: take a guidance scale as input, g; it adds emb_g(1 / g) to the condition.

    Attributes:
        config: the arguments above, JSON-serialisable: ``DiT(**net.config)`` has the same architecture.

    Raises:
        ValueError: an argument breaks these rules; the message names it.
    """

    def __init__(
        self,
        *,
        channels: int,
        patch_size: int,
        width: int,
        depth: int,
        heads: int,
        num_classes: int,
        mlp_ratio: float = 4.0,
        qk_norm: bool = False,
        pos: str = "sincos",
        guidance: bool = False,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "channels": channels,
            "patch_size": patch_size,
            "width": width,
            "depth": depth,
            "heads": heads,
            "num_classes": num_classes,
            "mlp_ratio": mlp_ratio,
            "qk_norm": qk_norm,
            "pos": pos,
            "guidance": guidance,
        }
        _check_config(self.config)
        self.channels, self.patch_size = channels, patch_size
        self.width, self.heads = width, heads
        self.num_classes, self.pos = num_classes, pos
        patch_features = channels * patch_size**2
        self.x_embedder = Linear(patch_features, width)
        self.t_embedder = TimestepEmbedding(width)
        self.d_embedder = TimestepEmbedding(width)
        self.y_embedder = nn.Embedding(num_classes + 1, width)
        self.g_embedder = TimestepEmbedding(width) if guidance else None
        self.blocks = nn.ModuleList(DiTBlock(width, heads, mlp_ratio, qk_norm) for _ in range(depth))
        self.final_layer = FinalLayer(width, patch_features)
        self.initialize()

    def initialize(self) -> None:
        """Draw DiT's weights: Xavier for linear layers, N(0, 0.02²) for embeddings, zero for adaLN and the output.

        With the zeros every block starts as the identity and u starts at 0. Every parameter is written, so that this
        also fills a network made on the meta device, after ``to_empty``.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, RMSNorm):
                module.reset_parameters()
        for embedder in (self.t_embedder, self.d_embedder, self.g_embedder):
            if embedder is None:
                continue
            nn.init.normal_(embedder.fc1.weight, std=0.02)
            nn.init.normal_(embedder.fc2.weight, std=0.02)
        nn.init.normal_(self.y_embedder.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, Modulation):
                nn.init.zeros_(module.linear.weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    @property
    def last_layer(self) -> nn.Module:
        """Return the layer with which `forward` ends; another one of its shape gives the trunk another output."""
        return self.final_layer

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        y: Tensor | None = None,
        *,
        g: Tensor | None = None,
        last_layer: nn.Module | None = None,
    ) -> Tensor:
        """Return the average velocity from t to s at x.

        Args:
            x: (B, channels, height, width) of any size that the patch size divides.
            t: (B,) in [0, 1], the time to start from; t = 0 is data, t = 1 noise.
            s: (B,) in [0, t], the time to reach; s = t asks for the instantaneous velocity.
            y: (B,) int64 in [0, num_classes], or None for "no label" everywhere.
            g: (B,) guidance scales > 0, for a network with `guidance`; None means 1, no guidance.
            last_layer: replaces the network's own, e.g. by an auxiliary head in training; None keeps its own.

        Returns:
            u, of x's shape and dtype.

        Raises:
            ValueError: a shape breaks these rules, or g is given without `guidance`; the message names the argument.
        """
        self._check_inputs(x, t, s, y, g)
        p, (rows, columns) = self.patch_size, (x.shape[2] // self.patch_size, x.shape[3] // self.patch_size)
        with full_precision(x.device):
            tokens = self.x_embedder(_patchify(x, p).to(self.x_embedder.weight.dtype))
            condition = self._condition(t, s, y, g)
        rotation = None
        if self.pos == "rope":
            dtype = torch.promote_types(tokens.dtype, torch.float32)
            head_dim = self.width // self.heads
            rotation = ops.rope_angles((rows, columns), head_dim, device=tokens.device, dtype=dtype)
        else:
            tokens = tokens + sincos_2d((rows, columns), self.width, like=tokens)
        pending: Branch | None = None
        for block in self.blocks:
            tokens, pending = block(tokens, pending, condition, rotation)
        last = self.last_layer if last_layer is None else last_layer
        return _unpatchify(last(tokens, pending, condition), p, (rows, columns)).to(x.dtype)

    def _condition(self, t: Tensor, s: Tensor, y: Tensor | None, g: Tensor | None) -> Tensor:  # (B, C)
        if y is None:
            y = torch.full(t.shape, self.num_classes, device=t.device)
        condition = self.t_embedder(t) + self.d_embedder(t - s) + self.y_embedder(y)
        return condition if self.g_embedder is None else condition + self.g_embedder(guidance_time(g, t))

    def _check_inputs(self, x: Tensor, t: Tensor, s: Tensor, y: Tensor | None, g: Tensor | None) -> None:
        p = self.patch_size
        if x.dim() != 4 or x.shape[1] != self.channels or x.shape[2] % p or x.shape[3] % p:
            raise ValueError(
                f"x: expected (B, {self.channels}, height, width) with sides divisible by the patch size {p}, "
                f"got {tuple(x.shape)}"
            )
        for name, value in (("t", t), ("s", s), ("y", y), ("g", g)):
            if value is not None and value.shape != x.shape[:1]:
                raise ValueError(f"{name}: expected ({x.shape[0]},), one for each image, got {tuple(value.shape)}")
        if g is not None and self.g_embedder is None:
            raise ValueError("g: this network takes no guidance scale; make it with guidance=True")


def _patchify(x: Tensor, patch_size: int) -> Tensor:
    """Rearrange (B, C, R·p, S·p) -> (B, R·S, C·p·p), patches row by row."""
    p = patch_size
    return x.unflatten(3, (-1, p)).unflatten(2, (-1, p)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def _unpatchify(tokens: Tensor, patch_size: int, grid: tuple[int, int]) -> Tensor:
    """Invert `_patchify` for a grid of (R, S) patches."""
    p = patch_size
    return tokens.unflatten(2, (-1, p, p)).unflatten(1, grid).permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def _check_config(config: dict[str, Any]) -> None:
    for name in ("channels", "patch_size", "width", "depth", "heads"):
        if not isinstance(config[name], int) or config[name] < 1:
            raise ValueError(f"{name}: expected a positive integer, got {config[name]!r}")
    width, heads = config["width"], config["heads"]
    if not isinstance(config["num_classes"], int) or config["num_classes"] < 0:
        raise ValueError(f"num_classes: expected an integer from 0 up, got {config['num_classes']!r}")
    if int(config["mlp_ratio"] * width) < 1:
        raise ValueError(f"mlp_ratio: expected a positive number, got {config['mlp_ratio']}")
    if width % 4 or width % heads:
        raise ValueError(f"width: expected a multiple of 4 and of heads={heads}, got {width}")
    if config["pos"] not in POSITIONS:
        raise ValueError(f"pos: expected one of {', '.join(POSITIONS)}, got {config['pos']!r}")
    if config["pos"] == "rope" and (width // heads) % 4:
        raise ValueError(f"heads: pos='rope' needs width / heads to be a multiple of 4, got {width} / {heads}")
