"""Digests of an operation's output, to find the first operation that two processes compute differently.

The digest of a row is a hash of its bits; that of several rows is the sum mod 2⁶⁴, whatever their order and
however they were split into batches or over ranks.

SGLang's process loads this file in exact mode, so it needs nothing but torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opo_megatron.utils.hashing import GOLDEN, mix_tensor, signed

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def row_digests(x: Tensor) -> Tensor:
    """[n, …] → signed 64-bit digest of each row [n]."""
    rows = x.detach().flatten(1).contiguous()
    bits = rows.view(_INTEGERS[rows.dtype.itemsize]).long()
    positions = torch.arange(1, bits.shape[1] + 1, device=bits.device) * signed(GOLDEN)
    return mix_tensor(mix_tensor(bits + positions).sum(1))
