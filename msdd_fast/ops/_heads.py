"""Memory order of attention tensors (B, N, heads, head size)."""

from __future__ import annotations

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
