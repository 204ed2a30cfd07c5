"""Define DiT in plain torch.nn.functional, on the same weights; ours is measured against it.

Attention is PyTorch's math backend, the only one that has a tangent. Under autocast everything follows PyTorch's rules.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastdistill.models import DiT

State = Mapping[str, Tensor]
Angles = tuple[Tensor, Tensor]


class PlainDiT:
    """Compute u(x, t, s) of a DiT with its weights, without a label."""

    def __init__(self, net: DiT) -> None:
        self.config = net.config
        self.state: State = dict(net.named_parameters())

    def __call__(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        config, p = self.config, self.config["patch_size"]
        rows, columns = x.shape[2] // p, x.shape[3] // p
        patches = F.unfold(x, p, stride=p).mT  # (B, N, C p p)
        h = linear(self.state, "x_embedder", patches)
        if config["pos"] == "sincos":
            h = h + _positions(rows, columns, config["width"]).to(h.device, self.state["x_embedder.weight"].dtype)
        unlabelled = self.state["y_embedder.weight"][-1]
        condition = self._time("t_embedder", t) + self._time("d_embedder", t - s) + unlabelled
        angles = _angles(rows, columns, config["width"] // config["heads"], x) if config["pos"] == "rope" else None
        for index in range(config["depth"]):
            h = plain_block(self.state, f"blocks.{index}.", config["heads"], h, condition, angles)
        shift, scale = modulation(self.state, "final_layer.", condition, 2)
        out = linear(self.state, "final_layer.linear", modulated(h, scale, shift))
        return F.fold(out.mT, x.shape[2:], p, stride=p).to(x.dtype)

    def _time(self, name: str, t: Tensor) -> Tensor:
        exponents = torch.linspace(0.0, 1.0, 128, dtype=t.dtype, device=t.device)
        angles = t[:, None] * 16.0**exponents
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)
        features = features.to(self.state[f"{name}.fc1.weight"].dtype)
        return linear(self.state, f"{name}.fc2", F.silu(linear(self.state, f"{name}.fc1", features)))


def plain_block(
    state: State, prefix: str, heads: int, x: Tensor, condition: Tensor, angles: Angles | None = None
) -> Tensor:
    """Compute a DiT block (B, N, C) -> (B, N, C); the names of its parameters in `state` start with `prefix`."""
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation(state, prefix, condition, 6)
    qkv = linear(state, f"{prefix}attn.qkv", modulated(x, scale, shift))
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    if f"{prefix}attn.q_norm.weight" in state:
        q, k = (
            F.rms_norm(z, z.shape[-1:], state[f"{prefix}attn.{name}_norm.weight"].to(z.dtype), 1e-6)
            for z, name in ((q, "q"), (k, "k"))
        )
    if angles is not None:
        q, k = turned(q, *angles).to(v.dtype), turned(k, *angles).to(v.dtype)
    with sdpa_kernel(SDPBackend.MATH):
        attended = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)
    x = x + gate * linear(state, f"{prefix}attn.proj", attended.transpose(1, 2).flatten(2))
    hidden = F.gelu(linear(state, f"{prefix}mlp.fc1", modulated(x, scale_mlp, shift_mlp)), approximate="tanh")
    return x + gate_mlp * linear(state, f"{prefix}mlp.fc2", hidden)


def modulation(state: State, prefix: str, condition: Tensor, count: int) -> tuple[Tensor, ...]:
    """Return `count` vectors of modulation, each (B, 1, C)."""
    return linear(state, f"{prefix}modulation.linear", F.silu(condition))[:, None].chunk(count, dim=-1)


def linear(state: State, name: str, x: Tensor) -> Tensor:
    """Apply the linear layer whose parameters have this name."""
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def modulated(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Apply a layer norm, then scale and shift the result."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring channels by the rotary angles."""
    u, v = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([u * cos - v * sin, u * sin + v * cos], dim=-1).flatten(-2)


def _angles(rows: int, columns: int, head_dim: int, like: Tensor) -> Angles:
    angles = torch.cat(_grid(rows, columns, head_dim // 4), dim=-1)
    dtype = torch.promote_types(like.dtype, torch.float32)
    return angles.cos().to(like.device, dtype), angles.sin().to(like.device, dtype)


def _positions(rows: int, columns: int, width: int) -> Tensor:
    of_row, of_column = _grid(rows, columns, width // 4)
    return torch.cat([of_column.sin(), of_column.cos(), of_row.sin(), of_row.cos()], dim=-1)


def _grid(rows: int, columns: int, count: int) -> tuple[Tensor, Tensor]:
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(count, dtype=torch.float64) / count)
    row, column = (torch.arange(n, dtype=torch.float64)[:, None] * frequencies for n in (rows, columns))
    return row.repeat_interleave(columns, dim=0), column.repeat(rows, 1)


def awakened(net: DiT, std: float = 0.02) -> DiT:
    """Draw the weights of adaLN and of the output anew, in place, so that none is zero, as after some training.

    All weights are rounded to bfloat16, so that every way of computing sees the same weights exactly.
    """
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "modulation" in name or name == "final_layer.linear.weight" or name.endswith("bias"):
                parameter.normal_(std=std)
            parameter.copy_(parameter.bfloat16())
    return net


def setting(net: DiT, size: int, batch: int, seed: int) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Return a point (x, t, s) and a velocity, in float32."""
    generator = torch.Generator().manual_seed(seed)
    x, v = torch.randn(2, batch, net.channels, size, size, generator=generator).unbind(0)
    t, of_t = torch.rand(2, batch, generator=generator).unbind(0)
    return (x, t, t * of_t), v
