"""The quickstart's model and one policy-gradient step in plain PyTorch, the baseline of `bench_loop.py`.

An optimized implementation without a framework: fused query-key-value and gate-up products, torch's own
attention and AdamW, logits at the response tokens only, micro-batches sorted by length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opo_megatron.batch.micro_batch import MicroBatch
from opo_megatron.config.schema import ModelConfig


class PlainLayer(nn.Module):
    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        hidden, self.heads = model.hidden_size, model.num_attention_heads
        self.norm = nn.RMSNorm(hidden, model.layernorm_epsilon)
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)
        self.mlp_norm = nn.RMSNorm(hidden, model.layernorm_epsilon)
        self.gate_up = nn.Linear(hidden, 2 * model.ffn_hidden_size, bias=False)
        self.down = nn.Linear(model.ffn_hidden_size, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch_size, length, hidden = x.shape
        qkv = self.qkv(self.norm(x)).view(batch_size, length, 3, self.heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(
            _rotate(query, cos, sin), _rotate(key, cos, sin), value, is_causal=True
        )
        x = x + self.out(attended.transpose(1, 2).reshape(batch_size, length, hidden))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class PlainModel(nn.Module):
    """A Llama without grouped queries, from weights by Hugging Face name."""

    def __init__(self, model: ModelConfig, vocab_size: int, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, model.hidden_size)
        self.layers = nn.ModuleList(PlainLayer(model) for _ in range(model.num_layers))
        self.norm = nn.RMSNorm(model.hidden_size, model.layernorm_epsilon)
        self.head = nn.Linear(model.hidden_size, vocab_size, bias=False)
        head_dim = model.hidden_size // model.num_attention_heads
        exponents = torch.arange(0, head_dim, 2) / head_dim
        angles = torch.outer(torch.arange(model.max_sequence_length), model.rotary_base**-exponents)
        angles = torch.cat((angles, angles), -1)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())
        self.load_state_dict(_renamed(weights, model.num_layers), strict=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """[b, s] → final hidden states [b, s, hidden]."""
        x = self.embedding(tokens)
        cos, sin = self.get_buffer("cos")[: tokens.shape[1]], self.get_buffer("sin")[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x, cos, sin)
        normed: Tensor = self.norm(x)
        return normed


def policy_gradient_step(
    model: PlainModel,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[MicroBatch],
    normalizer: float,
    clip: float,
) -> float:
    """One AdamW step on −(1/N) Σ A log π; returns the gradient's norm before clipping."""
    optimizer.zero_grad()
    for micro in micro_batches:
        hidden = model(micro.tokens).flatten(0, 1)[micro.loss_positions]
        log_prob = -F.cross_entropy(model.head(hidden), micro.targets, reduction="none")
        loss = -(micro.columns["advantages"] * log_prob).sum() / normalizer
        loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return float(norm)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def _renamed(weights: dict[str, Tensor], layers: int) -> dict[str, Any]:
    renamed = {
        "embedding.weight": weights["model.embed_tokens.weight"],
        "norm.weight": weights["model.norm.weight"],
        "head.weight": weights["lm_head.weight"],
    }
    for i in range(layers):
        p, q = f"model.layers.{i}.", f"layers.{i}."
        attention = [weights[f"{p}self_attn.{part}_proj.weight"] for part in "qkv"]
        renamed |= {
            q + "norm.weight": weights[p + "input_layernorm.weight"],
            q + "qkv.weight": torch.cat(attention),
            q + "out.weight": weights[p + "self_attn.o_proj.weight"],
            q + "mlp_norm.weight": weights[p + "post_attention_layernorm.weight"],
            q + "gate_up.weight": torch.cat(
                [weights[p + "mlp.gate_proj.weight"], weights[p + "mlp.up_proj.weight"]]
            ),
            q + "down.weight": weights[p + "mlp.down_proj.weight"],
        }
    return renamed
