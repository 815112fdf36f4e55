"""A user's estimator, `algorithm.baseline=package.module:function`, and the error for a wrong one.

    def advantages(rewards, lengths, groups) -> n finite numbers

gets three tensors of all n samples of a step: rewards (float64), response lengths in tokens and group
numbers (int64; samples of the same prompt have the same one).  It returns the advantages: a tensor, an array
or a list.  It runs in the training process, once per step on every rank, and must return the same on each:
what one rank raises or returns wrong ends the run on all of them, with one sentence.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from opo_megatron.algorithm.config import is_own
from opo_megatron.distributed.process_groups import Parallel, all_gather_objects
from opo_megatron.errors import UserError
from opo_megatron.tasks.user_verifier import (
    described,
    leave_forks,
    load_named,
    source_hash,
)


def load_estimator(baseline: str) -> UserEstimator | None:
    """The function that `algorithm.baseline` names; None for a preset.

    Raises:
        UserError: for a function that cannot be loaded.
    """
    return UserEstimator(baseline) if is_own(baseline) else None


class UserEstimator:
    """A user's function, with its errors as sentences."""

    def __init__(self, path: str) -> None:
        self.path = path
        advice = (
            "it must be a function in a module in {folder} or on PYTHONPATH, as in examples/advantages.py"
        )
        self._function = load_named("algorithm.baseline", path, advice)

    @property
    def fingerprint(self) -> dict[str, str]:
        """The hash of the function's source: a resumed run must have the same."""
        source = source_hash(self.path, self._function)
        return {} if source is None else {"algorithm.baseline": source}

    def __call__(self, parallel: Parallel, rewards: Tensor, lengths: Tensor, groups: Tensor) -> Tensor:
        """[n] float64 advantages; a collective of all ranks.

        Raises:
            UserError: on all ranks, for an exception or a wrong result on one of them, or different results.
        """
        found = self._call(rewards.clone(), lengths.clone(), groups.clone())
        failed = found if isinstance(found, str) else None
        gathered = all_gather_objects(parallel, (failed, None if isinstance(found, str) else found.tolist()))
        for error, _ in gathered:
            if error is not None:
                raise UserError(f"algorithm.baseline={self.path} {error}; correct it")
        if any(values != gathered[0][1] for _, values in gathered):
            raise UserError(
                f"algorithm.baseline={self.path} returned other advantages on another rank; it must be a "
                "function of its arguments alone"
            )
        assert not isinstance(found, str)
        return found

    def _call(self, rewards: Tensor, lengths: Tensor, groups: Tensor) -> Tensor | str:
        """The advantages, or what is wrong in words."""
        own_pid, result = os.getpid(), None
        try:
            result = self._function(rewards, lengths, groups)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a user's function may raise anything, SystemExit included
            return f"raised {described(error)}"
        finally:
            leave_forks(own_pid)
        expected = f"it must be {len(rewards)} finite numbers, one per sample"
        try:
            values = torch.as_tensor(result, dtype=torch.float64).detach().cpu().clone()
        except BaseException as error:  # the conversion runs the result's own code
            return f"returned {type(result).__name__} ({described(error)}), but {expected}"
        if values.shape != rewards.shape:
            return f"returned {type(result).__name__} of shape {list(values.shape)}, but {expected}"
        wrong = (~torch.isfinite(values)).nonzero()
        if len(wrong):
            return f"returned {float(values[wrong[0]])} for sample {int(wrong[0])}, but {expected}"
        return values
