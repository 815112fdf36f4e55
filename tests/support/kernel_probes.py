"""What tests in Triton's interpreter share: launches are counted, and memory that is not written is NaN."""

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
    """Every tensor that is made empty holds NaN."""

    def poisoned(make: Any) -> Any:
        def empty(*arguments: Any, **about: Any) -> Tensor:
            made: Tensor = make(*arguments, **about)
            return made.fill_(float("nan")) if made.is_floating_point() else made

        return empty

    monkeypatch.setattr(Tensor, "new_empty", poisoned(Tensor.new_empty))
    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
