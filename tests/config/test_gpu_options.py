"""FP8 and other GPU options without a GPU: validation, Megatron's fields, and the weights sent to the engine.

Transformer Engine cannot be imported here.  So the configuration object is Megatron's own, its effect is read
from Megatron's source, and the layer spec is built with stubs of the same names.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core import fp8_utils
from megatron.core.enums import Fp8Recipe
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.optimizer import optimizer_config

from opo_megatron.algorithm.objective import Supervised
from opo_megatron.batch.micro_batch import build_micro_batches, schedule_micro_batches
from opo_megatron.build import joined_ranks
from opo_megatron.config import to_yaml
from opo_megatron.config.choices import Fp8
from opo_megatron.config.compare import check_resume
from opo_megatron.distributed.megatron_versions import mlp_submodules
from opo_megatron.distributed.process_groups import initialize, shutdown
from opo_megatron.errors import UserError
from opo_megatron.policy import layer_specs, model, optimizer
from opo_megatron.policy.layer_specs import (
    check_context_device,
    fp8_lacks,
    fuse_weight_gradients,
    fuses_weight_gradients,
    layer_spec,
    spec_name,
    token_multiple,
)
from opo_megatron.policy.model import transformer_config
from opo_megatron.policy.optimizer import megatron_optimizer
from tests.support.fixtures import (
    BIG,
    BLOCKWISE,
    CORRECT,
    VOCAB_SIZE,
    ragged_rollouts,
    small_config,
    small_policy,
)

CPU = torch.device("cpu")


def config_of(*overrides: str, world_size: int = 1) -> Any:
    return small_config(*overrides, world_size=world_size).policy


# ---------------------------------------------------------------------- Megatron's fields


@pytest.mark.parametrize(
    ("fp8", "form", "recipe"),
    [
        ("blockwise", "e4m3", Fp8Recipe.blockwise),
        ("tensorwise", "hybrid", Fp8Recipe.tensorwise),
        ("delayed", "hybrid", Fp8Recipe.delayed),
        ("mxfp8", "e4m3", Fp8Recipe.mxfp8),
    ],
)
def test_fp8_sets_megatrons_recipe(fp8: str, form: str, recipe: Fp8Recipe) -> None:
    config = transformer_config(config_of(*BIG, CORRECT, f"policy.fp8={fp8}"), CPU)
    assert (config.fp8, config.fp8_recipe) == (form, recipe)
    assert not config.fp8_param and not config.fp8_dot_product_attention and not config.first_last_layers_bf16
    if fp8 == "delayed":
        assert (config.fp8_amax_history_len, config.fp8_amax_compute_algo) == (1024, "max")


def test_megatron_maps_every_recipe_to_the_intended_class() -> None:
    source = Path(inspect.getfile(fp8_utils)).read_text()
    for recipe, kind in (
        ("blockwise", "Float8BlockScaling"),
        ("tensorwise", "Float8CurrentScaling"),
        ("delayed", "TEDelayedScaling"),
        ("mxfp8", "MXFP8BlockScaling"),
    ):
        _, _, branch = source.partition(f"config.fp8_recipe == Fp8Recipe.{recipe}")
        assert kind in branch.split("elif")[0], recipe


def test_without_fp8_no_fp8_field_is_set() -> None:
    config = transformer_config(config_of(), CPU)
    assert config.fp8 is None and not config.gradient_accumulation_fusion
    assert config.recompute_granularity is None


def test_gpu_fields_depend_on_the_installed_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, installed = SimpleNamespace(type="cuda"), set[str]()
    monkeypatch.setattr(layer_specs, "find_spec", lambda name: name if name in installed else None)
    policy = config_of()
    assert spec_name(gpu) == "local"
    assert layer_specs.device_fields(policy, gpu) == {}
    installed |= {"transformer_engine"}
    assert spec_name(gpu) == "transformer_engine" and spec_name(CPU) == "local"
    assert layer_specs.device_fields(policy, gpu) == layer_specs.device_fields(policy, CPU) == {}
    packed = config_of("policy.packing=thd")
    assert layer_specs.device_fields(packed, gpu)["apply_rope_fusion"] is True
    assert "apply_rope_fusion" not in layer_specs.device_fields(packed, CPU)
    experts = config_of("policy.model.num_moe_experts=4")
    assert layer_specs.device_fields(experts, gpu)["moe_grouped_gemm"] is True


TE, APEX = "transformer_engine", "fused_weight_gradient_mlp_cuda"
FUSION = "policy.megatron.gradient_accumulation_fusion"


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("packages", [(), (TE,), (APEX,), (TE, APEX)])
@pytest.mark.parametrize("asked", [None, True, False])
def test_weight_gradients_are_fused_where_the_layers_can_without_apex(
    device: str, packages: tuple[str, ...], asked: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_specs, "find_spec", lambda name: name if name in packages else None)
    policy = config_of(*([] if asked is None else [f"{FUSION}={str(asked).lower()}"]))
    where = SimpleNamespace(type=device)
    possible = device == "cuda" and bool(packages)
    if asked and not possible:
        with pytest.raises(UserError) as refused:
            transformer_config(policy, where)
        assert str(refused.value).startswith(f"{FUSION} is true, but ")
        assert ("on a CPU; remove it" if device == "cpu" else "neither Transformer Engine nor Apex's") in str(
            refused.value
        )
        return
    fused = possible if asked is None else asked
    assert fuses_weight_gradients(policy, where) is fused
    # Megatron's output layer reads the config; Transformer Engine's layers get theirs afterwards.
    on_config = transformer_config(policy, where).gradient_accumulation_fusion
    assert on_config is (fused and TE not in packages)


def test_megatrons_own_linear_layers_ask_for_apex_so_the_config_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = small_config()
    parallel = initialize(config)
    try:
        monkeypatch.setattr(model, "fuses_weight_gradients", lambda policy, device: True)
        with pytest.raises(RuntimeError, match=APEX):  # as in a model of Transformer Engine's, by its head
            model.build_chunks(config.policy, VOCAB_SIZE, 0, 1, parallel.device)
        monkeypatch.undo()
        for tied in (False, True):
            policy = config_of(f"policy.model.tie_embeddings={str(tied).lower()}")
            (chunk,) = model.build_chunks(policy, VOCAB_SIZE, 0, 1, parallel.device)
            assert not chunk.output_layer.gradient_accumulation_fusion
    finally:
        shutdown()


class Fused(torch.nn.Linear):
    """A layer with Transformer Engine's attribute."""

    fuse_wgrad_accumulation = False


def test_fusion_is_set_on_every_layer_that_has_it_and_no_other() -> None:
    plain, chunk = torch.nn.Linear(2, 2), torch.nn.ModuleDict()
    chunk["attention"] = torch.nn.Sequential(Fused(2, 2), torch.nn.ModuleList([Fused(2, 2)]))
    chunk["output_layer"] = plain
    fuse_weight_gradients(chunk)
    assert [m.fuse_wgrad_accumulation for m in chunk.modules() if isinstance(m, Fused)] == [True, True]
    assert not hasattr(plain, "fuse_wgrad_accumulation") and not Fused.fuse_wgrad_accumulation
    with pytest.raises(RuntimeError, match="no layer of Transformer Engine has"):
        fuse_weight_gradients(torch.nn.Sequential(plain))


def test_the_transformer_engine_spec_is_megatrons(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.extensions import transformer_engine as extension
    from megatron.core.extensions import transformer_engine_spec_provider as module

    for name in [name for name in vars(module) if name.startswith("TE") and name != "TESpecProvider"]:
        monkeypatch.setattr(module, name, type(name, (), {}))
    monkeypatch.setattr(module, "is_te_min_version", lambda version: True)
    monkeypatch.setattr(gpt_layer_specs, "TESpecProvider", module.TESpecProvider, raising=False)
    norm = type("TENorm", (), {})
    monkeypatch.setattr(extension, "TENorm", norm, raising=False)
    config = transformer_config(config_of(*BLOCKWISE), CPU)
    spec, last = layer_spec(config, "transformer_engine", exact_parts=None)
    attention, mlp = spec.submodules.self_attention.submodules, mlp_submodules(spec.submodules.mlp)
    assert last is norm
    assert attention.linear_qkv.__name__ == mlp.linear_fc1.__name__ == "TELayerNormColumnParallelLinear"
    assert attention.linear_proj.__name__ == mlp.linear_fc2.__name__ == "TERowParallelLinear"
    assert attention.core_attention.__name__ == "TEDotProductAttention"


# ---------------------------------------------------------------------- validation


def error_of(*overrides: str) -> str:
    with pytest.raises(UserError) as error:
        small_config(*overrides)
    return str(error.value)


SGLANG = "rollout.engine=sglang"
EXPERTS = ("policy.model.num_moe_experts=4", "policy.model.moe_ffn_hidden_size=256")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("policy.fp8=blockwise",), "policy.fp8=blockwise with policy.dtype=fp32"),
        ((*BLOCKWISE, "policy.device=cpu"), "Transformer Engine has no FP8 on a CPU; set policy.fp8=null"),
        ((*BIG, "policy.fp8=tensorwise", *EXPERTS), "experts have FP8 by blocks only"),
        ((*BLOCKWISE, *EXPERTS, SGLANG, "policy.model.moe_ffn_hidden_size=192"), "moe_ffn_hidden_size / "),
        ((*BLOCKWISE, SGLANG, "policy.model.ffn_hidden_size=320"), "ffn_hidden_size / policy.tensor_model"),
        ((*BLOCKWISE, SGLANG, "policy.model.kv_channels=64"), "kv_channels is 64, which must be a multiple"),
        ((*BLOCKWISE, "policy.model.ffn_hidden_size=520"), "is 520, which must be a multiple of 16 for FP8"),
        ((*BIG, SGLANG, "rollout.sglang.fp8=true"), "policy.fp8 is null, so the engine would generate with"),
        ((*BIG, "policy.fp8=delayed", SGLANG, "rollout.sglang.fp8=true"), "set policy.fp8=blockwise or"),
        (("policy.megatron.fp8=hybrid",), "is set by the project; set policy.fp8 instead"),
        (("policy.megatron.fp8_recipe=delayed",), "set policy.fp8 instead"),
        (("policy.recompute=full", "policy.megatron.recompute_granularity=full"), "is set too; remove one"),
        ((*BIG, "policy.optimizer_offload=1.5"), "offload is 1.5; it must be between 0 and 1"),
        ((*BIG, "policy.optimizer_offload=1", "policy.device=cpu"), "is in host memory anyway; set policy"),
        (("policy.optimizer_offload=0.5",), "offload=0.5 with policy.dtype=fp32 and policy."),
        ((*BIG, "policy.optimizer_offload=1", "policy.distributed_optimizer=false"), "=false, but Megatron"),
        (("policy.context_parallel_size=2",), "is 2 with policy.packing=padded, but only packed sequences"),
    ],
)  # fmt: skip
def test_contradictory_and_unimplemented_options_are_refused(overrides: tuple[str, ...], words: str) -> None:
    assert words in error_of(*overrides)


H100, B200, A100 = (9, 0), (10, 0), (8, 0)


@pytest.mark.parametrize(
    ("fp8", "capability", "engine", "cuda", "words"),
    [
        ("blockwise", H100, "2.11.0", "13.0", None),
        ("tensorwise", H100, "2.9.0", "12.4", None),
        ("mxfp8", B200, "2.11.0", "13.0", None),
        ("mxfp8", H100, "2.11.0", "13.0", "10.0 (Blackwell), and this GPU has 9.0; set policy.fp8=blockwise"),
        ("delayed", A100, "2.11.0", "13.0", "8.9 (Ada or Hopper), and this GPU has 8.0; set policy.fp8=null"),
        ("blockwise", H100, "2.11.0", "12.8", "CUDA 12.9 or newer, and torch is built for 12.8"),
        ("blockwise", H100, None, "13.0", "Transformer Engine, which is not installed; install it with: pip"),
        ("blockwise", H100, "2.13.0", "13.0", "2.9 or newer, below 2.12, and 2.13.0 is installed"),
    ],
)
def test_missing_fp8_requirements_are_named(
    fp8: str, capability: tuple[int, int], engine: str | None, cuda: str, words: str | None
) -> None:
    missing = fp8_lacks(Fp8(fp8), capability, engine, cuda)
    assert missing is None if words is None else words in str(missing)


def test_fp8_without_a_gpu_is_refused_when_the_run_starts() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    error = pytest.raises(UserError, match=r"policy\.fp8=blockwise needs a GPU, and this run is on a CPU")
    with error, joined_ranks(small_config(*BLOCKWISE)):
        pass


def test_optimizer_offload_sets_megatrons_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checked by Megatron's own dataclass, and by its rule for the fields they require."""
    monkeypatch.setattr(optimizer_config, "is_te_min_version", lambda version: True)
    config = small_config(*BIG, "policy.optimizer_offload=0.5")
    fields = megatron_optimizer(config.policy, config.optimizer, torch.bfloat16)
    assert fields.optimizer_cpu_offload and fields.optimizer_offload_fraction == 0.5
    # Required for the hybrid optimizer to own the master weights and to receive gradients in its dtype.
    assert fields.use_precision_aware_optimizer_no_fp8_or_ds_fp8 and fields.decoupled_weight_decay
    assert fields.main_params_dtype == fields.exp_avg_dtype == fields.exp_avg_sq_dtype == torch.float32
    plain = small_config(*BIG)
    fields = megatron_optimizer(plain.policy, plain.optimizer, torch.bfloat16)
    assert not fields.optimizer_cpu_offload and not fields.use_precision_aware_optimizer


def test_recipes_with_a_boolean_optimizer_offload_still_load() -> None:
    assert small_config("policy.optimizer_offload=false").policy.optimizer_offload == 0.0


def test_offload_without_a_gpu_is_refused_when_the_run_starts() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    error = pytest.raises(UserError, match=r"policy\.optimizer_offload=1 needs a GPU, and this run is on a")
    with error, joined_ranks(small_config(*BIG, "policy.optimizer_offload=1")):
        pass


def test_offload_without_transformer_engine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, policy = SimpleNamespace(type="cuda"), config_of(*BIG, "policy.optimizer_offload=0.25")
    monkeypatch.setattr(optimizer, "find_spec", lambda name: name)
    optimizer.check_offload_device(policy, gpu)
    monkeypatch.setattr(optimizer, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"offload=0\.25 needs Transformer Engine, which is not installed; inst"
    ):
        optimizer.check_offload_device(policy, gpu)


def test_a_resumed_run_keeps_its_fp8_unless_a_change_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(small_config(*BIG)))
    allowed = ["on_policy.action"]
    with pytest.raises(UserError, match=r"policy\.fp8 is .*blockwise but was None"):
        check_resume(small_config(*BLOCKWISE), tmp_path / "config.yaml", 3, allowed)
    check_resume(small_config(*BLOCKWISE), tmp_path / "config.yaml", 3, [*allowed, "policy.fp8"])
    check_resume(small_config(*BIG, "policy.recompute=full"), tmp_path / "config.yaml", 3, [])


# ---------------------------------------------------------------------- shapes and recomputation


@pytest.mark.parametrize(("fp8", "alignment"), [("blockwise", 128), ("tensorwise", 16), ("delayed", 16)])
def test_fp8_micro_batches_hold_whole_blocks_on_every_rank(fp8: str, alignment: int) -> None:
    policy = config_of(*BIG, CORRECT, f"policy.fp8={fp8}")
    assert token_multiple(policy) == alignment
    parallel = replace(policy, tensor_model_parallel_size=2, sequence_parallel=True)
    assert token_multiple(parallel) == 2 * alignment
    assert token_multiple(replace(parallel, context_parallel_size=4)) == 8 * alignment
    batch = ragged_rollouts(24)
    schedule = schedule_micro_batches(batch.sequence_lengths.tolist(), 1, 128)
    batch = batch.select([i for rows in schedule.assignment[0] for i in rows])
    plain = build_micro_batches(batch, schedule, 0, {}, 2, CPU)
    for before, micro in zip(
        plain, build_micro_batches(batch, schedule, 0, {}, 2, CPU, 2 * alignment), strict=True
    ):
        rows, width = micro.tokens.shape
        assert rows * width % (2 * alignment) == 0 and width % 2 == 0
        assert (
            width - before.tokens.shape[1] < 2 * alignment // math.gcd(2 * alignment, rows) + 2
        )  # minimal padding
        assert torch.equal(micro.targets, before.targets)
        inputs = micro.tokens[:, : before.tokens.shape[1]]
        assert torch.equal(inputs, before.tokens) and not micro.tokens[:, before.tokens.shape[1] :].any()


def test_megatron_receives_the_context_parallel_size() -> None:
    policy = config_of("policy.packing=thd", "policy.context_parallel_size=2", world_size=2)
    config = transformer_config(policy, CPU)
    assert config.context_parallel_size == 2 and config.cp_comm_type is None  # Megatron's default, a ring


def test_context_parallelism_on_gpus_needs_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_specs, "spec_name", lambda device: "transformer_engine")
    sharded = ("policy.packing=thd", "policy.context_parallel_size=2")
    check_context_device(config_of(*sharded, "policy.dtype=bf16", world_size=2), CPU)
    check_context_device(config_of(), CPU)
    with pytest.raises(UserError, match=r"=2 with policy\.dtype=fp32, but .* set policy\.dtype=bf16, or"):
        check_context_device(config_of(*sharded, world_size=2), CPU)
    monkeypatch.setattr(layer_specs, "spec_name", lambda device: "local")
    check_context_device(config_of(*sharded, world_size=2), CPU)


def test_recomputed_activations_give_the_same_gradient() -> None:
    batch, gradients = ragged_rollouts(8), {}
    batch.is_demonstration = True
    parallel = initialize(small_config())
    try:
        for recompute in ("none", "selective", "full"):
            policy = small_policy(small_config(f"policy.recompute={recompute}"), parallel)
            assert policy.megatron_config.recompute_granularity == (
                None if recompute == "none" else recompute
            )
            schedule = policy.schedule(batch.sequence_lengths)
            policy.checked_gradients(batch.select(schedule.samples_of(0)), schedule, Supervised(len(batch)))
            gradients[recompute] = [b.grad_data.clone() for c in policy.ddp_chunks for b in c.buffers]
    finally:
        shutdown()
    assert float(gradients["none"][0].norm()) > 0
    for recompute in ("selective", "full"):
        for ours, theirs in zip(gradients[recompute], gradients["none"], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)
