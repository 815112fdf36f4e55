"""Validation of a resolved recipe: ranges of single fields, then rules that involve several.

Everything is checked before torch is imported and before a rank starts.  Rules about the vocabulary or the
device are elsewhere, because a recipe alone determines neither.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import reduce
from pathlib import Path
from typing import Any

from opo_megatron.config.arithmetic import expert_parallel_size, model_parallel_size, smallest_world
from opo_megatron.config.choices import EngineName, Kl, Packing, RopeType, TaskName
from opo_megatron.config.megatron_fields import MANAGED_FIELDS, check_megatron_fields
from opo_megatron.config.rules.algorithm import check_algorithm
from opo_megatron.config.rules.api_key import check_api_key
from opo_megatron.config.rules.environment import check_environment
from opo_megatron.config.rules.exact import check_exact
from opo_megatron.config.rules.gpu import check_gpu_options
from opo_megatron.config.rules.overlap import check_overlap
from opo_megatron.config.rules.replay import check_replay
from opo_megatron.config.rules.require import divides, require
from opo_megatron.config.rules.resilience import check_faults
from opo_megatron.config.rules.sglang import check_sglang
from opo_megatron.config.rules.staleness import check_staleness
from opo_megatron.config.rules.weight_layout import check_weight_layout
from opo_megatron.config.schema import Config, PolicyConfig, RopeScalingConfig

__all__ = ["MANAGED_FIELDS", "validate"]


def validate(config: Config, world_size: int | None) -> None:
    """Raise UserError at the first rule that a resolved configuration breaks.

    Args:
        world_size: number of ranks; None takes the fewest that the layout needs.
    """
    check_fields(config)
    check_engine(config)
    check_api_key(config)
    check_sglang(config)
    check_exact(config)
    check_run(config)
    check_faults(config)
    check_sampling(config)
    check_staleness(config)
    check_replay(config)
    check_overlap(config)
    check_algorithm(config)
    check_task(config)
    check_environment(config)
    check_model(config.policy)
    check_layout(config.policy)
    check_experts(config.policy)
    check_world(config, smallest_world(config) if world_size is None else world_size)
    check_weight_layout(config)
    check_megatron_fields(config.policy)
    check_gpu_options(config)


Rule = tuple[str, Callable[[Any], bool], str]

_FIELD_RULES: tuple[Rule, ...] = (
    (
        "run.ranks run.threads_per_rank rollout.prompts_per_step rollout.samples_per_prompt "
        "rollout.max_response_tokens rollout.local.slots rollout.fill_rounds rollout.overlap_micro_batches "
        "rollout.max_turns rollout.environments rollout.replay.size rollout.replay.max_age "
        "rollout.replay.min_size rollout.replay.history "
        "warm_start.batch_size "
        "algorithm.updates_per_batch "
        "eval.problems eval.samples_per_problem policy.model.num_layers policy.model.hidden_size "
        "policy.model.ffn_hidden_size policy.model.num_attention_heads policy.model.num_query_groups "
        "policy.model.kv_channels policy.model.max_sequence_length policy.model.num_moe_experts "
        "policy.model.moe_router_topk policy.model.moe_ffn_hidden_size policy.model.vocab_size "
        "policy.model.rope_scaling.original_max_sequence_length policy.tensor_model_parallel_size "
        "policy.pipeline_model_parallel_size policy.context_parallel_size "
        "policy.expert_model_parallel_size policy.expert_tensor_parallel_size "
        "policy.max_tokens_per_micro_batch policy.head_chunk_tokens task.max_prompt_tokens "
        "policy.exact_sum_parts "
        "task.verifier_workers task.verifier_batch "
        "task.generator_size rollout.sglang.servers rollout.sglang.tensor_parallel_size "
        "rollout.sglang.max_running_requests",
        lambda value: value >= 1,
        "at least 1",
    ),
    (
        "run.seed train.steps warm_start.steps optimizer.warmup_steps warm_start.warmup_steps "
        "optimizer.lr warm_start.lr optimizer.weight_decay warm_start.weight_decay optimizer.clip "
        "warm_start.clip rollout.staleness rollout.replay.ramp_steps rollout.top_k eval.top_k "
        "eval.every_steps checkpoint.every_steps "
        "on_policy.tolerance algorithm.length_exponent rollout.sglang.restarts algorithm.kl_coefficient "
        "algorithm.variance_every task.verifier_memory_mib task.verifier_retries "
        "task.environment_memory_mib",
        lambda value: value >= 0,
        "0 or more",
    ),
    (
        "rollout.replay.coefficient "
        "rollout.temperature eval.temperature optimizer.eps warm_start.eps run.distributed_timeout_minutes "
        "algorithm.loss_constant algorithm.tau rollout.sglang.start_timeout_seconds "
        "rollout.sglang.timeout_seconds on_policy.max_importance_weight algorithm.clip_high "
        "policy.weight_bucket_mib task.verifier_seconds task.environment_seconds "
        "policy.model.rotary_base policy.model.layernorm_epsilon policy.model.rope_scaling.factor "
        "policy.model.rope_scaling.low_freq_factor policy.model.rope_scaling.high_freq_factor",
        lambda value: value > 0,
        "above 0",
    ),
    ("rollout.top_p eval.top_p", lambda value: 0 < value <= 1, "above 0 and at most 1"),
    ("algorithm.clip_low", lambda value: 0 < value < 1, "above 0 and below 1"),
    ("rollout.replay.per_prompt", lambda value: value >= 2, "at least 2, between which rewards can differ"),
    ("algorithm.variance_prompts", lambda value: value >= 2, "at least 2, between which there is a variance"),
    (
        "optimizer.min_lr_ratio warm_start.min_lr_ratio policy.optimizer_offload",
        lambda value: 0 <= value <= 1,
        "between 0 and 1",
    ),
    (
        "optimizer.betas warm_start.betas",
        lambda value: len(value) == 2 and all(0 <= beta < 1 for beta in value),
        "two numbers, each at least 0 and below 1",
    ),
    (
        "policy.virtual_pipeline_model_parallel_size",
        lambda value: value >= 2,
        "at least 2, or null for no virtual stages",
    ),
    ("task.template", lambda value: "{prompt}" in value, "a text with {prompt} in it"),
    ("run.dir", lambda value: bool(value.strip()), "the path of a folder"),
    ("observe.wandb_project", lambda value: bool(value.strip()), "the name of a project, or null"),
)


def check_fields(config: Config) -> None:
    """Check each field by itself; None means 'not used' and passes."""
    for key, value in _leaves(config):
        require(not _is_not_finite(value), f"{key} is {value}; it must be a finite number")
    for keys, holds, words in _FIELD_RULES:
        for key in keys.split():
            value = reduce(getattr, key.split("."), config)
            require(value is None or holds(value), f"{key} is {value!r}; it must be {words}")


def check_task(config: Config) -> None:
    """Check that a task has the keys that it needs, and that its longest prompt and response fit."""
    task, rollout, model = config.task, config.rollout, config.policy.model
    if task.name == TaskName.lift:
        return
    is_class = all(task.name.partition(":"))
    require(
        is_class or task.name in TaskName.__members__,
        f"task.name is {task.name!r}; it must be one of {', '.join(TaskName.__members__)}, or "
        "package.module:Class",
    )
    require(
        is_class or config.warm_start.steps == 0,
        f"warm_start.steps is {config.warm_start.steps}, but task.name={task.name} has no "
        "demonstrations; set warm_start.steps=0",
    )
    require(
        task.name != TaskName.text or task.data is not None,
        "task.name is text, but task.data is null; name a JSONL or Parquet file",
    )
    require(
        task.name != TaskName.reasoning_gym or task.generator is not None,
        "task.name is reasoning_gym, but task.generator is null; name a generator, such as chain_sum",
    )
    require(
        task.max_prompt_tokens + rollout.max_response_tokens <= model.max_sequence_length,
        f"task.max_prompt_tokens={task.max_prompt_tokens} and rollout.max_response_tokens="
        f"{rollout.max_response_tokens} together exceed policy.model.max_sequence_length="
        f"{model.max_sequence_length}; lower one of them or raise the limit",
    )


def check_engine(config: Config) -> None:
    """Refuse a replay of experts that the model does not have, and what an SGLang engine cannot serve."""
    require(
        not config.rollout.routing_replay or config.policy.model.num_moe_experts is not None,
        "rollout.routing_replay is true, but the model has no experts; remove it, or set "
        "policy.model.num_moe_experts",
    )
    if config.rollout.engine is not EngineName.sglang:
        return
    require(
        not (config.rollout.sglang.share_memory and config.rollout.sglang.urls),
        "rollout.sglang.share_memory=true with rollout.sglang.urls, but only the run's own servers release "
        "memory; remove one",
    )


def check_run(config: Config) -> None:
    resume = config.resume
    require(
        resume in ("never", "auto") or Path(resume).is_dir(),
        f"resume is {resume!r}; it must be never, auto or the existing folder of a checkpoint",
    )


def check_sampling(config: Config) -> None:
    """Check that training rollouts are sampled from the policy itself, and fit into its context."""
    rollout, longest = config.rollout, config.policy.model.max_sequence_length
    for key, value, neutral in (("top_p", config.eval.top_p, 1), ("top_k", config.eval.top_k, 0)):
        require(
            value == neutral or config.observe.kl is Kl.off,
            f"eval.{key} is {value}, which samples another distribution than the policy whose KL "
            f"observe.kl=eval measures; set it to {neutral}, or observe.kl=off",
        )
    for key, value, neutral in (("top_p", rollout.top_p, 1), ("top_k", rollout.top_k, 0)):
        require(
            value == neutral or config.algorithm.off_policy_sampling,
            f"rollout.{key} is {value}, which samples another distribution than the policy; set it to "
            f"{neutral}, or accept off-policy rollouts with algorithm.off_policy_sampling=true",
        )
    require(
        rollout.max_response_tokens < longest,
        f"rollout.max_response_tokens is {rollout.max_response_tokens}, but prompt and response share "
        f"policy.model.max_sequence_length={longest}; lower the first or raise the second",
    )


def check_model(policy: PolicyConfig) -> None:
    """Check the shapes of attention, RoPE and the router."""
    model = policy.model
    heads, groups = model.num_attention_heads, model.num_query_groups or model.num_attention_heads
    divides("policy.model.num_query_groups", groups, "policy.model.num_attention_heads", heads)
    for key, width in (("hidden_size", model.hidden_size), ("kv_channels", model.kv_channels)):
        require(
            width is None or width % 2 == 0,
            f"policy.model.{key} is {width}; it must be even, because rotary embeddings rotate pairs",
        )
    check_rope_scaling(model.rope_scaling)
    experts, active = model.num_moe_experts, model.moe_router_topk
    require(
        experts is None or active <= experts,
        f"policy.model.moe_router_topk is {active}, more than policy.model.num_moe_experts={experts}; "
        f"lower the first",
    )
    require(
        experts is None or active > 1 or model.moe_router_pre_softmax,
        "policy.model.moe_router_topk is 1, where the softmax over the selected expert is always 1 and the "
        "router gets no gradient; raise it or set policy.model.moe_router_pre_softmax=true",
    )
    require(
        experts is not None or model.moe_ffn_hidden_size is None,
        f"policy.model.moe_ffn_hidden_size is {model.moe_ffn_hidden_size}, but the model has no experts; "
        f"set policy.model.num_moe_experts or remove it",
    )


def check_rope_scaling(scaling: RopeScalingConfig) -> None:
    require(
        scaling.type is not RopeType.none or scaling == RopeScalingConfig(),
        "policy.model.rope_scaling has values, but its type is none; set policy.model.rope_scaling.type to "
        "linear or llama3, or remove them",
    )
    require(
        scaling.low_freq_factor < scaling.high_freq_factor,
        f"policy.model.rope_scaling.low_freq_factor is {scaling.low_freq_factor:g}, which must be below "
        f"high_freq_factor={scaling.high_freq_factor:g}; lower it",
    )


def check_layout(policy: PolicyConfig) -> None:
    """Check tensor, pipeline, sequence and context parallelism against the model's shape."""
    model, tensor = policy.model, policy.tensor_model_parallel_size
    stages, chunks = policy.pipeline_model_parallel_size, policy.virtual_pipeline_model_parallel_size
    context = f"policy.context_parallel_size is {policy.context_parallel_size}"
    require(
        policy.context_parallel_size == 1 or policy.packing is Packing.thd,
        f"{context} with policy.packing={policy.packing.value}, but only packed sequences are sharded over "
        "ranks; set policy.packing=thd",
    )
    for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"):
        divides("policy.tensor_model_parallel_size", tensor, f"policy.model.{name}", getattr(model, name))
    require(
        tensor > 1 or not policy.sequence_parallel,
        "policy.sequence_parallel=true needs policy.tensor_model_parallel_size above 1; raise it or set "
        "policy.sequence_parallel=false",
    )
    require(
        chunks is None or stages > 1,
        f"policy.virtual_pipeline_model_parallel_size is {chunks}, but there is one pipeline stage; "
        f"raise policy.pipeline_model_parallel_size or set it to null",
    )
    slices = "policy.pipeline_model_parallel_size" + (" × virtual stages" if chunks else "")
    divides(slices, stages * (chunks or 1), "policy.model.num_layers", model.num_layers)


def check_experts(policy: PolicyConfig) -> None:
    """Check expert parallelism: only with experts, and evenly divided."""
    model, experts = policy.model, policy.model.num_moe_experts
    for name in ("expert_model_parallel_size", "expert_tensor_parallel_size"):
        size = getattr(policy, name)
        require(
            size == 1 or experts is not None,
            f"policy.{name} is {size}, but the model has no experts; set it to 1, or "
            f"policy.model.num_moe_experts",
        )
    if experts is None:
        return
    divides(
        "policy.expert_model_parallel_size",
        policy.expert_model_parallel_size,
        "policy.model.num_moe_experts",
        experts,
    )
    divides(
        "policy.expert_tensor_parallel_size",
        policy.expert_tensor_parallel_size or 1,
        "policy.model.moe_ffn_hidden_size",
        model.moe_ffn_hidden_size or model.ffn_hidden_size,
    )
    require(
        policy.expert_model_parallel_size > 1
        or policy.expert_tensor_parallel_size == policy.tensor_model_parallel_size,
        f"policy.expert_tensor_parallel_size is {policy.expert_tensor_parallel_size} where "
        f"policy.tensor_model_parallel_size is {policy.tensor_model_parallel_size} and experts are not "
        "parallel: Megatron then sums expert gradients over too few ranks; set both to the same",
    )
    require(
        policy.tensor_model_parallel_size == 1 or policy.sequence_parallel,
        "a model with experts at policy.tensor_model_parallel_size above 1 needs sequence parallelism; "
        "set policy.sequence_parallel=true",
    )


def check_world(config: Config, world_size: int) -> None:
    """Check that this number of ranks divides into whole replicas of the model and of its experts."""
    policy, fewest = config.policy, smallest_world(config)
    start = f"start a multiple of {fewest} ranks (--nproc {fewest}) or change the layout"
    require(world_size >= 1, f"the number of ranks is {world_size}; it must be at least 1")
    require(
        world_size % model_parallel_size(policy) == 0,
        f"{world_size} ranks cannot be split into model replicas of "
        f"{policy.tensor_model_parallel_size} tensor × {policy.pipeline_model_parallel_size} pipeline × "
        f"{policy.context_parallel_size} context parallel ranks; {start}",
    )
    require(
        world_size % expert_parallel_size(policy) == 0,
        f"{world_size} ranks cannot be split by policy.expert_model_parallel_size="
        f"{policy.expert_model_parallel_size} × {policy.expert_tensor_parallel_size} expert tensor × "
        f"{policy.pipeline_model_parallel_size} pipeline parallel ranks; {start}",
    )


def _leaves(section: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(full key, value) of every leaf of a section, including entries of lists and mappings."""
    children: Iterable[tuple[Any, Any]]
    if isinstance(section, dict):
        children = section.items()
    elif isinstance(section, list):
        children = enumerate(section)
    elif hasattr(section, "__dataclass_fields__"):
        children = vars(section).items()
    else:
        yield prefix, section
        return
    for name, value in children:
        yield from _leaves(value, f"{prefix}.{name}" if prefix else str(name))


def _is_not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
