"""Write `fastdistill.models.DiT` a second time, as a function of its state dict, in plain decomposed PyTorch.

It has an explicit softmax, a layer norm of means and squares, rotations of complex numbers, and loops over patches. No
code is shared with the network, and torch's own derivatives of every step are right in both modes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

State = Mapping[str, Tensor]


def plain_dit(state: State, config: Mapping[str, Any], x: Tensor, t: Tensor, s: Tensor, y: Tensor | None) -> Tensor:
    """Compute u(x, t, s, y) of the DiT with these weights, in the dtype of `x` (or as autocast sets it)."""
    p = config["patch_size"]
    patches = [(i, j) for i in range(0, x.shape[2], p) for j in range(0, x.shape[3], p)]
    tokens = torch.stack([x[:, :, i : i + p, j : j + p].reshape(len(x), -1) for i, j in patches], dim=1)
    h = _linear(state, "x_embedder", tokens)
    if config["pos"] == "sincos":
        h = h + torch.stack([_position(i // p, j // p, config["width"]) for i, j in patches]).to(h)
    labels = torch.full((len(x),), config["num_classes"]) if y is None else y
    condition = _time(state, "t_embedder", t) + _time(state, "d_embedder", t - s) + state["y_embedder.weight"][labels]
    for index in range(config["depth"]):
        block = f"blocks.{index}"
        parts = _linear(state, f"{block}.modulation.linear", _silu(condition))[:, None].chunk(6, dim=-1)
        h = h + parts[2] * _attention(state, f"{block}.attn", config, _modulated(h, parts[1], parts[0]), patches)
        hidden = _gelu(_linear(state, f"{block}.mlp.fc1", _modulated(h, parts[4], parts[3])))
        h = h + parts[5] * _linear(state, f"{block}.mlp.fc2", hidden)
    shift, scale = _linear(state, "final_layer.modulation.linear", _silu(condition))[:, None].chunk(2, dim=-1)
    out = _linear(state, "final_layer.linear", _modulated(h, scale, shift)).to(x.dtype)
    u = torch.zeros_like(x)
    for number, (i, j) in enumerate(patches):
        image = torch.nn.functional.pad(
            out[:, number].reshape(len(x), -1, p, p), (j, x.shape[3] - j - p, i, x.shape[2] - i - p)
        )
        u = u + image
    return u


def _linear(state: State, name: str, x: Tensor) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def _silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def _gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _modulated(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(dim=-1, keepdim=True) + 1e-6) * (1 + scale) + shift


def _rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / torch.sqrt((x**2).mean(dim=-1, keepdim=True) + 1e-6) * weight


def _time(state: State, name: str, t: Tensor) -> Tensor:
    frequencies = torch.tensor([16.0 ** (i / 127) for i in range(128)], dtype=torch.float64).to(t)
    angles = torch.outer(t, frequencies)
    features = torch.cat([torch.cos(angles), torch.sin(angles)], dim=1)
    return _linear(state, f"{name}.fc2", _silu(_linear(state, f"{name}.fc1", features)))


def _position(row: int, column: int, width: int) -> Tensor:
    quarter = [10000.0 ** (-4 * i / width) for i in range(width // 4)]
    values = [f(place * w) for place in (column, row) for f in (math.sin, math.cos) for w in quarter]
    return torch.tensor(values, dtype=torch.float64)


def _turned(x: Tensor, patches: list[tuple[int, int]], p: int) -> Tensor:
    """Multiply channels, taken as complex numbers, by exp(i angle) of each token."""
    quarter = [10000.0 ** (-4 * i / x.shape[-1]) for i in range(x.shape[-1] // 4)]
    angles = torch.tensor(
        [[place // p * w for place in patch for w in quarter] for patch in patches], dtype=torch.float64
    )
    turned = torch.view_as_complex(x.double().unflatten(-1, (-1, 2))) * torch.exp(1j * angles)
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


def _attention(state: State, name: str, config: Mapping[str, Any], x: Tensor, patches: list[tuple[int, int]]) -> Tensor:
    heads, outputs = config["heads"], []
    q, k, v = _linear(state, f"{name}.qkv", x).chunk(3, dim=-1)
    for head_q, head_k, head_v in zip(*(part.chunk(heads, dim=-1) for part in (q, k, v)), strict=True):
        if config["qk_norm"]:
            head_q = _rms(head_q, state[f"{name}.q_norm.weight"])
            head_k = _rms(head_k, state[f"{name}.k_norm.weight"])
        if config["pos"] == "rope":
            head_q, head_k = (_turned(part, patches, config["patch_size"]) for part in (head_q, head_k))
        logits = head_q @ head_k.mT / math.sqrt(head_q.shape[-1])
        weights = torch.exp(logits - logits.detach().amax(dim=-1, keepdim=True))
        outputs.append(weights / weights.sum(dim=-1, keepdim=True) @ head_v)
    return _linear(state, f"{name}.proj", torch.cat(outputs, dim=-1))
