"""What a user's mistake looks like: one sentence and exit code 2, never a traceback."""

EXIT_USER_ERROR = 2
EXIT_PREEMPTED = 75
"""EX_TEMPFAIL: the run was told to end before its last step, has saved, and goes on with resume=auto."""

EXIT_HUNG = 76
"""No progress for run.hang_minutes: the run was ended by its watchdog, and goes on with resume=auto."""
EXIT_DIFFERS = 3
"""`opo replay` found that a step is not what it was."""


class UserError(Exception):
    """A mistake that the user can mend.  The message names the thing, its value and the remedy."""


class UnreadableWeights(UserError):
    """Files of weights that are damaged or missing."""

    def __init__(self, reason: str, remedy: str = "download it again") -> None:
        """
        Args:
            remedy: where the files are a published model's; other folders have another.
        """
        super().__init__(f"{reason}; {remedy}")
        self.reason = reason


class SaveError(UserError):
    """A checkpoint that could not be written; those that were there before are as they were."""


class NonFiniteError(UserError):
    """A step with a reward, a loss or a gradient that is not finite, on all ranks; no weight has changed."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"{reason}; {remedy}")
        self.reason, self.remedy = reason, remedy


class OnPolicyError(UserError):
    """A batch that the current weights did not draw, by version or by log-probability."""


class EngineFailure(Exception):
    """A rollout engine that died, hung or broke off: nobody's mistake, and it can be started again."""


class ReplayDiffers(Exception):
    """A step that was done again is not what the run wrote of it; the message names what differs."""


class Preempted(Exception):
    """The run has to end before its last step, on all ranks; the message says why.  Nothing is lost."""
