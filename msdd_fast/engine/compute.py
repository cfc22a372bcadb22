"""In which dtype a device should calculate."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import torch

from msdd_fast.errors import InputError


def compute_dtype(dtype: torch.dtype, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype that the engine calculates in when ``dtype`` is asked for, and why.

    A CPU without bfloat16 instructions multiplies bfloat16 matrices several times slower than float32 ones, so there
    the engine keeps its weights and activations in float32, which is more exact, too. MSDD_FAST_CPU_BF16 = 1 or 0
    overrules what the processor says. float16 is for GPUs. Raises InputError for other dtypes.
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise InputError(f"dtype must be float32, bfloat16 or float16, got {dtype!r}")
    if device.type != "cpu" or dtype == torch.float32:
        return dtype, "as asked"
    choice = os.environ.get("MSDD_FAST_CPU_BF16") or "auto"
    if choice not in ("auto", "0", "1"):
        raise InputError(f"MSDD_FAST_CPU_BF16 must be auto, 0 or 1, got {choice!r}")
    if dtype == torch.bfloat16 and (choice == "1" or (choice == "auto" and _has_bf16_instructions())):
        return dtype, "as asked"
    return torch.float32, f"this CPU has no fast {str(dtype).removeprefix('torch.')} matrix product"


@cache
def _has_bf16_instructions() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags or " bf16 " in flags  # the last: Arm
