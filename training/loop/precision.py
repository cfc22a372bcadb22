"""In which arithmetic a training step runs."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from msdd_fast.training.loop.config import LoopConfig


def autocast(config: LoopConfig) -> AbstractContextManager[Any]:
    """Around a forward pass: what ``precision`` says."""
    if config.precision == "float32":
        return nullcontext()
    return torch.autocast(torch.device(config.device).type, dtype=torch.bfloat16)


@contextmanager
def plain_attention(config: LoopConfig) -> Generator[None]:
    """Around forward and backward passes: on a CPU in bfloat16, attention by plain matrix products.

    Backward, PyTorch's flash attention for CPUs takes about three times as long as the products, which keep the scores.
    """
    if config.precision == "float32" or torch.device(config.device).type != "cpu":
        yield
        return
    settings = torch.backends.cuda  # the only place of this switch, which is for all devices
    before = settings.fp16_bf16_reduction_math_sdp_allowed()
    settings.allow_fp16_bf16_reduction_math_sdp(True)  # else they are calculated in float32
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        settings.allow_fp16_bf16_reduction_math_sdp(before)
