"""Shared by the pointwise kernels: programs over rows of contiguous elements (``row_layout`` of layout.py)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from msdd_fast.layout import RowLayout, row_layout

BLOCK = 1024
NUM_WARPS = 4


@triton.jit
def row_and_columns(columns: tl.tensor, BLOCK: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """This program's row, int64, and its columns, int64 [BLOCK]. A dense tensor is a single row."""
    blocks = (columns - 1) // BLOCK + 1  # no sum that could leave 32 bits
    i = tl.program_id(0)
    return (i // blocks).to(tl.int64), (i % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)


class Launch(NamedTuple):
    """Grid, layout and compile-time constants for tensors that ``as_rows`` has laid out."""

    grid: tuple[int]
    layout: RowLayout
    options: dict[str, int | bool]


def launch_for(*tensors: Tensor) -> Launch:
    """Blocks of BLOCK elements, fewer if rows are short: eight elements per thread."""
    count = tensors[0].numel()
    layout = row_layout(*tensors) or RowLayout(1, count, (count,) * len(tensors))
    short = layout.rows > 1 and layout.columns < BLOCK
    block = max(256, triton.next_power_of_2(layout.columns)) if short else BLOCK
    grid = (layout.rows * triton.cdiv(layout.columns, block),)
    return Launch(grid, layout, dict(BLOCK=block, num_warps=block // 256, enable_fp_fusion=True))


def result_like(first: Tensor, layout: RowLayout) -> Tensor:
    """Empty and dense, in the memory order of ``first``."""
    return torch.empty_like(first, memory_format=torch.contiguous_format if layout.rows > 1 else torch.preserve_format)
