"""A dense decoder in float64, written from the architecture: the reference for policy and engine.

One sequence at a time, no KV cache, no padding, no fusion.  Weights by Hugging Face name.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from opo_megatron.config.schema import ModelConfig


def log_probs(
    model: ModelConfig,
    weights: dict[str, Tensor],
    prompt: list[int],
    response: list[int],
    temperature: float,
    experts: Tensor | None = None,
) -> Tensor:
    """log π_T of each response token [l], differentiable in `weights` (float64).

    Args:
        experts: [p + l − 1, layers, k] experts of a model that has them.
    """
    tokens = torch.tensor(prompt + response)[:-1]
    x = weights["model.embed_tokens.weight"][tokens]
    for layer in range(model.num_layers):
        chosen = None if experts is None else experts[:, layer].tolist()
        x = _layer(model, weights, f"model.layers.{layer}.", x, chosen)
    x = _norm(x, weights["model.norm.weight"], model.layernorm_epsilon)
    head = weights["model.embed_tokens.weight" if model.tie_embeddings else "lm_head.weight"]
    logits = x[len(prompt) - 1 :] @ head.T / temperature
    target_logits = logits.gather(1, torch.tensor(response).unsqueeze(1))[:, 0]
    return target_logits - torch.logsumexp(logits, 1)


def _norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight


def _layer(
    model: ModelConfig, weights: dict[str, Tensor], name: str, x: Tensor, experts: list[list[int]] | None
) -> Tensor:
    head_dim, length = model.kv_channels, x.shape[0]
    y = _norm(x, weights[name + "input_layernorm.weight"], model.layernorm_epsilon)
    q, k, v = (
        (y @ weights[f"{name}self_attn.{part}_proj.weight"].T).view(length, -1, head_dim) for part in "qkv"
    )
    if model.qk_layernorm:
        q = _norm(q, weights[name + "self_attn.q_norm.weight"], model.layernorm_epsilon)
        k = _norm(k, weights[name + "self_attn.k_norm.weight"], model.layernorm_epsilon)
    q, k = _rotate(q, model.rotary_base), _rotate(k, model.rotary_base)
    heads = []
    for head in range(model.num_attention_heads):
        group = head // (model.num_attention_heads // model.num_query_groups)
        scores = q[:, head] @ k[:, group].T / math.sqrt(head_dim)
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
        heads.append(scores.softmax(-1) @ v[:, group])
    x = x + torch.cat(heads, -1) @ weights[name + "self_attn.o_proj.weight"].T
    y = _norm(x, weights[name + "post_attention_layernorm.weight"], model.layernorm_epsilon)
    if experts is None:
        return x + _mlp(weights, name + "mlp.", y)
    scores = y @ weights[name + "mlp.gate.weight"].T
    if model.moe_router_pre_softmax:
        scores = scores.softmax(-1)
    mixed = []
    for token, chosen in enumerate(experts):
        share = scores[token, chosen]
        if not model.moe_router_pre_softmax:
            share = share.softmax(-1)
        outputs = [_mlp(weights, f"{name}mlp.experts.{expert}.", y[token]) for expert in chosen]
        mixed.append(share @ torch.stack(outputs))
    return x + torch.stack(mixed)


def _mlp(weights: dict[str, Tensor], name: str, y: Tensor) -> Tensor:
    gate = y @ weights[name + "gate_proj.weight"].T
    up = y @ weights[name + "up_proj.weight"].T
    return (gate * torch.sigmoid(gate) * up) @ weights[name + "down_proj.weight"].T


def _rotate(x: Tensor, base: float) -> Tensor:
    """Rotary embedding of [length, heads, head_dim]; element i is rotated with element i + head_dim / 2."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[0], dtype=x.dtype).view(-1, 1, 1) * base ** (
        -torch.arange(half, dtype=x.dtype) / half
    )
    first, second = x[..., :half], x[..., half:]
    return torch.cat(
        (first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()), -1
    )
