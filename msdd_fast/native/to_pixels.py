"""The C++ copy of an image to bytes."""

from __future__ import annotations

import torch
from torch import Tensor

from msdd_fast.backends.extension import load_extension
from msdd_fast.native._call import PIXEL_TYPES, operand


def to_pixels(x: Tensor) -> Tensor:
    """Images in [-1, 1], of any strides, as uint8, contiguous: ``ops._patches.to_uint8``."""
    out = torch.empty(x.shape, dtype=torch.uint8)
    target = (out.data_ptr(), PIXEL_TYPES[torch.uint8], tuple(out.shape), out.stride())
    load_extension().copy(target, operand(x), torch.get_num_threads())
    return out
