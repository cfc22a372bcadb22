"""Images as the commands take them: read in batches, unreadable ones passed over and counted."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from msdd_fast.diffusion.checks import first_not_finite
from msdd_fast.errors import InputError
from msdd_fast.io.images import center_crop, load_image, to_tensor
from msdd_fast.tokenizer import Tokenizer

_SHOWN = 10


class ImageReader:
    """Square crops of image files.

    Args:
        size: pixels per side.
        load: what is to be read, to an RGB image.
        crop: an image to one of ``size`` x ``size`` pixels; default ``center_crop``.
    """

    def __init__(
        self,
        size: int,
        load: Callable[[Any], Image.Image] = load_image,
        crop: Callable[[Image.Image], Image.Image] | None = None,
    ) -> None:
        self.size, self.load = size, load
        self.crop = crop or (lambda image: center_crop(image, size))
        self.count = 0
        self.unreadable: list[tuple[object, str]] = []

    def read(self, files: Sequence[object]) -> tuple[list[int], Tensor]:
        """Which of ``files`` could be read, and their images: float32 (n, 3, size, size) in [-1, 1]."""
        self.count += len(files)
        read: list[int] = []
        images: list[Tensor] = []
        for i, file in enumerate(files):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # what decoders say of odd files; errors are reported
                    images.append(to_tensor(self.crop(self.load(file))))
                read.append(i)
            except InputError as e:
                self.pass_over(file, str(e))
        return read, torch.stack(images) if images else torch.empty(0, 3, self.size, self.size)

    def pass_over(self, file: object, reason: str) -> None:
        self.unreadable.append((file, reason))

    def require_any(self) -> None:
        """Raise InputError if no image could be read."""
        if self.count and len(self.unreadable) == self.count:
            first = self.unreadable[0][1]
            raise InputError(
                first if self.count == 1 else f"none of {self.count} images can be read, the first: {first}"
            )

    def report(self, strict: bool) -> None:
        """As ``report_unreadable``."""
        report_unreadable([reason for _, reason in self.unreadable], self.count, strict)


def report_unreadable(reasons: Sequence[str], count: int, strict: bool) -> None:
    """Say on stderr which of ``count`` images were passed over. With ``strict``, raise InputError if that is any."""
    if not reasons:
        return
    for reason in reasons[:_SHOWN]:
        print(f"msdd-fast: {reason}", file=sys.stderr)
    more = len(reasons) - _SHOWN
    if more > 0:
        print(f"msdd-fast: and {more} more", file=sys.stderr)
    total = f"{len(reasons)} of {count} images could not be read"
    if strict:
        raise InputError(f"--strict: {total}")
    print(f"msdd-fast: {total} and were passed over", file=sys.stderr)


def encode(tokenizer: Tokenizer, images: Tensor, names: Sequence[object]) -> Tensor:
    """Latents of images in [-1, 1]. Raises InputError that names the image whose latents have NaN or Inf."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a bright image may well lie in [0, 1]
        z = tokenizer.encode(images)
    require_finite("encoding", z, names)
    return z


def require_finite(doing: str, x: Tensor, names: Sequence[object]) -> None:
    """Raise InputError that names the first item of the batch with NaN or Inf."""
    first = first_not_finite(x)
    if first is not None:
        raise InputError(f"{doing} gave NaN or Inf for {names[first]}")


def printable(path: object) -> str:
    """A path for a line of output: what the terminal's encoding cannot say is escaped."""
    encoding = sys.stdout.encoding or "utf-8"
    return str(path).encode(encoding, "backslashreplace").decode(encoding)
