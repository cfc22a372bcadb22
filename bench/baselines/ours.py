"""Our own decoders in the comparison: one step a scale, and a teacher of 30 steps calculated from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from msdd_fast.bench.baselines.peer import SIZE
from msdd_fast.bench.baselines.turns import WAYS, Options, in_turns
from msdd_fast.bench.decode.models import by_block, device_of, eager, load, random_latents
from msdd_fast.engine import accelerate
from msdd_fast.families import family_of
from msdd_fast.families.work import total

OURS = ("msdd-d12-joint", "msdd-d12", "msdd-nano", "ssdd-s-f8c4", "ssdd-m-f8c4")
TEACHER, TEACHER_STEPS = "msdd-d12-joint", 30


def measure(name: str, options: Options) -> list[dict[str, Any]]:
    """The row of a model at one step a scale; of ``TEACHER`` the teacher's row too."""
    tokenizer = load(name, options.device)
    cfg, family = tokenizer.config, family_of(tokenizer.config)
    z = random_latents(cfg, options.batch, options.device)
    row: dict[str, Any] = {
        "name": name if cfg.image_size == SIZE else f"{name} ({cfg.image_size} px)",
        "parameters": sum(p.numel() for p in tokenizer.decoder.parameters()),
        # As the eager model runs, since FLOP of the other decoders are counted on their eager models too.
        "flops": total(family.decode_work(hoisted=False)).flops,
    }
    plain = eager(tokenizer, options.dtype)
    engine = accelerate(tokenizer, dtype=options.dtype, batch_sizes=(options.batch,), steps=1)
    row |= in_turns(name, {"eager": lambda: plain(z, steps=1), "engine": lambda: engine.decode(z)}, options)
    if by_block(tokenizer):
        row["compile"]["note"] = "by block"
    if name != TEACHER:
        return [row]
    teacher = {"name": f"{name}, {TEACHER_STEPS} steps a scale", "parameters": row["parameters"]}
    teacher["flops"] = total(family.decode_work(steps=TEACHER_STEPS, hoisted=False)).flops
    for way in WAYS:
        if "median_s" in row[way]:
            seconds = TEACHER_STEPS * row[way]["median_s"]
            teacher[way] = {"median_s": seconds, "note": f"calculated: {TEACHER_STEPS} times one step"}
    return [row, teacher]


def compiled(name: str, device: torch.device, dtype: torch.dtype, batch: int) -> Callable[[], Tensor]:
    """The decoder ``name`` under torch.compile, at one step a scale."""
    tokenizer = load(name, device)
    decode, z = eager(tokenizer, dtype, compiled=True), random_latents(tokenizer.config, batch, device_of(tokenizer))
    return lambda: decode(z, steps=1)
