"""Rules about checkpoints and failures."""

from __future__ import annotations

from opo_megatron.config.schema import Config
from opo_megatron.errors import UserError

VOLATILE = ("time/", "memory/", "throughput/", "run/", "overlap/")
"""Metrics that may differ between identical runs."""


def check_faults(config: Config) -> None:
    """Raise UserError at the first rule that is broken."""
    checkpoint, run = config.checkpoint, config.run
    for key, value in (
        ("checkpoint.every_minutes", checkpoint.every_minutes),
        ("checkpoint.keep_last", checkpoint.keep_last),
        ("run.max_minutes", run.max_minutes),
        ("run.hang_minutes", run.hang_minutes),
    ):
        if value < 0:
            raise UserError(f"{key} is {value:g}; it must be 0 or more, and 0 turns it off")
    if run.on_bad_numbers not in ("stop", "skip"):
        raise UserError(f"run.on_bad_numbers is {run.on_bad_numbers!r}; it must be stop or skip")
    if checkpoint.on_failure not in ("stop", "continue"):
        raise UserError(f"checkpoint.on_failure is {checkpoint.on_failure!r}; it must be stop or continue")
    if checkpoint.keep_best is not None:
        if not checkpoint.keep_best.strip() or checkpoint.keep_best.startswith(VOLATILE):
            raise UserError(
                f"checkpoint.keep_best is {checkpoint.keep_best!r}; it must be a metric of metrics.jsonl "
                f"outside {' '.join(VOLATILE)}, such as eval/accuracy, or null"
            )
        if checkpoint.keep_last == 0:
            raise UserError(
                f"checkpoint.keep_best={checkpoint.keep_best} with checkpoint.keep_last=0, which keeps all; "
                "set checkpoint.keep_last=1 or more"
            )
