"""Which policy rank feeds which engine rank, and so which slices each rank receives.

A policy rank can hold slice e where its tensor-parallel rank holds the shard, or one of the shards, that e is
cut out of.  An engine takes memory of its own node only, so each of its ranks is fed by a rank of that node;
if possible by the one on the same GPU.  The ranks of a pipeline group receive the same slices, because each
stage's are broadcast to all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from opo_megatron.weights.engine_slices import EngineSizes

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Place:
    """Where one policy rank is."""

    node: str
    engine: int
    """The engine that it shares, as the first policy rank that does."""
    tp_rank: int
    replica: int
    """Its copy of the weights; ranks that differ in their pipeline stage alone are one pipeline group."""


@dataclass(frozen=True)
class SliceRoutes:
    """What is cut for whom."""

    engine: EngineSizes
    feeds: tuple[tuple[tuple[int, int], ...], ...]
    """By policy rank: the (engine, its rank) that it feeds."""
    wanted: tuple[tuple[int, ...], ...]
    """By policy rank: the engine ranks whose slices it receives."""


def routes_of(places: Sequence[Place], policy_size: int, engine: EngineSizes) -> SliceRoutes | str:
    """The routes of all ranks, or why there are none.

    Args:
        policy_size: tensor-parallel ranks of the policy.
    """
    on_node, sharing = _grouped(places, lambda p: p.node), _grouped(places, lambda p: p.engine)
    feeds: list[list[tuple[int, int]]] = [[] for _ in places]
    for owner, group in sorted(sharing.items()):
        node = places[owner].node
        for rank in range(engine.tensor):
            able = [i for i in on_node[node] if _holds(places[i].tp_rank, rank, policy_size, engine.tensor)]
            if not able:
                return f"the policy's ranks on {node} do not hold what rank {rank} of a server there needs"
            near = group[rank] if rank < len(group) else None

            def cost(i: int, group: list[int] = group, near: int | None = near, rank: int = rank) -> Any:
                has_it = any(other == rank for _, other in feeds[i])
                return i != near, i not in group, not has_it, len(feeds[i])

            feeds[min(able, key=cost)].append((owner, rank))
    wanted: list[tuple[int, ...]] = [()] * len(places)
    for group in _grouped(places, lambda p: (p.tp_rank, p.replica)).values():
        slices = tuple(sorted({rank for i in group for _, rank in feeds[i]}))
        for i in group:
            wanted[i] = slices
    return SliceRoutes(engine, tuple(map(tuple, feeds)), tuple(wanted))


def _grouped(places: Sequence[Place], key: Callable[[Place], K]) -> dict[K, list[int]]:
    """Indices of the places by key."""
    groups: dict[K, list[int]] = {}
    for i, place in enumerate(places):
        groups.setdefault(key(place), []).append(i)
    return groups


def _holds(tp_rank: int, rank: int, policy_size: int, engine_size: int) -> bool:
    """Whether a tensor-parallel rank has a shard that the engine rank's slice is cut out of."""
    if policy_size > engine_size:
        return tp_rank // (policy_size // engine_size) == rank
    return rank // (engine_size // policy_size) == tp_rank
