"""Exact mode as on a GPU, in Triton's interpreter: policy and a real server compute by the same kernels.

In float32: the interpreter has no products of bfloat16.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.fixtures import RECIPE
from tests.support.servers import ROOT, sglang_python
from tests.support.tiny_run import rows

LIMIT = 1500
pytestmark = [pytest.mark.slow, pytest.mark.timeout(LIMIT + 100)]

SETTINGS = (
    *("rollout.sglang.exact=true", "on_policy.tolerance=0", "policy.device=cpu", "policy.model.num_layers=2"),
    *("policy.model.hidden_size=32", "policy.model.ffn_hidden_size=48", "policy.model.num_attention_heads=4"),
    *("policy.model.num_query_groups=2", "policy.model.kv_channels=16", "warm_start.steps=0"),
    *("train.steps=1", "rollout.prompts_per_step=2", "rollout.samples_per_prompt=2", "eval.problems=2"),
    *("eval.every_steps=0", "observe.kl=off", "observe.tensorboard=false", "rollout.max_response_tokens=8"),
    *("rollout.sglang.options.chunked_prefill_size=32", "rollout.sglang.options.log_level=info"),
)


@pytest.mark.parametrize(
    "settings",
    [
        ("policy.packing=thd", "rollout.temperature=0.8"),
        ("policy.packing=padded", "policy.exact_sum_parts=2"),
    ],
    ids=" ".join,
)
def test_a_run_whose_policy_and_server_take_the_kernels_has_no_difference(
    settings: tuple[str, ...], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    argv = [sys.executable, "-m", "opo_megatron", "train", str(RECIPE.with_name("quickstart_sglang.yaml"))]
    argv += [f"run.dir={run_dir}", f"rollout.sglang.python={sglang_python()}", *SETTINGS, *settings]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OPO_EXACT_TRITON": "1"}
    done = subprocess.run(
        argv, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "log-probabilities of engine and policy are equal bit for bit" in done.stdout + done.stderr
    assert [row["on_policy/logprob_diff_max"] for row in rows(run_dir)[1:]] == [0.0]


NAMES = """
import runpy, sys
runpy.run_path(sys.argv[1])
from opo_megatron.rollout.sglang.exact_server.attention import GPU_NAME, NAME
from opo_megatron.rollout.sglang.exact_server.slot_attention import AttentionBackend, SlotAttention
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.layers.sampler import _CUSTOM_SAMPLER_FACTORIES
from opo_megatron.rollout.sglang.exact_server import sampler
hooks = {name for name, member in vars(SlotAttention).items() if callable(member) and name[0] != "_"}
print(*sorted(hooks - set(dir(AttentionBackend))))
print(ATTENTION_BACKENDS[NAME].__name__, ATTENTION_BACKENDS[GPU_NAME].__name__, *_CUSTOM_SAMPLER_FACTORIES)
"""


def test_the_hooks_of_the_backend_are_those_of_the_installed_sglang() -> None:
    serve = ROOT / "opo_megatron" / "rollout" / "sglang" / "serve.py"
    argv = [sglang_python(), "-c", NAMES, str(serve)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=LIMIT, check=True)
    assert done.stdout.splitlines()[-2:] == ["use_graphs", "backend backend pytorch"]
