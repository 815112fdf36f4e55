"""What saves: when a checkpoint is due, the one being written, and how a run stops before its last step.

A checkpoint is written in the background and gets its name when it is complete, at the latest before the next
one starts; the last one of a stage, and the one before a stop, are waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from opo_megatron.checkpoint.kept_rollouts import KeptRollouts
from opo_megatron.checkpoint.progress import RunProgress
from opo_megatron.checkpoint.retention import Retention
from opo_megatron.checkpoint.save import PendingCheckpoint
from opo_megatron.config import Config
from opo_megatron.errors import Preempted, SaveError
from opo_megatron.policy.policy import Policy
from opo_megatron.resilience.stop import StopRequest
from opo_megatron.utils.start_folder import absolute


@dataclass(kw_only=True)
class CheckpointSaver:
    """Checkpoints of one run; methods that save are collectives of all ranks."""

    config: Config
    policy: Policy
    state: dict[str, Any]
    """What estimators remember beyond the weights, name → JSON value: part of every checkpoint."""
    kept: KeptRollouts = field(default_factory=KeptRollouts)
    """Rollouts that later steps train on: part of every checkpoint."""
    retention: Retention
    stop: StopRequest
    memory_for_saving: Callable[[], AbstractContextManager[None]]
    """Within it the policy's memory is complete."""
    is_writer: bool
    """Whether this rank deletes old checkpoints."""
    enter_phase: Callable[[str], None]
    """Tells the watchdog."""
    log: Callable[[str], None]
    show_status: Callable[[str], None]
    saved: RunProgress | None = None
    """The last checkpoint, of this attempt or the one it resumed from."""
    pending: PendingCheckpoint | None = field(default=None, init=False)
    """The checkpoint being written."""

    def save_or_stop(self, progress: RunProgress, last: int, metrics: dict[str, Any]) -> None:
        """Save where it is due; where any rank was told to stop, save and stop.

        Args:
            last: the last step of this stage.
            metrics: of the finished step, by which the best checkpoint is found.

        Raises:
            Preempted: on all ranks, once everything is saved.
        """
        is_writing = self.pending is not None and not self.pending.is_written()
        flags = (self.retention.minutes_are_over(), is_writing)
        reason, (minutes_are_over, any_is_writing) = self.stop.agree(*flags)
        if self.pending is not None and not any_is_writing:
            self._complete_pending()
        has_weights = progress.step > 0
        is_best = has_weights and self.retention.note_best(metrics, progress)
        is_done = progress.phase == "step" and progress.step >= last
        if has_weights and self.retention.is_due(progress.step, last, minutes_are_over, is_best):
            self._save(progress, must_succeed=progress.step == last)
        if reason is not None and not is_done:
            self.save_before_stopping(progress)
            raise Preempted(reason)

    def save_before_stopping(self, progress: RunProgress) -> None:
        """Save `progress`, unless that is the last checkpoint already."""
        self._complete_pending()
        if progress.step > 0 and progress != self.saved:
            self._save(progress, must_succeed=True)

    def cancel_pending(self) -> None:
        """Give up the checkpoint being written, where the run has failed."""
        if self.pending is not None:
            self.pending.cancel()

    def _save(self, progress: RunProgress, must_succeed: bool) -> None:
        """Start a checkpoint once the one before it is complete; what must succeed is waited for."""
        self._complete_pending()
        self.enter_phase("checkpoint")
        self.show_status(f"saving {progress.folder}")
        in_background = self.config.checkpoint.asynchronous and not must_succeed
        with self._tolerated_failure(progress, must_succeed):
            with self.memory_for_saving():
                self.pending = PendingCheckpoint(
                    self.policy, self.config, progress, self.state, in_background, self.kept
                )
            if not in_background:
                self._complete_pending(must_succeed)

    def _complete_pending(self, must_succeed: bool = False) -> None:
        """Wait for the checkpoint being written and give it its name."""
        if self.pending is None:
            return
        pending, self.pending = self.pending, None
        with self._tolerated_failure(pending.progress, must_succeed):
            pending.complete()
            self.saved = pending.progress
            self.retention.saved(absolute(self.config.run.dir), self.is_writer)

    @contextmanager
    def _tolerated_failure(self, progress: RunProgress, must_succeed: bool) -> Iterator[None]:
        try:
            yield
        except SaveError as error:
            if must_succeed or self.config.checkpoint.on_failure == "stop":
                raise
            self.retention.failed(progress)
            self.log(f"warning: {error}; the run continues without it")
