"""Pictures in and out: files, PIL images and tensors in [-1, 1]."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from msdd_fast.errors import InputError
from msdd_fast.io.files import atomic_write, require_writable
from msdd_fast.ops._patches import to_uint8

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})


def load_image(path: str | os.PathLike[str], data: bytes | None = None) -> Image.Image:
    """Any picture as upright RGB: the file, or ``data`` read from it. Raises InputError that names the file."""
    try:
        with Image.open(path if data is None else io.BytesIO(data)) as file:
            image: Image.Image = file
            if image.mode in ("I", "I;16", "I;16B"):  # 16-bit grey: PIL's own conversion clips at 255
                image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError as e:
        raise InputError(f"image file {path} does not exist") from e
    except (UnidentifiedImageError, OSError, EOFError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        reason = "its format is not known" if isinstance(e, UnidentifiedImageError) else e
        raise InputError(f"{path} is not a readable image: {reason}") from e


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Largest centred square, then resized: BOX when shrinking by a whole factor, else antialiased bicubic."""
    short = min(image.size)
    left, top = (image.width - short) // 2, (image.height - short) // 2
    square = image.crop((left, top, left + short, top + short))
    return square.resize((size, size), Image.Resampling.BOX if short % size == 0 else Image.Resampling.BICUBIC)


CROP_DESCRIPTION = "largest centred square, resized by BOX (whole factors) or antialiased bicubic"


def to_tensor(image: Image.Image) -> Tensor:
    """RGB image to float32 (3, H, W) in [-1, 1]."""
    array = np.asarray(image, dtype=np.uint8).copy()
    return torch.from_numpy(array).permute(2, 0, 1).float().div_(127.5).sub_(1.0)


def load_batch(files: Sequence[Path], size: int) -> Tensor:
    """Centre crops of image files: float32 (len(files), 3, size, size) in [-1, 1]."""
    return torch.stack([to_tensor(center_crop(load_image(f), size)) for f in files])


def to_image(x: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] to an RGB image."""
    return Image.fromarray(to_uint8(x).permute(1, 2, 0).cpu().numpy())


def find_image_files(source: str | os.PathLike[str]) -> list[Path]:
    """Image files of a folder (recursive, sorted, none hidden), or the one file. Raises InputError if there is none."""
    path = Path(source)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InputError(f"{path} is neither a file nor a folder")
    files = [
        p
        for p in sorted(path.rglob("*"))
        if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".") and p.is_file()
    ]
    if not files:
        raise InputError(f"no images ({', '.join(sorted(IMAGE_SUFFIXES))}) found in {path}")
    return files


def require_picture_path(path: str | os.PathLike[str]) -> None:
    """Fail before the work: InputError if ``path`` has no suffix of a picture or cannot be written."""
    _check_suffix(Path(path))
    require_writable(path)


def save_image(image: Image.Image, path: str | os.PathLike[str]) -> None:
    """Write a picture atomically; the suffix chooses the format. Raises InputError if it cannot be written."""
    _check_suffix(Path(path))
    with atomic_write(path) as temporary:
        image.save(temporary)


def _check_suffix(path: Path) -> None:
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        raise InputError(f"output must end in one of {', '.join(sorted(IMAGE_SUFFIXES))}, got {path.name!r}")


def grid_image(rows: Sequence[Sequence[Tensor]], size: int, gap: int = 4) -> Image.Image:
    """Picture grid; every (3, H, W) tensor in [-1, 1] is enlarged to ``size`` by repeating pixels."""
    columns = max(len(row) for row in rows)
    canvas = Image.new("RGB", (columns * (size + gap) - gap, len(rows) * (size + gap) - gap), "white")
    for i, row in enumerate(rows):
        for j, tensor in enumerate(row):
            tile = to_image(tensor).resize((size, size), Image.Resampling.NEAREST)
            canvas.paste(tile, (j * (size + gap), i * (size + gap)))
    return canvas


def preview_grid(columns: Sequence[Tensor], size: int | None = None) -> Image.Image:
    """A row per image, a column per tensor (B, 3, h, w) in [-1, 1]; ``size``: pixels per tile, default column 0's."""
    return grid_image([list(row) for row in zip(*columns, strict=True)], size or columns[0].shape[-1])
