"""What a user's mistake looks like: one sentence and exit code 2, never a traceback."""

EXIT_USER_ERROR = 2


class UserError(Exception):
    """A mistake that the user can mend.  The message names the thing, its value and the remedy."""


class OnPolicyError(UserError):
    """A batch that the current weights did not draw, by version or by log-probability."""
