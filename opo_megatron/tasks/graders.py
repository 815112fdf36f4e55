"""Graders: what turns responses into rewards, in this process, in worker processes, or in a service.

A user's code runs in worker processes, unless `task.verifier_in_process=true`: there it can neither end nor
block the run, and sees no keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from opo_megatron.config.schema import TaskConfig
from opo_megatron.errors import UserError
from opo_megatron.tasks.base import Prompt
from opo_megatron.tasks.reward_service import SCHEMES, RewardService
from opo_megatron.tasks.user_verifier import (
    Job,
    Reply,
    call,
    load_named,
    source_hash,
)
from opo_megatron.tasks.verifiers import MATH, MATH_STRICT, Verifier, exact, number, regex
from opo_megatron.tasks.worker_pool import UNKNOWN, WorkerPool, verifier_error
from opo_megatron.utils.extras import require_extra

IN_BOX = (MATH, MATH_STRICT)
"""Verifiers whose gold answer is the last box of a reference solution."""


class Submission(NamedTuple):
    """A response to a problem."""

    prompt: Prompt
    response: str


class Backend(Protocol):
    """Grades jobs, which are the verifier's arguments; None is a job that could not be graded."""

    def start(self) -> None: ...

    def grade(self, jobs: Sequence[Job]) -> list[float | None]: ...

    def close(self) -> None: ...


class Grader:
    """The verifier of a recipe."""

    def __init__(self, config: TaskConfig) -> None:
        """
        Raises:
            UserError: for an unknown name, or a regex without its pattern.
        """
        self._backend = _open_backend(config)
        self._job = _math_job if config.verifier in IN_BOX else _text_job

    def start(self) -> None:
        """Start what grading needs.

        Raises:
            UserError: where the verifier cannot be loaded or reached.
        """
        self._backend.start()

    def grade(self, submissions: Sequence[Submission]) -> list[float | None]:
        """Reward of each response; None where it could not be graded.

        Raises:
            UserError: for a mistake of the verifier.
        """
        return self._backend.grade([self._job(one) for one in submissions])

    @property
    def fingerprint(self) -> dict[str, str]:
        """The hash of the source of a user's verifier, once it is started."""
        source = getattr(self._backend, "source", None)
        return {} if source in (None, UNKNOWN) else {"task.verifier": source}

    def close(self) -> None:
        self._backend.close()


def _math_job(submission: Submission) -> Job:
    return submission.response, submission.prompt.answer, submission.prompt.context


def _text_job(submission: Submission) -> Job:
    return submission.prompt.text, submission.response, submission.prompt.answer


def _open_backend(config: TaskConfig) -> Backend:
    name = config.verifier
    if name in ("exact", "number"):
        return InProcess(name, {"exact": exact, "number": number}[name], config.verifier_seconds)
    if name == "regex":
        if config.verifier_pattern is None:
            raise UserError("task.verifier=regex needs task.verifier_pattern; give the regular expression")
        return InProcess(name, regex(config.verifier_pattern), config.verifier_seconds)
    if name.startswith(SCHEMES):
        return RewardService(config)
    if name not in IN_BOX:
        module, _, function = name.partition(":")
        if not module or not function:
            raise UserError(
                f"task.verifier={name!r} is unknown; choose exact, number, regex, math, math_strict, "
                "package.module:function or http://host:port/path"
            )
        if config.verifier_in_process:
            return UserInProcess(name, config.verifier_seconds)
    if name == MATH_STRICT:
        require_extra("math_verify", "task.verifier=math_strict", "math")
    limits = config.verifier_seconds, config.verifier_memory_mib, config.verifier_batch
    return WorkerPool(config.verifier_workers, *limits, grader=name)


class InProcess:
    """A verifier in this process, without limits."""

    def __init__(self, name: str, verify: Verifier | Callable[..., object], seconds: float) -> None:
        self._name, self._verify, self._seconds = name, verify, seconds

    def start(self) -> None:
        pass

    def grade(self, jobs: Sequence[Job]) -> list[float | None]:
        replies: list[Reply] = [None] * len(jobs)
        call(self._verify, jobs, self._seconds, replies.__setitem__, never_caught=(KeyboardInterrupt,))
        for job, reply in zip(jobs, replies, strict=True):
            if isinstance(reply, dict):
                raise verifier_error(self._name, reply["error"], job)
        return replies  # type: ignore[return-value]

    def close(self) -> None:
        pass


class UserInProcess(InProcess):
    """A user's verifier in this process."""

    def __init__(self, path: str, seconds: float) -> None:
        advice = "check the name; modules are searched in {folder} and on PYTHONPATH"
        function = load_named("task.verifier", path, advice)
        super().__init__(path, function, seconds)
        self.source = source_hash(path, function)
