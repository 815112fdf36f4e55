"""Which operation do engine and policy compute differently?

The engine returns a digest of every operation's output for some responses (`kernels/exact_digest.py`); here
the policy computes the same from the outputs of Megatron's modules.  The first operation that differs is the
fault: everything after it has other inputs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.distributed.process_groups import Parallel, all_gather_objects
from opo_megatron.kernels import exact
from opo_megatron.kernels.exact_digest import row_digests
from opo_megatron.kernels.lm_head import gather_logits
from opo_megatron.policy.model import head_weight
from opo_megatron.policy.policy import Policy
from opo_megatron.rollout.engine import Digests
from opo_megatron.utils.hashing import MASK, signed

HEAD = "the LM head"
QUERY_NORM = "the norm of queries"
"""Recorded together with that of keys."""


def first_difference(engine: Digests, policy: Digests) -> str | None:
    """The first operation of the engine whose digest the policy does not share."""
    return next((name for name, digest in engine.items() if policy.get(name) != digest), None)


def policy_digests(policy: Policy, parallel: Parallel, rollouts: Rollouts) -> Digests:
    """Digests of the policy's forward pass over one response; a collective.

    Args:
        rollouts: a single response, the same on every rank.
    """
    tokens = torch.cat((rollouts.prompt_tokens, rollouts.response_tokens))
    recorder = _Recorder(policy, tokens, int(rollouts.prompt_lengths[0]))
    schedule = policy.schedule_replicated(rollouts.sequence_lengths, [0])
    with recorder.listening():
        policy.log_probs(rollouts, schedule, 1.0)
    total: Counter[str] = Counter()
    replica = recorder.digests if parallel.dp_rank == parallel.tp_rank == 0 else {}
    for digests in all_gather_objects(parallel, replica):
        total.update(digests)
    return {name: signed(digest & MASK) for name, digest in total.items()}


class _Recorder:
    """Digests of the outputs of this rank's modules, for the rows of one sequence."""

    def __init__(self, policy: Policy, tokens: Tensor, prompt_length: int) -> None:
        self._policy, self._tokens = policy, tokens
        self._prompt_length = prompt_length
        self._rows = self._head_rows = torch.zeros(0, dtype=torch.bool)
        self._query_norm: Tensor | None = None
        self.digests: dict[str, int] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        with ExitStack() as hooks:
            for chunk in self._policy.chunks:
                hooks.callback(chunk.register_forward_pre_hook(self._begin).remove)
                for module, name in self._modules(chunk):
                    hooks.callback(module.register_forward_hook(_Hook(self, name)).remove)
            yield

    def _modules(self, chunk: Any) -> Iterator[tuple[torch.nn.Module, str]]:
        if chunk.pre_process:
            yield chunk.embedding, "the embedding"
        for layer in chunk.decoder.layers:
            attention, mlp, of = layer.self_attention, layer.mlp, f"of layer {layer.layer_number}"
            yield layer.input_layernorm, f"the norm {of}"
            yield attention.linear_qkv, f"the linear layer of queries, keys and values {of}"
            if self._policy.config.model.qk_layernorm:
                yield attention.q_layernorm, QUERY_NORM
                yield attention.k_layernorm, f"the norm of queries and keys {of}"
            yield attention.core_attention, f"the attention {of}"
            yield attention.linear_proj, f"the linear layer of the attention's output {of}"
            yield layer.pre_mlp_layernorm, f"the norm of the MLP {of}"
            yield mlp.linear_fc1, f"the linear layer of gate and up {of}"
            yield mlp.linear_fc2, f"the linear layer of the MLP's output {of}"
        if chunk.post_process:
            yield chunk.decoder.final_layernorm, "the final norm"

    def _begin(self, chunk: Any, inputs: tuple[Any, ...]) -> None:
        """Find the rows of the sequence among those of a micro-batch, which may have none of it."""
        tokens, positions = inputs[0].cpu(), inputs[1].cpu()
        length = self._tokens.numel() - 1
        is_inside = positions[0] < length
        is_ours = bool((tokens[0][is_inside] == self._tokens[positions[0][is_inside]]).all())
        rows = torch.zeros_like(tokens, dtype=torch.bool)
        rows[0] = is_inside & is_ours
        self._rows = rows.t().flatten()
        self._head_rows = self._rows & (positions.t().flatten() >= self._prompt_length - 1)

    def add(self, name: str, inputs: tuple[Any, ...], output: Any) -> None:
        """Record what a module computed, and what reached it from operations that are no modules."""
        result = output[0] if isinstance(output, tuple) else output
        if name == QUERY_NORM:
            self._query_norm = result
        elif name.startswith("the norm of queries and keys"):
            assert self._query_norm is not None
            self._record(name, self._query_norm, result, shard_dim=-2)
        elif name.startswith("the attention of"):
            rotary = name.replace("the attention", "the rotary embedding")
            self._record(rotary, inputs[0], inputs[1], shard_dim=-2)
            self._record(name, result, shard_dim=-1)
        elif name.startswith("the linear layer of queries"):
            self._record(name, *self._by_kind(result), shard_dim=-1)
        elif name.startswith("the linear layer of gate"):
            self._record(name, *result.chunk(2, -1), shard_dim=-1)
        elif name.startswith("the linear layer of the MLP's output"):
            activated = name.replace("the linear layer of the MLP's output", "SwiGLU")
            self._record(activated, inputs[0], shard_dim=-1)
            self._record(name, result)
        else:
            self._record(name, result)
        if name == "the final norm":
            self._record_head(result)

    def _record_head(self, hidden: Tensor) -> None:
        """Recorded here, because the head is no module.  A collective of the tensor-parallel ranks."""
        rows = self._all_rows(hidden)[self._head_rows]
        shard, weight = self._policy.head.vocabulary(head_weight(self._policy.chunks[-1]))
        logits = gather_logits(exact.logits(rows, weight), shard)
        if rows.numel():
            self._add(HEAD, row_digests(logits))

    def _by_kind(self, qkv: Tensor) -> list[Tensor]:
        """Megatron's order, group by group, → all queries, all keys, all values."""
        model, ranks = self._policy.config.model, self._policy.parallel.tp_size
        groups, width = model.num_query_groups, model.kv_channels
        assert groups is not None and width is not None
        grouped = qkv.unflatten(-1, (groups // ranks, -1))
        shared = model.num_attention_heads // groups
        return [part.flatten(-2) for part in grouped.split([shared * width, width, width], -1)]

    def _record(self, name: str, *outputs: Tensor, shard_dim: int | None = None) -> None:
        """Args:
        shard_dim: along which each output is sharded over tensor-parallel ranks.
        """
        dim = -1 if shard_dim is None else shard_dim
        if shard_dim is not None:
            outputs = tuple(self._gathered(output, shard_dim) for output in outputs)
        self._add(name, row_digests(self._all_rows(torch.cat(outputs, dim))[self._rows]))

    def _all_rows(self, output: Tensor) -> Tensor:
        """[s, b, …] or [T, …], where s may be sharded over tensor-parallel ranks → [rows, …]."""
        rows = self._rows.numel()
        if output.shape[:2].numel() < rows and self._policy.config.sequence_parallel:
            output = self._gathered(output, 0)
        return output.detach().reshape(rows, -1)

    def _gathered(self, output: Tensor, dim: int) -> Tensor:
        parallel = self._policy.parallel
        if parallel.tp_size == 1:
            return output
        shards = [torch.empty_like(output) for _ in range(parallel.tp_size)]
        dist.all_gather(shards, output.detach().contiguous(), group=parallel.tp_group)
        return torch.cat(shards, dim)

    def _add(self, name: str, digests: Tensor) -> None:
        self.digests[name] = self.digests.get(name, 0) + int(digests.sum())


class _Hook:
    """A forward hook that knows its operation's name."""

    def __init__(self, recorder: _Recorder, name: str) -> None:
        self._recorder, self._name = recorder, name

    def __call__(self, module: Any, inputs: tuple[Any, ...], output: Any) -> None:
        self._recorder.add(self._name, inputs, output)
