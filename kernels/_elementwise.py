"""What the pointwise kernels share: a flat grid over tensors of one shape and one dense memory order."""

from __future__ import annotations

import triton
from torch import Tensor

BLOCK = 1024
NUM_WARPS = 4


def flat_grid(x: Tensor) -> tuple[int]:
    """Programs of BLOCK elements that cover ``x``."""
    return (triton.cdiv(x.numel(), BLOCK),)
