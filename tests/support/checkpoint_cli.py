"""`opo convert` and `opo export` as subprocesses."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.support.paths import ROOT, TOOLS

CONVERT, EXPORT = TOOLS / "convert_hf_to_megatron.py", TOOLS / "export_megatron_to_hf.py"
RECIPE = """\
run: {dir: unused}
task: {name: lift}
rollout: {max_response_tokens: 24, prompts_per_step: 4, samples_per_prompt: 2}
policy: {max_tokens_per_micro_batch: 256, model: {max_sequence_length: 64}}
warm_start: {steps: 1, batch_size: 4, lr: 1.0e-2}
train: {steps: 1}
eval: {every_steps: 0, problems: 2}
checkpoint: {every_steps: 0}
observe: {tensorboard: false}
"""


def command(*arguments: object, code: int = 0) -> str:
    """Run a command; returns stdout and stderr."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env=environment,
    )
    assert result.returncode == code, result.stdout + result.stderr
    return result.stdout + result.stderr
