"""Loss, coefficient and mismatch of packed tokens in one launch (Triton).

The reference implementations are `algorithm/objective.py::PolicyGradient` and
`algorithm/on_policy.py::MismatchSums.add`.  Per token, with Δ = log π_policy − log π_engine:

    w = e^Δ,   c = −A/N · min(w, cap),   loss = c · log π
    Σ |Δ|,  Σ e^Δ − 1 − Δ,  Σ w,  Σ w²,  count of |Δ| above each edge,  max |Δ|

Every column is read once, loss and coefficient are written once.  Each program writes the partial sums
of `BLOCK` tokens, which torch adds: no atomics, hence deterministic.  Sums and exponentials are float64;
the launch stays memory-bound.  e^Δ − 1 − Δ cancels for small Δ and is a series there.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton's kernels take pointers and scalars; their types are those of the launch.

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from opo_megatron.algorithm.objective import PolicyGradient
    from opo_megatron.algorithm.on_policy import MismatchSums

BLOCK = 1024
"""Tokens per program."""


@triton.jit
def _k3(delta, weight):
    """e^Δ − 1 − Δ in float64.

    Relative error: 4e-14 below 0.01, by five terms of the series; 5e-12 above, by the difference.
    """
    series = 1 / 24 + delta * (1 / 120 + delta * (1 / 720))
    series = delta * delta * (1 / 2 + delta * (1 / 6 + delta * series))
    return tl.where(tl.abs(delta) < 0.01, series, weight - 1 - delta)


@triton.jit
def _kernel(
    log_prob, advantages, engine_log_prob, edges, loss, coefficient, partial, tokens, normalizer, cap,
    HAS_LOSS: tl.constexpr, CAPPED: tl.constexpr, MEASURES: tl.constexpr, EDGES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    part, parts = tl.program_id(0), tl.num_programs(0)
    index = part.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < tokens
    policy = tl.load(log_prob + index, mask=inside, other=0.0)
    if CAPPED or MEASURES:
        # The difference is float32, as in the reference.
        delta = policy - tl.load(engine_log_prob + index, mask=inside, other=0.0)
        delta = delta.to(tl.float64)
        weight = tl.exp(delta)
    if HAS_LOSS:
        factor = tl.div_rn(-tl.load(advantages + index, mask=inside, other=0.0), normalizer)
        if CAPPED:
            # Unlike a minimum, this propagates NaN.
            factor *= tl.where(weight > cap, cap, weight.to(tl.float32))
        tl.store(loss + index, factor * policy, mask=inside)
        tl.store(coefficient + index, factor, mask=inside)
    if MEASURES:
        # Δ = 0 past the last token, so only the sums of w need a mask.
        size = tl.abs(delta)
        total = tl.sum(size, 0)
        partial += part
        tl.store(partial, total)
        tl.store(partial + parts, tl.sum(_k3(delta, weight), 0))
        weight = tl.where(inside, weight, 0.0)
        tl.store(partial + 2 * parts, tl.sum(weight, 0))
        tl.store(partial + 3 * parts, tl.sum(weight * weight, 0))
        for k in tl.static_range(EDGES):
            # NaN counts as above all edges, as in the reference.
            above = ~(size <= tl.load(edges + k))
            tl.store(partial + (4 + k) * parts, tl.sum(above.to(tl.int32), 0).to(tl.float64))
        tl.store(partial + (4 + EDGES) * parts, tl.where(total == total, tl.max(size, 0), total))


def token_loss(
    log_prob: Tensor,
    objective: PolicyGradient | None,
    advantages: Tensor | None,
    engine_log_prob: Tensor | None,
    mismatch: MismatchSums | None,
) -> tuple[Tensor, Tensor]:
    """(loss, ∂loss/∂log π) [n] float32; adds the tokens' Δ to `mismatch`.

    Args:
        log_prob: [n] float32 log π_policy.
        objective: None: forward only, and both results are empty.
        advantages: [n] float32, with an objective.
        engine_log_prob: [n] float32; None where neither cap nor mismatch needs it.
        mismatch: None: not measured.
    """
    tokens, has_loss = log_prob.numel(), objective is not None
    loss, coefficient = (log_prob.new_empty(tokens if has_loss else 0) for _ in range(2))
    cap = None if objective is None else objective.max_importance_weight
    if tokens and (has_loss or mismatch is not None):
        parts = triton.cdiv(tokens, BLOCK)
        edges = 0 if mismatch is None else mismatch.edges.numel()
        partial = None if mismatch is None else mismatch.values.new_empty(mismatch.values.numel() + 1, parts)
        _kernel[(parts,)](
            log_prob, advantages, engine_log_prob, None if mismatch is None else mismatch.edges,
            loss, coefficient, partial, tokens,
            1.0 if objective is None else float(objective.normalizer), 0.0 if cap is None else float(cap),
            HAS_LOSS=has_loss, CAPPED=cap is not None, MEASURES=mismatch is not None, EDGES=edges,
            BLOCK=BLOCK,
        )  # fmt: skip
        if mismatch is not None and partial is not None:
            mismatch.add_partial(partial)
    return loss, coefficient
