"""What the attention ops share about tensors (B, N, heads, head size)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from msdd_fast.backends.choice import Verdict
from msdd_fast.ops._checks import FLOAT_DTYPES

HEAD_SIZE, MAX_KEYS = 64, 256  # of the GPU kernels


def cast_for_autocast(q: Tensor, *others: Any) -> tuple[Any, ...]:
    """Cast tensors of a supported dtype to autocast's dtype, as torch's own ops do; without autocast, nothing."""
    device = q.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return (q, *others)
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if isinstance(t, Tensor) and t.dtype in FLOAT_DTYPES else t for t in (q, *others))


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Disable autocast, on devices that have it (meta has none)."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def rows_are_dense(*tensors: Tensor | None) -> Verdict:
    """Whether the last dimension of all tensors is contiguous."""
    fit = all(x is None or x.stride(3) == 1 for x in tensors)
    return fit, "" if fit else "needs the last dimension of all tensors to be contiguous"


def cpu_fits(q: Tensor, *others: Tensor | None) -> Verdict:
    """Whether the C++ attention's contract holds."""
    if q.dtype not in FLOAT_DTYPES:
        return False, f"works in float32, bfloat16 and float16, got {q.dtype}"
    if q.shape[3] > 128:
        return False, f"needs a head size up to 128, got {q.shape[3]}"
    return rows_are_dense(q, *others)


def _steps(x: Tensor) -> list[int]:
    """Strides between heads, but for dimensions of one element, whose stride means nothing."""
    return [stride for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True) if size != 1]


def kernels_fit(q: Tensor, k: Tensor, v: Tensor, accumulate: Tensor | None = None) -> Verdict:
    """Whether the GPU kernels' contract holds: dtype, head size, number of keys, rows at multiples of 16 bytes."""
    if q.dtype not in (torch.bfloat16, torch.float16):
        return False, f"works in bfloat16 and float16, got {q.dtype}"
    if q.shape[3] != HEAD_SIZE:
        return False, f"needs a head size of {HEAD_SIZE}, got {q.shape[3]}"
    if k.shape[1] > MAX_KEYS:
        return False, f"takes at most {MAX_KEYS} keys, got {k.shape[1]}"
    for name, x in (("q", q), ("k", k), ("v", v), ("accumulate", accumulate)):
        if x is not None and (x.stride(3) != 1 or x.storage_offset() % 8 or any(s % 8 for s in _steps(x))):
            got = f"{name} with strides {tuple(x.stride())}, offset {x.storage_offset()}"
            return False, f"needs contiguous heads at multiples of 16 bytes, got {got}"
    return True, ""
