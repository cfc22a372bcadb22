"""Patch rows: how a state or a velocity travels through the engine.

(N, B, C*p*p), token-major: N = (H/p)*(W/p) patches row by row, B images, features in (c, py, px) order, as the patch
embedding's convolution reads them. H = W.
"""

from __future__ import annotations

import math

from torch import Tensor


def patchify(image: Tensor, patch_size: int) -> Tensor:
    """(B, C, H, H) -> contiguous (N, B, C*p*p)."""
    batch, channels, height, width = image.shape
    p = patch_size
    x = image.reshape(batch, channels, height // p, p, width // p, p)
    return x.permute(2, 4, 0, 1, 3, 5).reshape(height // p * (width // p), batch, channels * p * p)


def unpatchify_rows(rows: Tensor, patch_size: int) -> Tensor:
    """(N, B, C*p*p), N a square number -> contiguous (B, C, H, H)."""
    count, batch, features = rows.shape
    p, grid = patch_size, math.isqrt(count)
    channels = features // (p * p)
    x = rows.reshape(grid, grid, batch, channels, p, p)
    return x.permute(2, 3, 0, 4, 1, 5).reshape(batch, channels, grid * p, grid * p)
