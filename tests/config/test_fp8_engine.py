"""FP8 on both sides: which recipes need correction, Transformer Engine's scales, what the engine gets.

Transformer Engine cannot be imported here, so its recipe class is a stub of the same name.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from opo_megatron.errors import UserError
from opo_megatron.kernels.fp8 import Scales, dequantize_blocks, quantize_blocks
from opo_megatron.policy import layer_specs
from opo_megatron.rollout.sglang.engine import SglangEngine
from opo_megatron.rollout.sglang.server import write_model_config
from opo_megatron.rollout.sglang.transfer import _copy_shared
from opo_megatron.weights.fp8_folder import BlockFp8, engine_quantization
from tests.support.fixtures import BIG, BLOCKWISE, CORRECT, VOCAB_SIZE, small_config

SGLANG = "rollout.engine=sglang"


def error_of(*overrides: str) -> str:
    """The one sentence with which a recipe is refused."""
    with pytest.raises(UserError) as error:
        small_config(*overrides)
    return str(error.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("policy.fp8=blockwise",), "policy.fp8=blockwise with rollout.engine=local, whose weights are bf16"),
        (("policy.fp8=tensorwise",), "set on_policy.action=correct, or rollout.engine=sglang with policy"),
        (("policy.fp8=delayed", "on_policy.action=warn"), "and on_policy.action=warn does not correct that"),
        (("policy.fp8=mxfp8", "on_policy.tolerance=1"), "policy.fp8=mxfp8 with rollout.engine=local"),
        (("policy.fp8=blockwise", SGLANG, "rollout.sglang.fp8=false"), "or rollout.sglang.fp8=true, or pol"),
        (("policy.fp8=tensorwise", SGLANG), "fp8=tensorwise with rollout.engine=sglang, whose weights"),
        (("policy.fp8=delayed", SGLANG), "on_policy.action=correct, or policy.fp8=blockwise, or policy"),
        (("policy.fp8=mxfp8", SGLANG, "on_policy.action=warn"), "samples from another policy than is"),
    ],
)  # fmt: skip
def test_fp8_without_the_same_weights_in_the_engine_must_be_corrected(
    overrides: tuple[str, ...], words: str
) -> None:
    assert words in error_of(*BIG, *overrides)
    small_config(*BIG, *overrides, CORRECT)


def test_fp8_with_the_same_weights_in_the_engine_needs_no_correction() -> None:
    for scales in Scales:
        config = small_config(*BIG, SGLANG, "policy.fp8=blockwise", f"policy.fp8_scales={scales.value}")
        assert config.rollout.sglang.fp8 and config.policy.fp8_scales is scales


@pytest.mark.parametrize("fp8", ["null", "tensorwise", "delayed", "mxfp8"])
@pytest.mark.parametrize("engine", ["local", "sglang"])
def test_fp32_scales_belong_to_blocks(fp8: str, engine: str) -> None:
    overrides = (
        *BIG,
        CORRECT,
        f"policy.fp8={fp8}",
        "policy.fp8_scales=fp32",
        f"rollout.engine={engine}",
    )
    assert f"policy.fp8_scales=fp32 with policy.fp8={fp8}, but only blocks have such scales" in error_of(
        *overrides
    )


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Transformer Engine's recipe class, as far as its scales go."""

    @dataclass(frozen=True)
    class QParams:
        power_2_scale: bool = False
        amax_epsilon: float = 0.0

    class Float8BlockScaling:
        fp8_quant_fwd_inp = fp8_quant_fwd_weight = fp8_quant_bwd_grad = QParams(True)

    module = SimpleNamespace(Float8BlockScaling=Float8BlockScaling, QParams=QParams)
    for name in ("transformer_engine", "transformer_engine.common"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    monkeypatch.setitem(sys.modules, "transformer_engine.common.recipe", module)
    return Float8BlockScaling


@pytest.mark.parametrize("scales", Scales)
@pytest.mark.parametrize("before", Scales)
@pytest.mark.parametrize("variable", [None, "0", "1"])
def test_transformer_engine_gets_the_recipes_scales_or_is_named(
    scales: Scales, before: Scales, variable: str | None, recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own variable is read when it is imported; where it says something else, it is named."""
    monkeypatch.delenv("NVTE_FP8_BLOCK_SCALING_FP32_SCALES", raising=False)
    layer_specs.set_fp8_scales(before)  # an earlier policy of the process
    is_power = scales is Scales.power_of_two
    if variable is not None:
        monkeypatch.setenv("NVTE_FP8_BLOCK_SCALING_FP32_SCALES", variable)
    if variable == ("1" if is_power else "0"):
        with pytest.raises(
            UserError, match=rf"SCALES={variable} contradicts policy\.fp8_scales={scales.value}; unset"
        ):
            layer_specs.set_fp8_scales(scales)
        return
    layer_specs.set_fp8_scales(scales)
    for kind in (recipe.fp8_quant_fwd_inp, recipe.fp8_quant_fwd_weight, recipe.fp8_quant_bwd_grad):
        assert kind.power_2_scale is is_power and kind.amax_epsilon == 0


# ---------------------------------------------------------------------- weights sent to the engine


def test_blockwise_fp8_enables_fp8_in_the_sglang_engine(tmp_path: Path) -> None:
    assert small_config(*BLOCKWISE, SGLANG).rollout.sglang.fp8 is True
    assert small_config(*BLOCKWISE, SGLANG, "rollout.sglang.fp8=false").rollout.sglang.fp8 is False
    assert small_config(*BLOCKWISE).rollout.sglang.fp8 is False
    assert small_config(*BIG, SGLANG).rollout.sglang.fp8 is False
    config = small_config(*BLOCKWISE, SGLANG)
    fp8 = BlockFp8(replace(config.policy.model, vocab_size=VOCAB_SIZE), Scales.power_of_two)
    write_model_config(config, VOCAB_SIZE, tmp_path, fp8.config)
    model_config = (tmp_path / "config.json").read_text()
    assert '"weight_block_size"' in model_config and '"ue8m0"' in model_config


@pytest.mark.parametrize("scales", Scales)
def test_the_engine_gets_the_scales_of_the_policy(scales: Scales) -> None:
    fp8 = engine_quantization(
        small_config(*BLOCKWISE, SGLANG, f"policy.fp8_scales={scales.value}"), VOCAB_SIZE
    )
    assert fp8 is not None and ("scale_fmt" in fp8.config) is (scales is Scales.power_of_two)
    weight = torch.randn(512, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    name = "model.layers.0.mlp.gate_proj.weight"
    sent, expected = dict(fp8.tensors(name, weight)), quantize_blocks(name, weight, scales)
    assert torch.equal(sent[name].view(torch.uint8), expected[0].view(torch.uint8))
    assert torch.equal(sent[name + "_scale_inv"], expected[1])


class Client:
    """A server that accepts every POST."""

    url = "http://nowhere"

    def post(self, path: str, **body: Any) -> dict[str, bool]:
        return {"success": True}

    def offers(self, path: str) -> bool:
        return True


class Transfer:
    """Records what a server would receive."""

    def __init__(self) -> None:
        self.received: dict[str, torch.Tensor] = {}

    def send(self, bucket: Any) -> Any:
        return lambda: self.received.update(bucket)

    def finish(self) -> None:
        pass


def engine_with(fp8: BlockFp8) -> tuple[SglangEngine, Transfer]:
    engine, transfer = SglangEngine.__new__(SglangEngine), Transfer()
    client: Any = Client()
    engine.config = small_config(*BLOCKWISE, SGLANG)
    engine.settings, engine.parallel = engine.config.rollout.sglang, SimpleNamespace(rank=0)  # type: ignore[assignment]
    engine._fp8, engine._owner, engine._clients, engine._released = fp8, 0, [client], set()
    engine._transfers = {client.url: transfer}  # type: ignore[dict-item]
    return engine, transfer


def test_the_engine_receives_the_trainers_fp8_bytes(tmp_path: Path) -> None:
    """Quantizing shard by shard at TP 2, as the trainer does, equals quantizing the whole, as it is sent."""
    model = replace(small_config(*BLOCKWISE).policy.model, vocab_size=VOCAB_SIZE)
    generator = torch.Generator().manual_seed(0)
    gate = torch.randn(512, 256, generator=generator).bfloat16()
    norm = torch.ones(256, dtype=torch.bfloat16)
    engine, transfer = engine_with(BlockFp8(model, Scales.power_of_two))
    name = "model.layers.0.mlp.gate_proj.weight"
    engine.update_weights(iter([[(name, gate), ("model.norm.weight", norm)]]), 3)
    assert engine.version == 3
    assert set(transfer.received) == {name, name + "_scale_inv", "model.norm.weight"}
    assert transfer.received["model.norm.weight"].dtype is torch.bfloat16
    sent, scale = transfer.received[name], transfer.received[name + "_scale_inv"]
    for rank, shard in enumerate(gate.chunk(2)):
        values, own = quantize_blocks(name, shard, Scales.power_of_two)
        assert torch.equal(values.view(torch.uint8), sent.chunk(2)[rank].view(torch.uint8))
        assert torch.equal(own, scale.chunk(2)[rank])
    assert torch.equal(scale.log2(), scale.log2().round())
    assert float((dequantize_blocks(sent, scale) - gate.float()).abs().max()) <= 2**-4 * float(
        gate.abs().max()
    )


def test_a_non_finite_weight_raises_after_the_whole_stream_is_consumed() -> None:
    model = replace(small_config(*BLOCKWISE).policy.model, vocab_size=VOCAB_SIZE)
    engine, transfer = engine_with(BlockFp8(model, Scales.power_of_two))
    bad = torch.full((512, 256), math.nan, dtype=torch.bfloat16)
    stream = iter([[("model.layers.0.mlp.gate_proj.weight", bad)], [("model.norm.weight", torch.ones(256))]])
    with pytest.raises(UserError, match="NaN or infinite"):
        engine.update_weights(stream, 3)
    assert engine.version is None and transfer.received == {} and next(stream, None) is None


def test_a_bucket_of_several_dtypes_keeps_each() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(128, 128, generator=generator)
    values, scale = quantize_blocks("w", weight, Scales.power_of_two)
    bucket = [("a", values), ("b", scale), ("c", weight.bfloat16()), ("d", torch.ones(3))]
    for (name, tensor), (_, copy) in zip(bucket, shared := _copy_shared(bucket), strict=True):
        assert copy.dtype is tensor.dtype and copy.shape == tensor.shape, name
        assert torch.equal(copy.view(torch.uint8), tensor.view(torch.uint8))
        assert copy.storage_offset() * copy.element_size() % 16 == 0
    assert len({copy.untyped_storage().data_ptr() for _, copy in shared}) == 1 and copy.is_shared()


def test_power_of_two_scales_equal_transformer_engines() -> None:
    """TE's kernel truncates 448 / amax to a power of two."""
    generator = torch.Generator().manual_seed(0)
    largest = torch.cat([torch.rand(4000, generator=generator) * 10, 448 * 2.0 ** torch.arange(-30, 9)])
    largest = torch.cat(
        [largest, largest.nextafter(torch.tensor(math.inf)), largest.nextafter(torch.tensor(0.0))]
    )
    blocks = torch.zeros(len(largest) * 128, 128)
    blocks[::128, 0] = largest
    _, ours = quantize_blocks("w", blocks, Scales.power_of_two)
    encoded = ((448 / largest).view(torch.int32) & ~0x7FFFFF).view(torch.float32)
    assert torch.equal(ours[:, 0], 1 / encoded)
