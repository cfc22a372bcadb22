"""What a decode takes and gives, of any family."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from msdd_fast.ops._patches import to_uint8


class StageImages(NamedTuple):
    """What ``FastDecoder.stream`` yields when a stage is done.

    Attributes:
        stage: its index.
        images: (B, 3, H, H) clean estimate at this scale (docs/spec.md#clean-estimate); of the last stage the decoded
            image.
        state: float32 (B, 3, H, H), still noisy at the stage's end level unless it is the last.
    """

    stage: int
    images: Tensor
    state: Tensor


class Inputs(NamedTuple):
    """What changes from call to call, all on the device: z (B, ...), seeds int64 (B,), CFG scale float32 ()."""

    z: Tensor
    seeds: Tensor
    scale: Tensor


class DecodeProgram(Protocol):
    """A whole decode, of either family."""

    @property
    def network(self) -> Any:
        """With its weights as ``w``."""
        ...

    def decode(
        self, inputs: Inputs, guided: bool, out_dtype: torch.dtype, noise: Sequence[Tensor] | None = None
    ) -> Tensor: ...

    def stream(self, inputs: Inputs, guided: bool, out_dtype: torch.dtype) -> Iterator[StageImages]: ...


def convert(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Images in [-1, 1] in another dtype; uint8 is clamped and quantised."""
    return to_uint8(images) if dtype == torch.uint8 else images.to(dtype)
