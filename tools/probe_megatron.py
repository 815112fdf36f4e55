"""What the installed Megatron-Core could give this project and does not yet, tried on a CPU.

    python tools/probe_megatron.py

Every probe builds the part of Megatron that a feature needs, as far as this environment goes, and says where
it ends.  `docs/megatron.md` has what follows from that.  Nothing here is used by a run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from opo_megatron.config import load_config
from opo_megatron.distributed.megatron_versions import VERSION, mlp_of_class, mlp_submodules
from opo_megatron.distributed.process_groups import initialize, shutdown
from opo_megatron.policy.layer_specs import RMSNorm
from opo_megatron.policy.packed_attention import PackedAttention
from opo_megatron.utils.terminal import prepare_terminal

RECIPE = Path(__file__).parent.parent / "recipes" / "quickstart.yaml"
SIZES: dict[str, Any] = {
    "num_layers": 1, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4,
    "add_bias_linear": False, "hidden_dropout": 0.0, "attention_dropout": 0.0, "normalization": "RMSNorm",
    "gated_linear_unit": True, "activation_func": torch.nn.functional.silu, "use_cpu_initialization": True,
}  # fmt: skip
LENGTHS = (5, 9, 3)


def packed_mla() -> str:
    """Multi-latent attention over packed rows: the same as sequence by sequence?"""
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer.spec_utils import build_module
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    config = MLATransformerConfig(
        **SIZES,
        q_lora_rank=32,
        kv_lora_rank=16,
        qk_head_dim=16,
        qk_pos_emb_head_dim=8,
        v_head_dim=16,
        rope_type="rope",
    )
    spec = gpt_layer_specs.get_gpt_layer_local_spec(multi_latent_attention=True, normalization="RMSNorm")
    attention = spec.submodules.self_attention
    attention.submodules.core_attention = _WideAttention
    module = build_module(attention, config=config, layer_number=1)
    torch.manual_seed(1)
    row = torch.randn(sum(LENGTHS), 1, config.hidden_size)
    ends = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)
    packed = PackedSeqParams("thd", ends, ends, None, None, max(LENGTHS), max(LENGTHS))
    together, _ = module(row, None, packed_seq_params=packed)
    alone = torch.cat([module(part, None)[0] for part in row.split(LENGTHS)])
    return f"largest difference of packed rows from single sequences {_difference(together, alone):.1e}"


def gated_delta_net() -> str:
    """Qwen3-Next's linear attention: can it be built here?"""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        **SIZES, linear_key_head_dim=16, linear_value_head_dim=16, linear_num_key_heads=2,
        linear_num_value_heads=4, linear_conv_kernel_dim=4, deterministic_mode=True,
    )  # fmt: skip
    submodules = GatedDeltaNetSubmodules(
        in_proj=ColumnParallelLinear, out_norm=torch.nn.RMSNorm, out_proj=RowParallelLinear
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    GatedDeltaNet(config, submodules, layer_number=1, pg_collection=groups)
    return "built; its own recurrence in torch is without packed rows (deterministic_mode)"


def batch_invariant() -> str:
    """Batch-invariant norms: do they run without a GPU?"""
    from megatron.core.transformer.custom_layers import batch_invariant_kernels as kernels

    x = torch.randn(4, 64)
    return f"ran: {_difference(kernels.rmsnorm_batch_invariant(x, torch.ones(64), 1e-6), x):.1e}"


def hybrid_model() -> str:
    """HybridModel with layers that need no Transformer Engine: one attention, one MLP."""
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.models.hybrid import hybrid_block
    from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
    from megatron.core.transformer.mlp import MLP
    from megatron.core.transformer.spec_utils import ModuleSpec

    def layer(**without: Any) -> ModuleSpec:
        spec = gpt_layer_specs.get_gpt_layer_local_spec(normalization="RMSNorm")
        spec.submodules.self_attention.submodules.core_attention = PackedAttention
        spec.submodules.mlp = mlp_of_class(MLP, mlp_submodules(spec.submodules.mlp))
        for name, value in without.items():
            setattr(spec.submodules, name, value)
        return spec

    config = TransformerConfig(**(SIZES | {"num_layers": 2}), is_hybrid_model=True)
    hybrid_block.TENorm = RMSNorm  # the final norm is no part of the spec
    stack = ModuleSpec(
        module=HybridStack,
        submodules=HybridStackSubmodules(
            attention_layer=layer(mlp=IdentityOp, pre_mlp_layernorm=IdentityOp, mlp_bda=IdentityFuncOp),
            mlp_layer=layer(
                self_attention=IdentityOp, input_layernorm=IdentityOp, self_attn_bda=IdentityFuncOp
            ),
        ),
    )
    model = HybridModel(
        config,
        stack,
        vocab_size=32,
        max_sequence_length=16,
        hybrid_layer_pattern="*-",
        position_embedding_type="rope",
    )
    tokens = torch.arange(8).view(1, 8)
    logits = model(tokens, tokens, None)
    names = [name for name, _ in model.named_parameters() if name.startswith("decoder.layers")]
    return f"ran, logits {list(logits.shape)}; parameters are {names[0]}, …, {names[-1]}"


class _WideAttention(PackedAttention):
    """Attention whose values have another width than its keys, which Megatron's local one has not."""

    def __init__(self, *args: Any, k_channels: int = 0, v_channels: int = 0, **more: Any) -> None:
        super().__init__(*args, **more)

    def forward(self, *args: Any, packed_seq_params: Any = None, **more: Any) -> Tensor:
        output = super().forward(*args, packed_seq_params=packed_seq_params, **more)
        return output if packed_seq_params is None else output.squeeze(1)  # as Transformer Engine's

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *args: Any, **more: Any
    ) -> Tensor:
        self.hidden_size_per_partition = value.shape[-2] * value.shape[-1]
        return super().attend(query, key, value, mask, *args, **more)


def _difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


PROBES: tuple[Callable[[], str], ...] = (packed_mla, gated_delta_net, batch_invariant, hybrid_model)


def main() -> int:
    initialize(load_config(RECIPE, ["run.dir=unused"]))
    table = Table(title=f"Megatron-Core {VERSION}")
    table.add_column("probe")
    table.add_column("what it found", overflow="fold")
    for probe in PROBES:
        try:
            found = probe()
        except Exception as error:  # how far a probe gets is its result
            found = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        table.add_row(probe.__name__, found)
    shutdown()
    Console(width=120).print(table)
    return 0


if __name__ == "__main__":
    prepare_terminal()
    sys.exit(main())
