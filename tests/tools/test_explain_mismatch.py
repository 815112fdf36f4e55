"""The mismatch of bf16, explained: the decoder of parts against an independent reference, and the tool."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import explain_mismatch
import pytest
import torch
from bench.mixed_precision import PARTS, MixedDecoder

from opo_megatron.weights.param_mapping import hf_shapes
from opo_megatron.weights.random_init import random_weights
from tests.support import dense_reference
from tests.support.fixtures import VOCAB_SIZE, small_config
from tests.support.paths import TOOLS

PROMPT = 5
SHAPES = {
    "qwen3": (),
    "qwen2": ("policy.model.qk_layernorm=false", "policy.model.add_qkv_bias=true"),
    "tied": ("policy.model.tie_embeddings=true",),
}


def decoder_and_weights(*overrides: str) -> tuple[MixedDecoder, dict[str, torch.Tensor]]:
    model = small_config(*overrides).policy.model
    source = random_weights(model, VOCAB_SIZE, 1)
    weights = {name: source(name).bfloat16() for name in hf_shapes(model, VOCAB_SIZE)}
    return MixedDecoder(model, weights), weights


def tokens() -> torch.Tensor:
    return torch.randint(VOCAB_SIZE, (3, 17), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", ["qwen3", "tied"])
def test_in_float64_it_is_the_reference(family: str) -> None:
    decoder, weights = decoder_and_weights(*SHAPES[family])
    _, log_probs = decoder.forward(tokens(), PROMPT, (), torch.float64)
    exact = {name: tensor.double() for name, tensor in weights.items()}
    for row, found in zip(tokens().tolist(), log_probs, strict=True):
        expected = dense_reference.log_probs(decoder.model, exact, row[:PROMPT], row[PROMPT:], 1.0)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)  # its frequencies are float32


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("family", SHAPES)
def test_every_part_alone_in_bf16_rounds_and_all_together_round_more(part: str, family: str) -> None:
    decoder, _ = decoder_and_weights(*SHAPES[family])
    exact = decoder.forward(tokens(), PROMPT, (), torch.float64)[1]

    def error(*low: str) -> float:
        log_probs = decoder.forward(tokens(), PROMPT, low, torch.float32)[1]
        return float((log_probs.double() - exact).square().mean().sqrt())

    assert error() < 1e-5 < error(part) < error(*PARTS) < 0.1


@pytest.mark.parametrize(
    "engine", [pytest.param("local", marks=[]), pytest.param("sglang", marks=pytest.mark.slow)]
)
def test_the_tables_of_an_engine(engine: str, tmp_path: Path) -> None:
    command = [sys.executable, str(TOOLS / "explain_mismatch.py"), "--engine", engine]
    command += ["--sequences", "2", "--prompt", "9", "--response", "5", "--records", str(tmp_path)]
    command += ["policy.model.num_layers=2", "policy.model.hidden_size=64", "policy.model.ffn_hidden_size=96"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / f"mismatch_{engine}.json").read_text())["results"]
    assert results["tokens compared"] == 10 and len(results["layers"]) == 2
    pairs = results["log-probabilities"]
    assert pairs["all parts in fp32 − float64"]["max"] < 1e-4 < pairs["policy − float64"]["max"] < 0.2
    assert sum(row["share of the variance"] for row in results["parts"].values()) == pytest.approx(1)
    # The policy on a CPU rounds where the decoder of parts does: the parts explain all of its error.
    assert pairs["all parts in bf16 − float64"]["rms"] == pytest.approx(
        pairs["policy − float64"]["rms"], rel=0.05
    )
    for row in results["layers"]:
        assert row["policy − engine"] <= row["policy − float64"] + row["engine − float64"]
        assert 1e-4 < row["policy − float64"] < 0.05


def test_a_model_with_experts_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["policy.model.num_moe_experts=4", "--records", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["explain_mismatch.py", *arguments])
    assert explain_mismatch.main() == 2
    expected = (
        "error: policy.model.num_moe_experts is 4, but the parts are those of a dense model; remove it\n"
    )
    assert capsys.readouterr().err == expected and not list(tmp_path.iterdir())
