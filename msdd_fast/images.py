"""Pictures in and out: files, PIL images and tensors in [-1, 1]."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from msdd_fast.errors import InputError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})


def load_image(path: str | os.PathLike[str]) -> Image.Image:
    """Any picture as upright RGB. Raises InputError that names the file."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError as e:
        raise InputError(f"image file {path} does not exist") from e
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        raise InputError(f"{path} is not a readable image: {e}") from e


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Largest centred square, then resized: BOX when shrinking by a whole factor, else antialiased bicubic."""
    short = min(image.size)
    left, top = (image.width - short) // 2, (image.height - short) // 2
    box = (left, top, left + short, top + short)
    whole = short >= size and short % size == 0
    return image.resize((size, size), Image.Resampling.BOX if whole else Image.Resampling.BICUBIC, box=box)


CROP_DESCRIPTION = "largest centred square, resized by BOX (whole factors) or antialiased bicubic"


def to_tensor(image: Image.Image) -> Tensor:
    """RGB image to float32 (3, H, W) in [-1, 1]."""
    array = np.asarray(image, dtype=np.uint8).copy()
    return torch.from_numpy(array).permute(2, 0, 1).float().div_(127.5).sub_(1.0)


def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] to uint8, same shape: clamp(127.5 x + 128, 0, 255) truncated (SPEC A4)."""
    return (x.float() * 127.5 + 128.0).clamp(0, 255).to(torch.uint8)


def to_image(x: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] to an RGB image."""
    return Image.fromarray(to_uint8(x).permute(1, 2, 0).cpu().numpy())


def find_image_files(source: str | os.PathLike[str]) -> list[Path]:
    """Image files of a folder (recursive, sorted), or the one file. Raises InputError if there is none."""
    path = Path(source)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InputError(f"{path} is neither a file nor a folder")
    files = [p for p in sorted(path.rglob("*")) if p.suffix.lower() in IMAGE_SUFFIXES]
    if not files:
        raise InputError(f"no images ({', '.join(sorted(IMAGE_SUFFIXES))}) found in {path}")
    return files


def save_image(image: Image.Image, path: str | os.PathLike[str]) -> None:
    """Write a picture atomically; the suffix chooses the format. Raises InputError if it cannot be written."""
    path = Path(path)
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        raise InputError(f"output must end in one of {', '.join(sorted(IMAGE_SUFFIXES))}, got {path.name!r}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
    except OSError as e:
        raise InputError(f"cannot write {path}: {e}") from e
    os.close(handle)
    try:
        image.save(temporary)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as e:
        raise InputError(f"cannot write {path}: {e}") from e
    finally:
        Path(temporary).unlink(missing_ok=True)


def grid_image(rows: Sequence[Sequence[Tensor]], size: int, gap: int = 4) -> Image.Image:
    """Picture grid; every (3, H, W) tensor in [-1, 1] is enlarged to ``size`` by repeating pixels."""
    columns = max(len(row) for row in rows)
    canvas = Image.new("RGB", (columns * (size + gap) - gap, len(rows) * (size + gap) - gap), "white")
    for i, row in enumerate(rows):
        for j, tensor in enumerate(row):
            tile = to_image(tensor).resize((size, size), Image.Resampling.NEAREST)
            canvas.paste(tile, (j * (size + gap), i * (size + gap)))
    return canvas
