"""The experts that a server took, out of its replies: one table [p + l − 1, layers, k] per response.

SGLang records them for all tokens of a request but the last, which it only samples, and keeps them beside its
KV cache: tokens of a cached prefix have the experts of the pass that computed them.  A reply has the table as
little-endian int32 in base64.  It becomes one byte per expert as soon as it arrives (two for more than 256
experts), and a table that cannot be a router's choice is refused: replayed, it would train other experts in
silence.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opo_megatron.batch.rollouts import experts_dtype
from opo_megatron.config.schema import ModelConfig
from opo_megatron.errors import EngineFailure, UserError
from opo_megatron.rollout.engine import GenerationRequest
from opo_megatron.rollout.sglang.expert_recording import OPTION

ROUTED_EXPERTS = "routed_experts"
"""In `meta_info` of a reply: base64, and after `unpack_experts` a tensor."""
_ENTRY = np.dtype("<i4")


def unpack_experts(requests: Sequence[GenerationRequest], replies: Sequence[Any], model: ModelConfig) -> None:
    """Put the tensor of each reply's experts in place of their base64.

    Raises:
        EngineFailure: experts are damaged.
        UserError: the server does not record the experts of every token and layer.
    """
    for request, reply in zip(requests, replies, strict=True):
        meta_info = reply["meta_info"]
        if meta_info["finish_reason"]["type"] == "abort":  # has none, and is refused as a whole
            continue
        packed = meta_info.get(ROUTED_EXPERTS)
        if packed is None:
            raise UserError(
                f"the server returned no experts with a response to prompt {request.prompt_id}; start it "
                f"with --{OPTION}, or set rollout.routing_replay=false"
            )
        tokens = len(request.tokens) + len(reply["output_ids"]) - 1
        meta_info[ROUTED_EXPERTS] = _unpacked(packed, tokens, model, request.prompt_id)


def experts_of(replies: Sequence[Any], model: ModelConfig) -> Tensor:
    """`Rollouts.routed_experts` of replies that `unpack_experts` has seen, also of none."""
    assert model.num_moe_experts is not None
    empty = torch.empty(
        0, model.num_layers, model.moe_router_topk, dtype=experts_dtype(model.num_moe_experts)
    )
    return torch.cat([empty, *(reply["meta_info"][ROUTED_EXPERTS] for reply in replies)])


def _unpacked(packed: str, tokens: int, model: ModelConfig, prompt_id: int) -> Tensor:
    """[tokens, layers, k]: a reply's experts, checked."""
    layers, topk = model.num_layers, model.moe_router_topk
    try:
        data = base64.b64decode(packed, validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise EngineFailure(
            f"the experts of a response to prompt {prompt_id} are not base64 ({error})"
        ) from error
    expected = tokens * layers * topk * _ENTRY.itemsize
    if len(data) != expected:
        raise EngineFailure(
            f"{len(data)} bytes of experts came with a response to prompt {prompt_id}, but {topk} experts of "
            f"{tokens} tokens in {layers} layers have {expected}"
        )
    table = torch.from_numpy(np.frombuffer(data, _ENTRY).astype(np.int32))
    return checked(table.view(tokens, layers, topk), model, prompt_id)


def checked(table: Tensor, model: ModelConfig, prompt_id: int) -> Tensor:
    """A table in the type of `Rollouts.routed_experts`.

    Raises:
        UserError: it names an expert that does not exist, or one twice for a token.
    """
    assert model.num_moe_experts is not None
    if table.numel() and not 0 <= int(table.min()) <= int(table.max()) < model.num_moe_experts:
        wrong = (table < 0) | (table >= model.num_moe_experts)
        _, layer, _ = wrong.nonzero()[0].tolist()
        raise UserError(
            f"the server routed a token of a response to prompt {prompt_id} to expert "
            f"{int(table[wrong][0])} in layer {layer}, but policy.model.num_moe_experts="
            f"{model.num_moe_experts}; give it this recipe's model, or set rollout.routing_replay=false"
        )
    compact = table.to(experts_dtype(model.num_moe_experts))
    # Every pair of columns: sorting so many short rows takes ten times as long.
    for gap in range(1, compact.shape[-1]):
        same = compact[..., gap:] == compact[..., :-gap]
        if same.any():
            _, layer, _ = same.nonzero()[0].tolist()
            raise UserError(
                f"the server routed a token of a response to prompt {prompt_id} twice to expert "
                f"{int(compact[..., gap:][same][0])} in layer {layer}, so it does not record what its router "
                "chooses; remove options of its MoE kernels from rollout.sglang.options, or set "
                "rollout.routing_replay=false"
            )
    return compact
