"""Images in and out: files, PIL images and tensors in [-1, 1].

Every image of training and of the commands comes through ``load_image``, so that one file is one image everywhere.
"""

from __future__ import annotations

import io
import logging
import operator
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePath
from typing import SupportsIndex

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from msdd_fast.errors import InputError
from msdd_fast.io.colour import check_layout, describe_layout, to_srgb
from msdd_fast.io.files import as_path, atomic_write, require_writable
from msdd_fast.io.metadata import exif_orientation, split
from msdd_fast.ops._patches import to_uint8

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})
OTHER_SUFFIXES: frozenset[str] = frozenset(
    {".avif", ".gif", ".heic", ".heif", ".jfif", ".jpe", ".jp2", ".jxl", ".pbm", ".pgm", ".pnm", ".ppm", ".psd"}
    | {".arw", ".cr2", ".cr3", ".dng", ".nef", ".svg"}
)
"""Images that a search passes over, and says so."""
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "AVIF")
"""Pillow's names of what is decoded, whatever the file is called. No format among them runs a program."""
MAX_PIXELS = 2**26
"""Images with more are refused; the environment variable MSDD_FAST_MAX_PIXELS sets another limit."""
MAX_FILE_BYTES = 2**30
RESIZE_FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
}
"""Pillow's, which are antialiased."""
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_log = logging.getLogger(__name__)


def load_image(path: str | os.PathLike[str], data: bytes | None = None) -> Image.Image:
    """An image as upright 8-bit sRGB without alpha: the file, or ``data`` read from it.

    The first page or frame; turned as EXIF says; colours by the ICC profile; transparent pixels over white; the upper 8
    of 16 bits. Raises InputError that names the file: it is missing, damaged, of another format than FORMATS, larger
    than the limits above, or its samples have no known scale.
    """
    path = as_path("path", path)
    if data is None:
        data = _read(path)
    elif not isinstance(data, (bytes, bytearray, memoryview)):
        raise InputError(f"data must be the bytes of an image file, got {type(data).__name__}")
    try:
        return _decode(bytes(data))
    except Exception as e:  # a damaged file can raise nearly anything in a decoder
        raise InputError(f"{path} is not a readable image: {str(e) or type(e).__name__}") from e


def _read(path: Path) -> bytes:
    try:
        with open(path, "rb") as f:
            size = os.fstat(f.fileno()).st_size
            data = f.read(MAX_FILE_BYTES + 1) if size <= MAX_FILE_BYTES else b""
    except FileNotFoundError as e:
        raise InputError(f"image file {path} does not exist") from e
    except OSError as e:
        raise InputError(f"{path} is not a readable image: {e.strerror or e}") from e
    if max(size, len(data)) > MAX_FILE_BYTES:  # a pipe has no size
        raise InputError(f"{path} is not a readable image: files must have at most {MAX_FILE_BYTES} bytes")
    return data


def _decode(data: bytes) -> Image.Image:
    if not data:
        raise InputError("the file is empty")
    meta = split(data)
    if meta.deep_key:
        raise InputError("a PNG with 16 bits a channel and a transparent colour is not supported: save it with alpha")
    limit = max_pixels()
    if meta.directory is not None:
        check_layout(meta.directory)
        _check_pixels(*meta.directory.tile, limit)
    try:
        file = Image.open(io.BytesIO(meta.data), formats=_formats())
    except UnidentifiedImageError as e:
        reason = describe_layout(meta.directory) if meta.directory is not None else _unknown(data)
        raise InputError(reason) from e
    except Image.DecompressionBombError as e:
        raise InputError(f"images must have at most {limit} pixels (MSDD_FAST_MAX_PIXELS), and Pillow says: {e}") from e
    with file:
        _check_pixels(*file.size, limit)
        file.load()
        profile = meta.profile if meta.orientation else file.info.get("icc_profile")
        image = to_srgb(file, profile if isinstance(profile, bytes) else None, meta.directory)
        turn = _TURNS.get(meta.orientation or exif_orientation(file.info.get("exif")))
        return image if turn is None else image.transpose(turn)


def _check_pixels(width: int, height: int, limit: int) -> None:
    if width * height > limit:
        raise InputError(
            f"images must have at most {limit} pixels, got {width} x {height}; "
            "the environment variable MSDD_FAST_MAX_PIXELS sets another limit"
        )


def _formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _unknown(data: bytes) -> str:
    heads = {b"%!PS": "PostScript", b"\xc5\xd0\xd3\xc6": "PostScript", b"%PDF": "PDF", b"8BPS": "PSD"}
    heads |= {b"\0\0\0\x0cjP": "JPEG 2000", b"\0\0\0\x0cJXL": "JPEG XL", b"\xff\x0a": "JPEG XL", b"<svg": "SVG"}
    name = next((name for head, name in heads.items() if data.startswith(head)), "")
    if data[4:8] == b"ftyp" and data[8:11] in (b"hei", b"hev", b"mif", b"msf"):
        name = "HEIC"
    read = f"read are {', '.join(FORMATS)}"
    return f"its format is {name}, {read}" if name else f"its format is not known, or its head is damaged ({read})"


def max_pixels() -> int:
    """The limit on the pixels of an image. Raises InputError if MSDD_FAST_MAX_PIXELS is no positive integer."""
    text = os.environ.get("MSDD_FAST_MAX_PIXELS", "")
    if not text:
        return MAX_PIXELS
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise InputError(f"MSDD_FAST_MAX_PIXELS must be a positive integer, got {text!r}")
    return int(text)


def _check_image(image: object) -> None:
    if not isinstance(image, Image.Image):
        raise InputError(f"image must be a PIL image, got {type(image).__name__}")


def center_crop(image: Image.Image, size: int, resample: Image.Resampling | None = None) -> Image.Image:
    """Largest centred square, then resized, by default with BOX when shrinking by a whole factor, else bicubic.

    Raises InputError unless ``image`` is a PIL image and ``size`` a positive integer.
    """
    _check_image(image)
    _check_size(size)
    short = min(image.size)
    left, top = (image.width - short) // 2, (image.height - short) // 2
    square = image.crop((left, top, left + short, top + short))
    if resample is None:
        resample = Image.Resampling.BOX if short % size == 0 else Image.Resampling.BICUBIC
    return square.resize((size, size), resample)


def adm_crop(image: Image.Image, size: int, resample: Image.Resampling = Image.Resampling.BICUBIC) -> Image.Image:
    """The crop of ADM's evaluation, which the MSDD authors' code uses (docs/spec.md#evaluation).

    Halved by box means while the shorter side is at least twice ``size``, then resized until it is ``size``; the pixels
    in the middle. Raises InputError as ``center_crop`` does.
    """
    _check_image(image)
    _check_size(size)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((max(size, round(image.width * scale)), max(size, round(image.height * scale))), resample)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _check_size(size: object) -> None:
    if isinstance(size, bool) or not isinstance(size, SupportsIndex) or operator.index(size) < 1:
        raise InputError(f"size must be a positive integer, got {size!r}")


CROP_DESCRIPTION = "largest centred square, resized by BOX (whole factors) or antialiased bicubic"


def to_tensor(image: Image.Image) -> Tensor:
    """RGB image to float32 (3, H, W) in [-1, 1]. Raises InputError for anything else than an RGB image of PIL."""
    _check_image(image)
    if image.mode != "RGB":
        raise InputError(f"image must be RGB, as load_image gives it, got mode {image.mode}")
    array = np.asarray(image, dtype=np.uint8).copy()
    return torch.from_numpy(array).permute(2, 0, 1).float().div_(127.5).sub_(1.0)


def load_batch(files: Sequence[Path], size: int) -> Tensor:
    """Centre crops of image files: float32 (len(files), 3, size, size) in [-1, 1]."""
    return torch.stack([to_tensor(center_crop(load_image(f), size)) for f in files])


def to_image(x: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] to an RGB image. Raises InputError for another shape or an integer dtype."""
    if not isinstance(x, Tensor) or x.ndim != 3 or x.shape[0] != 3 or not x.is_floating_point():
        got = f"{tuple(x.shape)} of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise InputError(f"x must be a floating-point tensor (3, H, W), got {got}")
    return Image.fromarray(to_uint8(x).permute(1, 2, 0).cpu().numpy())


def find_image_files(source: str | os.PathLike[str], required: bool = True) -> list[Path]:
    """Image files of a folder (recursive, sorted), or the one file.

    Linked folders are followed, each folder is searched once. Hidden files and folders and macOS's ``__MACOSX`` are
    left out; images of formats that are not searched for (OTHER_SUFFIXES) are counted in a warning of the log. Raises
    InputError if there is none.
    """
    path = as_path("source", source)
    try:
        path.stat()
    except FileNotFoundError as e:
        raise InputError(f"{path} is neither a file nor a folder") from e
    except OSError as e:
        raise InputError(f"{path} is neither a file nor a folder: {e.strerror or e}") from e
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise InputError(f"{path} is neither a file nor a folder")
    found = list(walk(path))
    files = sorted(p for p in found if is_searched(p.relative_to(path)) and p.is_file())
    others = passed_over(p.relative_to(path) for p in found)
    if not files and required:
        raise InputError(no_images(others, f" found in {path}"))
    report_passed_over(path, others)
    return files


def walk(folder: Path) -> Iterator[Path]:
    """Every file below a folder. Linked folders are followed; a folder that is reached twice is searched once."""
    seen: set[tuple[int, int]] = set()

    def failed(error: OSError) -> None:
        _log.warning("%s cannot be searched: %s", error.filename, error.strerror)

    for root, folders, files in os.walk(folder, onerror=failed, followlinks=True):
        found = os.stat(root)
        if (found.st_dev, found.st_ino) in seen:
            folders.clear()
            continue
        seen.add((found.st_dev, found.st_ino))
        folders[:] = sorted(f for f in folders if not _is_hidden(f))
        yield from (Path(root, f) for f in files)


def is_searched(name: PurePath, suffixes: frozenset[str] = IMAGE_SUFFIXES) -> bool:
    """Whether a search takes a file of this name, relative to where it started."""
    return name.suffix.lower() in suffixes and not any(map(_is_hidden, name.parts))


def _is_hidden(part: str) -> bool:
    """macOS puts the companions of its files, ``._NAME``, beside them or into a folder ``__MACOSX``."""
    return (part.startswith(".") and part != "..") or part == "__MACOSX"


def passed_over(names: Iterable[PurePath]) -> Counter[str]:
    """How many names that are not hidden have each of OTHER_SUFFIXES."""
    return Counter(n.suffix.lower() for n in names if is_searched(n, OTHER_SUFFIXES))


def no_images(others: Counter[str], where: str = "") -> str:
    """The words of an error: nothing that a search takes, and what it passed over."""
    more = f"; passed over: {_counts(others)}" if others else ""
    return f"no images ({', '.join(sorted(IMAGE_SUFFIXES))}){where}{more}"


def report_passed_over(source: object, others: Counter[str]) -> None:
    """A line in the log, if any file was passed over for its suffix."""
    if others:
        _log.warning("%s: passed over %s; read are %s", source, _counts(others), ", ".join(sorted(IMAGE_SUFFIXES)))


def _counts(others: Counter[str]) -> str:
    return ", ".join(f"{count} {suffix}" for suffix, count in sorted(others.items()))


def require_picture_path(path: str | os.PathLike[str]) -> None:
    """Fail before the work: InputError if ``path`` has no suffix of a picture or cannot be written."""
    _check_suffix(as_path("output", path))
    require_writable(path)


def save_image(image: Image.Image, path: str | os.PathLike[str]) -> None:
    """Write a picture atomically; the suffix chooses the format. Raises InputError if it cannot be written."""
    _check_image(image)
    _check_suffix(as_path("output", path))
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
