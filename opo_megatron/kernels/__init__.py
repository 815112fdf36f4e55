"""Kernels of a step: LM head, token loss, advantages, FP8, exact mode."""

from __future__ import annotations

import torch


def uses_triton(device: torch.device) -> bool:
    """Whether Triton kernels run on `device`, instead of their reference implementations in torch."""
    return device.type == "cuda"
