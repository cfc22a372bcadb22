"""Shared by the two halves of the pixel block: the modulation, for a few tokens at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor

CHUNK_BYTES = 64 << 20  # of the modulation: it is read while much of it is still in the L2 cache


def modulation_chunks(s: Tensor, weight: Tensor, bias: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Tokens, and s W^T + b of these tokens, a matrix product of the library's, at most CHUNK_BYTES (or one token)."""
    rows = max(1, CHUNK_BYTES // max(1, len(weight) * s.element_size()))
    for begin in range(0, len(s), rows):
        tokens = slice(begin, min(begin + rows, len(s)))
        yield tokens, F.linear(s[tokens], weight, bias)
