"""The CUDA kernels of the extension on tensors.

Kernels run on the current stream of the tensors' device and return at once. Call each once on a device before a graph
captures it: the first call loads the kernels there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from msdd_fast.backends.extension import load_extension
from msdd_fast.errors import BackendUnavailableError, InputError
from msdd_fast.layout import attention_result

_DTYPES = {torch.bfloat16: 1, torch.float16: 2}  # as in csrc/include/msdd_fast/dtype.h


def context_attention(q: Tensor, k: Tensor, v: Tensor, accumulate: Tensor | None = None) -> Tensor:
    """softmax(q k^T / 8) v, plus ``accumulate``, rounded once; memory order of ``attention_result(q)``.

    q (B, N, H, 64), k and v (B, L, H, 64) with L from 1 to 256, accumulate like q: bfloat16 or float16, strides any
    multiples of 8 elements but the last, which is 1, addresses multiples of 16 bytes. Nothing is copied.

    Raises InputError on anything else, BackendUnavailableError if the extension is missing or CUDA refuses.
    """
    for name, x in (("q", q), ("k", k), ("v", v), ("accumulate", accumulate)):
        if x is None and name == "accumulate":
            continue
        if not isinstance(x, Tensor) or x.device.type != "cuda" or x.dtype not in _DTYPES:
            got = f"{x.dtype} on {x.device}" if isinstance(x, Tensor) else type(x).__name__
            raise InputError(f"{name} must be a bfloat16 or float16 tensor on a GPU, got {got}")
        if x.device != q.device:
            raise InputError(f"{name} must be on {q.device}, got {x.device}")
    out = attention_result(q)
    if out.numel() == 0:
        return out
    views = [None if x is None else _view(x) for x in (q, k, v, accumulate, out)]
    stream = torch.cuda.current_stream(q.device).cuda_stream
    function = getattr(load_extension(), "context_attention", None)
    if function is None:
        raise BackendUnavailableError("context_attention: msdd_fast._C was built without CUDA")
    try:
        function(*views, stream, q.get_device())
    except ValueError as error:
        raise InputError(f"context_attention: {error}") from None
    except RuntimeError as error:
        raise BackendUnavailableError(f"context_attention: {error}") from None
    return out


def _view(x: Tensor) -> tuple[int, int, torch.Size, tuple[int, ...]]:
    """As the extension takes it. The stride of a dimension of one element means nothing and need not be aligned: 0."""
    strides = tuple(0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), _DTYPES[x.dtype], x.shape, strides
