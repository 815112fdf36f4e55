"""Exceptions and exit codes.  A user error is one sentence and exit code 2, never a traceback."""

EXIT_FAILED = 1
"""An error with a traceback, or a process that somebody's call of exit ended."""
EXIT_USER_ERROR = 2
EXIT_PREEMPTED = 75
"""EX_TEMPFAIL: the run stopped before its last step and saved; resume=auto resumes it."""

EXIT_HUNG = 76
"""No progress for run.hang_minutes: the watchdog ended the run; resume=auto resumes it."""
EXIT_DIFFERS = 3
"""`opo replay`: the step differs from the recorded one."""
EXIT_INTERRUPTED = 130


class UserError(Exception):
    """A mistake that the user can fix.  The message names the thing, its value and the remedy."""


class UnreadableWeights(UserError):
    """Weight files that are damaged or missing."""

    def __init__(self, reason: str, remedy: str = "download it again") -> None:
        """
        Args:
            remedy: for files of a published model.
        """
        super().__init__(f"{reason}; {remedy}")
        self.reason = reason


class SaveError(UserError):
    """A checkpoint could not be written; earlier checkpoints are unchanged."""


class NonFiniteError(UserError):
    """A non-finite reward, loss or gradient; raised on all ranks, before any weight changes."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"{reason}; {remedy}")
        self.reason, self.remedy = reason, remedy


class OnPolicyError(UserError):
    """Rollouts that were not sampled from the current weights, by version or log-probability."""


class EngineFailure(Exception):
    """A rollout engine died, hung or closed a connection; it can be restarted."""


class ReplayDiffers(Exception):
    """A replayed step differs from the recorded one; the message names the difference."""


class Preempted(Exception):
    """The run has to stop before its last step, raised on all ranks; the message is the reason."""


class OpoWarning(UserWarning):
    """A warning of this package; those of imported packages are not shown."""
