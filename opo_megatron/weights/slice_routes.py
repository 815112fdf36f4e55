"""Which policy rank feeds which engine rank, and so which slices each rank receives.

A policy rank can hold slice e where its tensor-parallel rank holds the shard, or one of the shards, that e is
cut out of.  An engine takes memory of its own node only, so each of its ranks is fed by a rank of that node;
if possible by the one on the same GPU.  The ranks of a pipeline group receive the same slices, because each
stage's are broadcast to all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from opo_megatron.weights.engine_slices import EngineSizes


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
    feeds: list[list[tuple[int, int]]] = [[] for _ in places]
    for owner in sorted({place.engine for place in places}):
        for rank in range(engine.tensor):
            feeder = _feeder(places, owner, rank, policy_size, engine.tensor)
            if feeder is None:
                node = places[owner].node
                return f"the policy's ranks on {node} do not hold what rank {rank} of a server there needs"
            feeds[feeder].append((owner, rank))
    wanted = []
    for place in places:
        group = [i for i, other in enumerate(places) if _pipeline_group(other) == _pipeline_group(place)]
        wanted.append(tuple(sorted({rank for i in group for _, rank in feeds[i]})))
    return SliceRoutes(engine, tuple(map(tuple, feeds)), tuple(wanted))


def _pipeline_group(place: Place) -> tuple[int, int]:
    return place.tp_rank, place.replica


def _feeder(places: Sequence[Place], owner: int, rank: int, policy_size: int, engine_size: int) -> int | None:
    """The policy rank that feeds rank `rank` of an engine; None where its node has none that can."""
    sharing = [i for i, place in enumerate(places) if place.engine == owner]
    beside = sharing[rank] if rank < len(sharing) else None
    able = [
        i
        for i, place in enumerate(places)
        if place.node == places[owner].node and _holds(place.tp_rank, rank, policy_size, engine_size)
    ]
    return min(able, key=lambda i: (i != beside, i not in sharing, i), default=None)


def _holds(tp_rank: int, rank: int, policy_size: int, engine_size: int) -> bool:
    """Whether a tensor-parallel rank has a shard that the engine rank's slice is cut out of."""
    if policy_size > engine_size:
        return tp_rank // (policy_size // engine_size) == rank
    return rank // (engine_size // policy_size) == tp_rank
