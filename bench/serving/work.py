"""The requests of a load test, and what their answers must be."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import urlencode

import numpy as np
import torch
from PIL import Image

from msdd_fast.bench.serving.client import Response
from msdd_fast.engine import FastDecoder

LATENTS = 64
FORMATS = ("png", "jpeg", "webp")
# A batch of another size may round differently, which can move a pixel to the next of the 256 levels.
TOLERANCE = 1


class Request(NamedTuple):
    """Path with the query, body, and the uint8 images (n, H, W, 3) that must come."""

    target: str
    body: bytes
    images: np.ndarray[Any, Any]

    def fault(self, response: Response) -> str | None:
        """What is wrong with the answer, if anything is."""
        if response.status != 200:
            return f"status {response.status}: {response.body[:200]!r}"
        kind = response.headers["content-type"]
        if kind.startswith("image/"):
            got = np.asarray(Image.open(io.BytesIO(response.body)).convert("RGB"))[None]
            lossless = kind == "image/png"
        else:
            got = np.frombuffer(response.body, np.uint8).reshape(json.loads(response.headers["shape"]))
            lossless = True
        if got.shape != self.images.shape:
            return f"images {got.shape} instead of {self.images.shape}"
        off = int(np.abs(got.astype(np.int16) - self.images).max())
        return f"a pixel is off by {off}" if lossless and off > TOLERANCE else None


def requests(engine: FastDecoder, count: int, images: int = 1, **query: str) -> list[Request]:
    """``count`` requests of ``images`` random latents each, by default for raw uint8 images."""
    shape = (images, *engine.family.example)
    found = []
    for i in range(count):
        z = torch.randn(shape, generator=torch.Generator().manual_seed(i))
        expected = engine.decode(z, i, out_dtype=torch.uint8).cpu().permute(0, 2, 3, 1).numpy()
        asked = {"output_type": "pt", "partial_postprocess": "true", **query} if "image_format" not in query else query
        text = urlencode({"shape": shape, "dtype": "float32", "seed": i, **asked}, doseq=True)
        found.append(Request(f"/decode?{text}", z.numpy().tobytes(), expected))
    return found


def bad_requests(engine: FastDecoder) -> Iterator[tuple[str, str, bytes, int]]:
    """Endlessly: what is bad, target, body and the status that it must get; 0 for one that is cut off."""
    shape = (1, *engine.family.example)
    z = torch.zeros(shape)
    good = _target(shape)
    body = z.numpy().tobytes()
    nan = torch.full(shape, float("nan")).numpy().tobytes()
    rng = np.random.default_rng(0)
    while True:
        yield "noise as safetensors", "/decode", rng.bytes(int(rng.integers(0, 4096))), 422
        yield "a huge safetensors header", "/decode", b"\xff" * 8 + rng.bytes(64), 422
        yield "body too short", good, body[:-4], 422
        yield "body too long", good, body + b"1234", 422
        yield "no body", good, b"", 422
        yield "NaN", good, nan, 422
        yield "wrong shape", _target((1, *(s + 1 for s in shape[1:]))), body, 422
        yield "shape of zeros", _target((0, *shape[1:])), b"", 422
        yield "negative shape", _target((-1, *shape[1:])), body, 422
        yield "huge shape", _target((2**40, *shape[1:])), body, 422
        yield "integer latents", _target(shape, dtype="int32"), body, 422
        yield "shape without dtype", f"/decode?{urlencode({'shape': shape}, doseq=True)}", body, 422
        yield "unknown parameter", f"{good}&steps=3", body, 422
        yield "negative seed", f"{good}&seed=-1", body, 422
        yield "guidance of NaN", f"{good}&cfg_scale=nan", body, 422
        yield "scaled to infinity", f"{good}&scaling_factor=1e-45", np.full(shape, 1e30, np.float32).tobytes(), 422
        yield "unknown format", f"{good}&output_type=pil&image_format=gif", body, 422
        yield "another method", "/health", body, 405
        yield "another path", "/decoder", body, 404
        yield "client leaves", good, body, 0


def _target(shape: tuple[int, ...], dtype: str = "float32") -> str:
    return f"/decode?{urlencode({'shape': shape, 'dtype': dtype}, doseq=True)}"
