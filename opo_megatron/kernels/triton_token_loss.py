"""Loss, coefficient and mismatch of packed tokens in one launch (Triton).

Its torch twins, with the formulas in words, are `algorithm/objective.py::PolicyGradient` and
`algorithm/on_policy.py::MismatchSums.add`.  Per token, with Δ = log π_policy − log π_engine:

    w = e^Δ,   c = −A/N · min(w, cap),   loss = c · log π
    Σ |Δ|,  Σ e^Δ − 1 − Δ,  Σ w,  Σ w²,  how many |Δ| are above each edge,  max |Δ|

so every column is read once and loss and coefficient are written once.  A program takes `BLOCK` tokens
and writes sums of its own, which torch adds: no atomics, hence the same bits in every run.  What is
summed is float64; the exponential too, which still takes less time than the reading.  e^Δ − 1 − Δ
loses its digits where Δ is small, and is a series there.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton's functions take pointers and numbers; their types are those of the launch.

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from opo_megatron.algorithm.objective import PolicyGradient
    from opo_megatron.algorithm.on_policy import MismatchSums

BLOCK = 1024
"""Tokens of a program."""


@triton.jit
def _k3(delta, weight):
    """e^Δ − 1 − Δ in float64.

    Below 0.01 five terms of the series are right to 4e-14, above the difference is to 5e-12.
    """
    series = 1 / 24 + delta * (1 / 120 + delta * (1 / 720))
    series = delta * delta * (1 / 2 + delta * (1 / 6 + delta * series))
    return tl.where(tl.abs(delta) < 0.01, series, weight - 1 - delta)


@triton.jit
def _kernel(
    log_prob, advantages, engine_log_prob, edges, loss, coefficient, partial, tokens, normalizer, cap,
    LEARNS: tl.constexpr, CAPPED: tl.constexpr, MEASURES: tl.constexpr, EDGES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    part, parts = tl.program_id(0), tl.num_programs(0)
    place = part.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < tokens
    policy = tl.load(log_prob + place, mask=inside, other=0.0)
    if CAPPED or MEASURES:
        # The difference is float32's, as the twins have it.
        delta = policy - tl.load(engine_log_prob + place, mask=inside, other=0.0)
        delta = delta.to(tl.float64)
        weight = tl.exp(delta)
    if LEARNS:
        factor = tl.div_rn(-tl.load(advantages + place, mask=inside, other=0.0), normalizer)
        if CAPPED:
            # Unlike a minimum, this keeps NaN.
            factor *= tl.where(weight > cap, cap, weight.to(tl.float32))
        tl.store(loss + place, factor * policy, mask=inside)
        tl.store(coefficient + place, factor, mask=inside)
    if MEASURES:
        # Behind the last token Δ = 0, so that only the sums of w must leave those places out.
        size = tl.abs(delta)
        total = tl.sum(size, 0)
        partial += part
        tl.store(partial, total)
        tl.store(partial + parts, tl.sum(_k3(delta, weight), 0))
        weight = tl.where(inside, weight, 0.0)
        tl.store(partial + 2 * parts, tl.sum(weight, 0))
        tl.store(partial + 3 * parts, tl.sum(weight * weight, 0))
        for k in tl.static_range(EDGES):
            # NaN is above all edges, as in the twin.
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
    """(loss, ∂loss/∂log π) [n] float32 of tokens, whose mismatch is added to `mismatch`.

    Args:
        log_prob: [n] float32 log π_policy.
        objective: None where nothing is learned: then both results are empty.
        advantages: [n] float32, with an objective.
        engine_log_prob: [n] float32; None where nothing needs it.
        mismatch: None where it is not measured.
    """
    tokens, learns = log_prob.numel(), objective is not None
    loss, coefficient = (log_prob.new_empty(tokens if learns else 0) for _ in range(2))
    cap = None if objective is None else objective.max_importance_weight
    if tokens and (learns or mismatch is not None):
        parts = triton.cdiv(tokens, BLOCK)
        edges = 0 if mismatch is None else mismatch.edges.numel()
        partial = None if mismatch is None else mismatch.values.new_empty(mismatch.values.numel() + 1, parts)
        _kernel[(parts,)](
            log_prob, advantages, engine_log_prob, None if mismatch is None else mismatch.edges,
            loss, coefficient, partial, tokens,
            1.0 if objective is None else float(objective.normalizer), 0.0 if cap is None else float(cap),
            LEARNS=learns, CAPPED=cap is not None, MEASURES=mismatch is not None, EDGES=edges, BLOCK=BLOCK,
        )  # fmt: skip
        if mismatch is not None and partial is not None:
            mismatch.add_partial(partial)
    return loss, coefficient
