"""Explains where the difference between a policy's and an engine's log-probabilities comes from.

    python tools/explain_mismatch.py                                   # local engine, a small model, CPU
    python tools/explain_mismatch.py --engine sglang                   # a real SGLang server
    python tools/explain_mismatch.py mine.yaml policy.init_from=path/to/model policy.device=cuda

The engine samples responses; policy and a float64 reference compute the same tokens with the same bf16
weights.  Three tables: log-probabilities of each against each; hidden states after every layer; and what each
part's rounding contributes, by a decoder in which one part at a time computes in bf16 while all others
compute in fp32, and the other way round.  Dense models.  Writes records/mismatch_ENGINE.json.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.record import RECORDS, write_record
from rich.console import Console
from rich.table import Table

from opo_megatron.utils.terminal import prepare_terminal

if TYPE_CHECKING:
    from torch import Tensor

    from opo_megatron.config import Config
    from opo_megatron.distributed.process_groups import Parallel
    from opo_megatron.policy.policy import Policy

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes" / "quickstart_sglang.yaml"
SMALL = (
    "num_layers=8", "hidden_size=256", "ffn_hidden_size=704", "num_attention_heads=4", "num_query_groups=2",
    "kv_channels=64", "vocab_size=4096", "max_sequence_length=1024",
)  # fmt: skip
DUMP = "debug_tensor_dump_output_folder"


@dataclass(frozen=True)
class Trace:
    """What one implementation computes for the same tokens, in float64 on the CPU."""

    log_probs: Tensor
    """[n, R]."""
    states: list[Tensor]
    """Residual stream after each layer, [n, T − 1, H]."""


def main() -> int:
    options = parse_arguments()
    import torch

    from opo_megatron.build import frozen_policy
    from opo_megatron.config import load_config
    from opo_megatron.distributed.process_groups import initialize, shutdown
    from opo_megatron.errors import EXIT_USER_ERROR
    from opo_megatron.policy.model import head_weight

    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"run.dir={folder}/run", "policy.dtype=bf16", f"rollout.engine={options.engine}"]
        if options.recipe == RECIPE:
            overrides += [f"policy.model.{setting}" for setting in SMALL]
        if options.engine == "sglang":
            # The dump hooks into every forward pass, which graphs would skip.
            overrides += [f"rollout.sglang.options.{DUMP}={folder}/dump"]
            overrides += ["rollout.sglang.options.disable_cuda_graph=true"]
        config = load_config(options.recipe, [*overrides, *options.overrides])
        if (experts := config.policy.model.num_moe_experts) is not None:
            remedy = "but the parts are those of a dense model; remove it"
            print(f"error: policy.model.num_moe_experts is {experts}, {remedy}", file=sys.stderr)
            return EXIT_USER_ERROR
        config.policy.max_tokens_per_micro_batch = options.sequences * (options.prompt + options.response)
        vocab_size = config.policy.model.vocab_size or 4096
        parallel = initialize(config)
        policy = frozen_policy(config, parallel, vocab_size, None)
        with torch.no_grad():
            head_weight(policy.chunks[-1]).mul_(options.head_scale)
        results = explain(config, policy, parallel, options, Path(folder))
        shutdown()
    show(results)
    print(f"written to {write_record(record_name(options), results, options.records)}")
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path, nargs="?", default=RECIPE)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for opo train")
    parser.add_argument("--engine", choices=["local", "sglang"], default="local")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=32, metavar="TOKENS")
    parser.add_argument("--response", type=int, default=32, metavar="TOKENS")
    parser.add_argument(
        "--head-scale", type=float, default=1.0, metavar="X",
        help="multiply the LM head: logits of trained models spread about ten times as far as random ones",
    )  # fmt: skip
    parser.add_argument("--records", type=Path, default=RECORDS, help="folder of the record")
    options = parser.parse_intermixed_args()
    if "=" in str(options.recipe):  # only overrides were given
        options.overrides, options.recipe = [str(options.recipe), *options.overrides], RECIPE
    return options


def record_name(options: argparse.Namespace) -> str:
    return f"mismatch_{options.engine}" + ("" if options.head_scale == 1 else "_scaled_head")


def explain(
    config: Config, policy: Policy, parallel: Parallel, options: argparse.Namespace, folder: Path
) -> dict[str, Any]:
    """All three tables."""
    import torch
    from bench.mixed_precision import PARTS, MixedDecoder

    weights = {name: tensor.clone() for bucket in policy.stream_weights() for name, tensor in bucket}
    rng = random.Random(0)
    prompts = [
        [rng.randrange(policy.vocab_size) for _ in range(options.prompt)] for _ in range(options.sequences)
    ]
    trace_engine = sglang_engine if options.engine == "sglang" else local_engine
    tokens, engine = trace_engine(config, policy, parallel, prompts, options.response, folder)
    own = policy_trace(policy, tokens, options.prompt)
    decoder, device = MixedDecoder(config.policy.model, weights), tokens.to(parallel.device)

    def mixed(low: Sequence[str], high: torch.dtype) -> Trace:
        with torch.no_grad():
            states, log_probs = decoder.forward(device, options.prompt, frozenset(low), high)
        return Trace(log_probs.double().cpu(), [state.double().cpu() for state in states])

    truth = mixed((), torch.float64)
    in_bf16 = mixed(PARTS, torch.float32)
    contributions: dict[str, dict[str, Any]] = {}
    for part in PARTS:
        alone = mixed((part,), torch.float32)
        without = mixed([other for other in PARTS if other != part], torch.float32)
        contributions[part] = {
            "alone in bf16": difference(alone, truth),
            "alone in fp32": difference(without, truth),
        }
    squares = sum(row["alone in bf16"]["rms"] ** 2 for row in contributions.values())
    for row in contributions.values():
        row["share of the variance"] = row["alone in bf16"]["rms"] ** 2 / squares
    pairs = {
        f"policy − {options.engine} engine": difference(own, engine),
        "policy − float64": difference(own, truth),
        f"{options.engine} engine − float64": difference(engine, truth),
        "all parts in bf16 − float64": difference(in_bf16, truth),
        "all parts in fp32 − float64": difference(mixed((), torch.float32), truth),
    }
    return {
        "engine": options.engine,
        "device": device_name(parallel.device),
        "head scale": options.head_scale,
        "model": {key: value for key, value in vars(config.policy.model).items() if isinstance(value, int)},
        "tokens compared": int(engine.log_probs.numel()),
        "log-probabilities": pairs,
        "layers": layer_table(own, engine, truth),
        "parts": contributions,
    }


def device_name(device: Any) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def difference(one: Trace, other: Trace) -> dict[str, float]:
    """mean, rms and max |Δ log π|."""
    delta = one.log_probs - other.log_probs
    return {
        "mean": float(delta.abs().mean()),
        "rms": float(delta.square().mean().sqrt()),
        "max": float(delta.abs().max()),
    }


def layer_table(policy: Trace, engine: Trace, truth: Trace) -> list[dict[str, float]]:
    """Per layer ‖Δ‖ / ‖x‖ of the residual stream."""

    def relative(one: Tensor, other: Tensor, whole: Tensor) -> float:
        return float((one - other).norm() / whole.norm())

    return [
        {
            "policy − engine": relative(p, e, t),
            "policy − float64": relative(p, t, t),
            "engine − float64": relative(e, t, t),
        }
        for p, e, t in zip(policy.states, engine.states, truth.states, strict=True)
    ]


# ---------------------------------------------------------------------- who computes


def policy_trace(policy: Policy, tokens: Tensor, prompt: int) -> Trace:
    """The policy's forward pass, as training runs it."""
    import torch

    from opo_megatron.batch.rollouts import Rollouts

    rows = tokens.tolist()
    rollouts = Rollouts.from_demonstrations([row[:prompt] for row in rows], [row[prompt:] for row in rows])
    rollouts.is_demonstration = False
    schedule = policy.schedule(rollouts.sequence_lengths)
    assert schedule.count == 1
    order = schedule.samples_of(0)
    captured: list[Tensor] = []

    def capture(module: Any, inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        captured.append(hidden.detach().double().cpu())

    layers = policy.chunks[0].decoder.layers
    hooks = [layer.register_forward_hook(capture) for layer in layers]
    log_probs = policy.log_probs(rollouts.select(order), schedule, 1.0)
    for hook in hooks:
        hook.remove()
    back = torch.tensor(order).argsort()
    shape = (len(rows), tokens.shape[1] - 1, -1)
    states = [in_rows(hidden, shape)[back] for hidden in captured]
    return Trace(log_probs.double().view(len(rows), -1)[back], states)


def in_rows(hidden: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Megatron's [s, b, H], padded or packed into one row, as [n, T − 1, H]."""
    n, length, _ = shape
    if hidden.shape[1] == 1:
        return hidden[: n * length, 0].view(shape)
    return hidden.transpose(0, 1)[:, :length]


def local_engine(
    config: Config, policy: Policy, parallel: Parallel, prompts: list[list[int]], response: int, folder: Path
) -> tuple[Tensor, Trace]:
    """Prefill and one token after the other by the local decoder, which records what enters its norms."""
    import torch

    from opo_megatron.kernels.exact import log_softmax
    from opo_megatron.rollout.local.decoder import Decoder, KeyValueCache

    recorded: dict[str, list[Tensor]] = {}

    class Recorder(Decoder):
        def _norm(self, x: Tensor, name: str) -> Tensor:
            if name == "norm" or name.endswith(".norm"):
                recorded.setdefault(name, []).append(x.double().cpu())
            return super()._norm(x, name)

    model, device = config.policy.model, parallel.device
    decoder = Recorder(model, policy.vocab_size, torch.bfloat16, device)
    for bucket in policy.stream_weights():
        for name, tensor in bucket:
            decoder.load(name, tensor)
    tokens = torch.tensor(prompts, device=device)
    rows = torch.arange(len(prompts), device=device)
    cache = KeyValueCache(model, len(prompts), tokens.shape[1] + response, torch.bfloat16, device)
    generator = torch.Generator(device).manual_seed(0)
    log_probs = []
    with torch.no_grad():
        hidden = decoder.prefill(tokens, cache, rows, rows)[:, -1]
        for position in range(tokens.shape[1], tokens.shape[1] + response):
            log_pi = log_softmax(decoder.logits(hidden), 1.0)
            chosen = log_pi.exp().multinomial(1, generator=generator)
            log_probs.append(log_pi.gather(1, chosen))
            tokens = torch.cat((tokens, chosen), 1)
            if len(log_probs) < response:
                positions = torch.full((len(prompts),), position, device=device)
                hidden = decoder.decode(chosen[:, 0], positions, cache)
    entries = [f"{i}.norm" for i in range(1, model.num_layers)] + ["norm"]
    states = [
        torch.cat([part.view(len(prompts), -1, model.hidden_size) for part in recorded[e]], 1)
        for e in entries
    ]
    return tokens.cpu(), Trace(torch.cat(log_probs, 1).double().cpu(), states)


def sglang_engine(
    config: Config, policy: Policy, parallel: Parallel, prompts: list[list[int]], response: int, folder: Path
) -> tuple[Tensor, Trace]:
    """A server that samples one response at a time and dumps the outputs of its modules."""
    import torch

    from opo_megatron.rollout.engine import GenerationRequest, Sampling
    from opo_megatron.rollout.sglang.engine import SglangEngine
    from opo_megatron.rollout.sglang.server import write_model_config

    write_model_config(config, policy.vocab_size, folder / "model", None)
    engine = SglangEngine(config, parallel, folder / "model", lambda line: None)
    rows, log_probs, passes = [], [], []
    try:
        engine.update_weights(policy.stream_weights(), policy.version)
        sampling = Sampling(max_tokens=response, stop_tokens=(), seed=(0,))
        seen = set(dumps(folder))
        for i, prompt in enumerate(prompts):
            rollouts = engine.generate([GenerationRequest(i, i, 0, tuple(prompt))], sampling)
            rows.append(prompt + rollouts.response_tokens.tolist())
            assert rollouts.engine_log_prob is not None
            log_probs.append(rollouts.engine_log_prob.double())
            passes.append([path for path in dumps(folder) if path not in seen])
            seen |= set(passes[-1])
    finally:
        engine.close()
    layers = range(1, config.policy.model.num_layers)
    names = [f"model.layers.{i}.input_layernorm" for i in layers] + ["model.norm"]
    states = [residuals(paths, names, len(row) - 1) for paths, row in zip(passes, rows, strict=True)]
    stacked = [torch.stack([one[i] for one in states]) for i in range(len(names))]
    return torch.tensor(rows), Trace(torch.stack(log_probs), stacked)


def dumps(folder: Path) -> list[Path]:
    """The files of all forward passes so far, in order."""
    return sorted((folder / "dump").glob("*/Pass*.pt"))


def residuals(paths: Sequence[Path], names: Sequence[str], length: int) -> list[Tensor]:
    """[length, H] of each name: the residual stream, which fused norms return beside their output."""
    import torch

    loaded = [torch.load(path, weights_only=True) for path in paths]
    return [torch.cat([one[name][1].double() for one in loaded])[:length] for name in names]


# ---------------------------------------------------------------------- tables


def show(results: dict[str, Any]) -> None:
    console = Console()
    table = Table(
        "log-probabilities", "mean |Δ|", "rms", "max |Δ|", title=f"{results['tokens compared']} tokens"
    )
    for name, row in results["log-probabilities"].items():
        table.add_row(name, *(f"{row[key]:.2e}" for key in ("mean", "rms", "max")))
    console.print(table)
    table = Table("after layer", *results["layers"][0], title="residual stream, ‖Δ‖ / ‖x‖")
    for number, row in enumerate(results["layers"], 1):
        table.add_row(str(number), *(f"{value:.2e}" for value in row.values()))
    console.print(table)
    whole = results["log-probabilities"]["all parts in bf16 − float64"]["mean"]
    table = Table("part", "alone in bf16", "share of the variance", "alone in fp32", "saves")
    table.title = f"mean |Δ log π| to float64; all parts in bf16: {whole:.2e}"
    for name, row in sorted(results["parts"].items(), key=lambda pair: -pair[1]["share of the variance"]):
        rest = row["alone in fp32"]["mean"]
        cells = (f"{row['share of the variance']:.0%}", f"{rest:.2e}", f"{1 - rest / whole:.0%}")
        table.add_row(name, f"{row['alone in bf16']['mean']:.2e}", *cells)
    console.print(table)


if __name__ == "__main__":
    prepare_terminal()
    sys.exit(main())
