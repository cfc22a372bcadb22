"""Which backend every op of a decode would take, and why, without building an engine."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from msdd_fast.diffusion.checks import as_int, check_guidance, check_sampling
from msdd_fast.engine.bound_ops import bind
from msdd_fast.engine.compute import compute_dtype
from msdd_fast.engine.isolation import building, without_autocast
from msdd_fast.engine.report import ChoiceRecorder, OpChoice, format_choices
from msdd_fast.families import family_of
from msdd_fast.families.base import conditions_of, example_conditions
from msdd_fast.layers.linear.dense import DenseLinear
from msdd_fast.layers.request import Inputs, Request
from msdd_fast.ops._registry import observe
from msdd_fast.tokenizer import Tokenizer, as_tokenizer


@dataclass(frozen=True)
class Explanation:
    """Answer of ``explain``; ``str`` of it is a table."""

    dtype: str
    ops: tuple[OpChoice, ...]

    def __str__(self) -> str:
        return f"{self.dtype}\n{format_choices(self.ops)}"


def explain(
    tokenizer: Tokenizer | str | os.PathLike[str],
    batch_size: int = 8,
    dtype: torch.dtype = torch.bfloat16,
    *,
    backend: str = "auto",
    steps: int | None = None,
    cfg_scale: float | None = None,
) -> Explanation:
    """The choices of ``accelerate(tokenizer, ...)`` for one decode of ``batch_size`` images.

    The decode runs on tensors without data: no weights are copied and nothing is computed. Arguments and errors as of
    ``accelerate``.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # not with the package: it takes a second

    tokenizer = as_tokenizer(tokenizer)
    config, family = tokenizer.config, family_of(tokenizer.config)
    device = next(tokenizer.parameters()).device
    steps = config.sampling.steps if steps is None else steps
    cfg_scale = config.sampling.cfg_scale if cfg_scale is None else cfg_scale
    steps, cfg_scale = check_sampling(steps, cfg_scale)
    batch_size = as_int("batch_size", batch_size, 1)
    check_guidance(config, cfg_scale)
    chosen, reason = compute_dtype(dtype, device)
    ops, choices = bind(backend), ChoiceRecorder()
    with building(device):
        tables = family.tables(tokenizer.decoder, tokenizer.schedule, steps, device)
    with without_autocast(device), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), observe(choices):
        program = family.program(tokenizer.decoder, tokenizer.schedule, tables, chosen, device, ops, DenseLinear)
        z = torch.zeros(batch_size, *family.example, dtype=chosen, device=device)
        others = conditions_of(family, z, steps, cfg_scale, example_conditions(family))
        inputs = Inputs(
            z,
            torch.zeros(batch_size, dtype=torch.int64, device=device),
            torch.zeros((), device=device),
            tuple(t.to(device) for t in others.tensors),
        )
        program.decode(inputs, Request(tuple(z.shape), cfg_scale != 1.0, torch.float32, size=others.size))
    return Explanation(f"{str(chosen).removeprefix('torch.')} ({reason})", choices.result())
