"""Multi-GPU recipes scaled down to a CPU: the same file, parallel structure and task with a tiny model.

Kept is what selects code paths: pipeline stages, virtual stages, sequence parallelism, recomputation,
packing, biases, experts, RoPE, task, algorithm, corrections.  The tensor-parallel size is at most 2, the
expert-parallel size at most 4, the data-parallel size follows from the ranks.  FP8, bf16 and SGLang need a
GPU and are replaced.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from opo_megatron.config import load_config
from tests.support.paths import RECIPES


class ScaledDown(NamedTuple):
    overrides: list[str]
    ranks: int


SCALES = {
    "opo_llama3_70b": 64,
    "opo_qwen2.5_32b": 32,
    "opo_qwen3_30b_a3b": 32,
    "opo_r1_distill_qwen_7b": 8,
    "paper/opo": 8,
    "paper/grpo_on_policy": 8,
    "paper/grpo_off_policy": 8,
}
"""Recipe → its number of GPUs."""


def scale_down(name: str, folder: Path) -> ScaledDown:
    """Overrides of `recipes/NAME.yaml` and the number of ranks, at most 8.

    Args:
        folder: for the run and its data, which are written here.
    """
    policy = load_config(RECIPES / f"{name}.yaml", (), SCALES[name]).policy
    stages, chunks = policy.pipeline_model_parallel_size, policy.virtual_pipeline_model_parallel_size or 1
    tensor = min(2, policy.tensor_model_parallel_size)
    for kind, count in (("train", 40), ("test", 8)):
        rows = [
            {"question": f"{i} + {j} =", "answer": str(i + j)} for i in range(count // 4) for j in range(4)
        ]
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = [
        f"run.dir={folder}/run",
        f"task.data={folder}/train.jsonl",
        f"task.held_out_data={folder}/test.jsonl",
        "task.tokenizer=bytes", "task.chat=false", "task.system_prompt=null", "task.max_prompt_tokens=120",
        "task.verifier=number", "task.verifier_pattern=null",
        "policy.device=cpu", "policy.dtype=fp32", "policy.fp8=null",
        f"policy.model.num_layers={2 * stages * chunks if chunks == 1 else stages * chunks}",
        "policy.model.hidden_size=32", "policy.model.ffn_hidden_size=64",
        "policy.model.num_attention_heads=4", "policy.model.num_query_groups=2",
        "policy.model.vocab_size=null", "policy.model.max_sequence_length=160",
        f"policy.tensor_model_parallel_size={tensor}",
        "policy.max_tokens_per_micro_batch=320",
        "rollout.engine=local", "rollout.prompts_per_step=4", "rollout.samples_per_prompt=2",
        "rollout.max_response_tokens=12",
        "train.steps=2", "optimizer.warmup_steps=0", "optimizer.lr=1e-3",
        "eval.problems=4", "eval.every_steps=0", "checkpoint.every_steps=0",
    ]  # fmt: skip
    if policy.model.num_moe_experts is not None:
        overrides += [
            "policy.model.num_moe_experts=8", "policy.model.moe_router_topk=2",
            "policy.model.moe_ffn_hidden_size=16",
            f"policy.expert_model_parallel_size={min(4, policy.expert_model_parallel_size)}",
        ]  # fmt: skip
    return ScaledDown(overrides, 8 if SCALES[name] > 8 else 4)
