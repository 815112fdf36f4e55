"""`Rollouts`: the samples of a step, from the engine to the policy; saved, they replay the step.

Storage is ragged: the tokens of all samples are concatenated, with a length per sample.  A column that was
not measured is None, never zeros.

Response tokens are those that the policy sampled, and nothing else.  What an environment gave during a
conversation stands in columns of its own: it conditions the tokens after it and is never trained on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

FINISH_STOP = 0
"""At a stop token."""
FINISH_LENGTH = 1
"""Out of tokens: of the response, or of the sequence."""
FINISH_TURNS = 2
"""A conversation out of turns."""
FINISH_ENVIRONMENT = 3
"""Its environment ended the conversation, or failed with its declared outcome."""
FINISH_NAMES = {
    FINISH_STOP: "stop", FINISH_LENGTH: "length", FINISH_TURNS: "turns", FINISH_ENVIRONMENT: "environment"
}  # fmt: skip

_PER_PROMPT_TOKEN = ("prompt_tokens",)
_PER_INPUT_TOKEN = ("routed_experts",)
_PER_GIVEN_TOKEN = ("given_tokens", "given_after")
_PER_RESPONSE_TOKEN = (
    "response_tokens", "weight_versions", "engine_log_prob", "old_log_prob", "current_log_prob",
    "reference_log_prob", "token_energy", "token_advantages",
)  # fmt: skip


def is_truncated(finish_reasons: Tensor) -> Tensor:
    """[n] bool: whether a limit cut the response, of tokens or of turns."""
    return (finish_reasons == FINISH_LENGTH) | (finish_reasons == FINISH_TURNS)


def experts_dtype(experts: int) -> torch.dtype:
    """The smallest type that names each of `experts` experts."""
    return torch.uint8 if experts <= 256 else torch.int16


@dataclass
class Rollouts:
    """n samples with Σp prompt, Σl response and, in conversations, Σg given tokens, all on the CPU.

    A group is the K samples of one prompt; a step's batch is sorted by (group, sample_index).
    """

    prompt_ids: Tensor
    """[n] int64: index of the prompt in the task."""
    groups: Tensor
    """[n] int64: index of the prompt in the step's batch."""
    sample_indices: Tensor
    """[n] int64: index of the sample in its group."""
    prompt_lengths: Tensor
    """[n] int64."""
    prompt_tokens: Tensor
    """[Σp] int64."""
    response_lengths: Tensor
    """[n] int64, including sampled stop tokens."""
    response_tokens: Tensor
    """[Σl] int64."""
    finish_reasons: Tensor
    """[n] int64: one of FINISH_NAMES."""
    given_lengths: Tensor | None = None
    """[n] int64: tokens that the environment gave; None where no sample is a conversation."""
    given_tokens: Tensor | None = None
    """[Σg] int64."""
    given_after: Tensor | None = None
    """[Σg] int64: the response tokens of the sample before each given token, non-decreasing in a sample."""
    weight_versions: Tensor | None = None
    """[Σl] int64: version of the weights that each token was sampled from."""
    engine_log_prob: Tensor | None = None
    """[Σl] float32: log π_T of each token, computed by the engine."""
    rewards: Tensor | None = None
    """[n] float64."""
    advantages: Tensor | None = None
    """[n] float64; with an advantage per token, their mean over the response."""
    token_advantages: Tensor | None = None
    """[Σl] float64, of a baseline for each token."""
    energy: Tensor | None = None
    """[n] float64: Σ of the tokens' energies (`algorithm/energy.py`)."""
    energy_hidden: Tensor | None = None
    """[n] float64: Σ of the tokens' energies times ‖h‖²."""
    token_energy: Tensor | None = None
    """[Σl] float32: each token's energy."""
    old_log_prob: Tensor | None = None
    """[Σl] float32: log π_T of each token, by a forward pass before the step's first update."""
    current_log_prob: Tensor | None = None
    """[Σl] float32: log π_T of each token, by a forward pass right before the update that trains on it."""
    reference_log_prob: Tensor | None = None
    """[Σl] float32: log π_T of each token under the reference weights."""
    sampled_in: Tensor | None = None
    """[n] int64: the step that sampled it, of samples that are kept to be replayed."""
    routed_experts: Tensor | None = None
    """[Σ(p + l + g − 1), layers, k] uint8, or int16 for more than 256 experts: the experts that the engine
    took for every token that the policy computes, which is all of a sample but the last."""
    derived: dict[str, Tensor] = field(default_factory=dict)
    """[Σl] each: columns that the objective computed for the next update; they are not saved."""
    is_demonstration: bool = False
    """Written by the task, not sampled: only the supervised objective accepts them."""

    def __len__(self) -> int:
        return self.prompt_ids.numel()

    @property
    def sequence_lengths(self) -> Tensor:
        """[n] int64: prompt, response and given tokens."""
        own = self.prompt_lengths + self.response_lengths
        return own if self.given_lengths is None else own + self.given_lengths

    @property
    def input_lengths(self) -> Tensor:
        """[n] int64: tokens that the policy computes; the last one is only a target."""
        return (self.sequence_lengths - 1).clamp(min=0)

    def sequences(self) -> list[Tensor]:
        """The tokens of each sample: the prompt, then response and given tokens in their order."""
        prompts = self.prompt_tokens.split(self.prompt_lengths.tolist())
        responses = self.response_tokens.split(self.response_lengths.tolist())
        if self.given_lengths is None:
            return [torch.cat(pair) for pair in zip(prompts, responses, strict=True)]
        assert self.given_tokens is not None
        starts = self.sequence_lengths.cumsum(0) - self.sequence_lengths
        tokens = torch.empty(int(self.sequence_lengths.sum()), dtype=torch.int64)
        columns = (
            (self.prompt_tokens, self.prompt_lengths, _within(self.prompt_lengths)),
            (self.response_tokens, self.response_lengths, self.response_positions()),
            (self.given_tokens, self.given_lengths, self.given_positions()),
        )
        for values, lengths, positions in columns:
            tokens[torch.repeat_interleave(starts, lengths) + positions] = values
        return list(tokens.split(self.sequence_lengths.tolist()))

    def response_positions(self) -> Tensor:
        """[Σl] int64: the index of each response token in its sequence."""
        lengths = self.response_lengths
        within = _within(lengths)
        positions = torch.repeat_interleave(self.prompt_lengths, lengths) + within
        if self.given_lengths is None:
            return positions
        assert self.given_after is not None
        # One search for all samples: keys of sample i lie between i and i + 1 times the stride.
        stride = int(lengths.max()) + 1 if len(self) else 1
        sample = torch.arange(len(self)) * stride
        given = torch.repeat_interleave(sample, self.given_lengths) + self.given_after
        before = torch.searchsorted(given, torch.repeat_interleave(sample, lengths) + within, right=True)
        first = self.given_lengths.cumsum(0) - self.given_lengths
        return positions + before - torch.repeat_interleave(first, lengths)

    def given_positions(self) -> Tensor:
        """[Σg] int64: the index of each given token in its sequence."""
        assert self.given_lengths is not None and self.given_after is not None
        prompts = torch.repeat_interleave(self.prompt_lengths, self.given_lengths)
        return prompts + self.given_after + _within(self.given_lengths)

    def segments(self) -> list[list[tuple[bool, list[int]]]]:
        """What follows each prompt, in its order: (whether it was sampled, tokens), in turns."""
        prompts = self.prompt_lengths.tolist()
        positions = self.response_positions().split(self.response_lengths.tolist())
        segments = []
        for sequence, prompt, own in zip(self.sequences(), prompts, positions, strict=True):
            sampled = torch.zeros(sequence.numel(), dtype=torch.bool)
            sampled[own] = True
            marked = zip(sampled[prompt:].tolist(), sequence[prompt:].tolist(), strict=True)
            parts = groupby(marked, key=itemgetter(0))
            segments.append([(is_sampled, [token for _, token in part]) for is_sampled, part in parts])
        return segments

    @property
    def turns(self) -> Tensor | None:
        """[n] int64: turns of the policy in each conversation; None where no sample is one."""
        if self.given_lengths is None:
            return None
        assert self.given_after is not None
        owners = torch.repeat_interleave(torch.arange(len(self)), self.given_lengths)
        begins = torch.ones_like(owners, dtype=torch.bool)
        begins[1:] = (owners[1:] != owners[:-1]) | (self.given_after[1:] != self.given_after[:-1])
        return 1 + torch.bincount(owners[begins], minlength=len(self))

    def responses(self) -> list[list[int]]:
        """Response tokens of each sample."""
        return [t.tolist() for t in self.response_tokens.split(self.response_lengths.tolist())]

    def select(self, indices: Sequence[int] | Tensor) -> Rollouts:
        """The samples `indices`, in that order."""
        index = torch.as_tensor(indices, dtype=torch.int64)
        changes: dict[str, Any] = {}
        for name, value in self._columns():
            if name in _PER_PROMPT_TOKEN:
                changes[name] = _select_ragged(value, self.prompt_lengths, index)
            elif name in _PER_RESPONSE_TOKEN:
                changes[name] = _select_ragged(value, self.response_lengths, index)
            elif name in _PER_GIVEN_TOKEN:
                assert self.given_lengths is not None
                changes[name] = _select_ragged(value, self.given_lengths, index)
            elif name in _PER_INPUT_TOKEN:
                changes[name] = _select_ragged(value, self.input_lengths, index)
            else:
                changes[name] = value[index]
        derived = {
            name: _select_ragged(value, self.response_lengths, index) for name, value in self.derived.items()
        }
        return replace(self, **changes, derived=derived)

    def _columns(self) -> list[tuple[str, Tensor]]:
        values = ((f.name, getattr(self, f.name)) for f in fields(self))
        return [(name, value) for name, value in values if isinstance(value, Tensor)]

    @staticmethod
    def concatenate(parts: Sequence[Rollouts]) -> Rollouts:
        """All samples of `parts`, which must have the same columns."""
        names = {tuple(name for name, _ in part._columns()) for part in parts}
        if len(names) != 1:
            raise ValueError(f"cannot concatenate rollouts with different columns: {sorted(names)}")
        columns: dict[str, Any] = {
            name: torch.cat([getattr(part, name) for part in parts]) for name in names.pop()
        }
        return replace(parts[0], **columns)

    @staticmethod
    def from_demonstrations(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> Rollouts:
        """Supervised examples as rollouts: one sample per group, without versions and rewards."""
        n = len(prompts)
        if len(responses) != n:
            raise ValueError(f"{n} prompts but {len(responses)} responses")
        if not all(prompts):
            raise ValueError("a prompt has no tokens")
        return Rollouts(
            prompt_ids=torch.arange(n),
            groups=torch.arange(n),
            sample_indices=torch.zeros(n, dtype=torch.int64),
            prompt_lengths=torch.tensor([len(p) for p in prompts], dtype=torch.int64),
            prompt_tokens=torch.tensor([t for p in prompts for t in p], dtype=torch.int64),
            response_lengths=torch.tensor([len(r) for r in responses], dtype=torch.int64),
            response_tokens=torch.tensor([t for r in responses for t in r], dtype=torch.int64),
            finish_reasons=torch.full((n,), FINISH_STOP, dtype=torch.int64),
            is_demonstration=True,
        )

    def save(self, path: Path) -> None:
        """Write to `path` atomically and without loss."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        columns = {name: value.contiguous() for name, value in self._columns()}
        save_file(columns, partial, metadata={"is_demonstration": json.dumps(self.is_demonstration)})
        os.replace(partial, path)

    @staticmethod
    def load(path: Path) -> Rollouts:
        """Read what `save` wrote."""
        with safe_open(path, framework="pt") as file:
            columns = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            is_demonstration = json.loads(file.metadata()["is_demonstration"])
        return Rollouts(**columns, is_demonstration=is_demonstration)


def _within(lengths: Tensor) -> Tensor:
    """[Σ lengths]: 0, 1, … of each row of a ragged column."""
    starts = torch.cumsum(lengths, 0) - lengths
    return torch.arange(int(lengths.sum())) - torch.repeat_interleave(starts, lengths)


def _select_ragged(values: Tensor, lengths: Tensor, index: Tensor) -> Tensor:
    """Rows `index` of a ragged column whose row i has lengths[i] values."""
    if index.numel() == 0:
        return values[:0]
    starts = torch.cumsum(lengths, 0) - lengths
    picked = lengths[index]
    # Index of every selected value: the start of its row plus its offset within the row.
    return values[torch.repeat_interleave(starts[index], picked) + _within(picked)]
