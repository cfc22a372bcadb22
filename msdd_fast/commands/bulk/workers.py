"""What a worker does with a unit of work: read, compute, write. A unit is written whole or not at all.

Units are rows of Ray Data, {"unit": number, "work": JSON}; so are their results. An error that a user can do something
about is a result, too: {"error": the message}.
"""

from __future__ import annotations

import io
import json
import os
import socket
import tarfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from msdd_fast.commands.bulk.sources import Piece, Ref, load_pieces, load_ref
from msdd_fast.commands.shards import EncodeJob
from msdd_fast.diffusion.checks import first_not_finite
from msdd_fast.errors import InputError, MsddFastError
from msdd_fast.integrations.ray.stages import Decoder, Rows, pick_device
from msdd_fast.io.files import atomic_write
from msdd_fast.io.images import save_image
from msdd_fast.io.latents import save_latents
from msdd_fast.io.signals import raise_if_received, remembered_signals
from msdd_fast.tokenizer import Tokenizer


class Unit(NamedTuple):
    """Some consecutive images of all, and the file or folder that their results go to."""

    first: int
    images: int
    output: str
    names: list[str]
    inputs: list[list[Any]]
    """Of ``Ref`` or ``Piece``."""


class Worker(ABC):
    """Does units; subclasses say how. One lives in every Ray worker."""

    def __call__(self, rows: Rows) -> Rows:
        with remembered_signals():  # by Ray's handler; a worker that should end must not publish its unit
            results = [self._result(int(n), work) for n, work in zip(rows["unit"], rows["work"], strict=True)]
        return {"unit": rows["unit"], "result": np.array([json.dumps(r) for r in results], dtype=object)}

    def _result(self, number: int, work: str) -> dict[str, Any]:
        unit, begin = Unit(*json.loads(work)), time.monotonic()
        head = {"unit": number, "first": unit.first, "count": unit.images, "output": unit.output}
        try:
            found = self.do(unit)
            raise_if_received()
        except MsddFastError as e:
            raise_if_received()  # rather than what came of it
            return {**head, "error": " ".join(str(e).split())}
        seconds = round(time.monotonic() - begin, 3)
        return {**head, **found, "worker": f"{socket.gethostname()}:{os.getpid()}", "seconds": seconds}

    @abstractmethod
    def do(self, unit: Unit) -> dict[str, Any]:
        """Write the unit's results; what the manifest shall say of it besides."""


class EncodeWorker(Worker):
    """Images to one file of latents, as ``msdd-fast encode`` writes its shards."""

    def __init__(
        self, checkpoint: str, device: str | None, threads: int | None, dtype: torch.dtype, batch: int
    ) -> None:
        self.tokenizer = Tokenizer.from_pretrained(checkpoint).to(pick_device(device, threads))
        self.dtype, self.batch = dtype, batch

    def do(self, unit: Unit) -> dict[str, Any]:
        refs = [Ref(*r) for r in unit.inputs]
        job = EncodeJob(self.tokenizer, refs, unit.names, self.dtype, self.batch, load_ref)
        latents = job.encode(range(len(refs)))
        save_latents(latents, unit.output)
        return {"shape": list(latents.z.shape), "unreadable": [[str(f), why] for f, why in job.reader.unreadable]}


class DecodeWorker(Worker):
    """Latents to PNG files in a folder, or in one WebDataset shard if the unit's output ends in .tar."""

    def __init__(self, batch: int, **options: Any) -> None:
        self.decoder = Decoder(batch_size=batch, **options)

    def do(self, unit: Unit) -> dict[str, Any]:
        z = load_pieces([Piece(*p) for p in unit.inputs])
        first = first_not_finite(z)
        if first is not None:
            name = unit.names[first]
            raise InputError(f"latents must be finite, got NaN or Inf in item {unit.first + first} ({name})")
        images = self._images(z, unit)
        if unit.output.endswith(".tar"):
            write_shard(unit.output, unit.names, images)
            return {}
        for name, image in zip(unit.names, images, strict=True):
            save_image(image, Path(unit.output, f"{name}.png"))
        return {}

    def _images(self, z: Tensor, unit: Unit) -> Iterator[Image.Image]:
        index = list(range(unit.first, unit.first + unit.images))
        for batch in self.decoder.decode(z, index):
            for x in batch:
                yield Image.fromarray(np.ascontiguousarray(x.permute(1, 2, 0).numpy()))


def write_shard(path: str, names: Sequence[str], images: Iterator[Image.Image]) -> None:
    """A tar file of PNG files, the same bytes for the same images. Written whole or not at all."""
    with atomic_write(path) as temporary, tarfile.open(temporary, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, image in zip(names, images, strict=True):
            file = io.BytesIO()
            image.save(file, "PNG")
            member = tarfile.TarInfo(f"{name}.png")
            member.size = len(file.getvalue())
            member.mode = 0o644
            file.seek(0)
            tar.addfile(member, file)
