"""A recipe → its plan: memory per rank and phase, communication, time per step, and whether it fits.

Phases, and what holds memory in each, follow `rollout/memory_sharing.py`.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from opo_megatron.algorithm.config import Weight
from opo_megatron.algorithm.objectives.table import passes_of
from opo_megatron.batch.micro_batch import padded_length, schedule_micro_batches, sequence_alignment
from opo_megatron.config import Config, load_config
from opo_megatron.config.arithmetic import model_parallel_size, shares_memory, smallest_world
from opo_megatron.config.choices import Dtype, EngineName, Packing, TaskName
from opo_megatron.errors import UserError
from opo_megatron.kernels.lm_head import default_chunk_tokens
from opo_megatron.plan.activations import activation_peak, recomputes_all, textbook_activations
from opo_megatron.plan.engine import EnginePlan, plan_engine, weight_bytes
from opo_megatron.plan.hardware import GPUS_PER_NODE, Gpu, constant
from opo_megatron.plan.lengths import Lengths
from opo_megatron.plan.models import folder_of
from opo_megatron.plan.ranks import RankBytes, fake_rank, meta_policy, offloaded, rank_bytes, use_meta_device
from opo_megatron.plan.sync import RankStream, SyncPlan, check_cover, combine, rank_stream
from opo_megatron.plan.times import Times, Work, step_times, sync_seconds
from opo_megatron.policy.layer_specs import row_multiple, token_multiple
from opo_megatron.policy.model import padded_vocab_size
from opo_megatron.tasks import make_task
from opo_megatron.tasks.tokenizers import open_tokenizer
from opo_megatron.weights.param_mapping import Stages, parameters
from opo_megatron.weights.stream import buckets

Log = Callable[[str, float], None]
"""Shows the current work and the fraction done (0 to 1)."""


@dataclass(frozen=True)
class Job:
    """The input of a plan: a recipe on GPUs of one kind."""

    config: Config
    vocab_size: int
    gpus: int
    gpu: Gpu
    lengths: Lengths

    @property
    def data_parallel(self) -> int:
        return self.gpus // model_parallel_size(self.config.policy)

    @property
    def shares_memory(self) -> bool:
        """Whether policy and engine share the GPUs' memory."""
        return shares_memory(self.config, on_gpu=True)


@dataclass(frozen=True)
class Stage:
    """Activations of a pipeline stage, in bytes."""

    peak: int
    textbook: int
    """By the formula, for comparison."""
    is_counted: bool
    """False where routing to experts depends on values; `peak` is then the formula's."""


@dataclass(frozen=True)
class Phases:
    """Peak memory of one rank's GPU per phase, in bytes, everything included."""

    sync: int
    drawing: int
    """While generating rollouts; the name is a key of --json."""
    training: int

    @property
    def peak(self) -> int:
        return max(self.sync, self.drawing, self.training)


@dataclass(frozen=True)
class RunPlan:
    """The whole plan."""

    job: Job
    ranks: list[RankBytes]
    stages: list[Stage]
    """By pipeline rank."""
    engine: EnginePlan
    sync: SyncPlan
    phases: list[Phases]
    """By rank."""
    work: Work
    times: Times
    micro_batches: int
    """Per data-parallel rank."""
    padding: float
    """Fraction of the trained tokens that is padding."""
    problem: str | None
    """Why the run does not fit; None where it does."""

    @property
    def parameters(self) -> int:
        return sum(rank.own_parameters for rank in self.ranks)

    @property
    def gpu_hours(self) -> float:
        return self.times.step * self.job.config.train.steps * self.job.gpus / 3600


def load_job(
    recipe: str, overrides: Sequence[str], gpus: int | None, gpu: Gpu, mean_response: float | None
) -> Job:
    """Read a recipe for planning; a model in `plan.models.MODELS` needs no folder.

    Raises:
        UserError: for a recipe that `opo train` would refuse, or a number of GPUs that does not divide.
    """
    all_overrides = overrides if gpus is None else [*overrides, "run.ranks=null"]
    with tempfile.TemporaryDirectory(prefix="opo-") as scratch:
        config = load_config(recipe, all_overrides, None, lambda name: folder_of(name, Path(scratch)))
    fewest = smallest_world(config)
    if gpus is not None and gpus % fewest:
        nearest = max(1, round(gpus / fewest)) * fewest
        policy = config.policy
        raise UserError(
            f"--gpus {gpus} is not a multiple of the {fewest} GPUs of one model replica "
            f"({policy.tensor_model_parallel_size} tensor × {policy.pipeline_model_parallel_size} pipeline × "
            f"{policy.context_parallel_size} context parallel); the nearest multiple is --gpus {nearest}"
        )
    count = gpus or config.run.ranks or fewest
    return Job(config, _vocab_size(config), count, gpu, _lengths(config, mean_response))


def _vocab_size(config: Config) -> int:
    """Rows of the embedding, without reading the task's data."""
    if config.policy.model.vocab_size is not None:
        return config.policy.model.vocab_size
    if config.task.name == TaskName.lift or config.task.name not in TaskName.__members__:
        return make_task(config.task).vocab_size
    return open_tokenizer(config.task.tokenizer).vocab_size


def _lengths(config: Config, mean_response: float | None) -> Lengths:
    rollout, longest = config.rollout, config.policy.model.max_sequence_length
    response = rollout.max_response_tokens
    prompt = max(1, min(config.task.max_prompt_tokens, longest - response))
    mean = response * constant("mean_response") if mean_response is None else mean_response
    if not 0 < mean <= response:
        raise UserError(
            f"--mean-response {mean:g} must be above 0 and at most rollout.max_response_tokens={response}"
        )
    samples = rollout.prompts_per_step * rollout.samples_per_prompt
    return Lengths(samples, prompt / 2, mean, prompt, response)


def trains_in_fp8(config: Config) -> bool:
    return config.policy.fp8 is not None


def counted_config(job: Job) -> Config:
    """The recipe as it is counted: always with Megatron's local layers, which have no FP8."""
    config = copy.deepcopy(job.config)
    policy = config.policy
    policy.optimizer_offload = 0.0  # the offloaded fraction is subtracted after counting
    if trains_in_fp8(config):
        policy.fp8 = None  # type: ignore[attr-defined]  # weights and saved activations stay bf16
    if policy.head_chunk_tokens is None:
        rows = padded_vocab_size(policy, job.vocab_size, job.data_parallel)
        dtype = torch.bfloat16 if policy.dtype is Dtype.bf16 else torch.float32
        local_rows = rows // policy.tensor_model_parallel_size
        policy.head_chunk_tokens = default_chunk_tokens(local_rows, dtype, torch.device("cuda"))
    return config


def longest_samples(job: Job) -> list[tuple[int, int]]:
    """(prompt, response) tokens of enough longest samples to fill every pipeline stage."""
    policy, lengths = job.config.policy, job.lengths
    longest, budget = lengths.longest_prompt + lengths.longest_response, policy.max_tokens_per_micro_batch
    packed = policy.packing is Packing.thd
    alignment = sequence_alignment(policy)
    each = padded_length(longest, alignment) if packed else longest
    rows = max(1, budget // each)
    micro_batch = [(lengths.longest_prompt, lengths.longest_response)] * rows
    if (
        packed and (rest := (budget - rows * each) // alignment * alignment) > 0
    ):  # a shorter sample fills the rest of the micro-batch
        prompt = max(1, rest + 1 - lengths.longest_response)
        micro_batch.append((prompt, rest + 1 - prompt))
    stages = policy.pipeline_model_parallel_size
    interleaved = policy.virtual_pipeline_model_parallel_size is not None
    enough = 2 * stages if interleaved else stages + 1
    in_step = math.ceil(lengths.samples / job.data_parallel / rows)
    count = min(enough, in_step + (-in_step % stages if interleaved else 0))
    return micro_batch * (count * job.data_parallel)


def count_stage(
    job: Job, config: Config, rank: int, with_activations: bool = True
) -> tuple[RankBytes, Stage]:
    """Build one rank and, with activations, run a step's forward and backward on it."""
    with fake_rank(config, rank, job.gpus) as parallel:
        policy = meta_policy(config, job.vocab_size, parallel)
        held = offloaded(rank_bytes(policy), job.config.policy.optimizer_offload)
        if not with_activations:
            return held, Stage(0, 0, is_counted=False)
        samples = longest_samples(job)
        textbook = textbook_activations(config.policy, samples, parallel.dp_size, parallel.pp_rank)
        if config.policy.model.num_moe_experts is not None:
            return held, Stage(textbook, textbook, is_counted=False)
        return held, Stage(activation_peak(policy, samples, on_gpus=True), textbook, is_counted=True)


def make_plan(job: Job, log: Log) -> RunPlan:
    """Count every rank, then assemble the phases."""
    use_meta_device()
    config = counted_config(job)
    ranks: list[RankBytes] = []
    streams: list[RankStream] = []
    tensors = 0
    for rank in range(job.gpus):
        log(f"rank {rank} of {job.gpus}: weights, optimizer, weight stream", 0.6 * rank / job.gpus)
        with fake_rank(config, rank, job.gpus) as parallel:
            policy = meta_policy(config, job.vocab_size, parallel)
            stream = rank_stream(policy, GPUS_PER_NODE, config)
            tensors = max(tensors, check_cover(stream))
            ranks.append(offloaded(rank_bytes(policy), job.config.policy.optimizer_offload))
            streams.append(stream)
    pipeline = config.policy.pipeline_model_parallel_size
    stages = []
    for stage in range(pipeline):
        log(f"activations of pipeline stage {stage} of {pipeline}", 0.6 + 0.4 * stage / pipeline)
        # A response ends its sequence: the first or the last context-parallel rank has most of its tokens.
        ends = {0, config.policy.context_parallel_size - 1}
        first = [r for r in ranks if (r.pp_rank, r.tp_rank, r.dp_rank) == (stage, 0, 0) and r.cp_rank in ends]
        counted = [count_stage(job, config, r.rank)[1] for r in first]
        stages.append(max(counted, key=lambda one: one.peak))
    return assemble(job, ranks, stages, combine(streams, tensors))


def assemble(job: Job, ranks: list[RankBytes], stages: list[Stage], sync: SyncPlan) -> RunPlan:
    """Engine, phases and times, from the counts."""
    engine = plan_engine(
        job.config, job.vocab_size, job.lengths, job.gpus, job.gpu, max(rank.parameters for rank in ranks)
    )
    phases = [phases_of(job, rank, stages[rank.pp_rank], engine) for rank in ranks]
    replica_bytes = max(rank.gradients + rank.parameters for rank in ranks) if job.data_parallel > 1 else 0
    work, count, padding = work_of(job, engine, max(rank.parameters for rank in ranks), replica_bytes)
    moved = max(rank.optimizer for rank in ranks) if job.shares_memory else 0
    times = step_times(work, sync_seconds(sync, job.gpu), moved, max(rank.host_optimizer for rank in ranks))
    return RunPlan(
        job, ranks, stages, engine, sync, phases, work, times, count, padding, problem_of(job, phases, engine)
    )


def work_of(job: Job, engine: EnginePlan, policy_weights: int, replica_bytes: int) -> tuple[Work, int, float]:
    """The work of a step, the micro-batches per data-parallel rank, and the padding.

    Args:
        policy_weights: bytes of a rank's weights.
        replica_bytes: what it exchanges with its data-parallel replicas.
    """
    count, padded, padding = _micro_batches(job)
    policy = job.config.policy
    work = Work(
        model=policy.model,
        vocab_size=job.vocab_size,
        gpus=job.gpus,
        gpu=job.gpu,
        lengths=job.lengths,
        trained_tokens=padded,
        bubble=_bubble(job.config, count),
        engine_tp=engine.tensor_parallel_size,
        engine_weights=engine.weights,
        engine_token=engine.token,
        running=_running(job, engine),
        engines=engine.engines,
        passes=_passes(job.config),
        recomputes=recomputes_all(job.config.policy),
        trains_in_fp8=trains_in_fp8(job.config),
        samples_per_prompt=job.config.rollout.samples_per_prompt,
        engine_experts=weight_bytes(job.config, job.vocab_size, engine.tensor_parallel_size, experts=True),
        expert_parallel=policy.expert_model_parallel_size,
        tensor_parallel=policy.tensor_model_parallel_size,
        context_parallel=policy.context_parallel_size,
        stages=policy.pipeline_model_parallel_size,
        chunks=policy.virtual_pipeline_model_parallel_size or 1,
        policy_weights=policy_weights,
        micro_batches=count,
        replica_bytes=replica_bytes,
    )
    return work, count, padding


def phases_of(job: Job, rank: RankBytes, stage: Stage, engine: EnginePlan) -> Phases:
    """Peak memory of one GPU, phase by phase."""
    reserved = int(constant("reserved"))
    in_flight = 3 * largest_bucket(job)  # the gathered shards, the joined tensors, the buffer that is sent
    if job.shares_memory:
        return Phases(
            sync=reserved + rank.parameters + rank.optimizer + engine.weights + in_flight,
            drawing=reserved + rank.parameters + engine.weights + engine.cache + engine.working,
            training=reserved + rank.static + stage.peak,
        )
    always = reserved + rank.static + engine.weights + engine.cache + engine.working
    return Phases(always + in_flight, always, always + stage.peak)


def largest_bucket(job: Job) -> int:
    """Bytes of the largest bucket of the weight stream: the recipe's limit, or one larger parameter."""
    policy = job.config.policy
    stages = Stages(
        policy.model.num_layers,
        policy.pipeline_model_parallel_size,
        policy.virtual_pipeline_model_parallel_size or 1,
    )
    specs = parameters(policy.model, job.vocab_size, stages, policy.expert_model_parallel_size)
    dtype = torch.bfloat16 if policy.dtype is Dtype.bf16 else torch.float32
    limit = int(policy.weight_bucket_mib * 2**20)
    return max(
        sum(parameter.numel for parameter in bucket) * dtype.itemsize
        for bucket in buckets(specs, limit, lambda parameter: dtype)
    )


def problem_of(job: Job, phases: Sequence[Phases], engine: EnginePlan) -> str | None:
    """Why this does not fit; None where it does."""
    for name, label in (("training", "training"), ("sync", "the weight sync"), ("drawing", "generation")):
        sizes = [getattr(phase, name) for phase in phases]
        if max(sizes) > job.gpu.memory:
            return (
                f"{label} takes {max(sizes) / 1e9:.1f} GB on rank {sizes.index(max(sizes))}, and an "
                f"{job.gpu.name.upper()} has {job.gpu.memory / 1e9:.0f} GB"
            )
    longest = job.lengths.longest_prompt + job.lengths.longest_response
    if engine.token and job.shares_memory and engine.cached_tokens < longest:
        return f"the engine's KV cache holds {engine.cached_tokens} tokens, and one sample has {longest}"
    return None


def _passes(config: Config) -> float:
    """Forward passes in addition to the update's, as in `config.arithmetic`."""
    algorithm, passes = config.algorithm, 0.0
    energies = algorithm.weight in (Weight.energy, Weight.energy_hidden, Weight.fitted)
    if energies and config.rollout.engine is EngineName.sglang:
        passes += 1
    return passes + sum(passes_of(algorithm))


def _running(job: Job, engine: EnginePlan) -> int:
    """Concurrent responses: the engine's limit, or what its KV cache holds at their mean length."""
    if not engine.cache:
        return engine.running
    mean = job.lengths.prompt + job.lengths.response
    return max(1, min(engine.running, int(engine.cached_tokens / mean)))


def _micro_batches(job: Job) -> tuple[int, float, float]:
    """Micro-batches per data-parallel rank; padded tokens of the fullest rank, times the ranks; and the
    fraction of those that is padding, or waiting for that rank."""
    policy = job.config.policy
    interleaved = policy.virtual_pipeline_model_parallel_size is not None
    return _schedule(
        job.lengths, job.data_parallel, policy.max_tokens_per_micro_batch, interleaved,
        policy.pipeline_model_parallel_size if interleaved else 1, policy.packing,
        sequence_alignment(policy), row_multiple(policy), token_multiple(policy),
    )  # fmt: skip


@cache
def _schedule(
    distribution: Lengths,
    replicas: int,
    tokens: int,
    interleaved: bool,
    multiple: int,
    packing: Packing,
    alignment: int,
    rows: int,
    token_multiple: int,
) -> tuple[int, float, float]:
    """`schedule_for`'s, by what it depends on: the search asks again and again."""
    lengths = [round(distribution.prompt) + response for response in distribution.responses()]
    schedule = schedule_micro_batches(
        lengths, replicas, tokens, interleaved, multiple, packing is Packing.thd, alignment
    )
    padded = max(schedule.padded_tokens(lengths, rows, token_multiple)) * replicas
    return schedule.count, float(padded), 1 - (sum(lengths) - len(lengths)) / padded


def _bubble(config: Config, count: int) -> float:
    policy = config.policy
    chunks = policy.virtual_pipeline_model_parallel_size or 1
    return (policy.pipeline_model_parallel_size - 1) / (count * chunks)
