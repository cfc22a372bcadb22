"""A few photographs that are at hand without a download: those inside the scikit-image wheel."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor

from msdd_fast.errors import InputError
from msdd_fast.io.images import center_crop, to_tensor

PHOTOS = ("astronaut", "chelsea", "coffee", "rocket")


def photographs(size: int) -> Tensor:
    """PHOTOS as float32 (4, 3, size, size) in [-1, 1]. Raises InputError if scikit-image is not installed."""
    try:
        import skimage.data
    except ImportError as e:
        raise InputError("the demo's photographs are in scikit-image: pip install 'msdd-fast[eval]'") from e
    pictures = [Image.fromarray(getattr(skimage.data, name)()) for name in PHOTOS]
    return torch.stack([to_tensor(center_crop(p, size)) for p in pictures])
