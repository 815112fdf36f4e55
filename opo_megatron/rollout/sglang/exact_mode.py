"""Exact mode, the trainer's side: how a server is started, and what a request carries.

`exact_server/` is the other side.  SGLang's own deterministic inference is not used: it makes samples
repeatable, not equal to the policy's bits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from opo_megatron.config.schema import ModelConfig
from opo_megatron.kernels.exact_sampling import key_at
from opo_megatron.rollout.engine import GenerationRequest, Sampling, sampling_key

PACKAGE = "exact_server"
OPTIONS: Mapping[str, object] = {
    "enable-custom-logit-processor": True,  # lets a request's parameters reach the sampler
    "chunked-prefill-size": 2048,
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
