"""A dense decoder whose parts compute in bf16 or in higher precision, one by one.

A part in bf16 rounds its inputs to bf16, computes with PyTorch's own operations and returns bf16; every other
part computes in the higher type.  With all parts in float64 it is the truth that policies and engines are
compared with; with one part alone in bf16 it shows what that part's rounding does to log-probabilities.
Whole sequences at once, no KV cache, Hugging Face names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

import torch
import torch.nn.functional as F
from torch import Tensor

from opo_megatron.config.schema import ModelConfig
from opo_megatron.kernels.rotary import inverse_frequencies

PARTS = ("residual stream", "norms", "projections", "rotary embedding", "attention", "activation", "head")


class MixedDecoder:
    """Weights by Hugging Face name, as they are stored; their bf16 values are exact in every type."""

    def __init__(self, model: ModelConfig, weights: dict[str, Tensor]) -> None:
        self.model, self.weights = model, weights

    def forward(
        self, tokens: Tensor, prompt: int, low: Collection[str], high: torch.dtype
    ) -> tuple[list[Tensor], Tensor]:
        """Hidden states after each layer [n, T − 1, H], and log π of the tokens after the prompt [n, R].

        Args:
            tokens: [n, T], of which the first `prompt` are given.
            low: the parts in bf16.
            high: the type of all others.
        """

        def run(part: str, work: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
            dtype = torch.bfloat16 if part in low else high
            return work(*(tensor.to(dtype) for tensor in tensors))

        model, weight = self.model, self.weights
        x = run(
            "residual stream", torch.clone, F.embedding(tokens[:, :-1], weight["model.embed_tokens.weight"])
        )
        states = []
        for i in range(model.num_layers):
            name = f"model.layers.{i}."
            x = run("residual stream", torch.add, x, self._attention(run, x, name))
            y = run("norms", self._norm, x, weight[name + "post_attention_layernorm.weight"])
            gate, up = (
                run("projections", F.linear, y, weight[f"{name}mlp.{p}_proj.weight"]) for p in ("gate", "up")
            )
            activated = run("activation", lambda a, b: F.silu(a) * b, gate, up)
            down = run("projections", F.linear, activated, weight[name + "mlp.down_proj.weight"])
            x = run("residual stream", torch.add, x, down)
            states.append(x)
        hidden = run("norms", self._norm, x, weight["model.norm.weight"])[:, prompt - 1 :]
        head = weight["model.embed_tokens.weight" if model.tie_embeddings else "lm_head.weight"]
        logits = run("head", F.linear, hidden, head)
        log_probs = logits.to(torch.float64 if high is torch.float64 else torch.float32).log_softmax(-1)
        return states, log_probs.gather(-1, tokens[:, prompt:].unsqueeze(-1))[..., 0]

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, self.model.layernorm_epsilon)

    def _attention(self, run: Callable[..., Tensor], x: Tensor, name: str) -> Tensor:
        model, weight = self.model, self.weights
        y = run("norms", self._norm, x, weight[name + "input_layernorm.weight"])
        heads = []
        for part in "qkv":
            bias = [weight[f"{name}self_attn.{part}_proj.bias"]] if model.add_qkv_bias else []
            projected = run("projections", F.linear, y, weight[f"{name}self_attn.{part}_proj.weight"], *bias)
            heads.append(projected.unflatten(-1, (-1, model.kv_channels or 0)).transpose(1, 2))
        query, key, value = heads
        if model.qk_layernorm:
            query = run("norms", self._norm, query, weight[name + "self_attn.q_norm.weight"])
            key = run("norms", self._norm, key, weight[name + "self_attn.k_norm.weight"])
        query, key = (run("rotary embedding", self._rotated, part) for part in (query, key))
        mixed = run("attention", self._attend, query, key, value)
        return run(
            "projections",
            F.linear,
            mixed.transpose(1, 2).flatten(2),
            weight[name + "self_attn.o_proj.weight"],
        )

    def _rotated(self, x: Tensor) -> Tensor:
        angles = torch.outer(torch.arange(x.shape[2]).double(), inverse_frequencies(self.model).double())
        angles = torch.cat((angles, angles), -1).to(x.device)
        first, second = x.chunk(2, -1)
        return x * angles.cos().to(x.dtype) + torch.cat((-second, first), -1) * angles.sin().to(x.dtype)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Causal attention, its softmax in fp32 at least."""
        shared = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
        scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])
        masked = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(masked, -math.inf)
        weights = scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(-1)
        return weights.to(value.dtype) @ value
