"""Which backend every op of a decode would take, and why, without building an engine."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from msdd_fast.engine.bound_ops import bind
from msdd_fast.engine.compute import compute_dtype
from msdd_fast.engine.linear import DenseLinear
from msdd_fast.engine.network import Network
from msdd_fast.engine.program import Inputs, Program
from msdd_fast.engine.report import Choices, OpChoice, format_choices
from msdd_fast.engine.tables import stage_tables
from msdd_fast.engine.weights import pack
from msdd_fast.models.tokenizer import Tokenizer, msdd_parts
from msdd_fast.ops._op import observe
from msdd_fast.sampling import check_sampling


@dataclass(frozen=True)
class Explanation:
    """Answer of ``explain``; ``str`` of it is a table."""

    dtype: str
    ops: tuple[OpChoice, ...]

    def __str__(self) -> str:
        return f"{self.dtype}\n{format_choices(self.ops)}"


def explain(
    tokenizer: Tokenizer,
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

    config, decoder = msdd_parts(tokenizer)
    device = next(tokenizer.parameters()).device
    steps = config.sampling.steps if steps is None else steps
    cfg_scale = config.sampling.cfg_scale if cfg_scale is None else cfg_scale
    check_sampling(steps, cfg_scale)
    chosen, reason = compute_dtype(dtype, device)
    tables = stage_tables(decoder, tokenizer.schedule, steps, device)
    choices = Choices()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), observe(choices):
        weights = pack(decoder, chosen, device, DenseLinear)
        network = Network(weights, config.decoder.head_dim, bind(backend))
        inputs = Inputs(
            torch.zeros(batch_size, config.num_latent_tokens, config.latent_dim, dtype=chosen, device=device),
            torch.zeros(batch_size, dtype=torch.int64, device=device),
            torch.zeros((), device=device),
        )
        Program(network, tables, tokenizer.schedule, config).decode(inputs, cfg_scale != 1.0, torch.float32)
    return Explanation(f"{str(chosen).removeprefix('torch.')} ({reason})", choices.result())
