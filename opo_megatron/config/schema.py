"""Every key of a recipe, its type, its default and its meaning.

The dataclasses are OmegaConf structured configs: an unknown key or a wrong type cannot be stored.
The values a field accepts are checked in `validate.py`, with the rules that involve several fields.
A field whose default is None is derived by `resolve` in `load.py` and printed resolved.  The string
after a field is its documentation: `tools/make_reference.py` collects them into docs/reference.md.
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
    Fp8,
    Kl,
    Packing,
    Recompute,
    RopeType,
    Scales,
    Schedule,
    TaskName,
)
from opo_megatron.config.rollout import RolloutConfig


@dataclass
class RunConfig:
    """The process: where files go, seeds, threads, time limits."""

    dir: str = MISSING
    """Folder for everything the run writes."""
    seed: int = 1
    """Seed of the initial weights, the prompt order and sampling."""
    ranks: int | None = None
    """Number of ranks the recipe is written for, one per GPU. `opo config` and `opo plan` count with it."""
    threads_per_rank: int = 1
    """OpenMP threads per rank on a CPU. More threads than cores make steps many times slower."""
    distributed_timeout_minutes: float = 10.0
    """A collective that waits longer than this ends the run."""
    hang_minutes: float = 30.0
    """If no rank makes progress within its phase for this long, the run ends with exit code 76 and writes
    the stacks of all ranks; 0 disables the watchdog."""
    on_bad_numbers: str = "stop"
    """What happens when a reward, loss or gradient is not finite. The rollouts are saved to bad_batches/
    first; then `stop` ends the run and `skip` skips the step."""
    max_minutes: float = 0.0
    """After this long the run saves a checkpoint and exits with code 75, to be resumed; 0 is no limit."""


@dataclass
class TrainConfig:
    """The length of the run."""

    steps: int = 100
    """Number of OPO steps. A step is one batch of rollouts and one optimizer step."""


@dataclass
class TaskConfig:
    """Prompts, tokenizer and verifier."""

    name: str = TaskName.lift.value
    """`lift`: a synthetic elevator task, generated on the fly; `text`: problems from a file or the Hub;
    `reasoning_gym`: problems from one of that package's generators; `package.module:Class`: a class of your
    own."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the lift (`floors`, `moves`, `largest_move`, …) or of your own class; `options.NAME=VALUE`
    sets one."""
    data: str | None = None
    """text: file with one problem per row (JSONL, a JSON list or Parquet), or
    `hub:owner/name[:config][:split]`."""
    held_out_data: str | None = None
    """text: the same for the held-out problems. Default: one row in ten of `data`, by a hash of the
    prompt."""
    prompt_field: str = "question"
    """text: field that holds the problem: its name, or a path such as `prompt.0.content`. With `chat`, the
    problem may be a list of messages."""
    answer_field: str = "answer"
    """text: field that holds the reference answer: its name, or a path such as
    `reward_model.ground_truth`."""
    answer_pattern: str | None = None
    """text: regular expression applied to the answer field; the first group of its last match is the
    answer."""
    generator: str | None = None
    """reasoning_gym: name of the generator."""
    generator_size: int = 10000
    """reasoning_gym: number of training problems, and of held-out problems."""
    generator_options: dict[str, Any] = field(default_factory=dict)
    """reasoning_gym: options passed to the generator; `generator_options.NAME=VALUE` sets one."""
    reward_threshold: float | None = None
    """reasoning_gym: scores at or above this become 1, all others 0. Default: scores are used as they are."""
    template: str = "{prompt}"
    """Text around the problem (the last message of a list); must contain `{prompt}`."""
    tokenizer: str = "bytes"
    """`bytes`, or the folder of a Hugging Face tokenizer."""
    chat: bool = False
    """Apply the tokenizer's chat template to the problem."""
    system_prompt: str | None = None
    """System message for the chat template. Rows with a system message of their own are refused."""
    max_prompt_tokens: int = 512
    """Longer prompts are dropped; their number is logged."""
    verifier: str = "exact"
    """text: `exact`, `number`, `regex`, `math`, `math_strict` (math-verify alone), a function of your own as
    `package.module:function`, or a service as `http://host:port/path`."""
    verifier_pattern: str | None = None
    """regex: the first group of the pattern's last match in a response is taken as its answer."""
    verifier_workers: int = 2
    """math, functions: number of grading processes per rank. Services: of requests at the same time."""
    verifier_batch: int = 64
    """Responses per request to a service, and per call of a function that grades batches."""
    verifier_seconds: float = 5.0
    """math, functions, services: time limit per response (a batch has that of all its responses). One that
    exceeds it gets `verifier_default` and is counted."""
    verifier_memory_mib: int = 4096
    """math, functions: memory limit (address space) of a grading process; 0 is none."""
    verifier_default: float = 0.0
    """Reward of a response that cannot be graded: it exceeds a limit, crashes its process, or its service is
    not reached."""
    verifier_in_process: bool = False
    """Functions: call it in the training process, without limits."""
    verifier_retries: int = 3
    """Services: how often a request without an answer is repeated."""
    verifier_api_key_env: str | None = None
    """Services: environment variable that holds the key, which is sent as `Authorization: Bearer KEY`."""
    environment: str = "single_turn"
    """What answers the policy: `single_turn`, nothing; `tools`, tools that a chat model calls; `lift_tool`, a
    tool that knows the lift; `package.module:Class`, a class of your own."""
    environment_options: dict[str, Any] = field(default_factory=dict)
    """Options of the environment; `environment_options.NAME=VALUE` sets one."""
    environment_seconds: float = 10.0
    """Time limit of an answer. One that exceeds it ends the conversation with `verifier_default`."""
    environment_memory_mib: int = 4096
    """Memory limit (address space) of an environment's process; 0 is none."""


@dataclass
class OptimizerConfig:
    """AdamW and its learning-rate schedule."""

    lr: float = 1e-6
    """Peak learning rate of AdamW."""
    schedule: Schedule = Schedule.constant
    """Learning-rate schedule after the warmup."""
    warmup_steps: int = 0
    """Number of linear warmup steps."""
    min_lr_ratio: float = 0.0
    """Learning rate at the last step as a fraction of `lr`, for `linear` and `cosine`."""
    weight_decay: float = 0.0
    """Decoupled weight decay. Vectors (norms, biases) are never decayed."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """Decay rates of Adam's first and second moments."""
    eps: float = 1e-8
    """Added to the square root of the second moment."""
    clip: float = 1.0
    """Maximum global gradient norm; 0 disables clipping."""


@dataclass
class WarmStartConfig(OptimizerConfig):
    """Supervised fine-tuning on the task's demonstrations, before the first OPO step."""

    steps: int = 0
    """Number of supervised steps; 0 starts OPO from the initial weights."""
    batch_size: int = 48
    """Demonstrations per step."""
    lr: float = 1e-5
    """Peak learning rate of AdamW in the supervised steps."""


@dataclass
class RopeScalingConfig:
    """Scaling of the rotary frequencies for sequences longer than those of pretraining."""

    type: RopeType = RopeType.none
    """`linear` divides all frequencies by `factor`; `llama3` divides the low ones, with a smooth
    transition."""
    factor: float = 1.0
    """Divisor of the scaled frequencies."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths above `original_max_sequence_length` / this are divided by `factor`."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below `original_max_sequence_length` / this are unchanged."""
    original_max_sequence_length: int = 8192
    """llama3: maximum sequence length before the scaling."""


@dataclass
class ModelConfig:
    """The decoder-only transformer, in Megatron-Core's names."""

    num_layers: int = 2
    """Number of transformer layers."""
    hidden_size: int = 128
    """Width of the hidden states."""
    ffn_hidden_size: int = 352
    """Width of the MLP."""
    num_attention_heads: int = 4
    """Number of query heads."""
    num_query_groups: int | None = None
    """Number of key and value heads. Default: one per query head."""
    kv_channels: int | None = None
    """Head dimension. Default: `hidden_size` / `num_attention_heads`."""
    qk_layernorm: bool = False
    """RMSNorm of queries and keys, as in Qwen3."""
    add_qkv_bias: bool = False
    """Biases of the query, key and value projections, as in Qwen2."""
    tie_embeddings: bool = False
    """Share one matrix between the embedding and the LM head."""
    vocab_size: int | None = None
    """Rows of the embedding. Default: the size of the task's vocabulary."""
    rotary_base: float = 10000.0
    """Base of the rotary embeddings (RoPE theta)."""
    rope_scaling: RopeScalingConfig = field(default_factory=RopeScalingConfig)
    layernorm_epsilon: float = 1e-6
    """Epsilon of every RMSNorm."""
    max_sequence_length: int = 2048
    """Maximum length of prompt and response together."""
    num_moe_experts: int | None = None
    """Experts per layer. Default: a dense model."""
    moe_router_topk: int = 2
    """Experts that each token is routed to."""
    moe_ffn_hidden_size: int | None = None
    """Width of one expert's MLP. Default: `ffn_hidden_size`."""
    moe_router_pre_softmax: bool = False
    """Take the router's softmax over all experts, before the top k are selected, instead of over those k."""


@dataclass
class PolicyConfig:
    """The model that is trained, its precision and its parallel layout."""

    init_from: str | None = None
    """Folder of a Hugging Face model, or of a Megatron checkpoint made by `opo convert`. `policy.model` takes
    its architecture and vocabulary from it. Default: random weights. For its tokenizer as well, set
    `task.tokenizer=${policy.init_from}`."""
    model: ModelConfig = field(default_factory=ModelConfig)
    dtype: Dtype = Dtype.fp32
    """Type of weights and activations. Master weights and gradient sums are always fp32."""
    device: Device = Device.auto
    """`auto` uses GPUs where there are any."""
    fp8: Fp8 | None = None
    """Run the layers' matrix products in FP8, with Transformer Engine. `blockwise` (128×128 blocks of
    weights, 1×128 of activations) is the format that servers can share. `tensorwise` and `delayed` have one
    scale per tensor, of this step or of earlier ones. `mxfp8` is for Blackwell."""
    fp8_scales: Scales = Scales.power_of_two
    """Scales of `fp8=blockwise`, of trainer and servers: `power_of_two`, Transformer Engine's default, or
    `fp32`, which uses more of FP8's range."""
    recompute: Recompute = Recompute.none
    """Activations recomputed in the backward pass: those of attention (`selective`), or all but the input of
    each layer (`full`)."""
    packing: Packing = Packing.padded
    """`padded`: the sequences of a micro-batch are rows, padded on the right to the longest. `thd`: they are
    concatenated into a single row, with almost no padding."""
    optimizer_offload: float = 0.0
    """Fraction of the optimizer, 0 to 1, that stays and steps in host memory. Per parameter of a rank's shard
    it saves 12 bytes on the GPU and takes 16 on the host. GPUs, bf16 and the distributed optimizer only."""
    tensor_model_parallel_size: int = 1
    """Ranks that share each weight matrix."""
    pipeline_model_parallel_size: int = 1
    """Pipeline stages that the layers are split into."""
    virtual_pipeline_model_parallel_size: int | None = None
    """Model chunks per pipeline stage (interleaved schedule). Default: no virtual stages."""
    exact_sum_parts: int = 1
    """Parts, added in order, of the sums that tensor parallelism splits in exact mode: a multiple of the
    ranks of policy and server; any numbers of ranks that divide it give the same bits."""
    sequence_parallel: bool = False
    """Shard activations between tensor-parallel regions along the sequence."""
    context_parallel_size: int = 1
    """Ranks that share every sequence; each keeps 1/size of the activations. Requires `packing=thd`, and bf16
    on GPUs."""
    expert_model_parallel_size: int = 1
    """Ranks that the experts of a layer are distributed over."""
    expert_tensor_parallel_size: int | None = None
    """Ranks that share the weight matrices of one expert. Default: `tensor_model_parallel_size`."""
    distributed_optimizer: bool = True
    """Shard the optimizer state over data- and context-parallel ranks."""
    max_tokens_per_micro_batch: int = 4096
    """Token budget of a micro-batch: rows × padded length, or the length of the packed row, over all
    context-parallel ranks. A single longer sequence still forms a micro-batch."""
    head_chunk_tokens: int | None = None
    """Tokens whose logits are in memory at once. Default: by vocabulary size, 512 to 1,024 on a CPU and 512
    to 8,192 on a GPU, where the logits take 540 MB."""
    weight_bucket_mib: float = 256.0
    """Size of the buckets in which weights are streamed to the engine."""
    megatron: dict[str, Any] = field(default_factory=dict)
    """Further fields of Megatron-Core's `TransformerConfig`, by their own names. Only fields that change how
    the model is computed are accepted, not those that change what it computes."""


@dataclass
class EvalConfig:
    """Evaluation on held-out problems during training."""

    every_steps: int = 10
    """Steps between evaluations. 0 evaluates only before the first and after the last step, which every run
    does."""
    problems: int = 512
    """Number of held-out problems."""
    samples_per_problem: int = 1
    """Responses per problem. Above 1, `eval/pass@k` and `eval/self_bleu` are logged as well."""
    temperature: float = 1.0
    """Sampling temperature."""
    top_p: float = 1.0
    """Nucleus sampling; 1 is off."""
    top_k: int = 0
    """Top-k sampling; 0 is off."""
    greedy: bool = True
    """Also generate one greedy response per problem."""


@dataclass
class ObserveConfig:
    """What a run logs."""

    tensorboard: bool = True
    """Write metrics to tensorboard/."""
    wandb_project: str | None = None
    """Log metrics to this Weights & Biases project too. Everything else is set by W&B's own environment
    variables."""
    save_rollouts: bool = True
    """Write the rollouts of every step, with rewards and advantages, to rollouts/."""
    audit: bool = True
    """Write digests of every step's weights and rollouts to audit.jsonl, for `opo replay`."""
    kl: Kl = Kl.off
    """`eval` measures, at each evaluation, the KL of the policy to the weights of step 0."""


@dataclass
class CheckpointConfig:
    """When checkpoints are written, and which are kept."""

    every_steps: int = 50
    """Steps between checkpoints, in warm-start and OPO steps alike. 0 saves only the last step of either."""
    at_end: bool = True
    """Save the last step of the warm start and of the run. `false` is for measurements: nothing can be
    evaluated or resumed afterwards, unless another key saves it."""
    every_minutes: float = 0.0
    """Also save at the end of the step in which this many minutes have passed since the last save; 0 is
    off."""
    keep_last: int = 0
    """Number of newest checkpoints to keep; 0 keeps all."""
    keep_best: str | None = None
    """Metric, such as `eval/accuracy`, whose best step is saved and kept in addition."""
    keep_best_is: Better = Better.highest
    """Whether the best value of that metric is its highest or its lowest."""
    asynchronous: bool = True
    """Write checkpoints in the background, from a separate process, one at a time. The last one of the warm
    start, and of the run, is waited for."""
    on_failure: str = "stop"
    """What happens when a checkpoint cannot be written: `stop`, or `continue` without it. The last one always
    stops the run."""


@dataclass
class Config:
    """A whole recipe."""

    run: RunConfig = field(default_factory=RunConfig)
    resume: str = "never"
    """`never` refuses a `run.dir` that is not empty. `auto` resumes from the newest complete checkpoint, or
    starts the run. The folder of a checkpoint resumes from that one."""
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
