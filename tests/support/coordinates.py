"""The coordinates of a rank under any parallel layout, without processes."""

from __future__ import annotations

from dataclasses import fields

import torch

from opo_megatron.distributed.process_groups import Parallel


def parallel_of(**coordinates: int) -> Parallel:
    ones = {f.name: 1 if f.name.endswith("size") else 0 for f in fields(Parallel) if f.type == "int"}
    groups = {f.name: None for f in fields(Parallel) if f.name.endswith("group")}
    return Parallel(device=torch.device("cpu"), **{**ones, **coordinates}, **groups)
