"""The section `rollout` of a recipe: how responses are sampled in training, and by which engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from opo_megatron.config.choices import (
    EngineName,
    Fill,
    GroupBackend,
    OverlapOrder,
    ReplayChoice,
    ReplayMethod,
    Transport,
    WeightLayout,
)


@dataclass
class LocalEngineConfig:
    """The decoder in the trainer's own process."""

    slots: int = 384
    """Responses decoded at once per rank. A finished response frees its slot for the next."""
    exact: bool = False
    """Make the log-probabilities recorded while sampling bitwise equal to those of the training pass, so that
    `on_policy.tolerance` may be 0. Dense models only; on GPUs in bf16."""


@dataclass
class SglangConfig:
    """SGLang servers."""

    python: str = ".venv-sglang/bin/python"
    """Python interpreter of the environment that has SGLang installed; `make setup-sglang` creates this
    one."""
    urls: list[str] = field(default_factory=list)
    """Servers that already run, as `http://host:port`. Empty: the run starts its own."""
    servers: int | None = None
    """Servers per node. Default: one per `tensor_parallel_size` GPUs, and one on a CPU."""
    tensor_parallel_size: int = 1
    """GPUs per server."""
    transport: Transport = Transport.tensor
    """How weights reach a server. `tensor`: shared memory or CUDA IPC, within a node; `distributed`:
    broadcast; `disk`: a shared folder."""
    layout: WeightLayout = WeightLayout.auto
    """What each rank of a server is sent: `slices`, the tensors that it holds, cut out of the policy's
    shards; `full`, all tensors of the model, of which it keeps its part. `auto` takes slices where both sides
    allow it, and the run says why where they do not."""
    distributed_backend: GroupBackend | None = None
    """Library of the broadcasts of `transport=distributed`. `gloo` copies through host memory, and works
    where trainer and server share a GPU; `nccl` needs one for each. Default: nccl on GPUs, gloo on a CPU."""
    max_running_requests: int | None = None
    """Maximum number of responses a server generates at once. Default: all responses of a step."""
    api_key: str | None = None
    """Key of the servers, as `${oc.env:NAME_KEY}`: the variable that holds it. Default: the key in
    `api_key_file`, and without one a random key for servers that the run starts."""
    api_key_file: str | None = None
    """File with the key of servers on other nodes, readable by its owner alone. `opo serve` makes it, the run
    that names their `urls` reads it."""
    start_timeout_seconds: float = 900.0
    """Time a server has to become ready. One that takes longer ends the run."""
    timeout_seconds: float = 1800.0
    """A server that does not respond for this long counts as hung."""
    restarts: int = 3
    """How many times in a row the rollouts of a step are continued or regenerated after a failure, before the
    run ends."""
    continue_responses: bool = True
    """After a server's death, continue responses from the tokens that were received as they were sampled.
    `false`, and with servers that neither the run nor `opo serve` started: all are generated again."""
    share_memory: bool | None = None
    """Policy and servers release GPU memory to each other in turn. Default: true where the run's own servers
    use the trainer's GPUs."""
    fp8: bool | None = None
    """Send weights to the servers in FP8, quantized as the trainer quantizes them. Default: true with
    `policy.fp8=blockwise`."""
    deterministic: bool = False
    """Sample by SGLang's deterministic inference, with a seed of the run for every response: the same run on
    the same GPUs samples the same tokens. GPUs only. Log-probabilities still differ from the policy's."""
    exact: bool = False
    """Run the policy's own operations inside the servers: recorded log-probabilities are bitwise equal to
    those of the training pass, so that `on_policy.tolerance` may be 0, and responses depend on the run's seed
    alone, so that a resumed run samples the same again. Dense models only; on GPUs in bf16."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further options of `sglang.launch_server`, by their own names, with `_` or `-`; `options.NAME=VALUE`
    sets one. `true` is a flag, a list several words, a mapping JSON; `false` and `null` leave one out."""


@dataclass
class ReplayConfig:
    """Responses of earlier steps that are trained on once more, beside those of the step. Needs
    `algorithm.off_policy_sampling=true`."""

    method: ReplayMethod = ReplayMethod.off
    """`repo`: responses to the same prompt, when it comes again; `spear`: the responses better than their
    group's baseline, once enough are kept."""
    size: int | None = None
    """repo: newest responses kept per prompt; spear: most samples of a replay, which comes when one and a
    half times as many are kept. Default: 16; 2048."""
    max_age: int | None = None
    """Steps after which a response is dropped. Default: never; 10 with spear."""
    coefficient: float = 1.0
    """Factor of the replayed part of the loss."""
    ramp_steps: int | None = None
    """Steps in which the factor rises from 0, along a cosine; 0 is at once. Default: 0; 200 with spear."""
    per_prompt: int = 8
    """repo: responses replayed per prompt."""
    min_size: int | None = None
    """repo: a prompt with fewer kept responses is not replayed. Default: `size`."""
    choose: ReplayChoice = ReplayChoice.highest
    """repo: which of them: those of highest reward, the most recent, random ones, or those whose rewards vary
    most."""
    history: int = 10240
    """spear: number of groups whose mean rewards, and their deviations, the baseline is the median of."""
    divide_by_std: bool = False
    """spear: divide advantages by the median deviation."""


@dataclass
class RolloutConfig:
    """How responses are sampled in training."""

    engine: EngineName = EngineName.local
    """`local` decodes in the trainer's own process; `sglang` sends requests to SGLang servers."""
    prompts_per_step: int = 48
    """Prompts per step, over all ranks."""
    samples_per_prompt: int = 8
    """K: responses per prompt, the group that shares a baseline."""
    fill: Fill = Fill.off
    """`groups_with_signal`: train on the first `prompts_per_step` prompts of the step whose responses do not
    all have the same reward; others have no gradient."""
    fill_rounds: int = 1
    """groups_with_signal: a step has at most this many times `prompts_per_step` prompts, sampled in rounds
    until enough of them have a signal."""
    overlap: bool = False
    """Train on groups that are complete while the engines still sample the others with the same weights;
    there is one optimizer step, when all are trained on. Needs engines on devices of their own."""
    overlap_order: OverlapOrder = OverlapOrder.arrival
    """Order in which groups are trained on: as they are complete, or `prompt`, repeatable bit for bit."""
    overlap_micro_batches: int | None = None
    """Least micro-batches, per data-parallel rank, of a part of the batch that is trained on while others are
    sampled. Default: twice the pipeline stages, which then wait for a third of the time at most."""
    staleness: int = 0
    """Train every step on the rollouts that the weights of this many steps before sampled; the first ones on
    rollouts of the initial weights. Above 0 the run is off-policy, and needs
    `algorithm.off_policy_sampling=true`."""
    temperature: float = 1.0
    """T of the policy softmax(z/T). The objective differentiates the same distribution."""
    top_p: float = 1.0
    """Any other value than 1 samples from another distribution than the policy's."""
    top_k: int = 0
    """0 is off. Any other value samples from another distribution than the policy's."""
    max_response_tokens: int = 64
    """Maximum response length. A response that reaches it is truncated and has no stop token."""
    max_turns: int = 8
    """Environments: maximum number of the policy's turns in a conversation."""
    environments: int = 64
    """Environments per rank that run at once, each in a process of its own."""
    routing_replay: bool | None = None
    """Train with the experts that the engine took: rollouts carry them, for every token and layer. Default:
    true for a model with experts."""
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    local: LocalEngineConfig = field(default_factory=LocalEngineConfig)
    sglang: SglangConfig = field(default_factory=SglangConfig)
