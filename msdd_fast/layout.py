"""How tensors lie in memory: what ops and their native and Triton kernels agree on. Imports nothing of ours."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


def is_token_major(x: Tensor) -> bool:
    """Whether tokens of x (B, N, H, d) lie further apart than images, as in a view of a buffer (N, B, H, d)."""
    return x.shape[0] > 1 and x.stride(1) > x.stride(0)


def attention_result(q: Tensor) -> Tensor:
    """Uninitialised result for queries (B, N, H, d): dense, token-major if q is so, else batch-major."""
    b, n, h, d = q.shape
    if is_token_major(q):
        return q.new_empty(n, b, h, d).transpose(0, 1)
    return q.new_empty(b, n, h, d)


class RowLayout(NamedTuple):
    """Element i, in logical order, of the tensor t lies ``i // columns * strides[t] + i % columns`` elements in."""

    rows: int
    columns: int
    strides: tuple[int, ...]


def row_layout(*tensors: Tensor) -> RowLayout | None:
    """The layout that tensors of one shape have in common, with as few rows as possible; None if there is none."""
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
    """(columns, row stride) of a tensor that is not contiguous; None if it is no rows of contiguous elements."""
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
