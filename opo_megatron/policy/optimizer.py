"""Adam as Megatron's OptimizerConfig, and optimizer offload to host memory.

With `policy.optimizer_offload` f, Megatron's hybrid optimizer keeps master weights and moments of a fraction
f of a rank's shard in page-locked host memory: gradients are copied there, torch's AdamW steps on the CPU,
weights are copied back.  It requires the precision-aware optimizer (whose moments stay fp32), which requires
Transformer Engine.  It needs a GPU, so this path is not tested on a CPU.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig

from opo_megatron.config.choices import Dtype
from opo_megatron.config.schema import OptimizerConfig, PolicyConfig
from opo_megatron.environment.versions import read_versions
from opo_megatron.errors import UserError


def megatron_optimizer(
    policy: PolicyConfig, config: OptimizerConfig, params_dtype: torch.dtype
) -> MegatronOptimizerConfig:
    """The recipe's optimizer as Megatron's OptimizerConfig."""
    return MegatronOptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.betas[0],
        adam_beta2=config.betas[1],
        adam_eps=config.eps,
        clip_grad=config.clip,
        bf16=policy.dtype is Dtype.bf16,
        params_dtype=params_dtype,
        use_distributed_optimizer=policy.distributed_optimizer,
        **offload_fields(policy),
    )


def offload_fields(policy: PolicyConfig) -> dict[str, Any]:
    """`policy.optimizer_offload` as fields of Megatron's OptimizerConfig."""
    if not policy.optimizer_offload:
        return {}
    return {
        "optimizer_cpu_offload": True,
        "optimizer_offload_fraction": policy.optimizer_offload,
        "use_precision_aware_optimizer": True,
    }


def check_offload_device(policy: PolicyConfig, device: torch.device) -> None:
    """Check that the device and the installed packages support `policy.optimizer_offload`.

    Raises:
        UserError: naming what is missing.
    """
    if not policy.optimizer_offload:
        return
    offload = f"policy.optimizer_offload={policy.optimizer_offload:g}"
    if device.type == "cpu":
        raise UserError(
            f"{offload} needs a GPU, and this run is on a CPU, whose optimizer is in host memory anyway; set "
            "policy.optimizer_offload=0"
        )
    if device.type == "cuda" and find_spec("transformer_engine") is None:
        fix = read_versions().part("transformer-engine").fix
        raise UserError(
            f"{offload} needs Transformer Engine, which is not installed; install it with: {fix}; or set "
            "policy.optimizer_offload=0"
        )
