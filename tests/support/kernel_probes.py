"""Shared by tests in Triton's interpreter: launch counts, and NaN in uninitialized memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor


class Counted:
    """A kernel that counts its launches."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid: Any) -> Any:
        self.launches += 1
        return self.kernel[grid]


def poison_new_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills every uninitialized float tensor with NaN."""

    def poisoned(make: Any) -> Any:
        def empty(*arguments: Any, **options: Any) -> Tensor:
            tensor: Tensor = make(*arguments, **options)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return empty

    monkeypatch.setattr(Tensor, "new_empty", poisoned(Tensor.new_empty))
    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
