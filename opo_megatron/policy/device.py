"""Whether this rank's device supports what the recipe sets for the policy."""

from __future__ import annotations

import torch

from opo_megatron.config.schema import PolicyConfig
from opo_megatron.policy.layer_specs import check_context_device, check_fp8_device
from opo_megatron.policy.optimizer import check_offload_device


def check_device(policy: PolicyConfig, device: torch.device) -> None:
    """Check that the device supports FP8, context parallelism and optimizer offload as the recipe sets them.

    Raises:
        UserError: naming what is missing.
    """
    check_fp8_device(policy, device)
    check_context_device(policy, device)
    check_offload_device(policy, device)
