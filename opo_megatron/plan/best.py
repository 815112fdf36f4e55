"""The layouts with the shortest predicted step that fit with a margin (`opo plan RECIPE --best`).

Every combination of tensor, pipeline, virtual, context and expert parallelism, recomputation, tokens per
micro-batch, engine size and the engine's share of memory that could fit by formulas is predicted by the
models of `times.py`.  Then, fastest first, the ends of the pipeline are built on the meta device, as in a
plan: a layout whose counted bytes do not fit is dropped, and with it the variants that hold more.  Of every
layout the fastest variant is kept.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from opo_megatron.config import Config
from opo_megatron.config.choices import EngineName, Recompute
from opo_megatron.errors import UserError
from opo_megatron.plan.activations import textbook_activations
from opo_megatron.plan.engine import EnginePlan, plan_engine
from opo_megatron.plan.hardware import GPUS_PER_NODE, constant
from opo_megatron.plan.plan import (
    Job,
    Log,
    RunPlan,
    assemble,
    count_stage,
    counted_config,
    load_job,
    longest_samples,
    work_of,
)
from opo_megatron.plan.ranks import fake_rank, meta_policy, use_meta_device
from opo_megatron.plan.search import count_ends
from opo_megatron.plan.sizes import sizes_of
from opo_megatron.plan.sync import check_cover, combine, rank_stream
from opo_megatron.plan.times import communication_seconds, generation_seconds, training_seconds

MARGIN = 0.05
"""Share of a GPU's memory that stays free in every phase."""
SECONDS = 90.0
"""After this long no further layout is counted."""
COUNT = 5


@dataclass(frozen=True)
class Layout:
    """What the search varies."""

    tensor: int
    pipeline: int
    virtual: int | None
    context: int
    expert: int
    recompute: Recompute
    tokens: int
    """Per micro-batch."""
    engine_tensor: int
    share: float | None = None
    """Of an engine's GPU for weights and cache; None until the policy's bytes are known."""

    @property
    def parallelism(self) -> tuple[int, int, int, int]:
        """By which layouts of the policy are told apart; of the others the fastest is kept."""
        return self.tensor, self.pipeline, self.context, self.expert

    @property
    def held(self) -> int:
        """Orders variants of one policy layout by the activations that they hold: none, selective, full."""
        return -[Recompute.none, Recompute.selective, Recompute.full].index(self.recompute)

    def settings(self) -> dict[str, object]:
        """As keys of a recipe."""
        settings: dict[str, object] = {
            "policy.tensor_model_parallel_size": self.tensor,
            "policy.sequence_parallel": self.tensor > 1,
            "policy.pipeline_model_parallel_size": self.pipeline,
            "policy.virtual_pipeline_model_parallel_size": self.virtual,
            "policy.context_parallel_size": self.context,
            "policy.expert_model_parallel_size": self.expert,
            "policy.recompute": self.recompute,
            "policy.max_tokens_per_micro_batch": self.tokens,
            "rollout.sglang.tensor_parallel_size": self.engine_tensor,
        }
        if self.share is not None:
            settings["rollout.sglang.options.mem-fraction-static"] = self.share
        return settings

    def overrides(self) -> list[str]:
        return [f"{key}={_yaml(value)}" for key, value in self.settings().items()]

    def applied(self, config: Config) -> Config:
        """`config` with this layout, unchecked."""
        config = copy.deepcopy(config)
        for key, value in self.settings().items():
            *path, last = key.split(".")
            owner = config
            for name in path:
                owner = getattr(owner, name) if not isinstance(owner, dict) else owner[name]
            if isinstance(owner, dict):
                owner[last.replace("-", "_")] = value
            else:
                setattr(owner, last, value)
        return config


@dataclass(frozen=True)
class Proposal:
    """A layout, counted and predicted."""

    layout: Layout
    plan: RunPlan

    @cached_property
    def peak(self) -> int:
        return max(phases.peak for phases in self.plan.phases)

    @property
    def limits(self) -> str:
        """What the step's time goes to first, and why."""
        return limits(self.plan)


def _yaml(value: object) -> str:
    if isinstance(value, Recompute):
        return value.value
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def propose(
    recipe: str, overrides: Sequence[str], job: Job, mean_response: float | None, log: Log
) -> tuple[Proposal, list[Proposal]]:
    """The recipe as it is, and at most `COUNT` layouts that fit, fastest first.

    Raises:
        UserError: for a recipe whose engine is not the policy's own SGLang servers.
    """
    settings = job.config.rollout.sglang
    if job.config.rollout.engine is not EngineName.sglang or settings.urls:
        raise UserError(
            "opo plan --best chooses the layout of the policy and of SGLang servers on the same GPUs; set "
            "rollout.engine=sglang, without rollout.sglang.urls"
        )
    began = time.monotonic()
    use_meta_device()
    log("counting the recipe's own layout", 0.0)
    present = counted(own_layout(job), job)
    log("predicting all layouts", 0.05)
    ranked = sorted((predicted_seconds(layout, job), i, layout) for i, layout in enumerate(layouts(job)))
    found: dict[tuple[int, ...], Proposal] = {}
    too_large: list[Layout] = []
    for _, _, layout in ranked:
        used = time.monotonic() - began
        if len(found) == COUNT or used > SECONDS:
            break
        if layout.parallelism in found or any(holds_more(layout, other) for other in too_large):
            continue
        try:
            new = load_job(recipe, [*overrides, *layout.overrides()], job.gpus, job.gpu, mean_response)
        except UserError:
            continue  # not a layout of this model
        log(f"counting {describe(layout)}", 0.1 + 0.9 * min(1.0, used / SECONDS))
        proposal = counted(layout, new) if first_stage_fits(new) else None
        if proposal is not None and fits(proposal.plan):
            found[layout.parallelism] = proposal
        else:
            too_large.append(layout)
    return present, sorted(found.values(), key=lambda one: one.plan.times.step)


def holds_more(layout: Layout, other: Layout) -> bool:
    """Whether a layout surely holds at least what `other`, which is too large, does during training."""
    return (
        layout.parallelism == other.parallelism
        and layout.virtual == other.virtual
        and layout.held >= other.held
        and layout.tokens >= other.tokens
        and layout.engine_tensor <= other.engine_tensor
    )


def own_layout(job: Job) -> Layout:
    """The recipe's."""
    policy, settings = job.config.policy, job.config.rollout.sglang
    return Layout(
        policy.tensor_model_parallel_size, policy.pipeline_model_parallel_size,
        policy.virtual_pipeline_model_parallel_size, policy.context_parallel_size,
        policy.expert_model_parallel_size, policy.recompute, policy.max_tokens_per_micro_batch,
        settings.tensor_parallel_size,
    )  # fmt: skip


def counted(layout: Layout, job: Job) -> Proposal:
    """The plan of a layout from the ends of its pipeline; other stages hold no more."""
    config = counted_config(job)
    ends = count_ends(job)
    ranks = [held for held, _ in ends]
    by_stage = {held.pp_rank: stage for held, stage in ends}
    stages = [
        by_stage.get(i, by_stage[max(by_stage)]) for i in range(config.policy.pipeline_model_parallel_size)
    ]
    streams, tensors = [], 0
    for held in ranks:
        with fake_rank(config, held.rank, job.gpus) as parallel:
            policy = meta_policy(config, job.vocab_size, parallel)
            streams.append(rank_stream(policy, GPUS_PER_NODE, config))
            tensors = max(tensors, check_cover(streams[-1]))
    return Proposal(layout, assemble(job, ranks, stages, combine(streams, tensors)))


def first_stage_fits(job: Job) -> bool:
    """Whether the rank with the most micro-batches in flight fits during training."""
    held, stage = count_stage(job, counted_config(job), 0)
    return constant("reserved") + held.static + stage.peak <= job.gpu.memory * (1 - MARGIN)


def fits(plan: RunPlan) -> bool:
    """Whether a plan fits, with the margin."""
    most = plan.job.gpu.memory * (1 - MARGIN)
    return plan.problem is None and all(phases.peak <= most for phases in plan.phases)


# ---------------------------------------------------------------- prediction


def layouts(job: Job) -> Iterator[Layout]:
    """All that could be a layout of this model on these GPUs, with a share of memory that fits."""
    for policy in policies(job):
        for engine_tensor in engine_sizes(job):
            share = engine_share(policy, engine_tensor, job)
            if share is not None:
                yield replace(policy, engine_tensor=engine_tensor, share=share)


def policies(job: Job) -> Iterator[Layout]:
    """Layouts of the policy that could fit during training."""
    model, gpus = job.config.policy.model, job.gpus
    groups, experts = model.num_query_groups or model.num_attention_heads, model.num_moe_experts
    longest = job.lengths.longest_prompt + job.lengths.longest_response
    for tensor in _divisors(math.gcd(groups, GPUS_PER_NODE, gpus)):
        for pipeline in _divisors(math.gcd(model.num_layers, gpus // tensor)):
            for context in _divisors(math.gcd(gpus // (tensor * pipeline), GPUS_PER_NODE)):
                for expert in _expert_sizes(experts, tensor, pipeline, gpus):
                    base = Layout(
                        tensor, pipeline, None, context, expert, Recompute.full, longest, engine_tensor=1
                    )
                    for virtual in _virtual_sizes(model.num_layers, pipeline):
                        for recompute in Recompute:
                            for times in (1, 2):
                                layout = replace(
                                    base, virtual=virtual, recompute=recompute, tokens=times * longest
                                )
                                if training_bytes(layout, job) <= job.gpu.memory * (1 - MARGIN):
                                    yield layout


def _divisors(number: int) -> list[int]:
    return [i for i in range(1, number + 1) if number % i == 0]


def _expert_sizes(experts: int | None, tensor: int, pipeline: int, gpus: int) -> list[int]:
    if experts is None:
        return [1]
    return [size for size in _divisors(math.gcd(experts, gpus // pipeline)) if size <= 4 * GPUS_PER_NODE]


def _virtual_sizes(layers: int, pipeline: int) -> list[int | None]:
    if pipeline == 1:
        return [None]
    return [None, *(size for size in _divisors(layers // pipeline) if 1 < size <= 10)]


def engine_sizes(job: Job) -> list[int]:
    return [size for size in (1, 2, 4, 8) if size <= min(GPUS_PER_NODE, job.gpus)]


def rank_parameters(layout: Layout, job: Job) -> int:
    """Parameters of a rank, about: an even part of the layers, and the embedding or the head."""
    sizes = sizes_of(job.config.policy.model, job.vocab_size)
    layers = sizes.matrices // layout.tensor + sizes.experts // layout.expert
    ends = max(sizes.embedding, sizes.head) if layout.pipeline > 1 else sizes.embedding + sizes.head
    return layers // layout.pipeline + ends // layout.tensor


def training_bytes(layout: Layout, job: Job) -> int:
    """What a rank of the first stage holds, by formula; the counted bytes decide."""
    replicas = job.gpus // (layout.tensor * layout.pipeline)
    config = layout.applied(job.config)
    new = replace(job, config=config)
    activations = textbook_activations(config.policy, longest_samples(new), new.data_parallel, 0)
    static = rank_parameters(layout, job) * (2 + 4 + 12 / replicas)
    return int(constant("reserved") + static) + activations


def engine_share(layout: Layout, engine_tensor: int, job: Job) -> float | None:
    """The share of memory for weights and cache: all responses, or as much as leaves the margin; None where
    not even the weights and one sample fit."""
    weights = 2 * rank_parameters(layout, job)
    engine = _engine(replace(layout, engine_tensor=engine_tensor), job, weights)
    free = job.gpu.memory - constant("reserved") - weights
    most = free - MARGIN * job.gpu.memory - engine.working
    longest = job.lengths.longest_prompt + job.lengths.longest_response
    if most < engine.weights + longest * engine.token:
        return None
    needed = engine.weights + engine.running * longest * engine.token
    return min(math.floor(100 * min(0.95, most / free)), math.ceil(100 * needed / free)) / 100


def _engine(layout: Layout, job: Job, weights: int) -> EnginePlan:
    config = layout.applied(job.config)
    if layout.share is None:
        config.rollout.sglang.options.pop("mem_fraction_static", None)
    return plan_engine(config, job.vocab_size, job.lengths, job.gpus, job.gpu, weights)


def predicted_seconds(layout: Layout, job: Job) -> float:
    """Generation and training; what else there is in a step hardly depends on the layout."""
    parameters = rank_parameters(layout, job)
    new = replace(job, config=layout.applied(job.config))
    engine = _engine(layout, job, 2 * parameters)
    exchanged = 6 * parameters if new.data_parallel > 1 else 0
    work, _, _ = work_of(new, engine, 2 * parameters, exchanged)
    return generation_seconds(work) + training_seconds(work)


# ---------------------------------------------------------------- words


def describe(layout: Layout) -> str:
    """One line, in the usual abbreviations."""
    parts = [f"TP{layout.tensor}", f"PP{layout.pipeline}"]
    parts += [f"VPP{layout.virtual}"] if layout.virtual else []
    parts += [f"CP{layout.context}"] if layout.context > 1 else []
    parts += [f"EP{layout.expert}"] if layout.expert > 1 else []
    return f"{' '.join(parts)}, recompute={layout.recompute.value}, engine TP{layout.engine_tensor}"


def limits(plan: RunPlan) -> str:
    """The larger of generation and training, and what it waits for."""
    times, work = plan.times, plan.work
    if times.generation >= times.training:
        wanted = math.ceil(plan.job.lengths.samples / work.engines)
        if work.running < wanted:
            return f"generation: the KV cache holds {work.running} of {wanted} responses"
        return f"generation: {work.running} responses at once, until the longest ends"
    if work.bubble > 0.05:
        return f"training: {work.bubble / (1 + work.bubble):.0%} pipeline bubble"
    if plan.padding > 0.05:
        return f"training: {plan.padding:.0%} of the tokens are padding or wait for the fullest rank"
    share = communication_seconds(work) * (1 + work.bubble) / times.training
    if share > 0.1:
        return f"training: {share:.0%} waits for tensor-, context- and pipeline-parallel ranks"
    return "training: arithmetic" + (", a quarter of it recomputed" if work.recomputes else "")


def difference(layout: Layout, job: Job) -> dict[str, tuple[object, object]]:
    """Keys of the recipe that a layout changes: (the recipe's value, the layout's)."""
    own = own_layout(job).settings()
    own["rollout.sglang.options.mem-fraction-static"] = job.config.rollout.sglang.options.get(
        "mem_fraction_static"
    )
    new = layout.settings()
    return {key: (own.get(key), new[key]) for key in new if own.get(key) != new[key]}
