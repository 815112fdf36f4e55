"""Every key of a recipe, its type, its default and its meaning.

The dataclasses are OmegaConf structured configs: an unknown key or a wrong type cannot be stored.
What a single field may hold is checked in `validate.py`, next to the rules that join several
fields.  A field whose default is None is derived by `resolve` in `load.py` and printed resolved.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from opo_megatron.algorithm.config import (
    AlgorithmConfig,
    OnPolicyConfig,
)
from opo_megatron.config.choices import (
    Better,
    Device,
    Dtype,
    EngineName,
    Fp8,
    Kl,
    Packing,
    Recompute,
    RopeType,
    Schedule,
    TaskName,
    Transport,
)


@dataclass
class RunConfig:
    dir: str = MISSING
    """Folder of everything that the run writes."""
    seed: int = 1
    """Seed of initial weights, prompt order and sampling."""
    ranks: int | None = None
    """Ranks that the recipe is meant for, one per GPU: what `opo config` and `opo schedule` count with."""
    threads_per_rank: int = 1
    """OpenMP threads of each rank on a CPU; more than there are cores makes steps many times slower."""
    distributed_timeout_minutes: float = 10.0
    """A collective that waits longer than this ends the run."""
    hang_minutes: float = 30.0
    """A rank that makes no progress in a phase for so long ends the run with exit code 76 and the stacks of
    all ranks; 0 is off."""
    on_bad_numbers: str = "stop"
    """What an OPO step with a reward, loss or gradient that is not finite does, once its rollouts are in
    bad_batches/: `stop` the run, or `skip` the step."""
    max_minutes: float = 0.0
    """After so long the run saves and ends with exit code 75, to be started again; 0 is no limit."""


@dataclass
class TrainConfig:
    steps: int = 100
    """OPO steps: each is one batch of rollouts and one optimizer step."""


@dataclass
class TaskConfig:
    name: TaskName = TaskName.lift
    """`lift`: a lift with ten floors, made up on the fly; `text`: problems from a file;
    `reasoning_gym`: problems of one of that package's generators."""
    data: str | None = None
    """text: JSONL or Parquet file, one problem per row, or hub:owner/name[:config][:split]."""
    held_out_data: str | None = None
    """text: the same for held-out problems; default one row in ten of `data`, by a hash of the prompt."""
    prompt_field: str = "question"
    """text: field of the problem."""
    answer_field: str = "answer"
    """text: field of the reference answer."""
    answer_pattern: str | None = None
    """text: regular expression whose last match (first group) in that field is the answer."""
    generator: str | None = None
    """reasoning_gym: name of the generator."""
    generator_size: int = 10000
    """reasoning_gym: problems for training, and as many held out."""
    generator_options: dict[str, Any] = field(default_factory=dict)
    """reasoning_gym: the generator's own options."""
    reward_threshold: float | None = None
    """reasoning_gym: scores from here on become 1 and others 0; default scores as they are."""
    template: str = "{prompt}"
    """Text around the problem."""
    tokenizer: str = "bytes"
    """`bytes`, or the folder of a Hugging Face tokenizer."""
    chat: bool = False
    """Put the problem into the tokenizer's chat format."""
    system_prompt: str | None = None
    """System message of the chat."""
    max_prompt_tokens: int = 512
    """Longer prompts are dropped, and their number is said."""
    verifier: str = "exact"
    """text: exact | number | regex | math | package.module:function."""
    verifier_pattern: str | None = None
    """Regular expression whose last match (first group) in a response is its answer."""
    verifier_workers: int = 2
    """math: grading processes of each rank."""
    verifier_seconds: float = 5.0
    """math: a response that takes longer gets `verifier_default`, and is counted."""
    verifier_memory_mib: int = 4096
    """math: address space of a grading process."""
    verifier_default: float = 0.0


@dataclass
class OptimizerConfig:
    lr: float = 1e-6
    """Peak learning rate of AdamW."""
    schedule: Schedule = Schedule.constant
    """Shape after the warm-up."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    min_lr_ratio: float = 0.0
    """Learning rate at the last step, as a share of `lr` (linear and cosine)."""
    weight_decay: float = 0.0
    """Decoupled weight decay; vectors (norms, biases) are never decayed."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """Decay rates of Adam's two moments."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    clip: float = 1.0
    """Largest norm of the whole gradient; 0 turns clipping off."""


@dataclass
class WarmStartConfig(OptimizerConfig):
    """Supervised steps on the task's demonstrations, before the first OPO step."""

    steps: int = 0
    """Optimizer steps; 0 starts OPO from the initial weights."""
    batch_size: int = 48
    """Demonstrations per step."""
    lr: float = 1e-5


@dataclass
class LocalEngineConfig:
    slots: int = 384
    """Responses decoded at once per rank; a finished one makes room for the next."""
    exact: bool = False
    """The log-probabilities recorded while sampling are bit for bit those of the training pass, so that
    on_policy.tolerance may be 0: on a CPU, in fp32, without tensor parallelism and experts."""


@dataclass
class SglangConfig:
    python: str = ".venv-sglang/bin/python"
    """Interpreter of the environment that has SGLang; `make setup-sglang` makes this one."""
    urls: list[str] = field(default_factory=list)
    """Servers that run already, as http://host:port; empty starts the run's own."""
    servers: int | None = None
    """Servers per node; default one per engine-sized group of GPUs, on a CPU one."""
    tensor_parallel_size: int = 1
    """GPUs of one server."""
    transport: Transport = Transport.tensor
    """`tensor`: shared memory or CUDA IPC on one node; `distributed`: a broadcast; `disk`: a folder."""
    max_running_requests: int | None = None
    """Responses that a server draws at once; default all of a step."""
    api_key: str | None = None
    """Key that the servers ask for; `${oc.env:NAME}` keeps it out of the recipe."""
    start_timeout_seconds: float = 900.0
    timeout_seconds: float = 1800.0
    """A server that gives no answer for so long counts as hung."""
    restarts: int = 3
    """How often in a row a step is drawn again after a failure, before the run ends."""
    share_memory: bool | None = None
    """Policy and servers give up memory in turns; default where the run's own servers use its GPUs."""
    fp8: bool | None = None
    """Servers get weights in FP8, in the trainer's own bytes; default where policy.fp8=blockwise."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further options of sglang.launch_server, by its own names."""


@dataclass
class RolloutConfig:
    engine: EngineName = EngineName.local
    """`local` decodes in the trainer's own process; `sglang` asks servers."""
    prompts_per_step: int = 48
    """Prompts of a step, over all ranks."""
    samples_per_prompt: int = 8
    """K: responses per prompt, the group that shares a baseline."""
    temperature: float = 1.0
    """T of the policy softmax(z/T): what is sampled is what is differentiated."""
    top_p: float = 1.0
    """Anything but 1 draws from another distribution than the policy's."""
    top_k: int = 0
    """0 is off; anything else draws from another distribution than the policy's."""
    max_response_tokens: int = 64
    """A response is cut here, without a stop token."""
    local: LocalEngineConfig = field(default_factory=LocalEngineConfig)
    sglang: SglangConfig = field(default_factory=SglangConfig)


@dataclass
class RopeScalingConfig:
    """How a model that was trained on short sequences turns its frequencies for long ones."""

    type: RopeType = RopeType.none
    """`linear` divides all by `factor`; `llama3` only the slow ones, with a smooth passage."""
    factor: float = 1.0
    low_freq_factor: float = 1.0
    """llama3: wavelengths above original_max_sequence_length / this are divided."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below original_max_sequence_length / this stay."""
    original_max_sequence_length: int = 8192
    """llama3: longest sequence before the scaling."""


@dataclass
class ModelConfig:
    """The decoder-only transformer, in Megatron-Core's names."""

    num_layers: int = 2
    hidden_size: int = 128
    ffn_hidden_size: int = 352
    num_attention_heads: int = 4
    num_query_groups: int | None = None
    """Key and value heads; default one per attention head."""
    kv_channels: int | None = None
    """Width of a head; default hidden_size / num_attention_heads."""
    qk_layernorm: bool = False
    """RMSNorm of queries and keys, as in Qwen3."""
    add_qkv_bias: bool = False
    """Biases of the query, key and value projections, as in Qwen2."""
    tie_embeddings: bool = False
    """One matrix for the embedding and the output."""
    vocab_size: int | None = None
    """Rows of the embedding; default the task's tokens."""
    rotary_base: float = 10000.0
    rope_scaling: RopeScalingConfig = field(default_factory=RopeScalingConfig)
    layernorm_epsilon: float = 1e-6
    max_sequence_length: int = 2048
    """Prompt and response together."""
    num_moe_experts: int | None = None
    """Experts per layer; default a dense model."""
    moe_router_topk: int = 2
    moe_ffn_hidden_size: int | None = None
    """Width of one expert; default ffn_hidden_size."""
    moe_router_pre_softmax: bool = False
    """Weigh experts by the softmax over all of them, not over the chosen ones."""


@dataclass
class PolicyConfig:
    init_from: str | None = None
    """Folder of a Hugging Face model, or what tools/convert_hf_to_megatron.py made of one: its
    architecture and vocabulary become policy.model's, its weights the first ones; default random
    weights.  For its tokenizer as well, set task.tokenizer to `${policy.init_from}`."""
    model: ModelConfig = field(default_factory=ModelConfig)
    dtype: Dtype = Dtype.fp32
    """Of weights and activations; master weights and gradient sums are fp32 always."""
    device: Device = Device.auto
    """`auto` takes GPUs where there are any."""
    fp8: Fp8 | None = None
    """Products of the layers in FP8, by Transformer Engine: `blockwise` (128×128 blocks of weights, 1×128 of
    activations) is what an engine can share; `tensorwise`, `delayed`: one scale per tensor, of this step or
    of earlier ones; `mxfp8` is for Blackwell."""
    recompute: Recompute = Recompute.none
    """Activations that are computed again in the backward pass: those of attention (`selective`), or all but
    each layer's input (`full`)."""
    packing: Packing = Packing.padded
    """`padded`: the sequences of a micro-batch are its rows, padded on the right to the longest; `thd`: they
    stand one behind another in a single row, and next to nothing is padding."""
    optimizer_offload: float = 0.0
    """Share of the optimizer, 0 to 1, that stays and steps in host memory: 12 bytes fewer on the GPU per
    parameter of a rank's shard, and 16 there; in bf16 with the distributed optimizer, on GPUs."""
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    """Model chunks per pipeline stage (interleaved schedule)."""
    sequence_parallel: bool = False
    context_parallel_size: int = 1
    """Ranks that share every sequence, for long ones, and keep 1/size of the activations each; with
    `packing=thd`, and on GPUs in bf16."""
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int | None = None
    """Ranks over which one expert is cut; default tensor_model_parallel_size."""
    distributed_optimizer: bool = True
    """Shard the optimizer's state over data- and context-parallel ranks."""
    max_tokens_per_micro_batch: int = 4096
    """Rows × padded length of one micro-batch, or the length of its packed row, over all context-parallel
    ranks (one longer sequence still makes a micro-batch)."""
    head_chunk_tokens: int | None = None
    """Tokens whose logits exist at one time; default by the size of the vocabulary, 512 to 1,024 on a CPU
    and 512 to 8,192 on a GPU, where they take 480 MB."""
    weight_bucket_mib: float = 256.0
    """Size of the buckets in which weights travel to the engine."""
    megatron: dict[str, Any] = field(default_factory=dict)
    """Further fields of Megatron-Core's TransformerConfig, by its own names: how to compute, not what."""


@dataclass
class EvalConfig:
    every_steps: int = 10
    """Also before the first and after the last step; 0 means only then."""
    problems: int = 512
    """Held-out problems."""
    samples_per_problem: int = 1
    """More than one also gives eval/pass@k and eval/self_bleu."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    greedy: bool = True
    """Also answer every problem once by the most likely token."""


@dataclass
class ObserveConfig:
    tensorboard: bool = True
    wandb_project: str | None = None
    """Also draw the metrics in this project of Weights & Biases; its own variables say the rest."""
    save_rollouts: bool = True
    """Write every step's rollouts, with rewards and advantages, to rollouts/."""
    audit: bool = True
    """Write digests of every step's weights and rollouts to audit.jsonl, for `opo replay`."""
    kl: Kl = Kl.off
    """`eval` measures, at each evaluation, how far the policy is from where OPO began."""


@dataclass
class CheckpointConfig:
    every_steps: int = 50
    """In warm-start and in OPO steps; the last of each is always saved.  0: only that one."""
    every_minutes: float = 0.0
    """Also at the end of the step in which so many minutes since the last one are over; 0 is off."""
    keep_last: int = 0
    """Older ones than the newest so many are deleted; 0 keeps all."""
    keep_best: str | None = None
    """Metric, such as eval/accuracy, whose best step is saved and kept besides those."""
    keep_best_is: Better = Better.highest
    asynchronous: bool = True
    """Written by a process beside the training, one at a time; the last of a stage is waited for."""
    on_failure: str = "stop"
    """Where one cannot be written: `stop`, or `continue` without it (the last one always stops)."""


@dataclass
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    resume: str = "never"
    """never | auto | the folder of a checkpoint."""
    train: TrainConfig = field(default_factory=TrainConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    on_policy: OnPolicyConfig = field(default_factory=OnPolicyConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    observe: ObserveConfig = field(default_factory=ObserveConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
