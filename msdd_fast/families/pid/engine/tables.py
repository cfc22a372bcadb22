"""What is constant in PiD once the times of all steps are known: every adaLN vector of the joint blocks.

So the time embedding and a matrix for each stream of each block, 29 % of the weights, become small tables.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msdd_fast.families.pid import sampler
from msdd_fast.families.pid.config import PiDConfig
from msdd_fast.families.pid.decoder import PiDDecoder, time_features


class Vectors(NamedTuple):
    """adaLN vectors of one stream of one block, each float32 (1, D)."""

    shift1: Tensor
    scale1: Tensor
    gate1: Tensor
    shift2: Tensor
    scale2: Tensor
    gate2: Tensor


class PiDStep(NamedTuple):
    """One evaluation of the network and the step that it serves.

    Attributes:
        time, following: float32 (); ``following`` is None if the image is next.
        dt: float32 (), following - time; None if the image is next.
        embedding: of the time, float32 (1, D).
        text, image: vectors of every block.
        solver: the step of an undistilled decode.
    """

    time: Tensor
    following: Tensor | None
    dt: Tensor | None
    embedding: Tensor
    text: list[Vectors]
    image: list[Vectors]
    solver: sampler.SolverStep | None

    def memory(self) -> int:
        """Bytes."""
        return self.embedding.nbytes + sum(t.nbytes for v in (*self.text, *self.image) for t in v)


@torch.no_grad()
def pid_steps(decoder: PiDDecoder, steps: int, device: torch.device) -> list[PiDStep]:
    """Computed in float32 from the decoder's own weights, each of which is read once for all steps.

    Undistilled: with the shift of ``config.image_size``, if none is set.
    """
    config: PiDConfig = decoder.config
    solver: list[sampler.SolverStep | None]
    if config.sampler == "dpm":
        side = config.image_size
        solver = list(sampler.solver_steps(steps, sampler.shift_of(config, side, side)))
        times = torch.stack([s.time for s in solver if s is not None] + [torch.zeros(())])
    else:
        solver = [None] * steps
        times = sampler.distilled_times(steps)
    embed: Any = decoder.t_embedder.mlp
    # On the CPU: its sines and cosines of large angles are those that the released numbers were checked with.
    features = time_features(times[:-1]).to(embed[0].weight.device)
    te = _linear(embed[2], F.silu(_linear(embed[0], features)))
    c = F.silu(te)
    text, image = ([_vectors(b, name, c, device) for b in decoder.patch_blocks] for name in ("txt", "img"))
    found = []
    for i in range(steps):
        last = i == steps - 1
        found.append(
            PiDStep(
                times[i].to(device),
                None if last else times[i + 1].to(device),
                None if last else (times[i + 1] - times[i]).to(device),
                te[i : i + 1].to(device),
                [Vectors(*(t[i : i + 1] for t in block)) for block in text],
                [Vectors(*(t[i : i + 1] for t in block)) for block in image],
                _on(solver[i], device),
            )
        )
    return found


def _vectors(block: Any, stream: str, c: Tensor, device: torch.device) -> tuple[Tensor, ...]:
    """Six tensors (steps, D)."""
    return _linear(getattr(block, f"adaLN_modulation_{stream}")[0], c).to(device).chunk(6, dim=1)


def _linear(linear: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, linear.weight.float(), linear.bias.float())


def _on(step: sampler.SolverStep | None, device: torch.device) -> sampler.SolverStep | None:
    return None if step is None else sampler.SolverStep(*(None if t is None else t.to(device) for t in step))  # type: ignore[arg-type]
