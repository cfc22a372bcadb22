"""Backend "triton": Triton kernels on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import os

from torch import Tensor

from msdd_fast.backends.choice import Verdict, register_backend
from msdd_fast.backends.packages import imports, is_installed


def can_use_triton(x: Tensor) -> Verdict:
    """Whether Triton kernels can work on ``x``: on a GPU, or on a CPU with TRITON_INTERPRET=1 (for tests)."""
    if not is_installed("triton"):
        return False, "Triton is not installed: pip install triton"
    if x.device.type == "cuda" or (x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        ok, reason = imports("triton", "Triton")
        return ok, "Triton kernel" if ok else reason
    return False, f"needs a CUDA tensor (or TRITON_INTERPRET=1, for tests), got {x.device}"


TRITON = register_backend("triton", can_use_triton)
