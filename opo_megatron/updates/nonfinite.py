"""A reward, loss or gradient that is NaN or infinite: rollouts are kept, the step is skipped or the run ends.

All ranks find out alike, before the optimizer step, so the weights stay as they are (as the updates
before it left them, where a batch has several).  A skipped step logs `skipped` = 1 and no other metrics
but those of an evaluation; the next step generates with the same weights and its own seed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from opo_megatron.batch.redistribute import gather_to_rank0
from opo_megatron.errors import NonFiniteError
from opo_megatron.evaluation.evaluate import evaluate, evaluation_is_due
from opo_megatron.run import Run


@contextmanager
def handle_nonfinite(run: Run, step: int) -> Iterator[None]:
    """Wraps OPO step `step`; a collective where it has a non-finite number.

    Raises:
        NonFiniteError: naming the file of the rollouts, where `run.on_bad_numbers` is stop.
    """
    try:
        yield
    except NonFiniteError as error:
        assert run.last_rollouts is not None
        path = run.files.write_nonfinite_batch(step, gather_to_rank0(run.parallel, run.last_rollouts))
        reason = f"step {step}: {error.reason}; its rollouts are in {path}"
        if run.config.run.on_bad_numbers == "stop":
            raise NonFiniteError(reason, error.remedy) from error
        run.display.log(f"warning: {reason}; the step is skipped")
        run.generation.synchronize()
        row = {"step": step, "skipped": 1}
        run.finish_step(row | (evaluate(run) if evaluation_is_due(run.config, step) else {}))
