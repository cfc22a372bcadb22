"""Cold start: seconds from the start of a fresh process to its first image, step by step."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys

import torch

RUNS = 3
STEPS = ("import torch", "import msdd_fast", "load", "first eager image", "accelerate", "first image", "second image")

_PROGRAM = """
import json, sys, time
times = [time.perf_counter()]
done = lambda: times.append(time.perf_counter())
import torch
done()
import msdd_fast
from msdd_fast.families import family_of
done()
device = torch.device(sys.argv[2])
wait = (lambda: torch.cuda.synchronize()) if device.type == "cuda" else (lambda: None)
tok = msdd_fast.Tokenizer.from_pretrained(sys.argv[1]).to(device)
wait(); done()
z = torch.randn(1, *family_of(tok.config).example, device=device)
tok.decode(z); wait(); done()
try:
    fast = msdd_fast.accelerate(tok, batch_sizes=(1,))
    fast.warmup(); wait(); done()
    for _ in range(2):
        fast.decode(z); wait(); done()
except (AttributeError, msdd_fast.errors.MsddFastError):
    pass  # no engine in this version
print(json.dumps([b - a for a, b in zip(times, times[1:])]))
"""


def cold_start(device: torch.device, model: str = "msdd-nano", runs: int = RUNS) -> dict[str, float]:
    """Median seconds of each of ``STEPS`` over fresh processes; fewer steps where there is no engine."""
    command = [sys.executable, "-c", _PROGRAM, model, device.type]
    outputs = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(runs)]
    seconds = [json.loads(text.splitlines()[-1]) for text in outputs]
    return {step: statistics.median(column) for step, column in zip(STEPS, zip(*seconds, strict=True), strict=False)}
