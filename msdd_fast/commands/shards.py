"""Encoding a set of images to shards of latents: what `encode` does itself, and what its workers on Ray do."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from msdd_fast.commands.common import chunks, device_of
from msdd_fast.commands.inputs import ImageReader, encode, require_finite
from msdd_fast.commands.record import ENCODE_RECORD, digest
from msdd_fast.errors import InputError
from msdd_fast.io.images import load_image
from msdd_fast.io.latents import Latents
from msdd_fast.io.safetensors import open_safetensors
from msdd_fast.tokenizer import Tokenizer

RECORD = ENCODE_RECORD


class EncodeJob:
    """What is to be encoded, and how: ``load`` makes an image of each of ``files``."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        files: Sequence[object],
        names: list[str],
        dtype: torch.dtype,
        batch_size: int,
        load: Callable[[Any], Image.Image] = load_image,
        shown: tqdm[Any] | None = None,
    ) -> None:
        self.tokenizer, self.files, self.names = tokenizer, files, names
        self.dtype, self.batch_size = dtype, batch_size
        self.reader = ImageReader(tokenizer.config.image_size, load)
        self.bar = tqdm(total=len(files), disable=True) if shown is None else shown

    def encode(self, index: range, limit: int | None = None) -> Latents:
        """The latents of these files, as far as they can be read. Raises InputError if they exceed ``limit`` bytes."""
        parts: list[Tensor] = []
        names: list[str] = []
        for part in chunks(len(index), self.batch_size):
            files = [self.files[index[i]] for i in part]
            read, images = self.reader.read(files)
            z = encode(self.tokenizer, images.to(device_of(self.tokenizer)), [files[i] for i in read])
            z = z.to("cpu", self.dtype)
            require_finite(f"rounding to {str(self.dtype).removeprefix('torch.')}", z, [files[i] for i in read])
            parts.append(z)
            names += [self.names[index[part.start + i]] for i in read]
            needed = len(index) * z[:1].nbytes
            if limit is not None and needed > limit:
                raise InputError(
                    f"--out must be a folder for latents of more than {limit / 2**30:g} GiB, got one file for "
                    f"{needed / 2**30:.1f} GiB"
                )
            self.bar.update(len(part))
        return Latents(torch.cat(parts), names)


def shard_paths(folder: Path, count: int, size: int) -> list[tuple[Path, range]]:
    """Every shard of ``count`` images, and which images are in it."""
    return [(folder / f"{i:06d}.safetensors", part) for i, part in enumerate(chunks(count, size))]


def shards_record(tokenizer: Tokenizer, names: list[str], dtype: torch.dtype, size: int) -> dict[str, object]:
    """What the shards of a folder depend on."""
    return {
        "encoder": digest("", tokenizer.encoder.state_dict()),
        "image_size": tokenizer.config.image_size,
        "dtype": str(dtype).removeprefix("torch."),
        "shard_size": size,
        "images": len(names),
        "names": digest(json.dumps(names)),
    }


def names_in(path: Path) -> list[str] | None:
    """The names in a shard; None if there is no such file, or it does not load."""
    try:
        with open_safetensors(path) as f:
            if "latents" not in f.keys():  # noqa: SIM118 (not a dict)
                return None
            names = json.loads((f.metadata() or {}).get("names", "null"))
    except (OSError, ValueError, SafetensorError):
        return None
    return names if isinstance(names, list) and all(isinstance(n, str) for n in names) else None
