"""Batches of rows through one engine that lives as long as its worker."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from msdd_fast.diffusion.checks import as_int, check_finite, check_latents
from msdd_fast.engine import FastDecoder, accelerate
from msdd_fast.errors import InputError
from msdd_fast.tokenizer import Tokenizer

Rows = dict[str, npt.NDArray[Any]]


def pick_device(device: str | None, threads: int | None) -> torch.device:
    """Where a worker computes: by default on the GPU that Ray gave it, else on the CPU, with this many threads."""
    if threads is not None:
        torch.set_num_threads(as_int("threads", threads, 1))
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


class Decoder:
    """Rows with ``latents`` and ``index`` get ``image``, uint8 (H, W, 3), in place of ``latents``.

    Image of index i has the noise of ``seed + i``, whichever worker decodes it and in whatever batch.

    Args:
        checkpoint: what ``Tokenizer.from_pretrained`` takes; every node must see it.
        batch_size: of the engine. With the same batches of rows, results have the same bits; in other batches they
            agree up to rounding.
        seed, steps, cfg_scale, dtype: as of ``accelerate`` and ``FastDecoder.decode``.
        device: default: the GPU that Ray gave this worker, else the CPU.
        threads: of PyTorch in this worker; default: what Ray has set, which is ``num_cpus``.
    """

    def __init__(
        self,
        checkpoint: str | os.PathLike[str] = "msdd-nano-256",
        *,
        batch_size: int = 8,
        seed: int = 0,
        steps: int | None = None,
        cfg_scale: float | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: str | None = None,
        threads: int | None = None,
    ) -> None:
        tokenizer = Tokenizer.from_pretrained(checkpoint).to(pick_device(device, threads))
        self.batch_size, self.seed = as_int("batch_size", batch_size, 1), as_int("seed", seed, 0)
        self.engine: FastDecoder = accelerate(
            tokenizer, dtype=dtype, steps=steps, cfg_scale=cfg_scale, batch_sizes=(self.batch_size,), validate=True
        )

    def __call__(self, rows: Rows) -> Rows:
        """Raises InputError for latents that the model does not take, and for NaN and Inf."""
        z = torch.from_numpy(stacked("latents", rows))
        images = torch.cat(list(self.decode(z, column("index", rows).tolist())))
        others = {name: values for name, values in rows.items() if name != "latents"}
        return {**others, "image": images.permute(0, 2, 3, 1).contiguous().numpy()}

    def decode(self, z: Tensor, index: list[int]) -> Iterator[Tensor]:
        """uint8 (n, 3, H, W) on the CPU for every ``batch_size`` latents; ``index`` has one global index for each."""
        check_latents(z, *self.engine.config.latent_shape)
        check_finite("latents", z)
        for first in range(0, len(z), self.batch_size):
            part = slice(first, first + self.batch_size)
            seeds = [self.seed + i for i in index[part]]
            yield self.engine.decode(z[part], seeds, out_dtype=torch.uint8).cpu()


class Encoder:
    """Rows with ``image``, uint8 (H, W, 3) of the size that the model takes, get ``latents`` in place of it.

    Args:
        checkpoint, device, threads: as of ``Decoder``.
        batch_size: images at a time.
    """

    def __init__(
        self,
        checkpoint: str | os.PathLike[str] = "msdd-nano-256",
        *,
        batch_size: int = 8,
        device: str | None = None,
        threads: int | None = None,
    ) -> None:
        self.tokenizer = Tokenizer.from_pretrained(checkpoint).to(pick_device(device, threads))
        self.batch_size = as_int("batch_size", batch_size, 1)

    def __call__(self, rows: Rows) -> Rows:
        """Latents are float32. Raises InputError for images that the model does not take."""
        images = stacked("image", rows)
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
            raise InputError(f"image must be uint8 (H, W, 3) in every row, got {images.dtype} {images.shape[1:]}")
        x = torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)
        parts = [self.tokenizer.encode(part.to(self.tokenizer.device)).cpu() for part in x.split(self.batch_size)]
        others = {name: values for name, values in rows.items() if name != "image"}
        return {**others, "latents": torch.cat(parts).numpy()}


def column(name: str, rows: Rows) -> npt.NDArray[Any]:
    """A column. Raises InputError if there is none."""
    if name not in rows:
        raise InputError(f"rows must have a column {name!r}, got {', '.join(rows) or 'none'}")
    return np.asarray(rows[name])


def stacked(name: str, rows: Rows) -> npt.NDArray[Any]:
    """A column of arrays as one array. Raises InputError if they differ in shape."""
    values = column(name, rows)
    if values.dtype != object:
        return np.array(values)  # Ray's are read-only
    shapes = sorted({np.shape(v) for v in values})
    if len(shapes) != 1:
        raise InputError(f"{name} must have one shape in a batch, got {' and '.join(map(str, shapes)) or 'no rows'}")
    return np.stack(list(values))
