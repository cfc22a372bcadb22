"""An offline job: a file of latent tokens to a folder of pictures, as fast as the engine goes.

    msdd-fast encode photos/ -o latents.safetensors
    python examples/offline.py latents.safetensors out/ [--checkpoint msdd-nano-256] [--batch-size 8]

Reading, decoding and writing overlap: ``decode_many`` fetches the next latents while this batch decodes, and a thread
pool compresses the pictures.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

import msdd_fast
from msdd_fast.io.latents import load_latents


def write(image: Tensor, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("latents", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--checkpoint", default="msdd-nano-256")
    parser.add_argument("--batch-size", type=int, default=8)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = msdd_fast.Tokenizer.from_pretrained(args.checkpoint).to(device)
    engine = msdd_fast.accelerate(tokenizer, batch_sizes=(args.batch_size,))
    engine.warmup()
    latents = load_latents(args.latents)

    def parts() -> Iterator[Tensor]:
        yield from latents.z.split(args.batch_size)

    names = iter(latents.names)
    begin = time.perf_counter()
    with ThreadPoolExecutor() as writers:
        jobs = []
        for images in engine.decode_many(parts(), seed=0, out_dtype=torch.uint8):
            for image in images.cpu():
                jobs.append(writers.submit(write, image, args.output / f"{next(names)}.png"))
        for job in jobs:
            job.result()  # raises what went wrong in a writer
    seconds = time.perf_counter() - begin
    print(f"{len(jobs)} pictures in {seconds:.2f} s, {len(jobs) / seconds:.1f} img/s, written to {args.output}")


if __name__ == "__main__":
    main()
