"""A low-latency decoding service in one process: asyncio micro-batching over one engine.

    python examples/service.py [--checkpoint msdd-nano] [--requests 200] [--rate 20] [--max-batch 8] [--max-wait-ms 5]

Requests arrive at random times (Poisson). The batcher takes what has arrived, up to --max-batch, and waits at most
--max-wait-ms for more; while one batch decodes, the next one gathers. Prints p50, p95 and p99 of the time from a
request to its image. Replace ``arrivals`` by your web framework's handler: it awaits ``Batcher.decode``.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

import msdd_fast


class Batcher:
    """Decodes single latents in batches. Image i has its own seed, so batching changes no image."""

    def __init__(self, engine: msdd_fast.FastDecoder, max_batch: int, max_wait: float) -> None:
        self.engine, self.max_batch, self.max_wait = engine, max_batch, max_wait
        self.sizes: list[int] = []
        self._queue: asyncio.Queue[tuple[Tensor, int, asyncio.Future[Tensor]]] = asyncio.Queue()
        # One thread: the device does one batch at a time, and the event loop stays free to collect the next.
        self._executor = ThreadPoolExecutor(1)

    async def decode(self, z: Tensor, seed: int) -> Tensor:
        """uint8 (3, R, R) of one latent image (128, 32).

        A request that cannot be decoded is refused here, before it shares a batch with others.
        """
        if not isinstance(z, Tensor):
            raise msdd_fast.errors.InputError(f"z must be a torch.Tensor, got {type(z).__name__}")
        self.engine.inputs(z[None], seed)
        done: asyncio.Future[Tensor] = asyncio.get_running_loop().create_future()
        await self._queue.put((z, seed, done))
        return await done

    async def run(self) -> None:
        """Serve until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self._queue.get()]
            deadline = loop.time() + self.max_wait
            while len(batch) < self.max_batch and (left := deadline - loop.time()) > 0:
                try:
                    batch.append(await asyncio.wait_for(self._queue.get(), left))
                except asyncio.TimeoutError:
                    break
            self.sizes.append(len(batch))
            try:
                images = await loop.run_in_executor(self._executor, self._decode, batch)
            except Exception as error:  # one bad batch must not end the service
                for _, _, done in batch:
                    if not done.cancelled():
                        done.set_exception(error)
                continue
            for image, (_, _, done) in zip(images, batch, strict=True):
                if not done.cancelled():
                    done.set_result(image)

    def _decode(self, batch: list[tuple[Tensor, int, asyncio.Future[Tensor]]]) -> Tensor:
        z, seeds = torch.stack([b[0] for b in batch]), [b[1] for b in batch]
        return self.engine.decode(z, seeds, out_dtype=torch.uint8).cpu()


async def arrivals(batcher: Batcher, latents: Tensor, rate: float) -> list[float]:
    """Ask for every latent image at Poisson times; seconds from request to image."""

    async def ask(i: int) -> float:
        begin = time.perf_counter()
        await batcher.decode(latents[i], seed=i)
        return time.perf_counter() - begin

    server = asyncio.create_task(batcher.run())
    waiting = []
    for i in range(len(latents)):
        waiting.append(asyncio.create_task(ask(i)))
        await asyncio.sleep(random.expovariate(rate))
    seconds = await asyncio.gather(*waiting)
    server.cancel()
    return list(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", default="msdd-nano")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--rate", type=float, default=20.0, help="requests a second")
    parser.add_argument("--max-batch", type=int, default=8)
    parser.add_argument("--max-wait-ms", type=float, default=5.0)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = msdd_fast.Tokenizer.from_pretrained(args.checkpoint).to(device)
    engine = msdd_fast.accelerate(tokenizer, batch_sizes=sorted({1, args.max_batch}))
    engine.warmup()
    config = tokenizer.config
    latents = torch.randn(args.requests, config.num_latent_tokens, config.latent_dim)
    batcher = Batcher(engine, args.max_batch, args.max_wait_ms / 1e3)
    seconds = sorted(asyncio.run(arrivals(batcher, latents, args.rate)))
    quantiles = statistics.quantiles(seconds, n=100)
    print(f"{len(seconds)} requests at {args.rate:g}/s, mean batch {statistics.mean(batcher.sizes):.1f}")
    print("  ".join(f"p{p} {quantiles[p - 1] * 1e3:.1f} ms" for p in (50, 95, 99)))


if __name__ == "__main__":
    main()
