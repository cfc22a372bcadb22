"""How tensors lie in memory: what ops, native functions and Triton kernels agree on. Imports nothing of ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# --- Dense tensors: contiguous, or channels-last if they have four dimensions. ---


def memory_order(x: Tensor) -> torch.memory_format:
    """channels_last for a tensor (B, C, H, W) that is so and is not contiguous, else contiguous_format."""
    last = x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def dense(x: Tensor) -> Tensor:
    """``x`` if it is contiguous or channels-last, else a contiguous copy."""
    return x.contiguous(memory_format=memory_order(x))


def dense_like(y: Tensor, x: Tensor) -> Tensor:
    """``y`` in the memory order of the dense tensor ``x``; copied only if it differs."""
    return y.contiguous(memory_format=memory_order(x))


# --- Rows of contiguous elements: how pointwise kernels read slices such as ``v[:, :batch]`` in place. ---


class RowLayout(NamedTuple):
    """Element i, in logical order, of tensor t is at offset ``i // columns * strides[t] + i % columns``."""

    rows: int
    columns: int
    strides: tuple[int, ...]


def row_layout(*tensors: Tensor) -> RowLayout | None:
    """The layout, with as few rows as possible, that tensors of one shape share; None if there is none."""
    count = tensors[0].numel()
    found = [layout for t in tensors if (layout := (count, count) if t.is_contiguous() else _rows_of(t))]
    if len(found) < len(tensors):
        return None
    columns = min(found)[0]
    if any(c not in (columns, count) for c, _ in found):
        return None
    strides = tuple(columns if c == count else stride for c, stride in found)
    return RowLayout(count // columns if columns else 1, columns, strides)


def _rows_of(t: Tensor) -> tuple[int, int] | None:
    """(columns, row stride) of a tensor that is not contiguous; None if it is not rows of contiguous elements."""
    dims = [(size, stride) for size, stride in zip(t.shape, t.stride(), strict=True) if size != 1]
    columns = 1
    while dims and dims[-1][1] == columns:
        columns *= dims.pop()[0]
    row_stride = dims[-1][1]
    rows = 1
    for size, stride in reversed(dims):
        if stride != rows * row_stride:
            return None
        rows *= size
    return (columns, row_stride) if columns > 1 else None


def as_rows(first: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """The tensors themselves if they share a ``row_layout``, else dense ones in the memory order of the first."""
    if row_layout(first, *others) is not None:
        return first, *others
    first = dense(first)
    return first, *(dense_like(t, first) for t in others)


def with_contiguous_rows(x: Tensor) -> Tensor:
    """``x`` if its last dimension is contiguous, whatever the other strides, else a contiguous copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def channels_last(x: Tensor) -> Tensor:
    """A map (B, C, H, W), copied only if it lies otherwise."""
    return x.contiguous(memory_format=torch.channels_last)


def flat_rows(x: Tensor) -> Tensor:
    """``x`` (*, I) as (R, I) with adjacent elements in a row; copies only what strides cannot express."""
    x = x if x.ndim == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


# --- Tables (G, D): every row of x (R, D) takes one entry. R / G rows share one; ``split`` cuts the rows in two. ---


def expand_rows(table: Tensor, rows: int, split: int | None) -> Tensor:
    """(G, 1, D), to broadcast over x as (G, rows / G, D); with ``split`` one entry for every row, (rows, 1, D)."""
    if split is not None:
        table = table.repeat_interleave(table.new_tensor([split, rows - split]).long(), dim=0, output_size=rows)
    return table[:, None]


def rows_per_entry(tables: Sequence[Tensor], rows: int, split: int | None) -> tuple[list[Tensor], int]:
    """Tables with contiguous rows, and ``run``: row r of x takes entry min(r // run, G - 1)."""
    if split == 0:
        tables, split = [t[1:] for t in tables], None
    run = rows // max(1, len(tables[0])) if split is None else split
    return [t if t.stride(-1) == 1 else t.contiguous() for t in tables], max(1, run)


# --- Attention: (B, N, heads, head size), batch-major or, as a view of (N, B, heads, head size), token-major. ---


def is_token_major(x: Tensor) -> bool:
    """Whether tokens of x (B, N, ...) lie further apart than images; False if there is one token or one image."""
    return x.shape[0] > 1 and x.shape[1] > 1 and x.stride(1) > x.stride(0)


def empty_tokens(x: Tensor, *inner: int) -> Tensor:
    """Uninitialised (B, N, *inner), dense in the order of x (B, N, ...): token-major if x is, else batch-major."""
    b, n = x.shape[:2]
    return x.new_empty(n, b, *inner).transpose(0, 1) if is_token_major(x) else x.new_empty(b, n, *inner)


def attention_result(q: Tensor) -> Tensor:
    """Uninitialised result of attention for queries (B, N, heads, head size), in the order of q."""
    return empty_tokens(q, *q.shape[2:])


def like_layout(out: Tensor, q: Tensor) -> Tensor:
    """``out`` (B, N, ...), dense in the order of q; copied only if it is not."""
    return out.transpose(0, 1).contiguous().transpose(0, 1) if is_token_major(q) else out.contiguous()
