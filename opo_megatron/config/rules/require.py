"""Helpers for rules: a condition, and the error message where it does not hold."""

from __future__ import annotations

from opo_megatron.errors import UserError


def require(condition: bool, message: str) -> None:
    """Raise UserError with `message`, which names key, value and remedy, unless `condition` holds."""
    if not condition:
        raise UserError(message)


def divides(name: str, divisor: int, total_name: str, total: int) -> None:
    """Raise UserError unless `total` is a multiple of `divisor`."""
    require(
        total % divisor == 0,
        f"{total_name} is {total}, which is not divisible by {name}={divisor}; change one of them",
    )
