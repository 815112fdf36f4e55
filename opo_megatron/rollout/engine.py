"""What the loop asks of an engine, whichever it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.weights.stream import NamedTensors


@dataclass(frozen=True)
class GenerationRequest:
    """One response to draw."""

    prompt_id: int
    """Which prompt of the task."""
    group: int
    """Place of the prompt in the batch."""
    sample_index: int
    """Place of the sample among those of the same prompt."""
    tokens: tuple[int, ...]
    """The prompt."""


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn: token ~ softmax(z / temperature), cut to top_k and top_p."""

    max_tokens: int
    stop_tokens: tuple[int, ...]
    seed: tuple[int, ...]
    """Joined with (prompt id, sample index, position) it fixes every uniform number."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    greedy: bool = False
    energies: bool = False
    """Also return each response's Σ energy and Σ energy·‖h‖², where the engine can."""


Progress = Callable[[int, int, int], None]
"""Called now and then with (responses finished, responses in all, tokens drawn so far)."""


class RolloutEngine(Protocol):
    """Draws responses and holds a copy of the policy's weights, of a known version."""

    version: int | None
    """Version of the weights held; None before the first complete update."""

    def generate(
        self, requests: Sequence[GenerationRequest], sampling: Sampling, progress: Progress | None = None
    ) -> Rollouts:
        """Draw one response per request, in the order of `requests`."""
        ...

    def update_weights(self, buckets: NamedTensors, version: int) -> None:
        """Take over the streamed weights; until the stream ends the engine holds no version."""
        ...

    def probe(self, requests: Sequence[GenerationRequest], sampling: Sampling) -> dict[str, Rollouts]:
        """The same requests answered by every copy of the weights that this rank feeds, by name."""
        ...

    def sleep(self, keeps_weights: bool = False) -> None:
        """Give up memory that the policy needs: that of keys and values, and of weights."""
        ...

    def wake(self) -> None:
        """Take memory again for all that was given up; weights come with the next update."""
        ...

    def recover(self) -> None:
        """Make the engine usable after an EngineFailure, without weights; a collective of all ranks."""
        ...

    def close(self) -> None:
        """Give back what the engine holds: processes, memory."""
        ...
