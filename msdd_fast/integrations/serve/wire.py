"""What goes over the wire: latents in, images out.

The parameters are those of ``diffusers.utils.remote_decode``: the body is the raw tensor, ``shape`` and ``dtype`` say
what it is, ``output_type`` and ``image_format`` what comes back. Without ``shape`` the body is a safetensors file.
"""

from __future__ import annotations

import io
import json
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from msdd_fast.diffusion.checks import check_finite, check_latents
from msdd_fast.engine import FastDecoder
from msdd_fast.errors import InputError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
SAFETENSORS_HEAD = 65_536
"""Bytes that the header of a safetensors body may have on top of the tensor."""
FORMATS = {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP"}

OutputType = Literal["pil", "pt"]
ImageFormat = Literal["png", "jpg", "jpeg", "webp"]


class Answer(NamedTuple):
    """The body of a response, its media type and further headers."""

    body: bytes
    media_type: str
    headers: dict[str, str]


@dataclass(frozen=True)
class Output:
    """How a client wants its images; see ``remote_decode``.

    Attributes:
        kind: "pil", an image file, or "pt", a raw tensor.
        image_format: of "pil".
        quality: of JPEG and WebP, 1 to 100.
        dtype: of "pt", unless it is quantised.
        quantised: of "pt": uint8 (n, H, W, 3) instead of floats (n, 3, H, W) in [-1, 1].
    """

    kind: OutputType
    image_format: ImageFormat
    quality: int
    dtype: torch.dtype
    quantised: bool

    @property
    def engine_dtype(self) -> torch.dtype:
        """What the engine decodes to."""
        return torch.uint8 if self.kind == "pil" or self.quantised else self.dtype

    def encode(self, images: Tensor) -> Answer:
        """The response of images (n, 3, H, W) of ``engine_dtype`` on the CPU."""
        if self.kind == "pil":
            name = FORMATS[self.image_format]
            file = io.BytesIO()
            options = {} if name == "PNG" else {"quality": self.quality}
            Image.fromarray(np.ascontiguousarray(images[0].permute(1, 2, 0).numpy())).save(file, name, **options)
            return Answer(file.getvalue(), f"image/{name.lower()}", {})
        # Copied by NumPy: PyTorch's threads belong to the engine, and a second team would fight it for the cores.
        if self.quantised:
            body = images.permute(0, 2, 3, 1).numpy().tobytes()
            shape = [len(images), *images.shape[2:], images.shape[1]]
        else:
            body, shape = images.flatten().view(torch.uint8).numpy().tobytes(), list(images.shape)
        headers = {"shape": json.dumps(shape), "dtype": str(images.dtype).removeprefix("torch.")}
        return Answer(body, "application/octet-stream", headers)


def read_latents(body: bytearray, shape: list[int] | None, dtype: str | None) -> Tensor:
    """The latents (n, ...) of a body: raw with ``shape`` and ``dtype``, a safetensors file without both.

    Raises InputError for a body that does not fit, and for other dtypes than DTYPES.
    """
    if shape is None and dtype is None:
        return _read_safetensors(bytes(body))
    if shape is None or dtype is None:
        raise InputError("shape and dtype must be given together (neither: the body is a safetensors file)")
    if dtype not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if not 1 <= len(shape) <= 8 or min(shape) < 1:
        raise InputError(f"shape must be 1 to 8 sides of at least 1, got {shape}")
    size = math.prod(shape) * DTYPES[dtype].itemsize
    if len(body) != size:
        raise InputError(f"the body must have {size} bytes for {dtype} {shape}, got {len(body)}")
    return torch.frombuffer(body, dtype=DTYPES[dtype]).reshape(shape)


def _read_safetensors(body: bytes) -> Tensor:
    try:
        tensors = load(body)
    except (SafetensorError, ValueError, KeyError, RuntimeError, TypeError) as e:
        raise InputError(f"the body is not a safetensors file (or shape and dtype are missing): {e}") from e
    if "latents" not in tensors and len(tensors) != 1:
        raise InputError(f"the body must hold one tensor, or one called 'latents', got {len(tensors)}")
    z = tensors.get("latents", next(iter(tensors.values())))
    if z.dtype not in DTYPES.values():
        raise InputError(f"latents must be one of {', '.join(DTYPES)}, got {str(z.dtype).removeprefix('torch.')}")
    return z


class TooLargeError(Exception):
    """A request is beyond a limit; the message says which."""


def prepare(
    engine: FastDecoder, z: Tensor, scaling: float | None, shift: float | None, max_images: int, max_pixels: int
) -> Tensor:
    """Latents as the engine takes them: checked, ``z / scaling + shift``, in the engine's dtype.

    Raises InputError for what the engine would refuse, and for NaN and Inf; TooLargeError beyond the limits.
    """
    check_latents(z, *engine.config.latent_shape)
    if not 1 <= len(z) <= max_images:
        raise TooLargeError(f"a request must hold 1 to {max_images} images, got {len(z)}")
    height, width = size_of(engine, z)
    if height * width > max_pixels:
        raise TooLargeError(f"images must have at most {max_pixels} pixels, got {height} x {width}")
    for name, value in (("scaling_factor", scaling), ("shift_factor", shift)):
        if value is not None and (not math.isfinite(value) or (name == "scaling_factor" and value == 0)):
            raise InputError(f"{name} must be finite{' and not 0' if name == 'scaling_factor' else ''}, got {value}")
    if scaling is not None or shift is not None:
        z = z if z.dtype == torch.float64 else z.float()
        z = z / (1.0 if scaling is None else scaling) + (0.0 if shift is None else shift)
    z = z.to(engine.dtype)
    check_finite("latents", z)
    return z


def size_of(engine: FastDecoder, z: Tensor) -> tuple[int, int]:
    """Height and width of the images of latents (n, ...)."""
    _, height, width = engine.config.stage_shapes(z.shape)[-1]
    return height, width


def largest_body(engine: FastDecoder, max_images: int, max_pixels: int) -> int:
    """Bytes of the largest request: float64 latents of ``max_images`` images of ``max_pixels``."""
    example = engine.family.example
    pixels = math.prod(engine.config.stage_shapes((1, *example))[-1][1:])
    per_image = math.prod(example)
    if None in engine.config.latent_shape:  # images of any height and width
        per_image = math.ceil(per_image * max(1.0, max_pixels / pixels))
    return 8 * per_image * max_images + SAFETENSORS_HEAD
