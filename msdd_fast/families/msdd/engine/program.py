"""The whole decode as a sequence of stages: no host synchronisation, so it can be captured in a CUDA graph."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from msdd_fast import profiling
from msdd_fast.diffusion.patch_rows import patchify, unpatchify_rows
from msdd_fast.diffusion.schedule import StageSchedule
from msdd_fast.families.msdd.config import TokenizerConfig
from msdd_fast.families.msdd.engine.memory import activation_bytes
from msdd_fast.families.msdd.engine.network import Network
from msdd_fast.families.msdd.engine.tables import StageTables
from msdd_fast.layers.request import Inputs, Request, StageImages, convert
from msdd_fast.ops.renoise_upsample import renoise_upsample_with
from msdd_fast.sampling import clean_estimate

T = TypeVar("T")


class StageEnd(NamedTuple):
    """A stage before its last Euler step is taken: patch rows of the state and of the velocity there."""

    x: Tensor
    v: Tensor
    v_uncond: Tensor | None


class Program:
    """Decodes with ``guided`` or plain velocity. Its results are functions of its inputs only."""

    def __init__(
        self, network: Network, tables: Sequence[StageTables], schedule: StageSchedule, config: TokenizerConfig
    ) -> None:
        self.network, self.tables, self.schedule, self.config = network, tables, schedule, config
        self.ops, self.dtype = network.ops, network.w.dtype

    def decode(self, inputs: Inputs, request: Request, noise: Sequence[Tensor] | None = None) -> Tensor:
        """Images (B, 3, R, R) in ``request.out_dtype``; ``noise`` as in ``sampling.sample``."""
        end = last(self.stages(inputs, request, noise))
        return self.final(end, inputs, request.out_dtype)

    def images(self, stage: int, end: StageEnd, inputs: Inputs, request: Request) -> StageImages:
        """The clean estimate of a stage; of the last one the decoded images."""
        if stage + 1 < len(self.tables):
            return self._estimate(stage, end, inputs, request.out_dtype)
        state = self.final(end, inputs, torch.float32)
        images = state if request.out_dtype == torch.float32 else self.final(end, inputs, request.out_dtype)
        return StageImages(stage, images, state)

    def stages(self, inputs: Inputs, request: Request, noise: Sequence[Tensor] | None = None) -> Iterator[StageEnd]:
        """Run every stage up to its last evaluation; ``final`` takes the last one's end to an image."""
        context = self.network.context(inputs.z, request.guided)
        x = self._start(inputs, noise)
        sizes = self.config.stage_resolution
        for s, tables in enumerate(profiling.ranges(self.tables, lambda i: f"scale {sizes(i)}")):
            for i, step in enumerate(tables.steps):
                v = self.network.velocity(x, context, step.modulation, tables.rope)
                end = _at(x, v, request.guided)
                if i + 1 < len(tables.steps):
                    x = self._euler(end, step.dt, inputs.scale)
            yield end
            if s + 1 < len(self.tables):
                x = self._transition(s + 1, end, inputs, noise)

    def activations(self, request: Request) -> int:
        return activation_bytes(self.network, self.config, request)

    def final(self, end: StageEnd, inputs: Inputs, out_dtype: torch.dtype) -> Tensor:
        """Images (B, 3, R, R) in ``out_dtype`` after the last stage's last step."""
        dt, p = self.tables[-1].steps[-1].dt, self.config.patch_size
        return self.ops.final_step(end.x, end.v, dt, p, out_dtype, end.v_uncond, _scale(end, inputs))

    def _start(self, inputs: Inputs, noise: Sequence[Tensor] | None) -> Tensor:
        """Patch rows of the noise that the first stage starts from."""
        if noise is not None:
            return patchify(noise[0].to(self.dtype), self.config.patch_size)
        size = self.config.stage_resolution(0)
        return self.ops.start_noise(inputs.seeds, (3, size, size), self.dtype, self.config.patch_size)

    def _transition(self, stage: int, end: StageEnd, inputs: Inputs, noise: Sequence[Tensor] | None) -> Tensor:
        """Patch rows at the start of ``stage`` from the end of the one before."""
        dt, p = self.tables[stage - 1].steps[-1].dt, self.config.patch_size
        alpha, beta = self.tables[stage].alpha, self.tables[stage].beta
        if noise is None:
            rho = self.schedule.config.block_correlation
            scalars = (dt, alpha, beta, inputs.seeds, stage, p, rho)
            return self.ops.stage_transition(end.x, end.v, *scalars, end.v_uncond, _scale(end, inputs))
        state = unpatchify_rows(self._euler(end, dt, inputs.scale), p).float()
        return patchify(renoise_upsample_with(state, alpha, beta, noise[stage].float()).to(self.dtype), p)

    def _estimate(self, s: int, end: StageEnd, inputs: Inputs, out_dtype: torch.dtype) -> StageImages:
        """Of a stage that is not the last."""
        step = self.tables[s].steps[-1]
        v = end.v if end.v_uncond is None else self.ops.cfg_combine(end.v, end.v_uncond, inputs.scale)
        x_t, velocity = (unpatchify_rows(r, self.config.patch_size).float() for r in (end.x, v))
        t = self.schedule.time_grid(s, len(self.tables[s].steps))[1][-2]
        images = clean_estimate(x_t, step.gain * velocity, float(t), self.schedule[s])
        return StageImages(s, convert(images, out_dtype), x_t + step.dt * velocity)

    def _euler(self, end: StageEnd, dt: Tensor, scale: Tensor) -> Tensor:
        if end.v_uncond is None:
            return self.ops.euler_step(end.x, end.v, dt)
        return self.ops.cfg_euler(end.x, end.v, end.v_uncond, scale, dt)


def last(items: Iterable[T]) -> T:
    """The last of the items, which must not be empty; no other is kept."""
    return deque(items, maxlen=1).pop()


def _at(x: Tensor, v: Tensor, guided: bool) -> StageEnd:
    """State and velocity; of a guided one, the conditional images' velocity comes first."""
    batch = x.shape[1]
    return StageEnd(x, v[:, :batch], v[:, batch:]) if guided else StageEnd(x, v, None)


def _scale(end: StageEnd, inputs: Inputs) -> Tensor | None:
    return None if end.v_uncond is None else inputs.scale
