"""Where the arithmetic of a step is: the head, one sweep over the vocabulary; what becomes of each token."""

from __future__ import annotations

import torch


def uses_triton(device: torch.device) -> bool:
    """Whether kernels run here, or the torch code that each of them has as a twin."""
    return device.type == "cuda"
