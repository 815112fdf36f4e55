"""AdamW with the state layout of Apex's and Transformer Engine's FusedAdam.

torch's Adam keeps `step` per parameter, which Megatron-Core's distributed optimizer cannot
checkpoint.  This one keeps `step` in the parameter group and only `exp_avg` and `exp_avg_sq` per
parameter, so checkpoints have the same layout with and without a GPU.  Where Transformer Engine or
Apex is installed, Megatron uses theirs and this file is unused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


class GroupStepAdam(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019): θ ← (1 − ηλ)θ − η·m̂ / (√v̂ + ε), moments bias-corrected."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        if not adam_w_mode:
            raise ValueError("only decoupled weight decay (AdamW) is supported")
        if capturable:
            raise ValueError("steps are not captured in CUDA graphs")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1  # of empty groups too: all ranks must agree on it
            params = [p for p in group["params"] if p.grad is not None and p.numel() > 0]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
                    self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
            grads = [p.grad for p in params]
            first = [self.state[p]["exp_avg"] for p in params]
            second = [self.state[p]["exp_avg_sq"] for p in params]
            beta1, beta2 = group["betas"]
            torch._foreach_lerp_(first, grads, 1 - beta1)
            torch._foreach_mul_(second, beta2)
            torch._foreach_addcmul_(second, grads, grads, value=1 - beta2)
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            root = torch._foreach_div(second, 1 - beta2 ** group["step"])
            torch._foreach_sqrt_(root)
            torch._foreach_add_(root, group["eps"])
            torch._foreach_addcdiv_(params, first, root, value=-group["lr"] / (1 - beta1 ** group["step"]))


def use_group_step_adam() -> None:
    """Make Megatron-Core use this Adam where neither Transformer Engine nor Apex is installed."""
    import megatron.core.optimizer as optimizer
    import megatron.core.optimizer.distrib_optimizer as distributed

    if not optimizer.USING_PYTORCH_OPTIMIZER:
        return
    optimizer.Adam = distributed.Adam = GroupStepAdam
    optimizer.USING_PYTORCH_OPTIMIZER = False
    # These flags select Apex's state layout in Megatron, which is this one's.
    distributed.HAVE_APEX_OR_TE = distributed.USING_APEX_OPTIMIZER = True
    # Loading copies in place into master weights, which are leaf tensors that require gradients.
    cls = distributed.DistributedOptimizer
    cls._set_main_param_and_optimizer_states = torch.no_grad()(cls._set_main_param_and_optimizer_states)
