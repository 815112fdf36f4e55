"""The interface of rollout engines: requests, sampling parameters, and the `RolloutEngine` protocol."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.config.schema import ModelConfig
from opo_megatron.errors import UserError
from opo_megatron.utils.hashing import hash_of
from opo_megatron.weights.stream import NamedTensors

if TYPE_CHECKING:
    from opo_megatron.rollout.conversations import Conversations


@dataclass(frozen=True)
class GenerationRequest:
    """One response to generate."""

    prompt_id: int
    """Index of the prompt in the task."""
    group: int
    """Index of the prompt in the batch."""
    sample_index: int
    """Index of the sample among those of the same prompt."""
    tokens: tuple[int, ...]
    """Token ids of the prompt."""


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters: token ~ softmax(z / temperature), truncated by top_k and top_p."""

    max_tokens: int
    stop_tokens: tuple[int, ...]
    seed: tuple[int, ...]
    """Together with (prompt id, sample index, position) it determines every uniform number."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    greedy: bool = False
    energies: bool = False
    """Also return each response's Σ energy and Σ energy·‖h‖², where the engine can."""
    token_energies: bool = False
    """Also return each token's energy, where the engine can."""
    routed_experts: bool = False
    """Also return the experts of every token and layer."""


def sampling_key(sampling: Sampling, request: GenerationRequest) -> int:
    """Signed 64-bit key of one response's random numbers."""
    return hash_of((*sampling.seed, request.prompt_id, request.sample_index))


def check_lengths(requests: Sequence[GenerationRequest], sampling: Sampling, model: ModelConfig) -> int:
    """The tokens of the longest prompt.

    Raises:
        UserError: where a prompt and its response do not fit.
    """
    longest = max((len(request.tokens) for request in requests), default=0)
    limit = model.max_sequence_length
    if longest + sampling.max_tokens > limit:
        raise UserError(
            f"a prompt of {longest} tokens and rollout.max_response_tokens={sampling.max_tokens} exceed "
            f"policy.model.max_sequence_length={limit}; shorten one or raise the other"
        )
    return longest


WITHOUT_GRAPHS = "without CUDA graphs"
"""The batching, in the check of exact mode, of an engine that otherwise decodes in CUDA graphs."""
Digests = Mapping[str, int]
"""Operation → digest of its rows, in the order of the forward pass (`kernels/exact_digest.py`)."""

Progress = Callable[[int, int, int], None]
"""Called from time to time with (finished responses, all responses, tokens generated so far)."""


Deliver = Callable[[Rollouts], None]
"""Called with complete responses, as they end."""


class RolloutEngine(Protocol):
    """Generates responses from a copy of the policy's weights, of known version."""

    version: int | None
    """Version of the weights held; None before the first complete update."""

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        sampling: Sampling,
        progress: Progress | None = None,
        *,
        conversations: Conversations | None = None,
    ) -> Rollouts:
        """Generate one response per request, in the order of `requests`.

        Args:
            conversations: what answers the turns of each response, and rewards it in the end; None where a
                response is one turn.
        """
        ...

    def update_weights(self, buckets: NamedTensors, version: int) -> None:
        """Load the streamed weights; until the stream ends the engine holds no version."""
        ...

    def probe(self, requests: Sequence[GenerationRequest], sampling: Sampling) -> dict[str, Rollouts]:
        """Responses to the same requests from every copy of the weights that this rank sends to, by name."""
        ...

    def sleep(self, keeps_weights: bool = False) -> None:
        """Release memory for the policy: the KV cache and, unless `keeps_weights`, the weights."""
        ...

    def wake(self) -> None:
        """Allocate all released memory again; weights are undefined until the next update."""
        ...

    def activity(self) -> str | None:
        """A line for the display where the engine does something else than to answer; None otherwise."""
        ...

    def recover(self) -> None:
        """Make the engine usable after an EngineFailure, without weights; a collective of all ranks.

        Where it can, the next `generate` with the same sampling and weight version continues the last.
        """
        ...

    def kept_tokens(self, sampling: Sampling) -> int | None:
        """After `recover` and an update: how many tokens of the last `generate` the next one begins with.

        None where it generates all again.
        """
        ...

    def close(self) -> None:
        """Free what the engine holds: processes, memory."""
        ...


class StreamingEngine(RolloutEngine, Protocol):
    """An engine that delivers responses while it generates others."""

    def generate(
        self,
        requests: Sequence[GenerationRequest],
        sampling: Sampling,
        progress: Progress | None = None,
        deliver: Deliver | None = None,
        *,
        conversations: Conversations | None = None,
    ) -> Rollouts:
        """Generate one response per request, in the order of `requests`; each is delivered as it ends."""
        ...
