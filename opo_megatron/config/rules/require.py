"""How a rule about a recipe is stated: what must hold, and the sentence where it does not."""

from __future__ import annotations

from opo_megatron.errors import UserError


def require(holds: bool, sentence: str) -> None:
    """Refuse a recipe with `sentence`, which names key, value and remedy."""
    if not holds:
        raise UserError(sentence)


def divides(name: str, divisor: int, total_name: str, total: int) -> None:
    """Refuse a `total` that is no multiple of `divisor`."""
    require(
        total % divisor == 0,
        f"{total_name} is {total}, which is not divisible by {name}={divisor}; change one of them",
    )
