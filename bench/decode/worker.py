"""One side of ``msdd-fast bench --compare REVISION``: measures what it is told to, one call at a time.

    worker.py DEVICE SLOWDOWN      SLOWDOWN: share by which every call is made longer (0, but in bench/decode/trial.py)

    stdin                          stdout (one JSON value a line)
    case MODEL KIND BATCH          names of the providers, each of which has run once
    time PROVIDER                  seconds of one call

Runs over any revision of msdd_fast, so it uses nothing but the public API.
"""

import json
import sys
import time

import torch

import msdd_fast

# OpenMP's threads spin for some milliseconds after their work, which would disturb the other side's next call.
REST_S = 0.01


def providers(model: str, kind: str, batch: int, device: torch.device) -> dict:
    try:
        tokenizer = msdd_fast.Tokenizer.from_pretrained(model)
    except msdd_fast.errors.CheckpointError:
        torch.manual_seed(0)
        tokenizer = msdd_fast.Tokenizer.from_config(model)
    tokenizer.to(device)
    cfg = tokenizer.config
    generator = torch.Generator().manual_seed(0)
    if kind == "encode":
        images = torch.rand(batch, 3, cfg.image_size, cfg.image_size, generator=generator).to(device)
        return {"eager": lambda: tokenizer.encode(images)}
    z = torch.randn(batch, cfg.num_latent_tokens, cfg.latent_dim, generator=generator).to(device)
    found = {"eager": lambda: tokenizer.decode(z)}
    try:
        engine = msdd_fast.accelerate(tokenizer, batch_sizes=(batch,))
        engine.decode(z)
        found["engine"] = lambda: engine.decode(z)
    except (AttributeError, msdd_fast.errors.MsddFastError):
        pass  # a revision without an engine
    return found


def seconds(function, device: torch.device, slowdown: float) -> float:
    begin = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    end = begin + (time.perf_counter() - begin) * (1 + slowdown)
    while time.perf_counter() < end:
        pass  # a planted slowdown costs the machine what a true one would
    return time.perf_counter() - begin


def main() -> None:
    device, slowdown, found = torch.device(sys.argv[1]), float(sys.argv[2]), {}
    for line in sys.stdin:
        command, *words = line.split()
        if command == "case":
            found = providers(words[0], words[1], int(words[2]), device)
            for function in found.values():
                seconds(function, device, slowdown)
            answer = list(found)
        else:
            answer = seconds(found[words[0]], device, slowdown)
            time.sleep(REST_S)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
