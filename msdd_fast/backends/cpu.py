"""Backend "cpu": the C++ functions of the compiled extension."""

from __future__ import annotations

from torch import Tensor

from msdd_fast.backends.choice import Verdict, register_backend
from msdd_fast.backends.extension import extension_status


def can_use_cpu(x: Tensor) -> Verdict:
    """Whether the compiled C++ functions can work on ``x``."""
    if not x.is_cpu:
        return False, f"works on CPU tensors, got {x.device}"
    return extension_status()


CPU = register_backend("cpu", can_use_cpu)
