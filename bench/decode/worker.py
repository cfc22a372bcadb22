"""One side of ``msdd-fast bench --compare REVISION``: measures what it is told to, one call at a time.

    worker.py DEVICE SLOWDOWN      SLOWDOWN: share by which every call is made longer (used by trial.py only)

    stdin                          stdout (one JSON value a line)
    case MODEL KIND BATCH          names of the providers, each of which has run once
    time PROVIDER                  seconds of one call

It runs over any revision of msdd_fast, so it uses the public API only.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

import msdd_fast

# OpenMP's threads spin for some milliseconds after their work, which would disturb the other side's next call.
REST_S = 0.01

Call = Callable[[], Any]


def providers(model: str, kind: str, batch: int, device: torch.device) -> dict[str, Call]:
    """Calls by name: "eager", and for a decode "engine" if the revision has one."""
    try:
        tokenizer = msdd_fast.Tokenizer.from_pretrained(model)
    except msdd_fast.errors.CheckpointError:
        torch.manual_seed(0)
        tokenizer = msdd_fast.Tokenizer.from_config(model)
    tokenizer.to(device)
    size, generator = tokenizer.config.image_size, torch.Generator().manual_seed(0)
    images = torch.rand(batch, 3, size, size, generator=generator).to(device)
    if kind == "encode":
        return {"eager": lambda: tokenizer.encode(images)}
    latent_shape = tokenizer.encode(images[:1]).shape[1:]
    z = torch.randn(batch, *latent_shape, generator=generator).to(device)
    found: dict[str, Call] = {"eager": lambda: tokenizer.decode(z)}
    try:
        engine = msdd_fast.accelerate(tokenizer, batch_sizes=(batch,))
        engine.decode(z)
        found["engine"] = lambda: engine.decode(z)
    except (AttributeError, msdd_fast.errors.MsddFastError):
        pass  # a revision without an engine
    return found


def seconds(call: Call, device: torch.device, slowdown: float) -> float:
    """Seconds of one call, prolonged by a busy wait: a planted slowdown costs the machine what a real one would."""
    begin = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    end = begin + (time.perf_counter() - begin) * (1 + slowdown)
    while time.perf_counter() < end:
        pass
    return time.perf_counter() - begin


def main() -> None:
    device, slowdown = torch.device(sys.argv[1]), float(sys.argv[2])
    found: dict[str, Call] = {}
    answer: list[str] | float
    for line in sys.stdin:
        command, *words = line.split()
        if command == "case":
            found = providers(words[0], words[1], int(words[2]), device)
            for call in found.values():
                seconds(call, device, slowdown)
            answer = list(found)
        else:
            answer = seconds(found[words[0]], device, slowdown)
            time.sleep(REST_S)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
