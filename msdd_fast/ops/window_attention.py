"""window_attention: every pixel attends to a square window round it, with a bias by displacement
(docs/spec.md#ssdd-network).

    logits = q k^T / sqrt(d) + table[qy - ky + w - 1, qx - kx + w - 1, head]     where |qy - ky| < w and |qx - kx| < w
    out = softmax(logits) v        per image and head; keys outside the window count for nothing

q, k, v (B, N, heads, d), N = height * width tokens row by row, one dtype: float32, bfloat16 or float16; strides as they
come, so views of one packed buffer cost no copy. table (2w - 1, 2w - 1, heads), any float dtype and strides. out is
(B, N, heads, d), dense in q's memory order (``attention``). Under autocast q, k and v are cast to its dtype.

The eager reference is the paper's dense one: float32 softmax over all N keys with logits of -1e7 outside the window,
which a query that sees itself turns into weights of exactly zero. It needs B heads N^2 floats. sdpa is
F.scaled_dot_product_attention with the bias as a mask, heads N^2 numbers, and rounds it to the dtype. Both are
differentiable, and training takes sdpa.
The kernels never form a logit outside the window (cpu) or the window of a tile of queries (triton) and need no memory
but for their result. float32 inside, rounded once; triton rounds the weights to the dtype too, as every flash attention
does.

Moves 4 B N heads d elements; 4 B N heads d s FLOP with s <= (2w - 1)^2 keys seen, a mean of s = (w (2 H - w + 1) - H)
(w (2 W - w + 1) - W) / (H W) on a grid (H, W) of at least w.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from msdd_fast import native
from msdd_fast.backends.choice import Verdict
from msdd_fast.backends.sdpa import SDPA
from msdd_fast.backends.triton import TRITON
from msdd_fast.errors import InputError
from msdd_fast.layout import attention_result, like_layout
from msdd_fast.ops._checks import FLOAT_DTYPES, check_device, check_float, check_floating
from msdd_fast.ops._example import normals
from msdd_fast.ops._heads import cast_for_autocast, without_autocast
from msdd_fast.ops._native import register_native
from msdd_fast.ops._registry import Op

# What a key outside the window adds to its logit: finite, so that no row can become NaN.
OUTSIDE = -1e7
MAX_HEAD_SIZE = 128
MAX_WINDOW = 64


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, height: int, width: int, *, backend: str | None = None
) -> Tensor:
    """Attention over the window of each pixel.

    Args:
        q, k, v: (B, height * width, heads, d).
        table: (2w - 1, 2w - 1, heads), which says the window w.
        height, width: of the grid.

    Raises InputError for anything else.
    """
    check_float("q", q)
    q, k, v = cast_for_autocast(q, k, v)
    if torch._C._get_tracing_state() is not None:  # torch.jit.trace makes tensors of sizes
        height, width = int(height), int(width)
    for name, size in (("height", height), ("width", width)):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise InputError(f"{name} must be an int >= 1, got {size!r}")
    if q.ndim != 4 or q.shape[3] == 0 or q.shape[1] != height * width:
        raise InputError(f"q must be a tensor (B, {height * width}, heads, head size), got {tuple(q.shape)}")
    for name, x in (("k", k), ("v", v)):
        check_float(name, x)
        check_device(name, x, "q", q)
        if x.dtype != q.dtype:
            raise InputError(f"{name} must have the dtype of q, {q.dtype}, got {x.dtype}")
        if x.shape != q.shape:
            raise InputError(f"{name} must have the shape of q, {tuple(q.shape)}, got {tuple(x.shape)}")
    check_floating("table", table)
    check_device("table", table, "q", q)
    if table.ndim != 3 or table.shape[0] != table.shape[1] or table.shape[0] % 2 == 0 or table.shape[2] != q.shape[2]:
        raise InputError(f"table must be (2w - 1, 2w - 1, {q.shape[2]}), got {tuple(table.shape)}")
    out: Tensor = OP(q, k, v, table, height, width, backend=backend)
    return out


def window_attention_eager(q: Tensor, k: Tensor, v: Tensor, table: Tensor, height: int, width: int) -> Tensor:
    """Reference: plain torch, dense, float32 throughout."""
    q32, k32, v32 = (x.transpose(1, 2).float() for x in (q, k, v))
    with without_autocast(q):
        bias = dense_bias(table.float(), height, width)
        weights = (q32 @ k32.transpose(2, 3) * q.shape[3] ** -0.5 + bias).softmax(dim=-1)
        out = (weights @ v32).transpose(1, 2).to(q.dtype)
    return like_layout(out, q)


def dense_bias(table: Tensor, height: int, width: int) -> Tensor:
    """(heads, N, N): what is added to the logit of query (row) and key (column).

    OUTSIDE where the key is not seen, or the least float16.
    """
    reach = (table.shape[0] - 1) // 2
    rows = torch.arange(height, device=table.device)
    columns = torch.arange(width, device=table.device)
    dy, dx = rows[:, None] - rows + reach, columns[:, None] - columns + reach
    seen = ((dy >= 0) & (dy <= 2 * reach))[:, None, :, None] & ((dx >= 0) & (dx <= 2 * reach))[None, :, None, :]
    dy, dx = dy.clamp(0, 2 * reach)[:, None, :, None], dx.clamp(0, 2 * reach)[None, :, None, :]
    outside = max(OUTSIDE, torch.finfo(table.dtype).min)
    bias = table[dy, dx].where(seen[..., None], outside)  # (height, width, height, width, heads)
    return bias.flatten(2, 3).flatten(0, 1).permute(2, 0, 1)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, table: Tensor, height: int, width: int) -> Tensor:
    bias = dense_bias(table, height, width).to(q.dtype)
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=bias)
    return like_layout(out.transpose(1, 2), q)


def _triton(q: Tensor, k: Tensor, v: Tensor, table: Tensor, height: int, width: int) -> Tensor:
    from msdd_fast.kernels.window_attention import window_attention as launch

    out = attention_result(q)
    launch(q, k, v, table, height, width, out)
    return out


def _kernels_fit(q: Tensor, k: Tensor, v: Tensor, table: Tensor, height: int, width: int) -> Verdict:
    if table.dtype not in FLOAT_DTYPES:
        return False, f"works with a table in float32, bfloat16 or float16, got {table.dtype}"
    if q.shape[3] > MAX_HEAD_SIZE:
        return False, f"takes heads of at most {MAX_HEAD_SIZE}, got {q.shape[3]}"
    if table.shape[0] > 2 * MAX_WINDOW - 1:
        return False, f"takes windows of at most {MAX_WINDOW}, got a table {tuple(table.shape)}"
    if height * width > 2**30:
        return False, f"takes at most 2^30 pixels, got {height} x {width}"
    if any(x.stride(3) != 1 for x in (q, k, v)):
        return False, "needs the last dimension of q, k and v to be contiguous"
    return True, ""


def _example() -> tuple[Any, ...]:
    qkv, table = normals((1, 4, 3, 1, 16), (3, 3, 1))
    return *qkv.unbind(2), table, 2, 2


OP = Op(
    "window_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor table, int height, int width) -> Tensor",
    window_attention_eager,
    lambda q, *_: attention_result(q),
    _example,
)
register_native(OP, native.window_attention, fits=_kernels_fit)
OP.register(TRITON, _triton, _kernels_fit)
OP.register(SDPA, _sdpa, differentiable=True)
