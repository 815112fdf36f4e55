"""How a step's tokens spread over the experts, counted from the experts that the engine took.

    experts/fullest_share   max over layers of max_e n_e / Σ_e n_e: the share of a layer's assignments that
                            its fullest expert takes; 1 / E where all E are equally full, at most 1 / k
    experts/dead            share of all (layer, expert) with n_e = 0

n_e counts the tokens of all samples of the step, prompts included, that one of their k experts is e.  Nothing
acts on these figures: an auxiliary loss that evens the load out would be another objective.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opo_megatron.config.schema import ModelConfig
from opo_megatron.distributed.process_groups import Parallel, all_reduce


def expert_counts(routed_experts: Tensor, experts: int) -> Tensor:
    """[layers, experts] int64: tokens that took each expert, of `routed_experts` [tokens, layers, k]."""
    layers = routed_experts.shape[1]
    counts = [torch.bincount(routed_experts[:, i].flatten(), minlength=experts) for i in range(layers)]
    return torch.stack(counts)


def load_metrics(counts: Tensor) -> dict[str, float]:
    """The metrics of `counts` [layers, experts]."""
    shares = counts.double() / counts.sum(1, keepdim=True)
    return {
        "experts/fullest_share": float(shares.max()),
        "experts/dead": float((counts == 0).double().mean()),
    }


def expert_load(parallel: Parallel, routed_experts: Tensor | None, model: ModelConfig) -> dict[str, float]:
    """The metrics of a step, of all ranks' samples; a collective.  Empty where no experts are recorded."""
    if routed_experts is None or model.num_moe_experts is None:
        return {}
    return load_metrics(all_reduce(parallel, expert_counts(routed_experts, model.num_moe_experts)))
