"""A user's verifier: how it is found and called, what it may return, and what is said of what it raises.

    def reward(prompt, response, answer) -> float                  one response async def reward(prompt,
    response, answer) -> float            many at the same time def reward(prompts, responses, answers) ->
    list                a batch, also `async`; None is the default reward

Which of them it is, is told by `async` and by the name of its first parameter.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from opo_megatron.errors import UserError
from opo_megatron.utils.start_folder import start_folder

Mode = Literal["each", "async", "batch"]
Job = Sequence[str]
"""The arguments of the verifier: prompt, response, answer."""
Reply = float | None | dict[str, str]
"""A reward, None for the default reward, or {"error": words}."""
BATCH = "prompts"
"""The first parameter of a verifier that grades a batch."""


class NotANumber(ValueError):
    """A verifier returned something else than a finite number."""


def make_importable() -> Path:
    """Let imports find the folder that the command was started in, which this returns."""
    folder = start_folder()
    if str(folder) not in sys.path:  # `python -m` searches it, the command `opo` does not
        sys.path.append(str(folder))
    return folder


def load_function(path: str) -> Callable[..., Any]:
    """The function `package.module:function`; importing it may raise anything."""
    module, _, name = path.partition(":")
    function = getattr(importlib.import_module(module), name)
    if not callable(function):
        raise TypeError(f"{name} is not a function")
    return function  # type: ignore[no-any-return]


def load_named(key: str, path: str, advice: str) -> Callable[..., Any]:
    """The function that a recipe's key names.

    Args:
        advice: what to do where it cannot be loaded; `{folder}` is where modules are searched.

    Raises:
        UserError: whatever importing it raises.
    """
    folder = make_importable()
    try:
        return load_function(path)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a user's module may raise anything
        raise UserError(
            f"{key}={path} cannot be loaded: {described(error)}; {advice.format(folder=folder)}"
        ) from error


def source_hash(path: str, function: Any) -> str | None:
    """The hash of the files of `package.module` and of what it names there; None where there are none.

    What these import is not covered.
    """
    files = [getattr(sys.modules.get(path.partition(":")[0]), "__file__", None)]
    for written in (inspect.unwrap(function) if callable(function) else function, type(function)):
        with suppress(TypeError, OSError):  # a builtin, or an object such as functools.partial
            files.append(inspect.getsourcefile(written))
            break
    found = [Path(file).read_bytes() for file in dict.fromkeys(files) if file and Path(file).is_file()]
    return hashlib.sha256(b"\0".join(found)).hexdigest() if found else None


def call_mode(function: Callable[..., Any]) -> Mode:
    """How a verifier is called."""
    try:
        first = next(iter(inspect.signature(function).parameters), "")
    except (TypeError, ValueError):  # a builtin
        first = ""
    if first == BATCH:
        return "batch"
    is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
    return "async" if is_async else "each"


def call(
    function: Callable[..., Any],
    jobs: Sequence[Job],
    seconds: float,
    send: Callable[[int, Reply], None],
    never_caught: tuple[type[BaseException], ...] = (),
) -> None:
    """Grade jobs; `send` gets the index and the reply of each, whatever the verifier raises.

    Args:
        seconds: limit of an asynchronous job.
        never_caught: what is not the verifier's.
    """
    mode, own_pid = call_mode(function), os.getpid()

    def send_from_here(index: int, reply: Reply) -> None:
        leave_forks(own_pid)
        send(index, reply)

    if mode == "async":
        asyncio.run(_call_concurrently(function, jobs, seconds, send_from_here, never_caught))
    elif mode == "batch":
        for index, reply in enumerate(_call_batch(function, jobs, never_caught)):
            send_from_here(index, reply)
    else:
        for index, job in enumerate(jobs):
            send_from_here(index, _call_one(function, job, never_caught))


def leave_forks(own_pid: int) -> None:
    """End a process that users' code forked, and in which it returned: it would go on as a second run."""
    if os.getpid() != own_pid:
        os._exit(0)


def _call_one(function: Callable[..., Any], job: Job, never_caught: tuple[type[BaseException], ...]) -> Reply:
    try:
        return as_reward(function(*job))
    except never_caught:
        raise
    except BaseException as error:  # a user's function may raise anything
        return failure(error)


def _call_batch(
    function: Callable[..., Any], jobs: Sequence[Job], never_caught: tuple[type[BaseException], ...]
) -> Sequence[Reply]:
    try:
        rewards = function(*(list(column) for column in zip(*jobs, strict=True)))
        rewards = asyncio.run(_awaited(rewards)) if inspect.isawaitable(rewards) else rewards
        if isinstance(rewards, Mapping | Set | str | bytes):
            raise NotANumber(f"returned {rewards!r:.60} for a batch, which is no list")
        rewards = list(rewards)
        if len(rewards) != len(jobs):
            raise NotANumber(f"returned {len(rewards)} rewards for {len(jobs)} responses")
        return [None if reward is None else as_reward(reward) for reward in rewards]
    except never_caught:
        raise
    except BaseException as error:  # a user's function may raise anything
        return [failure(error)] * len(jobs)


async def _awaited(value: Any) -> Any:
    return await value


async def _call_concurrently(
    function: Callable[..., Any],
    jobs: Sequence[Job],
    seconds: float,
    send: Callable[[int, Reply], None],
    never_caught: tuple[type[BaseException], ...],
) -> None:
    async def one(index: int) -> None:
        reply: Reply
        limit = asyncio.timeout(seconds)
        try:
            async with limit:
                reply = as_reward(await function(*jobs[index]))
        except never_caught:
            raise
        except TimeoutError as error:  # its own, unless the limit was reached
            reply = None if limit.expired() else failure(error)
        except BaseException as error:  # a user's function may raise anything
            reply = failure(error)
        send(index, reply)

    await asyncio.gather(*map(one, range(len(jobs))))


def as_reward(value: Any) -> float:
    """The number that a verifier returned.

    Raises:
        NotANumber: for what is not a finite number; text is not a number.
    """
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise NotANumber(f"returned {value!r:.60}")
    return number


def failure(error: BaseException) -> Reply:
    """The reply for an error: running out of memory is the response's fault, all else is the verifier's."""
    if isinstance(error, MemoryError):
        return None
    return {"error": str(error) if isinstance(error, NotANumber) else f"raised {described(error)}"}


def described(error: BaseException) -> str:
    """The error in a few words, of one line."""
    try:
        words = " ".join(str(error).split())[:200]
    except BaseException:  # its __str__ is a user's code as well
        words = "no text"
    return f"{type(error).__name__} ({words})" if words else type(error).__name__
