"""Ask a decoding service for a picture, over HTTP or inside a program of your own.

    pip install 'msdd-fast[serve]'
    msdd-fast serve &                       # the service; docs/serving.md has its options and limits
    python examples/service.py [--url http://127.0.0.1:8000] [--out decoded.png]

Sends one random latent image of the service's model and keeps what comes back. ``Batcher`` has the same micro-batching
for an asyncio program that needs no HTTP.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import urllib.request
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from msdd_fast import FastDecoder
from msdd_fast.diffusion.noise import resolve_seeds
from msdd_fast.integrations import serve


class Batcher:
    """Decodes single latents in the batches that they arrive in: ``await decode(z, seed)`` while ``run`` runs."""

    def __init__(self, engine: FastDecoder, max_batch: int, max_wait: float) -> None:
        """``max_wait``: seconds that the first of a batch waits for others."""
        self.engine = engine
        self._batcher = serve.Batcher(engine, max_wait)
        self._batcher.max_batch = min(max_batch, self._batcher.max_batch)
        self._batcher.start()

    async def decode(self, z: Tensor, seed: int) -> Tensor:
        """uint8 (3, R, R) of one latent image. Raises InputError before it shares a batch with others."""
        self.engine.inputs(z[None], seed)
        images = self._batcher.submit(z[None], resolve_seeds(seed, 1))
        return (await asyncio.wrap_future(images))[0]

    async def run(self) -> None:
        """Serve until cancelled; what has been accepted is decoded first."""
        try:
            await asyncio.Event().wait()
        finally:
            self._batcher.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--out", type=Path, default=Path("decoded.png"))
    args = parser.parse_args()
    with urllib.request.urlopen(f"{args.url}/health") as answer:
        shape = [n or 32 for n in json.load(answer)["latents"]]  # null stands for a side that is free
    body = save({"latents": torch.randn(1, *shape)})
    request = urllib.request.Request(f"{args.url}/decode?image_format=png&seed=0", body)
    with urllib.request.urlopen(request) as answer:
        args.out.write_bytes(answer.read())
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
