"""Pairs of an image and what became of it: reconstructed here, or read from a second folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor

from msdd_fast.bench.timing.clock import now
from msdd_fast.commands.bulk.sources import Ref, load_ref
from msdd_fast.commands.inputs import ImageReader, require_finite
from msdd_fast.errors import InputError
from msdd_fast.io.images import RESIZE_FILTERS, adm_crop, center_crop, to_tensor


class Pairs(NamedTuple):
    """Images float32 (3, H, W) in [-1, 1].

    Attributes:
        numbers: of the files that could be read.
        results, references: as many images each.
        seconds: spent as the authors count it (docs/spec.md#evaluation); 0 where nothing is decoded.
    """

    numbers: list[int]
    results: Sequence[Tensor]
    references: Sequence[Tensor]
    seconds: float


class Source(Protocol):
    unreadable: dict[int, str]
    """Numbers of the pairs that could not be read, and why."""

    def read(self, part: range) -> Pairs:
        """The pairs of these numbers."""
        ...


def make_crop(crop: str, resize: str, size: int) -> Callable[[Image.Image], Image.Image]:
    """The crop of a protocol. ``resize`` "auto" is that of ``center_crop``, bicubic for "adm"."""
    chosen = None if resize == "auto" else RESIZE_FILTERS[resize]
    if crop == "center":
        return lambda image: center_crop(image, size, chosen)
    if crop == "adm":
        return lambda image: adm_crop(image, size, Image.Resampling.BICUBIC if chosen is None else chosen)
    return lambda image: image


def describe_crop(crop: str, resize: str) -> str:
    """For a reader of the report."""
    named = {"auto": "BOX (whole factors) or antialiased bicubic"}.get(resize, f"antialiased {resize}")
    if crop == "center":
        return f"largest centred square, resized by {named}"
    if crop == "adm":
        how = "antialiased bicubic" if resize == "auto" else named
        return f"ADM's: halved by box means while twice too large, shorter side resized by {how}, centre cropped"
    return "none"


class Reconstructed:
    """Images encoded and decoded by a tokenizer. Image i is decoded with ``seed`` + i.

    Args:
        files: by the number of the image.
        encode_images, decode: a batch of images to latents; latents and seeds to images.
        context: what both run in, such as autocast.
    """

    def __init__(
        self,
        files: Mapping[int, Ref],
        crop: Callable[[Image.Image], Image.Image],
        size: int,
        device: torch.device,
        seed: int,
        encode_images: Callable[[Tensor, Sequence[object]], Tensor],
        decode: Callable[[Tensor, list[int]], Tensor],
        context: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self.files = files
        self.device, self.seed, self.context = device, seed, context
        self.encode_images, self.decode = encode_images, decode
        self.reader = ImageReader(size, load_ref, crop)
        self.unreadable: dict[int, str] = {}

    def images(self, part: range) -> tuple[list[int], Tensor]:
        """Those that could be read, on the CPU."""
        before = len(self.reader.unreadable)
        read, images = self.reader.read([self.files[i] for i in part])
        failed = [part.start + i for i in range(len(part)) if i not in set(read)]
        for number, (_, reason) in zip(failed, self.reader.unreadable[before:], strict=True):
            self.unreadable[number] = reason
        return [part.start + i for i in read], images

    def read(self, part: range) -> Pairs:
        index, images = self.images(part)
        if not index:
            return Pairs([], [], [], 0.0)
        names = [self.files[i] for i in index]
        start = now()
        images.permute(0, 2, 3, 1).contiguous().numpy()  # the authors' copy of the originals is in their time
        x = images.to(self.device)
        with self.context():
            z = self.encode_images(x, names)
            y = self.decode(z, [self.seed + i for i in index])
        seconds = now() - start
        require_finite("decoding", y, names)
        return Pairs(index, list(y.float()), list(x), seconds)


class Compared:
    """Reconstructions, and the images that they are of.

    Args:
        pairs: reconstruction and original by the number of the pair.
        crop: of the originals, to the size of their partners; "none": they must have that size.
    """

    def __init__(self, pairs: Mapping[int, tuple[Ref, Ref]], crop: str, resize: str) -> None:
        self.pairs, self.crop, self.resize = pairs, crop, resize
        self.unreadable: dict[int, str] = {}

    def read(self, part: range) -> Pairs:
        index: list[int] = []
        results: list[Tensor] = []
        references: list[Tensor] = []
        for i in part:
            files = self.pairs[i]
            try:
                result, reference = map(load_ref, files)
            except InputError as e:
                self.unreadable[i] = str(e)
                continue
            if self.crop != "none":
                if result.width != result.height:
                    raise InputError(
                        f"--crop {self.crop} needs square reconstructions, got {result.width} x {result.height} pixels "
                        f"in {files[0]}"
                    )
                reference = make_crop(self.crop, self.resize, result.width)(reference)
            if result.size != reference.size:
                raise InputError(
                    f"{files[1]} has {reference.width} x {reference.height} pixels, its reconstruction "
                    f"{result.width} x {result.height}: give --crop"
                )
            index.append(i)
            results.append(to_tensor(result))
            references.append(to_tensor(reference))
        return Pairs(index, results, references, 0.0)


def pair_up(references: Sequence[Path], results: Sequence[Path], roots: tuple[Path, Path]) -> list[Path]:
    """Of every image the one of ``results`` that has its name but for the suffix.

    Raises InputError if an image has no partner, or several.
    """
    found, names = _by_name(results, roots[1]), _by_name(references, roots[0])
    missing = [name for name in names if name not in found]
    if missing:
        raise InputError(f"{roots[1]} must have an image for each of {roots[0]}, got none for {missing[0]}")
    return [found[name] for name in names]


def _by_name(files: Sequence[Path], root: Path) -> dict[str, Path]:
    """Files by their path below ``root`` without suffix. Raises InputError if two share one."""
    base = root if root.is_dir() else root.parent
    found: dict[str, Path] = {}
    for file in files:
        name = file.relative_to(base).with_suffix("").as_posix()
        if name in found:
            raise InputError(f"{root} must have one image of a name, got {found[name].name} and {file.name}")
        found[name] = file
    return found
