"""Exact mode, the trainer's side: how a server is started, and what a request carries.

`exact_server/` is the other side.  SGLang's own deterministic inference is not used: it makes samples
repeatable, not equal to the policy's bits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from opo_megatron.config.schema import ModelConfig, SglangConfig
from opo_megatron.errors import EngineFailure
from opo_megatron.kernels.exact_sampling import key_at
from opo_megatron.rollout.engine import GenerationRequest, Sampling, sampling_key
from opo_megatron.rollout.sglang.installation import by_their_own_names
from opo_megatron.utils.hashing import MASK, signed

PACKAGE = "exact_server"
CHUNK = "chunked-prefill-size"
OPTIONS: Mapping[str, object] = {
    "enable-custom-logit-processor": True,  # lets a request's parameters reach the sampler
    CHUNK: 1024,
}
ENVIRONMENT: Mapping[str, str] = {"SGLANG_EXTERNAL_MODEL_PACKAGE": PACKAGE}
MODEL = "opo_model"
KEY, TRACE = "opo_key", "opo_trace"
"""Names that `exact_server/` has as well, and cannot import from here."""
SEEDED = json.dumps({"callable": f"c{PACKAGE}.sampler\nSeeded\n.".encode().hex()})
"""The custom logit processor of every request: a pickled reference to its class."""


def model_description(model: ModelConfig) -> dict[str, Any]:
    """`policy.model` as JSON, for the server's `config.json`."""
    fields = asdict(model)
    fields["rope_scaling"]["type"] = model.rope_scaling.type.value
    return {MODEL: fields}


def carried(requests: Sequence[GenerationRequest], sampling: Sampling, trace: bool) -> list[dict[str, Any]]:
    """What each request carries to the sampler.

    A server counts positions from the start of the prompt, the local engine from the first sampled token.
    """
    keys = [key_at(sampling_key(sampling, request), len(request.tokens)) for request in requests]
    return [{KEY: key} | ({TRACE: True} if trace else {}) for key in keys]


def chunk_tokens(settings: SglangConfig) -> int:
    """Tokens that a server prefills at once."""
    return int((dict(OPTIONS) | by_their_own_names(settings.options))[CHUNK])


def disables_prefixes(settings: SglangConfig) -> bool:
    """Whether the servers have no prefix cache."""
    return bool(by_their_own_names(settings.options).get("disable-radix-cache"))


def digests_of(reply: Any) -> dict[str, int]:
    """Digest of each operation over all tokens of a response, from those of its steps.

    Raises:
        EngineFailure: where the server has none.
    """
    steps = reply["meta_info"].get(TRACE)
    if not steps:
        raise EngineFailure("the server returned no digests of its operations")
    return {name: signed(sum(step[name] for step in steps) & MASK) for name in steps[0]}
