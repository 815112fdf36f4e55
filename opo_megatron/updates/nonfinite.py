"""A reward, loss or gradient that is NaN or infinite: the batch is kept, the step skipped or the run ended.

All ranks find out alike, before the optimizer step, so the weights stay as they are (as the updates
before it left them, where a batch has several).  A skipped step has a row with `skipped` = 1 and no other
numbers but those of an evaluation; the next step draws with the same weights and its own seed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from opo_megatron.batch.stats import gather_to_rank0
from opo_megatron.errors import NonFiniteError
from opo_megatron.evaluation.evaluate import evaluate, evaluation_is_due
from opo_megatron.run import Run


@contextmanager
def handle_nonfinite(run: Run, step: int) -> Iterator[None]:
    """Within this context is the OPO step `step`; a collective where it has bad numbers.

    Raises:
        BadNumbers: naming the file of the batch, where `run.on_bad_numbers` is stop.
    """
    try:
        yield
    except NonFiniteError as error:
        assert run.drawn is not None
        path = run.files.write_nonfinite_batch(step, gather_to_rank0(run.parallel, run.drawn))
        reason = f"step {step}: {error.reason}; its rollouts are in {path}"
        if run.config.run.on_bad_numbers == "stop":
            raise NonFiniteError(reason, error.remedy) from error
        run.display.log(f"warning: {reason}; the step is skipped")
        run.synchronize()
        row = {"step": step, "skipped": 1}
        run.finish_step(row | (evaluate(run) if evaluation_is_due(run.config, step) else {}))
