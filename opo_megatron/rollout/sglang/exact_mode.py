"""Exact mode, the trainer's side: how a server is started, and what a request carries.

`exact_server/` is the other side.  SGLang's own deterministic inference is not used: it makes samples
repeatable, not equal to the policy's bits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from opo_megatron.config.schema import Config, PolicyConfig, SglangConfig
from opo_megatron.errors import EngineFailure, UserError
from opo_megatron.kernels.exact_sampling import key_at
from opo_megatron.rollout.engine import GenerationRequest, Sampling, sampling_key
from opo_megatron.rollout.sglang.client import Client
from opo_megatron.rollout.sglang.installation import by_their_own_names
from opo_megatron.utils.hashing import MASK, hash_of_text, signed

PACKAGE = "opo_megatron.rollout.sglang.exact_server"
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


def options(config: Config) -> dict[str, object]:
    """Options of a server in exact mode.  Its name tells which recipes it is exact for."""
    return dict(OPTIONS) | {"served-model-name": server_name(config)}


def server_name(config: Config) -> str:
    """The name of a server with the operations of this recipe; the vocabulary comes from the task."""
    policy = replace(config.policy, model=replace(config.policy.model, vocab_size=None))
    described = model_description(policy)
    text = json.dumps([described, config.policy.dtype.value], sort_keys=True)
    return f"opo-exact-{hash_of_text(text) & MASK:016x}"


def check_server(config: Config, client: Client) -> None:
    """Check that a server that runs already was started in exact mode for this recipe's model.

    Raises:
        UserError: where it was not.
    """
    info = client.get("/server_info")
    if info.get("served_model_name") != server_name(config):
        raise UserError(
            f"the SGLang server {client.url} of rollout.sglang.urls does not run the operations of this "
            "recipe's model in exact mode; start it by `opo serve` with this recipe and "
            "rollout.sglang.exact=true, or set rollout.sglang.exact=false"
        )


def model_description(policy: PolicyConfig) -> dict[str, Any]:
    """`policy.model` and how its sums are split as JSON, for the server's `config.json`."""
    fields = asdict(policy.model)
    fields["rope_scaling"]["type"] = policy.model.rope_scaling.type.value
    return {MODEL: fields | {"exact_sum_parts": policy.exact_sum_parts}}


def carried(requests: Sequence[GenerationRequest], sampling: Sampling, trace: bool) -> list[dict[str, Any]]:
    """What each request carries to the sampler.

    A server counts positions from the start of the prompt, the local engine from the first sampled token.
    """
    keys = [key_at(sampling_key(sampling, request), len(request.tokens)) for request in requests]
    return [{KEY: key} | ({TRACE: True} if trace else {}) for key in keys]


def chunk_tokens(settings: SglangConfig) -> int:
    """Tokens that a server prefills at once; -1: any number."""
    chunk: int = by_their_own_names(settings.options).get(CHUNK, OPTIONS[CHUNK])
    return chunk


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
