"""Whether this rank's device can do what the recipe asks of the policy."""

from __future__ import annotations

import torch

from opo_megatron.config.schema import PolicyConfig
from opo_megatron.policy.layer_specs import check_context_device, check_fp8_device
from opo_megatron.policy.optimizer import check_offload_device


def check_device(policy: PolicyConfig, device: torch.device) -> None:
    """Refuse what the device lacks.

    Raises:
        UserError: naming what is missing.
    """
    check_fp8_device(policy, device)
    check_context_device(policy, device)
    check_offload_device(policy, device)
