"""What a user's mistake looks like: one sentence and exit code 2, never a traceback."""

EXIT_USER_ERROR = 2


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


class OnPolicyError(UserError):
    """A batch that the current weights did not draw, by version or by log-probability."""


class EngineFailure(Exception):
    """A rollout engine that died, hung or broke off: nobody's mistake, and it can be started again."""
