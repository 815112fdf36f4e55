"""Sampling parameters in SGLang's terms, and its replies as `Rollouts`: token ids both ways."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch

from opo_megatron.batch.rollouts import FINISH_LENGTH, FINISH_STOP, Rollouts
from opo_megatron.errors import EngineFailure, UserError
from opo_megatron.kernels.exact_sampling import key_at
from opo_megatron.rollout.engine import GenerationRequest, Sampling, sampling_key
from opo_megatron.rollout.sglang.exact_mode import PACKAGE
from opo_megatron.rollout.sglang.token_channel import UNKNOWN_VERSION, version_number
from opo_megatron.utils.hashing import MASK, signed

KEY, TRACE, NO_GRAPH = "opo_key", "opo_trace", "opo_no_graph"
"""Names that `exact_server/` has as well, and cannot import from here."""
SEEDED = json.dumps({"callable": f"c{PACKAGE}.sampler\nSeeded\n.".encode().hex()})
"""The custom logit processor of every request: a pickled reference to its class."""


def generate_body(
    requests: Sequence[GenerationRequest],
    sampling: Sampling,
    exact: bool = False,
    trace: bool = False,
    prefixes: Sequence[Sequence[int]] | None = None,
    no_graph: bool = False,
    sampled: Sequence[int] | None = None,
) -> dict[str, Any]:
    """The body of a request to /generate.

    SGLang ignores seeds outside its deterministic mode, and in that mode gives all requests without one the
    same: they are always sent.

    Args:
        exact: the server runs in exact mode, and samples by the run's random numbers.
        trace: it also returns the digests of its operations.
        prefixes: tokens of each response that are sampled already.  Random numbers belong to positions, in
            the deterministic and in the exact mode: they continue as if there had been no interruption.
        no_graph: a server in exact mode decodes these without CUDA graphs.
        sampled: how many of each request's tokens were sampled, in turns before this one.
    """
    if prefixes is None:
        prefixes = [()] * len(requests)
    if exact:
        parameters = carried(requests, sampling, trace, no_graph, sampled)
        seeds: list[dict[str, Any]] = [{"custom_params": one} for one in parameters]
    else:
        seeds = [{"sampling_seed": sampling_key(sampling, request)} for request in requests]
    common = sampling_params(sampling)
    body: dict[str, Any] = {
        "input_ids": [[*r.tokens, *prefix] for r, prefix in zip(requests, prefixes, strict=True)],
        "sampling_params": [
            common | {"max_new_tokens": sampling.max_tokens - len(prefix)} | seed
            for prefix, seed in zip(prefixes, seeds, strict=True)
        ],
        "return_logprob": True,
    }
    if sampling.routed_experts:
        body["return_routed_experts"] = True
    if exact:
        body["custom_logit_processor"] = SEEDED
    return body


def carried(
    requests: Sequence[GenerationRequest],
    sampling: Sampling,
    trace: bool,
    no_graph: bool,
    sampled: Sequence[int] | None = None,
) -> list[dict[str, Any]]:
    """What each request carries to the sampler.

    A server counts positions from the start of the prompt, the local engine sampled tokens.
    """
    if sampled is None:
        sampled = [0] * len(requests)
    keys = [
        key_at(sampling_key(sampling, request), len(request.tokens) - before)
        for request, before in zip(requests, sampled, strict=True)
    ]
    wanted = {name: True for name, is_wanted in ((TRACE, trace), (NO_GRAPH, no_graph)) if is_wanted}
    return [{KEY: key} | wanted for key in keys]


def sampling_params(sampling: Sampling) -> dict[str, Any]:
    """`sampling` in SGLang's parameters, without its seed."""
    params: dict[str, Any] = {
        "max_new_tokens": sampling.max_tokens,
        "temperature": 0.0 if sampling.greedy else sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k if sampling.top_k > 0 else -1,
    }
    if sampling.stop_tokens:
        params["stop_token_ids"] = list(sampling.stop_tokens)
    else:
        params["ignore_eos"] = True
    return params


def rollouts_of(
    requests: Sequence[GenerationRequest], replies: Sequence[Any], sampling: Sampling
) -> Rollouts:
    """From one reply per request, in that order, without experts (`experts_of`).

    Raises:
        EngineFailure: a reply is incomplete.
        UserError: the server ended a response at a token that is not one of the task's stop tokens.
    """
    tokens: list[int] = []
    log_probs: list[float] = []
    versions: list[int] = []
    lengths, reasons = [], []
    for request, reply in zip(requests, replies, strict=True):
        ids, meta_info = reply["output_ids"], reply["meta_info"]
        sampled = meta_info.get("output_token_logprobs") or []
        if [token for _, token, *_ in sampled] != ids:
            raise EngineFailure(
                f"{len(sampled)} log-probabilities came with the {len(ids)} tokens of prompt "
                f"{request.prompt_id}"
            )
        tokens += ids
        log_probs += [value for value, *_ in sampled]
        versions += versions_of(meta_info, len(ids))
        lengths.append(len(ids))
        reasons.append(finish_reason_of(request, ids, meta_info["finish_reason"], sampling))
    return Rollouts(
        prompt_ids=torch.tensor([r.prompt_id for r in requests], dtype=torch.int64),
        groups=torch.tensor([r.group for r in requests], dtype=torch.int64),
        sample_indices=torch.tensor([r.sample_index for r in requests], dtype=torch.int64),
        prompt_lengths=torch.tensor([len(r.tokens) for r in requests], dtype=torch.int64),
        prompt_tokens=torch.tensor([t for r in requests for t in r.tokens], dtype=torch.int64),
        response_lengths=torch.tensor(lengths, dtype=torch.int64),
        response_tokens=torch.tensor(tokens, dtype=torch.int64),
        finish_reasons=torch.tensor(reasons, dtype=torch.int64),
        weight_versions=torch.tensor(versions, dtype=torch.int64),
        engine_log_prob=torch.tensor(log_probs, dtype=torch.float32),
    )


def versions_of(meta_info: dict[str, Any], length: int) -> list[int]:
    """The weight version of each token: by spans where the server reports them, else one for all."""
    spans = meta_info.get("weight_versions")
    if not spans:
        return [version_number(meta_info.get("weight_version"))] * length
    versions = [UNKNOWN_VERSION] * length
    for span in spans:
        for position in range(span["start"], min(span["end"], length)):
            versions[position] = version_number(span["version"])
    return versions


def spans_of(versions: Sequence[int]) -> list[dict[str, int]]:
    """`weight_versions` of a reply, from that of each token; a step has one version: one span."""
    spans, start = [], 0
    for version, same in groupby(versions):
        end = start + len([*same])
        spans.append({"start": start, "end": end, "version": version})
        start = end
    return spans


def finish_reason_of(
    request: GenerationRequest, ids: list[int], reason: dict[str, Any], sampling: Sampling
) -> int:
    """How a response or a turn with these tokens has ended.

    Raises:
        EngineFailure: by neither a stop token nor its length.
        UserError: at a token that is not one of the task's stop tokens.
    """
    kind = reason["type"]
    if kind == "length":
        return FINISH_LENGTH
    if kind == "stop" and ids and ids[-1] in sampling.stop_tokens:
        return FINISH_STOP
    if kind == "stop":
        raise UserError(
            f"the server ended a response to prompt {request.prompt_id} at {reason.get('matched')!r}, which "
            f"is none of the task's stop tokens {list(sampling.stop_tokens)}; start it without stop "
            "strings or stop tokens of its own"
        )
    raise EngineFailure(
        f"a response to prompt {request.prompt_id} was ended by {kind}: {reason.get('message')}"
    )


def digests_of(reply: Any) -> dict[str, int]:
    """Digest of each operation over all tokens of a response, from those of its steps.

    Raises:
        EngineFailure: where the server has none.
    """
    steps = reply["meta_info"].get(TRACE)
    if not steps:
        raise EngineFailure("the server returned no digests of its operations")
    return {name: signed(sum(step[name] for step in steps) & MASK) for name in steps[0]}
