"""One rank: streams a policy's slices for engines of several sizes, and compares them with what they hold.

slice_stream_worker.py FAMILY VOCAB [ENGINE,EXPERT_RANKS,fp8|bf16:policy override,override …] …
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace

import torch

from opo_megatron.config.choices import Scales
from opo_megatron.distributed.process_groups import (
    all_gather_objects,
    destroy_model_parallel,
    initialize,
    shutdown,
)
from opo_megatron.kernels.fp8 import quantize_blocks
from opo_megatron.policy.policy import Policy
from opo_megatron.weights.engine_slices import EngineSizes, check_slices, expected_tensors
from opo_megatron.weights.fp8_folder import BlockFp8
from opo_megatron.weights.random_init import random_weights
from opo_megatron.weights.slice_routes import Place, SliceRoutes, routes_of
from tests.support.engine_slices import held_by
from tests.support.fixtures import small_config
from tests.support.slice_cases import FAMILIES, model_overrides


def run(family: str, vocab: int, engine: str, overrides: list[str]) -> None:
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    config = small_config(*model_overrides(FAMILIES[family]), *overrides, world_size=world_size)
    parallel = initialize(config)
    weights, model = random_weights(config.policy.model, vocab, 1), config.policy.model
    policy = Policy(config, vocab, parallel, config.optimizer, weights)
    tensor, expert, precision = engine.split(",")
    fp8 = BlockFp8(replace(model, vocab_size=vocab), Scales.fp32) if precision == "fp8" else None
    sizes = EngineSizes(int(tensor), int(expert), fp8)
    place = Place("node", 0, parallel.tp_rank, parallel.dp_cp_rank)
    routes = routes_of(all_gather_objects(parallel, place), parallel.tp_size, sizes)
    assert isinstance(routes, SliceRoutes), routes
    stream = policy.stream_weights().slices(routes)
    check_slices(stream.infos, expected_tensors(model, vocab, sizes, torch.bfloat16))
    found: dict[int, dict[str, torch.Tensor]] = {rank: {} for rank in routes.wanted[parallel.rank]}
    for bucket in stream:
        assert bucket.keys() == found.keys()
        for rank, named in bucket.items():
            found[rank] |= dict(named)
    for rank, tensors in found.items():
        held = held_by(model, vocab, lambda name: weights(name).bfloat16(), rank, sizes.tensor, sizes.expert)
        if fp8 is not None:
            held = dict(pair for name, tensor in held.items() for pair in quantized(name, tensor))
        assert tensors.keys() == held.keys()
        for name, tensor in tensors.items():
            # Bits: `==` is not defined for FP8.
            expected = held[name].contiguous()
            same = tensor.dtype == expected.dtype and tensor.shape == expected.shape
            assert same and torch.equal(tensor.view(torch.uint8), expected.view(torch.uint8)), (rank, name)
    fed = sorted(rank for own in all_gather_objects(parallel, sorted(found)) for rank in own)
    assert set(fed) == set(range(sizes.tensor))
    destroy_model_parallel()


def quantized(name: str, tensor: torch.Tensor):  # type: ignore[no-untyped-def]
    """By blocks of a rank's own matrix; every expert by itself."""
    in_layer = name.startswith("model.layers.") and tensor.dim() > 1 and not name.endswith("mlp.gate.weight")
    if not in_layer:
        return [(name, tensor)]
    experts = tensor if tensor.dim() == 3 else tensor[None]
    both = [quantize_blocks(name, one, Scales.fp32) for one in experts]
    values, scales = (torch.stack([pair[i].view(torch.uint8) for pair in both]) for i in range(2))
    named = [(name, values.view(torch.float8_e4m3fn)), (f"{name}_scale_inv", scales.view(torch.float32))]
    return named if tensor.dim() == 3 else [(one, stacked[0]) for one, stacked in named]


def main() -> None:
    family, vocab, *cases = sys.argv[1:]
    for case in cases:
        engine, _, overrides = case.partition(":")
        run(family, int(vocab), engine, list(filter(None, overrides.split(","))))
    shutdown()


if __name__ == "__main__":
    main()
