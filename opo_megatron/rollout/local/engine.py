"""Batched decoding with continuous refilling: a finished response frees its slot for the next request.

Running responses always fill the first rows of the cache.  When some finish, running rows from the
end move into the free rows, and waiting requests are admitted after them; nothing else is copied.
Samples of one prompt share its prefill.  Conversations are in `conversation_batch.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from opo_megatron.batch.rollouts import FINISH_LENGTH, FINISH_STOP, Rollouts, experts_dtype
from opo_megatron.config.schema import ModelConfig
from opo_megatron.errors import UserError
from opo_megatron.kernels.exact import padded_keys
from opo_megatron.kernels.exact_digest import row_digests
from opo_megatron.kernels.exact_sampling import uniforms
from opo_megatron.rollout.engine import (
    Digests,
    GenerationRequest,
    Progress,
    Sampling,
    check_lengths,
    sampling_key,
)
from opo_megatron.rollout.local.decoder import Decoder, KeyValueCache
from opo_megatron.rollout.local.sampler import sample
from opo_megatron.utils.hashing import MASK, signed
from opo_megatron.weights.stream import NamedTensors

if TYPE_CHECKING:
    from opo_megatron.rollout.conversations import Conversations

PREFILL_TOKENS = 16384
"""Prompt tokens, padding included, per prefill pass."""


class LocalEngine:
    """A `RolloutEngine` in this process, holding one full copy of the weights."""

    def __init__(
        self,
        model: ModelConfig,
        vocab_size: int,
        dtype: torch.dtype,
        device: torch.device,
        slots: int,
        exact: bool = False,
        sum_parts: int = 1,
    ) -> None:
        self.decoder = Decoder(model, vocab_size, dtype, device, exact, sum_parts)
        self.slots = slots
        self.version: int | None = None
        self._cache: KeyValueCache | None = None

    def update_weights(self, buckets: NamedTensors, version: int) -> None:
        """Load all tensors of the stream.

        Raises:
            ValueError: when the stream does not carry each tensor exactly once.
        """
        self.version = None
        missing = set(self.decoder.names())
        for bucket in buckets:
            for name, tensor in bucket:
                if name not in missing:
                    raise ValueError(f"the weight stream carries {name} twice, or the model has none")
                missing.remove(name)
                self.decoder.load(name, tensor)
        if missing:
            raise ValueError(f"the weight stream lacks {sorted(missing)[0]} and {len(missing) - 1} more")
        self.version = version

    def probe(self, requests: Sequence[GenerationRequest], sampling: Sampling) -> dict[str, Rollouts]:
        """The responses of this rank's copy, the only one that it updates."""
        return {"the local engine": self.generate(requests, sampling)}

    def sleep(self, keeps_weights: bool = False) -> None:
        """Frees nothing: the engine is one decoder and the cache of a step."""

    def wake(self) -> None: ...

    def activity(self) -> str | None:
        """It never does anything else than to generate."""
        return None

    def recover(self) -> None:
        """Nothing to do: the engine lives in this process."""

    def kept_tokens(self, sampling: Sampling) -> None:
        """It fails with its process."""

    def close(self) -> None:
        self._cache = None

    # ------------------------------------------------------------------ check of exact mode

    def batchings(self) -> Sequence[str]:
        return [f"with {slots} slots" for slots in sorted({1, 3, self.slots})]

    def check_size(self, batching: str) -> tuple[int, int]:
        """More requests than slots, so that slots are refilled."""
        slots = _slots_of(batching)
        return slots + slots // 2 + 2, 2

    def generate_batched(
        self, requests: Sequence[GenerationRequest], sampling: Sampling, batching: str
    ) -> Rollouts:
        """The responses with another number of slots."""
        configured, self.slots = self.slots, _slots_of(batching)
        try:
            return self.generate(requests, sampling)
        finally:
            self.slots = configured

    def trace(
        self, requests: Sequence[GenerationRequest], sampling: Sampling
    ) -> tuple[Rollouts, list[Digests]]:
        """Responses, and the digests of their operations, one response after another."""
        rollouts, traces = [], list[Digests]()
        for request in requests:
            digests: Counter[str] = Counter()

            def add(operation: str, output: Tensor, total: Counter[str] = digests) -> None:
                total[operation] += int(row_digests(output.flatten(0, 1)).sum())

            self.decoder.observe = add
            try:
                rollouts.append(self.generate([request], sampling))
            finally:
                self.decoder.observe = None
            traces.append({name: signed(digest & MASK) for name, digest in digests.items()})
        return Rollouts.concatenate(rollouts), traces

    def cache(self, rows: int, length: int) -> KeyValueCache:
        """A cache of at least this size; its memory is kept for the next call, because touching fresh
        pages costs an eighth of a step's decoding."""
        length = padded_keys(length)  # exact mode reads whole multiples
        kept = self._cache
        if kept is None or kept.rows < rows or kept.length < length:
            self._cache = kept = None  # freed before the next one is allocated
            decoder = self.decoder
            self._cache = kept = KeyValueCache(decoder.model, rows, length, decoder.dtype, decoder.device)
        return kept

    @torch.no_grad()
    def generate(
        self,
        requests: Sequence[GenerationRequest],
        sampling: Sampling,
        progress: Progress | None = None,
        *,
        conversations: Conversations | None = None,
    ) -> Rollouts:
        """Generate one response per request.

        Raises:
            UserError: for prompts that do not fit, or weights that give no finite probabilities.
        """
        if self.version is None:
            raise RuntimeError("the engine holds no complete weights yet")
        longest = check_lengths(requests, sampling, self.decoder.model)
        if conversations is None:
            batch = Batch(self, requests, sampling, longest + sampling.max_tokens)
        else:
            from opo_megatron.rollout.local.conversation_batch import ConversationBatch

            batch = ConversationBatch(self, requests, sampling, conversations)
        while batch.advance():
            if progress is not None:
                progress(batch.finished, len(requests), batch.sampled)
        rollouts = batch.rollouts(self.version)
        assert rollouts.engine_log_prob is not None
        if not bool(torch.isfinite(rollouts.engine_log_prob).all()):
            raise UserError(
                f"weights of version {self.version} give non-finite probabilities; resume from the last "
                "checkpoint with a smaller learning rate"
            )
        return rollouts


@dataclass
class Rows:
    """State of the running responses, one entry per occupied cache row."""

    request: Tensor
    """Which request."""
    key: Tensor
    """Its random key."""
    position: Tensor
    """Position of `token` in the sequence."""
    token: Tensor
    """Last sampled token, not yet in the cache."""
    count: Tensor
    """Tokens sampled so far."""

    def columns(self) -> tuple[Tensor, ...]:
        return self.request, self.key, self.position, self.token, self.count


def _slots_of(batching: str) -> int:
    return int(batching.split()[1])


class Batch:
    """One call of `generate`."""

    def __init__(
        self, engine: LocalEngine, requests: Sequence[GenerationRequest], sampling: Sampling, length: int
    ) -> None:
        self.decoder, self.requests, self.sampling = engine.decoder, requests, sampling
        self.device, n = engine.decoder.device, len(requests)
        self.slots = min(engine.slots, n)
        self.cache = engine.cache(self.slots, length)
        self.keys = torch.tensor(
            [sampling_key(sampling, request) for request in requests],
            dtype=torch.int64,
            device=self.device,
        )
        self.prompt_lengths = torch.tensor([len(r.tokens) for r in requests], dtype=torch.int64)
        self.stop = torch.tensor(sampling.stop_tokens, dtype=torch.int64, device=self.device)
        self.tokens = torch.zeros(n, sampling.max_tokens, dtype=torch.int64, device=self.device)
        self.log_probs = torch.zeros(n, sampling.max_tokens, device=self.device)
        self.lengths = torch.zeros(n, dtype=torch.int64, device=self.device)
        self.energies = torch.zeros(2, n if sampling.energies else 0, dtype=torch.float64, device=self.device)
        width = sampling.max_tokens if sampling.token_energies else 0
        self.token_energies = torch.zeros(n, width, device=self.device)
        self.routed_experts = self._experts_of(n, length - 1) if sampling.routed_experts else None
        self.stopped = torch.zeros(n, dtype=torch.bool, device=self.device)
        none = torch.empty(0, dtype=torch.int64, device=self.device)
        self.rows = Rows(none, none, none, none, none)
        self.admitted = self.finished = self.sampled = 0

    def _experts_of(self, n: int, length: int) -> Tensor | None:
        """[n, length, layers, k] to record the experts of every token in; None for a dense model."""
        model = self.decoder.model
        if model.num_moe_experts is None:
            return None
        shape = (n, max(0, length), model.num_layers, model.moe_router_topk)
        return torch.zeros(shape, dtype=experts_dtype(model.num_moe_experts), device=self.device)

    @contextmanager
    def _recording(self) -> Iterator[list[Tensor]]:
        """The experts [b, s, k] of each layer of the passes within; none where they are not recorded."""
        layers: list[Tensor] = []
        self.decoder.routed_experts = layers if self.routed_experts is not None else None
        try:
            yield layers
        finally:
            self.decoder.routed_experts = None

    def advance(self) -> bool:
        """Admit what fits, sample one token per running response; False once all are finished."""
        if self.admitted < len(self.requests) and self.rows.request.numel() < self.slots:
            self._admit()
            self._retire()
        if self.rows.request.numel():
            rows = self.rows
            hidden = self._decode(rows)
            rows.position = rows.position + 1
            self._sample(rows, hidden)
            self._retire()
        return self.finished < len(self.requests)

    def _decode(self, rows: Rows) -> Tensor:
        """Hidden states [n, hidden] behind the last token of each row, which enters the cache."""
        with self._recording() as layers:
            hidden = self.decoder.decode(rows.token, rows.position, self.cache)
        if self.routed_experts is not None:
            experts = torch.stack(layers, 2)[:, 0].to(self.routed_experts.dtype)
            self.routed_experts[rows.request, rows.position] = experts
        return hidden

    def _admit(self) -> None:
        """Prefill the next requests into free rows and sample their first token."""
        running = self.rows.request.numel()
        batch = list(range(self.admitted, min(self.admitted + self.slots - running, len(self.requests))))
        self.admitted += len(batch)
        unique = list(dict.fromkeys(self.requests[i].tokens for i in batch))
        index_of = {prompt: i for i, prompt in enumerate(unique)}
        prompt_of = [index_of[self.requests[i].tokens] for i in batch]
        last_hidden = torch.empty(
            len(unique), self.decoder.model.hidden_size, dtype=self.decoder.dtype, device=self.device
        )
        per_pass = max(1, PREFILL_TOKENS // max(len(prompt) for prompt in unique))
        for begin in range(0, len(unique), per_pass):
            part = unique[begin : begin + per_pass]
            inside = [i for i, p in enumerate(prompt_of) if begin <= p < begin + len(part)]
            rows = torch.tensor([running + i for i in inside], device=self.device)
            sources = torch.tensor([prompt_of[i] - begin for i in inside], device=self.device)
            lengths = torch.tensor([len(prompt) for prompt in part], device=self.device)
            padded = torch.zeros(len(part), int(lengths.max()), dtype=torch.int64, device=self.device)
            for i, prompt in enumerate(part):
                padded[i, : len(prompt)] = torch.tensor(prompt, device=self.device)
            with self._recording() as layers:
                hidden = self.decoder.prefill(padded, self.cache, rows, sources)
            if self.routed_experts is not None:
                experts = torch.stack(layers, 2).to(self.routed_experts.dtype)
                admitted = torch.tensor([batch[i] for i in inside], device=self.device)
                # Decoding overwrites what stands here for the padding of a shorter prompt.
                self.routed_experts[admitted, : padded.shape[1]] = experts[sources]
            last_hidden[begin : begin + len(part)] = hidden[torch.arange(len(part)), lengths - 1]
        request = torch.tensor(batch, device=self.device)
        new = Rows(
            request=request,
            key=self.keys[request],
            position=self.prompt_lengths.to(self.device)[request],
            token=torch.zeros_like(request),
            count=torch.zeros_like(request),
        )
        self._sample(new, last_hidden[torch.tensor(prompt_of, device=self.device)])
        joined = zip(self.rows.columns(), new.columns(), strict=True)
        self.rows = Rows(*(torch.cat(pair) for pair in joined))

    def _sample(self, rows: Rows, hidden: Tensor) -> None:
        """Sample the token that follows `hidden` in each row and record it."""
        uniform = uniforms(rows.key, rows.count)
        logits = self.decoder.logits(hidden)
        if self.decoder.observe is not None:
            self.decoder.observe("the LM head", logits.unsqueeze(0))
        rows.token, log_prob, energy = sample(logits, uniform, self.sampling)
        if energy is not None and self.sampling.token_energies:
            self.token_energies[rows.request, rows.count] = energy
        if energy is not None and self.sampling.energies:
            energy = energy.double()
            self.energies[:, rows.request] += torch.stack((energy, energy * hidden.float().square().sum(1)))
        self.tokens[rows.request, rows.count] = rows.token
        self.log_probs[rows.request, rows.count] = log_prob
        rows.count = rows.count + 1
        self.sampled += rows.count.numel()

    def _retire(self) -> None:
        """Remove finished responses."""
        rows = self.rows
        stopped = torch.isin(rows.token, self.stop)
        done = stopped | (rows.count >= self.sampling.max_tokens)
        if not bool(done.any()):
            return
        self.stopped[rows.request[stopped]] = True
        self._free(done)

    def _free(self, done: Tensor) -> None:
        """Remove the rows `done`, at least one; running rows from the end move into their rows."""
        rows = self.rows
        self.lengths[rows.request[done]] = rows.count[done]
        running = int((~done).sum())
        self.finished += done.numel() - running
        holes = done[:running].nonzero()[:, 0]
        movers = (~done[running:]).nonzero()[:, 0] + running
        if movers.numel():
            self.cache.move(movers, holes, int(rows.position[movers].max()))
            for column in rows.columns():
                column[holes] = column[movers]
        self.rows = Rows(*(column[:running] for column in rows.columns()))

    def _given_lengths(self) -> Tensor:
        """[n] int64: tokens of each request that an environment gave."""
        return torch.zeros_like(self.prompt_lengths)

    def rollouts(self, version: int) -> Rollouts:
        """The finished responses, on the CPU, in the order of the requests."""
        lengths = self.lengths.cpu()
        sampled = torch.arange(self.sampling.max_tokens) < lengths.unsqueeze(1)
        routed_experts = None
        if self.routed_experts is not None:
            computed = torch.arange(self.routed_experts.shape[1])
            inputs = (self.prompt_lengths + lengths + self._given_lengths() - 1).unsqueeze(1)
            routed_experts = self.routed_experts.cpu()[computed < inputs]
        requests = self.requests
        return Rollouts(
            prompt_ids=torch.tensor([r.prompt_id for r in requests], dtype=torch.int64),
            groups=torch.tensor([r.group for r in requests], dtype=torch.int64),
            sample_indices=torch.tensor([r.sample_index for r in requests], dtype=torch.int64),
            prompt_lengths=self.prompt_lengths,
            prompt_tokens=torch.tensor([t for r in requests for t in r.tokens], dtype=torch.int64),
            response_lengths=lengths,
            response_tokens=self.tokens.cpu()[sampled],
            finish_reasons=torch.where(self.stopped.cpu(), FINISH_STOP, FINISH_LENGTH),
            weight_versions=torch.full((int(lengths.sum()),), version, dtype=torch.int64),
            engine_log_prob=self.log_probs.cpu()[sampled],
            energy=self.energies[0].cpu() if self.sampling.energies else None,
            energy_hidden=self.energies[1].cpu() if self.sampling.energies else None,
            token_energy=self.token_energies.cpu()[sampled] if self.sampling.token_energies else None,
            routed_experts=routed_experts,
        )
