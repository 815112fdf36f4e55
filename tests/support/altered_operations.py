"""A decoder in exact mode with one operation replaced by a usual form of it.

Also loaded, by its path, by the server of `altered_server/`, so it needs nothing but torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Replace = Callable[[Any, str, Any], None]
"""(class, attribute, replacement), such as pytest's `monkeypatch.setattr`."""


def linear(decoder: type, replace: Replace) -> None:
    replace(decoder, "_linear", lambda self, x, name: x @ self._tensors[name].t())


def norm(decoder: type, replace: Replace) -> None:
    def divided(self: Any, x: torch.Tensor, name: str) -> torch.Tensor:
        scale = (x.square().mean(-1, keepdim=True) + self.model.layernorm_epsilon).sqrt()
        return x / scale * self._tensors[name]

    replace(decoder, "_norm", divided)


def rotary(decoder: type, replace: Replace) -> None:
    """Angles in float64."""
    forward = decoder.forward  # type: ignore[attr-defined]

    def exact_angles(self: Any, *arguments: Any) -> torch.Tensor:
        if self.cos.dtype == torch.float32 and not hasattr(self, "altered"):
            half = self.head_dim // 2
            exponents = torch.arange(half, dtype=torch.float64) / half
            angles = torch.outer(
                torch.arange(self.cos.shape[0], dtype=torch.float64), self.model.rotary_base**-exponents
            )
            angles = torch.cat((angles, angles), -1)
            self.cos, self.sin, self.altered = angles.cos().float(), angles.sin().float(), True
        return forward(self, *arguments)

    replace(decoder, "forward", exact_angles)


def head(decoder: type, replace: Replace) -> None:
    def usual(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ self._tensors["embedding" if self.model.tie_embeddings else "head"].t()

    replace(decoder, "logits", usual)


def attention(decoder: type, replace: Replace) -> None:
    """The local engine's usual attention.  A server's is replaced in its registry."""
    attend = decoder._attention  # type: ignore[attr-defined]

    def usual(self: Any, query: Any, keys: Any, values: Any, mask: Any) -> torch.Tensor:
        self.exact = False
        try:
            return attend(self, query, keys, values, mask[..., : keys.shape[2]])
        finally:
            self.exact = True

    replace(decoder, "_attention", usual)


IN_DECODER = {"linear": linear, "norm": norm, "rotary": rotary, "head": head, "attention": attention}
NAMED = {
    "linear": r"the linear layer of queries, keys and values of layer 1",
    "norm": r"the norm of layer 1",
    "rotary": r"the rotary embedding of layer 1",
    "head": r"the LM head",
    "attention": r"the attention of layer 1",
    "sampler": r"the sampler, which records other log-probabilities than those of its logits",
}
"""How the check of exact mode names each."""
