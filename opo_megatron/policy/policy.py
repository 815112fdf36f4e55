"""The policy: model, gradients, optimizer, weights.  One `train_step` serves every objective.

A step: micro-batches run through Megatron's schedule; the head computes loss and both gradients from hidden
states; sums over tokens are reduced; the caller's check may refuse the step; then there is exactly one
optimizer step.  The normaliser is inside the coefficients, so gradients are summed over data- and
context-parallel ranks and never rescaled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from opo_megatron.algorithm.objective import Objective
from opo_megatron.batch.micro_batch import MicroBatch, MicroBatchPlan, build_micro_batches, schedule_for
from opo_megatron.batch.rollouts import Rollouts
from opo_megatron.config.choices import Dtype
from opo_megatron.config.rules.exact import exact_switch
from opo_megatron.config.schema import Config, OptimizerConfig
from opo_megatron.distributed.process_groups import Parallel, all_reduce
from opo_megatron.errors import NonFiniteError, UserError
from opo_megatron.kernels.lm_head import default_chunk_tokens
from opo_megatron.policy.adam import use_group_step_adam
from opo_megatron.policy.layer_specs import row_multiple, spec_name, token_multiple
from opo_megatron.policy.lm_head import LMHead, LMHeadLoss, log_probs
from opo_megatron.policy.memory import PolicyMemory
from opo_megatron.policy.metric_sums import MetricSums, StepMetrics
from opo_megatron.policy.model import build_chunks, head_shares_embedding, head_weight, padded_vocab_size
from opo_megatron.policy.optimizer import megatron_optimizer
from opo_megatron.policy.routing_replay import RoutingReplay, check_routed_experts
from opo_megatron.policy.token_loss import TokenLoss
from opo_megatron.policy.token_measures import measure_tokens
from opo_megatron.weights.param_mapping import Stages, parameters
from opo_megatron.weights.slice_stream import WeightStream
from opo_megatron.weights.stream import ModelShards, Receivers, Shards, WeightSource, load_weights


@dataclass(frozen=True)
class LocalParams:
    """One rank's shards of a set of weights, per parameter."""

    tensors: list[Tensor]


class Policy:
    """A Megatron-Core GPT with its optimizer; every rank holds its shards."""

    def __init__(
        self,
        config: Config,
        vocab_size: int,
        parallel: Parallel,
        optimizer: OptimizerConfig | None,
        weights: WeightSource | None,
    ) -> None:
        """Build this rank's shards.

        Args:
            optimizer: None for a policy that never trains: no gradient buffers, no optimizer.
            weights: full tensors by Hugging Face name; None where a checkpoint is loaded next.
        """
        self.config, self.vocab_size, self.parallel = config.policy, vocab_size, parallel
        self._check_vocabulary()
        self.version = 0
        """Number of optimizer steps that these weights have had."""
        self.on_micro_batch: Callable[[], None] = lambda: None
        """Called at the start of each micro-batch."""
        is_exact = exact_switch(config) is not None
        self.chunks = build_chunks(
            self.config,
            vocab_size,
            parallel.pp_rank,
            parallel.dp_size,
            parallel.device,
            exact=is_exact,
        )
        stages = Stages(self.config.model.num_layers, parallel.pp_size, parallel.vpp_size)
        padded = padded_vocab_size(self.config, vocab_size, parallel.dp_size)
        spec = spec_name(parallel.device, is_exact)
        self.param_mapping = parameters(self.config.model, vocab_size, stages, parallel.ep_size, padded, spec)
        if weights is not None:
            load_weights(self.chunks, self.param_mapping, parallel, weights)
        self._mark_shards()
        self.megatron_config = self.chunks[0].config
        self.head = LMHead(
            parallel,
            vocab_size,
            self.config.head_chunk_tokens
            or default_chunk_tokens(
                padded // parallel.tp_size, self.megatron_config.params_dtype, parallel.device
            ),
            self.megatron_config.sequence_parallel,
            is_exact,
        )
        self.routing_replay = RoutingReplay(self.chunks, self.megatron_config, parallel)
        self.ddp_chunks = [self._wrap(chunk, trains=optimizer is not None) for chunk in self.chunks]
        # Not None, which has further effects; what it would do is done once all micro-batches are added.
        self.megatron_config.finalize_model_grads_func = _no_reduction
        self.reduce_gradients: Callable[[list[Any]], None] = finalize_model_grads
        """Sums gradients over ranks, tied embeddings' over stages, norms' over sequence-parallel ranks.  It
        divides by nothing: the coefficients hold the normaliser."""
        self.memory = PolicyMemory(self)
        self.optimizer: MegatronOptimizer | Any = None
        if optimizer is not None:
            self.start_optimizer(optimizer)

    def _check_vocabulary(self) -> None:
        size = self.parallel.tp_size
        padded = padded_vocab_size(self.config, self.vocab_size, self.parallel.dp_size)
        if padded // size * (size - 1) >= self.vocab_size:
            raise UserError(
                f"a vocabulary of {self.vocab_size} tokens leaves the last of "
                f"policy.tensor_model_parallel_size={size} ranks without any; use fewer tensor-parallel ranks"
            )

    def _mark_shards(self) -> None:
        """Mark parameters that are sharded over TP ranks, as Megatron's own initialization would.

        Unmarked ones count as duplicates, and the gradient norm would skip them on all ranks but one.
        """
        for parameter in self.param_mapping:
            if parameter.stage == self.parallel.pp_rank and parameter.sharding.partition_dim is not None:
                weight = self.chunks[parameter.chunk].get_parameter(parameter.mcore_name)
                if not hasattr(weight, "tensor_model_parallel"):  # biases are always marked
                    set_tensor_model_parallel_attributes(weight, True, parameter.sharding.partition_dim, 1)

    def _wrap(self, chunk: GPTModel, trains: bool) -> Any:
        module = Float16Module(chunk.config, chunk) if self.config.dtype is Dtype.bf16 else chunk
        if not trains:
            return module
        settings = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=self.config.distributed_optimizer
        )
        return DistributedDataParallel(chunk.config, settings, module)

    def start_optimizer(self, config: OptimizerConfig) -> None:
        """Create or reset the optimizer: zero moments, step 0, master weights from the current weights."""
        self.memory.reload()
        self.optimizer_config = config
        self.optimizer = None  # its state is freed before the next one is allocated
        use_group_step_adam()
        self.optimizer = get_megatron_optimizer(
            megatron_optimizer(self.config, config, self.megatron_config.params_dtype),
            self.ddp_chunks,
            use_gloo_process_groups=self.parallel.device.type != "meta",
        )

    def allocate_optimizer_state(self) -> None:
        """Allocate the optimizer's moments, to load a checkpoint into; weights stay unchanged."""
        self.zero_gradients()
        for group in self.optimizer.param_groups:
            group["lr"] = group["weight_decay"] = 0.0
        self.optimizer.step()

    # ------------------------------------------------------------------ training

    def schedule(
        self, lengths: Tensor, zero_advantage: Tensor | None = None, only: Sequence[int] | None = None
    ) -> MicroBatchPlan:
        """The micro-batch plan for sequences of `lengths` [n], those of all samples; the same on every rank.

        Args:
            zero_advantage: [n] bool, samples whose coefficients are all exactly 0.  Their gradient is exactly
                0, so they run forward only: the same step in less time.
            only: the samples to schedule; default all.
        """
        samples = range(lengths.numel()) if only is None else only
        if zero_advantage is None or not bool(zero_advantage.any()):
            return self._schedule_of(lengths, samples, self.parallel.dp_size)
        is_zero = zero_advantage.tolist()
        with_gradient, without = [i for i in samples if not is_zero[i]], [i for i in samples if is_zero[i]]
        forward_only = self._schedule_of(lengths, without, self.parallel.dp_size)
        return replace(
            self._schedule_of(lengths, with_gradient, self.parallel.dp_size), forward_only=forward_only
        )

    def schedule_replicated(self, lengths: Tensor, samples: Sequence[int]) -> MicroBatchPlan:
        """The micro-batch plan for `samples`, which every data-parallel replica runs in full."""
        schedule = self._schedule_of(lengths, samples, replicas=1)
        return replace(schedule, assignment=schedule.assignment * self.parallel.dp_size)

    def _schedule_of(self, lengths: Tensor, samples: Sequence[int], replicas: int) -> MicroBatchPlan:
        schedule = schedule_for(self.config, [int(lengths[i]) for i in samples], replicas)
        assignment = [
            [[samples[i] for i in micro_batch] for micro_batch in micro_batches]
            for micro_batches in schedule.assignment
        ]
        return replace(schedule, assignment=assignment)

    def train_step(
        self,
        rollouts: Rollouts,
        schedule: MicroBatchPlan,
        objective: Objective,
        lr: float,
        pre_step_check: Callable[[StepMetrics], None] | None = None,
    ) -> StepMetrics:
        """Exactly one optimizer step.

        Args:
            rollouts: this data-parallel rank's samples, in the order of `schedule`.
            pre_step_check: called with the metrics before the optimizer step; raises to refuse it, which
                zeroes the gradients and leaves the weights unchanged.
        """
        sums = self.accumulate_gradients(rollouts, schedule, objective)
        return self._step(self._checked(sums, rollouts.response_lengths), lr, pre_step_check)

    def _step(
        self, metrics: StepMetrics, lr: float, pre_step_check: Callable[[StepMetrics], None] | None
    ) -> StepMetrics:
        """The optimizer step on the gradients that are there, or none: then they are zeroed."""
        try:
            if pre_step_check is not None:
                pre_step_check(metrics)
        except Exception:
            self.zero_gradients()
            raise
        for group in self.optimizer.param_groups:
            group["lr"] = lr
            group["weight_decay"] = self.optimizer_config.weight_decay * group["wd_mult"]
            # A loaded checkpoint sets its own; the recipe overrides them.
            group["betas"] = tuple(self.optimizer_config.betas)
            group["eps"] = self.optimizer_config.eps
        _, grad_norm, _ = self.optimizer.step()
        self.version += 1
        return StepMetrics(**{**vars(metrics), "grad_norm": float(grad_norm)})

    def accumulate_gradients(
        self, rollouts: Rollouts, schedule: MicroBatchPlan, objective: Objective
    ) -> MetricSums:
        """Forward and backward over all micro-batches; leaves reduced gradients in `main_grad`.

        Reads no tensor values, so it runs on meta tensors too.
        """
        sums = self.begin_gradients(measures_mismatch=rollouts.engine_log_prob is not None)
        self.add_gradients(rollouts, schedule, objective, sums)
        self.reduce_gradients(self.ddp_chunks)
        return sums

    def begin_gradients(self, measures_mismatch: bool) -> MetricSums:
        """Zero the gradients, and the sums that come with them."""
        self.memory.reload()
        self.zero_gradients()
        return MetricSums(self.parallel.device, measures_mismatch)

    def add_gradients(
        self, rollouts: Rollouts, schedule: MicroBatchPlan, objective: Objective, sums: MetricSums
    ) -> None:
        """Forward and backward over all micro-batches; adds to `main_grad`, not reduced over ranks."""
        if rollouts.is_demonstration != objective.learns_from_demonstrations:
            raise ValueError(f"{type(objective).__name__} cannot learn from these rollouts")
        columns = dict.fromkeys(objective.columns)
        if rollouts.engine_log_prob is not None:
            columns["engine_log_prob"] = None

        def loss_fn(chunk: GPTModel, micro: MicroBatch, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            token_loss = TokenLoss(objective, micro.columns, sums)
            loss = LMHeadLoss.apply(
                hidden, head_weight(chunk), self.head, micro, token_loss, head_shares_embedding(chunk)
            )
            # Megatron's schedule modifies the returned loss in place.
            return loss, torch.tensor(micro.targets.numel(), dtype=torch.int), loss.detach().clone()

        def eval_fn(chunk: GPTModel, micro: MicroBatch, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            output = log_probs(self.head, hidden, head_weight(chunk), micro, objective.temperature)
            TokenLoss(None, micro.columns, sums).finish(output)
            return _no_loss(hidden)

        with_gradient, zero_advantage = self._parts(rollouts, schedule)
        self._run(with_gradient, schedule, columns, loss_fn, forward_only=False)
        if schedule.forward_only is not None:
            self._run(zero_advantage, schedule.forward_only, columns, eval_fn, forward_only=True)

    def finish_streamed_step(
        self,
        sums: MetricSums,
        normalizer: float,
        response_lengths: Tensor,
        lr: float,
        pre_step_check: Callable[[StepMetrics], None] | None = None,
    ) -> StepMetrics:
        """The one optimizer step, after `add_gradients` of all parts of the batch with the normalizer 1.

        The gradients are reduced over ranks once, then divided; then it is as in `train_step`.

        Args:
            normalizer: N of the whole batch.
            response_lengths: of all samples that this data-parallel rank has added.
        """
        self.reduce_gradients(self.ddp_chunks)
        for chunk in self.ddp_chunks:
            chunk.scale_gradients(1.0 / normalizer)
        sums.divide_loss(normalizer)
        return self._step(self._checked(sums, response_lengths), lr, pre_step_check)

    def checked_gradients(
        self, rollouts: Rollouts, schedule: MicroBatchPlan, objective: Objective
    ) -> StepMetrics:
        """`accumulate_gradients`, and the step's metrics over all ranks.

        Raises:
            NonFiniteError: on all ranks, for a loss or gradient that is NaN or infinite.
        """
        sums = self.accumulate_gradients(rollouts, schedule, objective)
        return self._checked(sums, rollouts.response_lengths)

    def _checked(self, sums: MetricSums, response_lengths: Tensor) -> StepMetrics:
        metrics = sums.total(self.parallel, response_lengths)
        self._check_finite(metrics)
        return metrics

    def _parts(self, rollouts: Rollouts, schedule: MicroBatchPlan) -> tuple[Rollouts, Rollouts]:
        """The samples with a gradient, and the forward-only ones, which follow them."""
        count = sum(len(micro_batch) for micro_batch in schedule.assignment[self.parallel.dp_rank])
        return rollouts.select(range(count)), rollouts.select(range(count, len(rollouts)))

    def zero_gradients(self) -> None:
        """Zero all gradients."""
        for chunk in self.ddp_chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def _check_finite(self, metrics: StepMetrics) -> None:
        """Raise NonFiniteError on all ranks where any rank's loss or gradient is NaN or infinite."""
        buffers = [b for chunk in self.ddp_chunks for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
        norms = torch.stack([torch.linalg.vector_norm(buffer.grad_data) for buffer in buffers])
        non_finite = all_reduce(self.parallel, (~torch.isfinite(norms)).sum().cpu())
        if int(non_finite) or not math.isfinite(metrics.loss):
            self.zero_gradients()
            raise NonFiniteError(
                f"the loss is {metrics.loss:g} and the gradient is {'not ' if int(non_finite) else ''}"
                "finite, so the weights stay unchanged",
                "resume from a checkpoint with a smaller optimizer.lr",
            )

    def log_probs(self, rollouts: Rollouts, schedule: MicroBatchPlan, temperature: float) -> Tensor:
        """log π_T of every response token of `rollouts` [Σl] float32, by a forward-only pass, on every rank
        of the data-parallel replica."""
        return measure_tokens(self, rollouts, schedule, temperature).log_prob

    def run_forward(
        self,
        rollouts: Rollouts,
        schedule: MicroBatchPlan,
        visit: Callable[[GPTModel, MicroBatch, Tensor], None],
    ) -> None:
        """A forward-only pass; on the last pipeline stage `visit` is called with the model's last chunk, each
        micro-batch of this rank and its hidden states [b, s, H]."""

        def forward_fn(chunk: GPTModel, micro: MicroBatch, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            visit(chunk, micro, hidden)
            return _no_loss(hidden)

        self._run(rollouts, schedule, (), forward_fn, forward_only=True)

    def _run(
        self,
        rollouts: Rollouts,
        schedule: MicroBatchPlan,
        columns: Iterable[str],
        loss: _Loss,
        forward_only: bool,
    ) -> None:
        check_routed_experts(rollouts, self.config.model)
        micro_batches = build_micro_batches(
            rollouts,
            schedule,
            self.parallel.dp_rank,
            {name: token_column(rollouts, name).float() for name in columns},
            multiple=row_multiple(self.config),
            device=self.parallel.device,
            token_multiple=token_multiple(self.config),
            context=(self.parallel.cp_rank, self.parallel.cp_size),
        )

        def forward(iterator: Iterator[MicroBatch], chunk: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
            micro = next(iterator)
            self.on_micro_batch()
            with self.routing_replay.forward(self.ddp_chunks.index(chunk), micro.routed_experts):
                output = chunk(micro.tokens, micro.position_ids, None, packed_seq_params=micro.packed)
            return output, partial(loss, self.chunks[-1], micro)

        iterators = [iter(micro_batches) for _ in self.ddp_chunks]
        rows, padded_length = micro_batches[0].tokens.shape
        padded_length *= self.parallel.cp_size  # Megatron's schedule divides by it
        try:
            with torch.set_grad_enabled(not forward_only):
                get_forward_backward_func()(
                    forward_step_func=forward,
                    data_iterator=iterators if len(iterators) > 1 else iterators[0],
                    model=self.ddp_chunks if len(self.ddp_chunks) > 1 else self.ddp_chunks[0],
                    num_microbatches=schedule.count,
                    seq_length=padded_length,
                    micro_batch_size=rows,
                    forward_only=forward_only,
                )
        finally:
            self.routing_replay.clear()

    # ------------------------------------------------------------------ weights

    def set_weights(self, shards: Shards) -> None:
        """Copy in all weights, and reset the optimizer where there is one."""
        with torch.no_grad():
            for parameter in self.param_mapping:
                if parameter.stage == self.parallel.pp_rank:
                    weight = self.chunks[parameter.chunk].get_parameter(parameter.mcore_name)
                    weight.copy_(shards.read(parameter))
        if self.optimizer is not None:
            self.start_optimizer(self.optimizer_config)

    def stream_weights(self, to: Receivers = "all") -> WeightStream:
        """Buckets of (Hugging Face name, full tensor), on every rank or on rank 0, or slices for the ranks of
        engines; to read it is a collective of all ranks.

        Tensors are read-only, and valid until the next optimizer step.
        """
        limit = int(self.config.weight_bucket_mib * 2**20)
        return WeightStream(ModelShards(self.chunks), self.param_mapping, self.parallel, limit, to)

    @contextmanager
    def swap_weights(self, source: WeightSource | LocalParams) -> Iterator[None]:
        """Within this context the model computes forward-only with the weights of `source`: full tensors, or
        the shards from `shards_of`.

        Its own weights are always restored bit for bit; that costs one copy of this rank's shards.
        """
        own = LocalParams([parameter.detach().clone() for parameter in self._parameters()])
        try:
            if isinstance(source, LocalParams):
                self._copy_in(source)
            else:
                load_weights(self.chunks, self.param_mapping, self.parallel, source)
            yield
        finally:
            self._copy_in(own)

    def shards_of(self, source: WeightSource) -> LocalParams:
        """This rank's shards of the full tensors of `source`, in host memory."""
        with self.swap_weights(source):
            return LocalParams([parameter.detach().to("cpu", copy=True) for parameter in self._parameters()])

    def _parameters(self) -> list[Tensor]:
        return [parameter for chunk in self.chunks for parameter in chunk.parameters()]

    def _copy_in(self, shards: LocalParams) -> None:
        with torch.no_grad():
            for parameter, tensor in zip(self._parameters(), shards.tensors, strict=True):
                parameter.copy_(tensor)


_Loss = Callable[[GPTModel, MicroBatch, Tensor], tuple[Tensor, Tensor, Tensor]]


def _no_loss(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What Megatron's schedule expects of a forward-only micro-batch."""
    return hidden.new_zeros(()), torch.tensor(0, dtype=torch.int), hidden.new_zeros(())


def token_column(rollouts: Rollouts, name: str) -> Tensor:
    """A column of the rollouts per response token [Σl]."""
    if name == "advantages" and rollouts.token_advantages is not None:
        return rollouts.token_advantages
    values = rollouts.derived[name] if name in rollouts.derived else getattr(rollouts, name, None)
    if values is None:
        raise ValueError(f"the objective needs the column {name!r}, which these rollouts do not have")
    if name in ("advantages", "rewards"):
        values = torch.repeat_interleave(values, rollouts.response_lengths)
    return cast(Tensor, values)


def _no_reduction(*_: Any, **__: Any) -> None:
    """In place of the reduction at the end of every schedule."""
