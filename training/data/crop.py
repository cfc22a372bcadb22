"""From an image to a square training image."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

from PIL import Image

from msdd_fast.errors import InputError
from msdd_fast.io.images import RESIZE_FILTERS, center_crop


@dataclass(frozen=True)
class CropConfig:
    """How a square is cut out of an image."""

    crop: Literal["random", "adm", "center"] = "random"
    """"random": a square of ``min_crop`` to 1 times the shorter side at a sub-pixel position, resized in one go. "adm"
    (the authors' random_crop_arr): halve by box means while twice too large, resize the shorter side to 1 to
    1/``min_crop`` times the target, crop whole pixels. "center": the largest centred square, as in the evaluations."""
    min_crop: float = 0.8
    resize: Literal["bicubic", "bilinear", "lanczos", "box"] = "bicubic"
    """Filter of "random" and "adm", always antialiased."""
    flip: bool = True
    """Mirror with probability 1/2."""

    def __post_init__(self) -> None:
        if (
            isinstance(self.min_crop, bool)
            or not isinstance(self.min_crop, (int, float))
            or not 0.0 < self.min_crop <= 1.0
        ):
            raise InputError(f"min_crop must be in (0, 1], got {self.min_crop}")


def crop_image(image: Image.Image, size: int, config: CropConfig, rng: random.Random) -> Image.Image:
    """A training image of ``size`` x ``size`` pixels from an RGB image."""
    resample = RESIZE_FILTERS[config.resize]
    if config.crop == "random":
        side = min(image.size) * rng.uniform(config.min_crop, 1.0)
        left, top = rng.uniform(0, image.width - side), rng.uniform(0, image.height - side)
        image = image.resize((size, size), resample, box=(left, top, left + side, top + side))
    elif config.crop == "center":
        image = center_crop(image, size)
    else:
        shorter = rng.randint(size, max(size, int(size / config.min_crop)))
        while min(image.size) >= 2 * shorter:
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        scale = shorter / min(image.size)
        image = image.resize((max(size, round(image.width * scale)), max(size, round(image.height * scale))), resample)
        left, top = rng.randint(0, image.width - size), rng.randint(0, image.height - size)
        image = image.crop((left, top, left + size, top + size))
    if config.flip and rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image
