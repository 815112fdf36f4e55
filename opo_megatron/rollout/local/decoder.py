"""A Llama/Qwen decoder with a KV cache and Hugging Face parameter names, written from the architecture.

Attention scale and SwiGLU follow Megatron's local spec (the scale inside `baddbmm`, gate and up as halves of
one product), so that both round alike.  Rows of the cache are independent responses, each at its own
position.

In exact mode all operations are those of `kernels/exact.py`, which the policy uses too.  SGLang
then runs this decoder in its own processes, over its own cache (`rollout/sglang/exact_server/`), so the file
needs nothing but torch.  Several ranks share one there: each has some heads and columns of the MLP, and their
sums are added in the order of `policy.exact_sum_parts`, as the policy's ranks do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from opo_megatron.kernels import exact as exact_kernels
from opo_megatron.kernels.exact import MASKED, causal_mask, padded_keys
from opo_megatron.kernels.rotary import inverse_frequencies

if TYPE_CHECKING:
    from opo_megatron.config.schema import ModelConfig

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, query, key, value), each [b, s, heads, head_dim] → attention output [b, s, heads, head_dim]."""
Observe = Callable[[str, Tensor], None]
"""(operation, its output [b, s, …]); layers are counted from 1, as Megatron does."""


@dataclass(frozen=True)
class Share:
    """A rank's part of a dense decoder in exact mode."""

    ranks: int
    """They divide the groups of heads, the width of the MLP, and `sum_parts`."""
    rank: int
    gather: Callable[[Tensor, int], Tensor]
    """(tensor, dimension) → those of all ranks, concatenated along it in their order."""


class KeyValueCache:
    """KV cache of `rows` responses, up to `length` tokens each: [rows, heads, length, head_dim] per layer."""

    def __init__(
        self, model: ModelConfig, rows: int, length: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        assert model.num_query_groups is not None and model.kv_channels is not None
        self.rows, self.length = rows, length
        shape = (model.num_layers, rows, model.num_query_groups, length, model.kv_channels)
        # Zeros: a masked key has weight 0, and 0 times uninitialized memory may be NaN.
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    def by_slot(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, each a view [slots, heads, head_dim]; see `slots`."""
        _, rows, heads, length, width = self.keys.shape
        size, strides = (
            (rows * heads * length - (heads - 1) * length, heads, width),
            (width, length * width, 1),
        )
        keys, values = (part[layer] for part in (self.keys, self.values))
        return keys.as_strided(size, strides), values.as_strided(size, strides)

    def slots(self, rows: int, length: int) -> Tensor:
        """[rows, length] int32: where the first tokens of each row lie in `by_slot`."""
        _, _, heads, capacity, _ = self.keys.shape
        device = self.keys.device
        first = torch.arange(rows, dtype=torch.int32, device=device) * (heads * capacity)
        return first.unsqueeze(1) + torch.arange(length, dtype=torch.int32, device=device)

    def move(self, sources: Tensor, targets: Tensor, length: int) -> None:
        """Copy the first `length` tokens of rows `sources` to rows `targets`."""
        self.keys[:, targets, :, :length] = self.keys[:, sources, :, :length]
        self.values[:, targets, :, :length] = self.values[:, sources, :, :length]


class Decoder:
    """Weights and the two forward passes: `prefill` of whole prompts, `decode` of one token per row."""

    def __init__(
        self,
        model: ModelConfig,
        vocab_size: int,
        dtype: torch.dtype,
        device: torch.device,
        exact: bool = False,
        sum_parts: int = 1,
        share: Share | None = None,
    ) -> None:
        """Args:
        sum_parts: `policy.exact_sum_parts`.
        share: of this rank, where several compute the model.
        """
        assert model.num_query_groups is not None and model.kv_channels is not None
        self.model, self.vocab_size, self.dtype, self.device = model, vocab_size, dtype, device
        self.exact, self.sum_parts, self._share = exact, sum_parts, share
        self._ranks = 1 if share is None else share.ranks
        self.groups, self.head_dim = model.num_query_groups // self._ranks, model.kv_channels
        self.queries_per_group = model.num_attention_heads // model.num_query_groups
        self._tensors: dict[str, Tensor] = {}
        self._slices: dict[str, Tensor] = {}
        self._allocate()
        positions = torch.arange(model.max_sequence_length, dtype=torch.float32)
        angles = torch.outer(positions, inverse_frequencies(model))
        angles = torch.cat((angles, angles), -1).to(device)
        self.cos, self.sin = angles.cos().to(dtype), angles.sin().to(dtype)
        self.observe: Observe | None = None
        """Called with the output of every operation of a dense model."""
        self.routed_experts: list[Tensor] | None = None
        """Where it is a list, every layer with experts appends those that it took [b, s, k]."""

    # ------------------------------------------------------------------ weights

    def names(self) -> frozenset[str]:
        """Hugging Face names of all tensors."""
        return frozenset(self._slices)

    def tensors(self) -> dict[str, Tensor]:
        """All memory of the weights, each tensor once, by the decoder's own names."""
        return dict(self._tensors)

    def load(self, name: str, tensor: Tensor) -> None:
        """Copy in one tensor by its Hugging Face name, or this rank's share of it."""
        own = self._slices[name]
        if self._share is not None:
            for dim, (size, whole) in enumerate(zip(own.shape, tensor.shape, strict=True)):
                if size * self._ranks == whole:
                    tensor = tensor.chunk(self._ranks, dim)[self._share.rank]
        own.copy_(tensor)

    def _allocate(self) -> None:
        model, hidden = self.model, self.model.hidden_size
        self._stack("embedding", {"model.embed_tokens.weight": self.vocab_size}, hidden)
        if not model.tie_embeddings:
            self._stack("head", {"lm_head.weight": self.vocab_size}, hidden)
        self._stack("norm", {"model.norm.weight": hidden})
        keys = self.groups * self.head_dim
        queries = keys * self.queries_per_group
        for i in range(model.num_layers):
            p = f"model.layers.{i}."
            self._stack(f"{i}.norm", {p + "input_layernorm.weight": hidden})
            rows = {"q": queries, "k": keys, "v": keys}
            self._stack(f"{i}.qkv", {f"{p}self_attn.{n}_proj.weight": r for n, r in rows.items()}, hidden)
            if model.add_qkv_bias:
                self._stack(f"{i}.qkv_bias", {f"{p}self_attn.{n}_proj.bias": r for n, r in rows.items()})
            if model.qk_layernorm:
                self._stack(f"{i}.q_norm", {p + "self_attn.q_norm.weight": self.head_dim})
                self._stack(f"{i}.k_norm", {p + "self_attn.k_norm.weight": self.head_dim})
            self._stack(f"{i}.out", {p + "self_attn.o_proj.weight": hidden}, queries)
            self._stack(f"{i}.mlp_norm", {p + "post_attention_layernorm.weight": hidden})
            if model.num_moe_experts is None:
                self._allocate_mlp(f"{i}.", p + "mlp.", model.ffn_hidden_size)
                continue
            assert model.moe_ffn_hidden_size is not None
            self._stack(f"{i}.router", {p + "mlp.gate.weight": model.num_moe_experts}, hidden)
            for e in range(model.num_moe_experts):
                self._allocate_mlp(f"{i}.{e}.", f"{p}mlp.experts.{e}.", model.moe_ffn_hidden_size)

    def _allocate_mlp(self, prefix: str, hf_prefix: str, ffn: int) -> None:
        ffn //= self._ranks
        gate_up = {hf_prefix + "gate_proj.weight": ffn, hf_prefix + "up_proj.weight": ffn}
        self._stack(prefix + "gate_up", gate_up, self.model.hidden_size)
        self._stack(prefix + "down", {hf_prefix + "down_proj.weight": self.model.hidden_size}, ffn)

    def _stack(self, name: str, rows: dict[str, int], columns: int | None = None) -> None:
        """One tensor `name` that holds several Hugging Face tensors, concatenated by rows."""
        shape = (sum(rows.values()),) if columns is None else (sum(rows.values()), columns)
        tensor = torch.empty(shape, dtype=self.dtype, device=self.device)
        self._tensors[name] = tensor
        self._slices |= dict(zip(rows, tensor.split(list(rows.values())), strict=True))

    # ------------------------------------------------------------------ forward

    def prefill(self, tokens: Tensor, cache: KeyValueCache, rows: Tensor, sources: Tensor) -> Tensor:
        """Run prompts [p, s] (right-padded) and store prompt sources[i] in cache row rows[i].

        Returns:
            [p, s, hidden]: final hidden states.
        """
        prompts, length = tokens.shape
        positions = torch.arange(length, device=self.device).expand(prompts, length)
        if self._uses_slots:
            slots = torch.arange(prompts * length, dtype=torch.int32, device=self.device)
            own = slots.view(prompts, length), torch.full_like(slots[:prompts], length)
            mask = slots  # attention over slots needs none
        else:
            mask = causal_mask(length, self.device)
        if not self.exact:
            mask = mask[:, :length]

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            cache.keys[layer, rows, :, :length] = key.transpose(1, 2)[sources]
            cache.values[layer, rows, :, :length] = value.transpose(1, 2)[sources]
            if self._uses_slots:
                return self._attend_slots(query, key.flatten(0, 1), value.flatten(0, 1), *own)
            return self._attention(query, key.transpose(1, 2), value.transpose(1, 2), mask)

        return self.forward(tokens, positions, attend)

    def decode(self, tokens: Tensor, positions: Tensor, cache: KeyValueCache) -> Tensor:
        """One token per row [n], at positions [n], for the first n cache rows → hidden states [n, hidden]."""
        n = tokens.shape[0]
        rows = torch.arange(n, device=self.device)
        length = int(positions.max()) + 1
        if self.exact:
            length = padded_keys(length)
        slots = cache.slots(n, length) if self._uses_slots else None
        is_masked = torch.arange(length, device=self.device) > positions.unsqueeze(1)
        mask = is_masked.view(n, 1, 1, length)

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            cache.keys[layer, rows, :, positions] = key[:, 0]
            cache.values[layer, rows, :, positions] = value[:, 0]
            if slots is not None:
                return self._attend_slots(query, *cache.by_slot(layer), slots, positions.int() + 1)
            keys, values = cache.keys[layer, :n, :, :length], cache.values[layer, :n, :, :length]
            return self._attention(query, keys, values, mask)

        return self.forward(tokens.unsqueeze(1), positions.unsqueeze(1), attend)[:, 0]

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, hidden] → [n, V]."""
        name = "embedding" if self.model.tie_embeddings else "head"
        return exact_kernels.logits(hidden, self._tensors[name]) if self.exact else self._linear(hidden, name)

    def forward(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Final hidden states [b, s, hidden] of tokens [b, s] at positions [b, s].

        Args:
            attend: stores keys and values, and computes attention.
        """
        x = F.embedding(tokens, self._tensors["embedding"])
        self._observed("the embedding", x)
        cos, sin = self.cos[positions].unsqueeze(2), self.sin[positions].unsqueeze(2)
        batch_size, length = tokens.shape
        heads = (self.groups * self.queries_per_group, self.groups, self.groups)
        for i in range(self.model.num_layers):
            of = f"of layer {i + 1}"
            y = self._norm(x, f"{i}.norm")
            self._observed(f"the norm {of}", y)
            qkv = self._linear(y, f"{i}.qkv")
            if self.model.add_qkv_bias:
                qkv = qkv + self._tensors[f"{i}.qkv_bias"]
            kinds = qkv.split([count * self.head_dim for count in heads], -1)
            self._observed(f"the linear layer of queries, keys and values {of}", *kinds, is_cut=True)
            query, key, value = (
                part.view(batch_size, length, count, self.head_dim)
                for part, count in zip(kinds, heads, strict=True)
            )
            if self.model.qk_layernorm:
                query, key = self._norm(query, f"{i}.q_norm"), self._norm(key, f"{i}.k_norm")
                self._observed(f"the norm of queries and keys {of}", query, key, is_cut=True)
            rotate = exact_kernels.rotary if self.exact else exact_kernels.rotate_halves
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
            self._observed(f"the rotary embedding {of}", query, key, is_cut=True)
            attended = attend(i, query, key, value).reshape(batch_size, length, -1)
            self._observed(f"the attention {of}", attended, is_cut=True)
            out = self._linear(attended, f"{i}.out")
            self._observed(f"the linear layer of the attention's output {of}", out)
            x = x + out
            y = self._norm(x, f"{i}.mlp_norm")
            self._observed(f"the norm of the MLP {of}", y)
            if self.model.num_moe_experts is None:
                x = x + self._mlp(y, f"{i}.", of)
            else:
                x = x + self._experts(y, i)
        x = self._norm(x, "norm")
        self._observed("the final norm", x)
        return x

    def _linear(self, x: Tensor, name: str) -> Tensor:
        weight = self._tensors[name]
        if not self.exact:
            return x @ weight.t()
        is_summed = name.endswith((".out", ".down"))
        if self._share is None or not is_summed:
            return exact_kernels.linear(x, weight, self.sum_parts if is_summed else 1)
        own = exact_kernels.partial_products(x.flatten(0, -2), weight, self.sum_parts // self._ranks)
        total = exact_kernels.add_in_order(self._share.gather(own, 0))
        return total.to(x.dtype).view(*x.shape[:-1], -1)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight, eps = self._tensors[name], self.model.layernorm_epsilon
        return (
            exact_kernels.rms_norm(x, weight, eps) if self.exact else F.rms_norm(x, weight.shape, weight, eps)
        )

    @property
    def _uses_slots(self) -> bool:
        """Whether attention is the Triton kernel of exact mode."""
        return self.exact and exact_kernels.uses_triton(self._tensors["embedding"])

    def _attend_slots(
        self, query: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor
    ) -> Tensor:
        """Attention of query [b, s, heads, head_dim], the last of each row's keys, over slots of keys."""
        rows, length = query.shape[:2]
        starts = torch.arange(0, (rows + 1) * length, length, dtype=torch.int32, device=self.device)
        mixed = exact_kernels.slot_attention(
            query.flatten(0, 1), keys, values, table, starts, lengths, length, 1 / math.sqrt(self.head_dim)
        )
        return mixed.view_as(query)

    def _attention(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """Causal attention [b, s, heads, head_dim] of query [b, s, heads, head_dim] over keys and values
        [b, groups, t, head_dim]; where mask (over [b, heads, s, t]) is True a key is masked."""
        if self.exact:
            return exact_kernels.attention(query, keys, values, mask)
        batch_size, length = query.shape[:2]
        shared, head_dim, total = self.queries_per_group, self.head_dim, keys.shape[2]
        # Queries of one group attend to the same keys, so they are rows of one product.
        grouped = query.view(batch_size, length, self.groups, shared, head_dim).permute(0, 2, 3, 1, 4)
        grouped = grouped.reshape(batch_size * self.groups, shared * length, head_dim)
        flat_keys = keys.reshape(batch_size * self.groups, total, head_dim)
        scores = torch.baddbmm(
            grouped.new_empty(1, 1, 1),
            grouped,
            flat_keys.transpose(1, 2),
            beta=0,
            alpha=1 / math.sqrt(head_dim),
        )
        scores = scores.view(batch_size, self.groups * shared, length, total).masked_fill_(mask, MASKED)
        weights = scores.float().softmax(-1).to(scores.dtype)
        weights = weights.view(batch_size * self.groups, shared * length, total)
        mixed = torch.bmm(weights, values.reshape(batch_size * self.groups, total, head_dim))
        return mixed.view(batch_size, self.groups * shared, length, head_dim).transpose(1, 2)

    def _mlp(self, x: Tensor, name: str, of: str) -> Tensor:
        gate_up = self._linear(x, name + "gate_up")
        self._observed(f"the linear layer of gate and up {of}", *gate_up.chunk(2, -1), is_cut=True)
        activated = exact_kernels.swiglu(gate_up) if self.exact else _swiglu(gate_up)
        self._observed(f"SwiGLU {of}", activated, is_cut=True)
        down = self._linear(activated, name + "down")
        self._observed(f"the linear layer of the MLP's output {of}", down)
        return down

    def _observed(self, operation: str, *outputs: Tensor, is_cut: bool = False) -> None:
        """Args:
        is_cut: whether each rank has its share of them, along their third dimension.
        """
        if self.observe is None:
            return
        if self._share is not None and is_cut:
            outputs = tuple(self._share.gather(output.contiguous(), 2) for output in outputs)
        self.observe(operation, torch.cat(outputs, 2))

    def _experts(self, x: Tensor, layer: int) -> Tensor:
        """Each token's top-k experts, weighted by the softmax over them, or over all experts."""
        flat = x.reshape(-1, x.shape[-1])
        logits = flat @ self._tensors[f"{layer}.router"].t()
        if self.model.moe_router_pre_softmax:
            weights, chosen = self._choose(logits.float().softmax(-1).to(flat.dtype), layer)
        else:
            scores, chosen = self._choose(logits, layer)
            weights = scores.float().softmax(-1).to(flat.dtype)
        if self.routed_experts is not None:
            self.routed_experts.append(chosen.view(*x.shape[:-1], -1))
        mixed = torch.zeros_like(flat)
        assert self.model.num_moe_experts is not None
        for expert in range(self.model.num_moe_experts):
            token, slot = (chosen == expert).nonzero(as_tuple=True)
            if token.numel():
                output = self._mlp(flat[token].unsqueeze(0), f"{layer}.{expert}.", f"of layer {layer + 1}")[0]
                mixed.index_add_(0, token, output * weights[token, slot].unsqueeze(1))
        return mixed.view_as(x)

    def _choose(self, scores: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Scores and indices, [n, k] each, of the experts of tokens with `scores` [n, experts]."""
        values, chosen = scores.topk(self.model.moe_router_topk, -1)
        return values, chosen


def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up
