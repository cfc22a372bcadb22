"""Two-axis rotary position embedding (docs/spec.md#rope).

A head of size d is d/2 interleaved (even, odd) pairs. The first half of the pairs turns with the row
index, the second half with the column index, both with frequencies base^(-2i/(d/2)), i < d/4. Angles
and the rotation itself are computed in float32; the result is cast back to the input's dtype.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class RopeTable(NamedTuple):
    """cos and sin of the angle of every pair: each float32 (tokens, head_dim / 2).

    ``sin`` is None for the authors' "cosine" variant, which scales q and k by cos(theta) and drops
    the imaginary part of the rotation.
    """

    cos: Tensor
    sin: Tensor | None


def rope_table(
    rows: Tensor,
    cols: Tensor,
    head_dim: int,
    base: float,
    *,
    cosine_only: bool = False,
    frequency_dtype: torch.dtype = torch.float32,
) -> RopeTable:
    """Table for tokens at (rows[i], cols[i]); both float (tokens,).

    ``frequency_dtype=torch.bfloat16`` rounds base^(i/n) and its inverse to bfloat16, as the authors'
    code does for the context under autocast.
    """
    n = head_dim // 4
    exponent = torch.arange(n, device=rows.device, dtype=torch.float32) / n
    freq = 1.0 / (base**exponent).to(frequency_dtype)
    freq = freq.to(torch.float32)
    angle = torch.cat([torch.outer(rows.float(), freq), torch.outer(cols.float(), freq)], dim=1)
    return RopeTable(angle.cos(), None if cosine_only else angle.sin())


def apply_rope(x: Tensor, table: RopeTable) -> Tensor:
    """Rotate (or, in the cosine variant, scale) ``x`` of shape (B, tokens, heads, head_dim)."""
    pairs = x.float().unflatten(-1, (-1, 2))
    even, odd = pairs[..., 0], pairs[..., 1]
    cos = table.cos[:, None]
    if table.sin is None:
        out = torch.stack([even * cos, odd * cos], dim=-1)
    else:
        sin = table.sin[:, None]
        out = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return out.flatten(-2).to(x.dtype)


def image_grid_positions(grid: int, max_grid: int, kind: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column positions of a ``grid`` x ``grid`` patch grid, row-major, in units of the final grid.

    "centered": the middle crop of the ``max_grid`` squared table. "scaled": token i of g sits at
    (i + 0.5) * M / g - 0.5, the centre of the pixels that it covers.
    """
    index = torch.arange(grid, device=device, dtype=torch.float32)
    line = index + (max_grid - grid) // 2 if kind == "centered" else (index + 0.5) * max_grid / grid - 0.5
    return line.repeat_interleave(grid), line.repeat(grid)


def latent_grid_shape(num_tokens: int) -> tuple[int, int]:
    """Rows and columns of the most nearly square grid that holds ``num_tokens`` (128 -> 8 x 16)."""
    rows = max(d for d in range(1, math.isqrt(num_tokens) + 1) if num_tokens % d == 0)
    return rows, num_tokens // rows


def latent_positions(
    num_tokens: int, max_grid: int, kind: str, row: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Row and column positions of the latent tokens.

    "row": token j at (row, j). "grid": token j at the centre of its cell of a grid laid over the image.
    """
    if kind == "row":
        cols = torch.arange(num_tokens, device=device, dtype=torch.float32)
        return torch.full_like(cols, float(row)), cols
    n_rows, n_cols = latent_grid_shape(num_tokens)
    rows = (torch.arange(n_rows, device=device, dtype=torch.float32) + 0.5) * max_grid / n_rows - 0.5
    cols = (torch.arange(n_cols, device=device, dtype=torch.float32) + 0.5) * max_grid / n_cols - 0.5
    return rows.repeat_interleave(n_cols), cols.repeat(n_rows)
