"""Encode and decode pictures, keeping what happens at every scale, and draw it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image
from torch import Tensor

from msdd_fast.commands.inputs import encode
from msdd_fast.engine import FastDecoder
from msdd_fast.io.images import preview_grid
from msdd_fast.sampling import StageResult
from msdd_fast.tokenizer import Tokenizer


class Reconstruction(NamedTuple):
    """Images float32 in [-1, 1]: the originals (B, 3, R, R), the clean estimate of every stage, the result."""

    original: Tensor
    stages: list[Tensor]
    result: Tensor


def reconstruct(
    tokenizer: Tokenizer, images: Tensor, seed: int | Sequence[int] = 0, engine: FastDecoder | None = None
) -> Reconstruction:
    """Round trip of images (B, 3, R, R) in [-1, 1], decoded by ``engine`` if there is one, else by the eager model.

    Raises InputError if the latents have NaN or Inf.
    """
    z = encode(tokenizer, images, range(len(images)))
    if engine is not None:
        stages = [s.images for s in engine.stream(z, seed)]
        return Reconstruction(images, stages, stages[-1])
    results: list[StageResult] = []
    out = tokenizer.decode(z, seed, stage_callback=results.append)
    return Reconstruction(images, [r.clean for r in results], out)


def draw(r: Reconstruction, size: int | None = None) -> Image.Image:
    """A row per image: original, clean estimates, result. ``size``: pixels per tile, default the image's."""
    return preview_grid([r.original, *r.stages[:-1], r.result], size)
