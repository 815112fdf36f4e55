"""The keys of `policy.megatron`: fields of Megatron-Core's configuration that the project does not set.

The names are read from Megatron's source with `ast`: importing the class takes many seconds and imports
torch.  Megatron checks the values' types.
"""

from __future__ import annotations

import ast
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from opo_megatron.config.keys import key_types, unknown
from opo_megatron.config.schema import PolicyConfig
from opo_megatron.errors import UserError

_SOURCES = {
    "ModelParallelConfig": "model_parallel_config.py",
    "TransformerConfig": "transformer/transformer_config.py",
}


def _use(key: str) -> str:
    return f"set policy.{key} instead"


def _always(value: str) -> str:
    return f"it is always {value}, remove it"


_DROPOUT = "dropout must be 0: the engine samples without it"
_OBJECTIVE = "remove it: the gradient is of the policy objective and nothing else"
_AUXILIARY = f"{_OBJECTIVE}, an auxiliary loss would add its own"
_WEIGHTS = "initial weights follow from run.seed, the same under every layout, remove it"
_FUNCTION = "the training step supplies this function, remove it"
_EVEN = "layers are split evenly over the stages, remove it"
_NOT_IMPLEMENTED = "it is not implemented, remove it"

MANAGED_FIELDS: dict[str, str] = {
    "num_layers": _use("model.num_layers"),
    "hidden_size": _use("model.hidden_size"),
    "ffn_hidden_size": _use("model.ffn_hidden_size"),
    "num_attention_heads": _use("model.num_attention_heads"),
    "num_query_groups": _use("model.num_query_groups"),
    "kv_channels": _use("model.kv_channels"),
    "qk_layernorm": _use("model.qk_layernorm"),
    "add_qkv_bias": _use("model.add_qkv_bias"),
    "layernorm_epsilon": _use("model.layernorm_epsilon"),
    "num_moe_experts": _use("model.num_moe_experts"),
    "moe_router_topk": _use("model.moe_router_topk"),
    "moe_ffn_hidden_size": _use("model.moe_ffn_hidden_size"),
    "moe_router_pre_softmax": _use("model.moe_router_pre_softmax"),
    "tensor_model_parallel_size": _use("tensor_model_parallel_size"),
    "pipeline_model_parallel_size": _use("pipeline_model_parallel_size"),
    "virtual_pipeline_model_parallel_size": _use("virtual_pipeline_model_parallel_size"),
    "sequence_parallel": _use("sequence_parallel"),
    "context_parallel_size": _use("context_parallel_size"),
    "expert_model_parallel_size": _use("expert_model_parallel_size"),
    "expert_tensor_parallel_size": _use("expert_tensor_parallel_size"),
    "params_dtype": _use("dtype"),
    "pipeline_dtype": _use("dtype"),
    "autocast_dtype": _use("dtype"),
    "enable_autocast": _use("dtype"),
    "bf16": _use("dtype"),
    "fp16": _use("dtype (fp32 or bf16)"),
    "fp8": _use("fp8"),
    "fp8_recipe": _use("fp8"),
    "fp4": _NOT_IMPLEMENTED,
    "hidden_dropout": _DROPOUT,
    "attention_dropout": _DROPOUT,
    "variable_seq_lengths": _always("what the micro-batches need"),
    "calculate_per_token_loss": _always("true"),
    "normalization": _always("RMSNorm"),
    "gated_linear_unit": _always("true"),
    "activation_func": _always("SiLU"),
    "add_bias_linear": _always("false"),
    "use_cpu_initialization": "policy.device decides it, remove it",
    "perform_initialization": _WEIGHTS,
    "init_method": _WEIGHTS,
    "init_method_std": _WEIGHTS,
    "output_layer_init_method": _WEIGHTS,
    "embedding_init_method": _WEIGHTS,
    "embedding_init_method_std": _WEIGHTS,
    "moe_aux_loss_coeff": _AUXILIARY,
    "moe_z_loss_coeff": _AUXILIARY,
    "moe_router_load_balancing_type": f"it is always none, {_OBJECTIVE}, and balancing would change it",
    "moe_router_fusion": "its fused top-k ignores the experts of rollout.routing_replay, remove it",
    "moe_enable_routing_replay": "set rollout.routing_replay instead",
    "moe_token_dispatcher_type": _always("alltoall"),
    "pipeline_model_parallel_layout": _EVEN,
    "num_layers_in_first_pipeline_stage": _EVEN,
    "num_layers_in_last_pipeline_stage": _EVEN,
    "finalize_model_grads_func": _FUNCTION,
    "grad_scale_func": _FUNCTION,
    "no_sync_func": _FUNCTION,
    "grad_sync_func": _FUNCTION,
    "param_sync_func": _FUNCTION,
}
"""Fields that the project sets → what to do instead.  A dropout of 0 is accepted."""


ALLOWED_FIELDS = (
    "recompute_",
    "overlap_p2p_comm",
    "batch_p2p_comm",
    "batch_p2p_sync",
    "tp_comm_overlap",
    "distribute_saved_activations",
    "deallocate_pipeline_outputs",
    "microbatch_group_size_per_vp_stage",
    "attention_softmax_in_fp32",
    "moe_router_dtype",
    "persist_layer_norm",
    "memory_efficient_layer_norm",
    "bias_activation_fusion",
    "bias_dropout_fusion",
    "masked_softmax_fusion",
    "apply_rope_fusion",
    "gradient_accumulation_fusion",
    "moe_permute_fusion",
    "deterministic_mode",
    "cpu_offloading",
)
"""Prefixes of the fields that change how model and gradient are computed, not what is computed.

Any other could change what the policy computes, and neither the engine nor the LM head would follow."""

_PREFIX = "policy.megatron."


def check_megatron_fields(policy: PolicyConfig) -> None:
    """Raise UserError unless every extra field exists in Megatron, is allowed, and fits the others."""
    extra = policy.megatron
    for name, value in extra.items():
        if name in MANAGED_FIELDS and not (name.endswith("_dropout") and value == 0):
            raise UserError(f"{_PREFIX}{name} is set by the project; {MANAGED_FIELDS[name]}")
        if name not in megatron_field_names():
            allowed = [field for field in sorted(megatron_field_names()) if field.startswith(ALLOWED_FIELDS)]
            raise UserError(unknown(_PREFIX + name, [*(_PREFIX + field for field in allowed), *key_types()]))
        if name not in MANAGED_FIELDS and not name.startswith(ALLOWED_FIELDS):
            raise UserError(
                f"{_PREFIX}{name} could change what the policy computes without the engine knowing, so it is "
                "refused; remove it"
            )
    if policy.virtual_pipeline_model_parallel_size is None or not extra.get("batch_p2p_comm"):
        return
    if policy.pipeline_model_parallel_size == 2:
        raise UserError(
            "policy.megatron.batch_p2p_comm=true with virtual stages on 2 pipeline stages silently gives "
            "wrong gradients in Megatron, because both neighbours are one rank; set it to false"
        )
    if extra.get("overlap_p2p_comm", True):
        raise UserError(
            "policy.megatron.batch_p2p_comm=true excludes overlap_p2p_comm, which virtual stages turn on; "
            "set one of them to false"
        )


@lru_cache(maxsize=1)
def megatron_field_names() -> frozenset[str]:
    """Public fields of TransformerConfig and its base ModelParallelConfig, as installed."""
    spec = find_spec("megatron")  # a namespace package: find_spec imports nothing
    roots = [Path(folder) / "core" for folder in (spec.submodule_search_locations or ())] if spec else []
    for root in roots:
        if all((root / source).is_file() for source in _SOURCES.values()):
            return frozenset(
                name for cls, source in _SOURCES.items() for name in _fields_of(cls, root / source)
            )
    raise UserError(
        "policy.megatron cannot be checked without Megatron-Core; run opo doctor, which names its version"
    )


def _fields_of(class_name: str, source: Path) -> list[str]:
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            targets = [item.target for item in node.body if isinstance(item, ast.AnnAssign)]
            names = [target.id for target in targets if isinstance(target, ast.Name)]
            return [name for name in names if not name.startswith("_")]
    raise UserError(
        f"Megatron-Core's {source.name} has no class {class_name}; run opo doctor, which names its version"
    )
