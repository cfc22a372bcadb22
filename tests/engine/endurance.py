"""Many decodes with engines built and dropped: memory, threads and open files stay where they were.

    python -m tests.engine.endurance [DECODES]

A process of its own, so that nobody else's memory is counted.
"""

import gc
import os
import random
import sys

import torch

from msdd_fast import accelerate
from tests.engine.conftest import _configs
from tests.perturbed import perturbed

DECODES_OF_AN_ENGINE = 10
MAX_GROWTH = 24 * 2**20  # bytes; one engine of a tiny model that stayed every 100 decodes would be twice this


def state():
    """(resident bytes, threads, open files) of this process."""
    gc.collect()
    with open("/proc/self/statm") as f:
        resident = int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resident, len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))


def decodes(tokenizers, count, rng):
    """``count`` decodes of every kind, each ten with an engine of their own."""
    for i in range(count):
        if i % DECODES_OF_AN_ENGINE == 0:
            tok = rng.choice(tokenizers)
            spatial = tok.config.family == "ssdd"
            engine = accelerate(
                tok,
                dtype=rng.choice([torch.float32, torch.bfloat16]),
                graphs=rng.choice(["auto", False]),
                batch_sizes=rng.choice([1, 2, 8]),
                steps=rng.choice([None, 2]),
                validate=rng.random() < 0.2,
            )
        z = torch.randn(rng.choice([1, 1, 2, 3]), *((4, 8, 8) if spatial else tok.config.latent_shape[-2:]))
        kind = rng.randrange(5)
        options = {"out_dtype": rng.choice([torch.float32, torch.uint8])}
        if not spatial and rng.random() < 0.3:
            options["cfg_scale"] = 1.5
        if kind == 0:
            list(engine.stream(z, i, **options))
        elif kind == 1:
            next(engine.stream(z, i, **options))  # and no more of it
        elif kind == 2:
            list(engine.decode_many([z, z], i, **options))
        elif kind == 3:
            next(iter(engine.decode_many(iter([z] * 5), i, **options)))
        else:
            engine.decode(z, i, **options)


def main(count=3000):
    rng, count = random.Random(0), int(count)
    tokenizers = [*map(perturbed, _configs().values()), perturbed("tiny-ssdd")]
    decodes(tokenizers, max(count // 5, 100), rng)
    before = state()
    faults = []
    for part in range(4):
        decodes(tokenizers, count // 5, rng)
        now = state()
        print(f"{(part + 2) * (count // 5)} decodes: {now[0] / 2**20:.1f} MiB, {now[1]} threads, {now[2]} files")
    if now[0] > before[0] + MAX_GROWTH:
        faults.append(f"memory grew from {before[0]} to {now[0]} bytes")
    if now[1] > before[1]:
        faults.append(f"threads grew from {before[1]} to {now[1]}")
    if now[2] > before[2]:
        faults.append(f"open files grew from {before[2]} to {now[2]}")
    print("\n".join(faults), file=sys.stderr, end="")
    return len(faults) > 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
