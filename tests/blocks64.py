"""Halves of a pre-norm decoder block of Llama's kind, before and behind its attention, in float64."""

from typing import Any

import torch

from qtool.nn import QLinear


def product64(linear: QLinear, x: torch.Tensor) -> torch.Tensor:
    """What a linear means, from its dequantized weight."""
    weight = linear.matrix().dequantize().double()
    if linear.activations != "float":
        scale = x.abs().amax(-1, keepdim=True) / 127 if linear.act_scale is None else linear.act_scale.double()
        x = torch.floor(x / scale + 0.5).clamp(-127, 127) * scale
    y = x @ weight.T
    return y if linear.bias is None else y + linear.bias.double()


def norm64(norm: Any, x: torch.Tensor) -> torch.Tensor:
    return norm.weight.double() * x / (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()


def front64(layer: Any, x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values `[batch, heads, tokens, size]` by way of complex numbers."""
    attention, normal = layer.self_attn, norm64(layer.input_layernorm, x)
    states = [product64(linear, normal) for linear in (attention.q_proj, attention.k_proj, attention.v_proj)]
    query, key, value = (state.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for state in states)
    half = attention.head_dim // 2
    turn = torch.complex(cosine.double(), sine.double())[:, None, :, :half]

    def turned(state: torch.Tensor) -> torch.Tensor:
        z = torch.complex(state[..., :half], state[..., half:]) * turn
        return torch.cat((z.real, z.imag), dim=-1)

    return turned(query), turned(key), value


def back64(layer: Any, context: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    x = x + product64(layer.self_attn.o_proj, context)
    normal = norm64(layer.post_attention_layernorm, x)
    gate, up = product64(layer.mlp.gate_proj, normal), product64(layer.mlp.up_proj, normal)
    return x + product64(layer.mlp.down_proj, layer.mlp.act_fn(gate) * up)


def close(found: torch.Tensor, wanted: torch.Tensor, unit: float = 1e-6) -> None:
    """By rows: off by some rounding of float32, but for a few rows where a value fell to the other side of a tie."""
    found, wanted = found.flatten(0, -2), wanted.double().flatten(0, -2)
    off = (found.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert (off < unit).double().mean() > 0.95 and (off < 0.05).all(), off.sort().values


def angles(batch_size: int, tokens: int, size: int, each: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Of transformers' layout: the same at both channels of a pair; one row of positions, or one for each text."""
    draw = torch.Generator().manual_seed(tokens)
    turns = torch.rand((batch_size if each else 1, tokens, size // 2), generator=draw) * 6
    both = torch.cat((turns, turns), dim=-1)
    return both.cos(), both.sin()
