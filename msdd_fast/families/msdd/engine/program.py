"""The whole decode as a sequence of stages over device tensors: nothing in it waits for, or asks, the host."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from msdd_fast import profiling
from msdd_fast.diffusion.patch_rows import patchify, unpatchify
from msdd_fast.diffusion.schedule import StageSchedule
from msdd_fast.families.msdd.config import TokenizerConfig
from msdd_fast.families.msdd.engine.network import Context, Network
from msdd_fast.families.msdd.engine.tables import StageTables, Step
from msdd_fast.layers.request import Inputs, StageImages, convert
from msdd_fast.ops.renoise_upsample import renoise_upsample_with
from msdd_fast.sampling import clean_estimate


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

    def decode(
        self, inputs: Inputs, guided: bool, out_dtype: torch.dtype, noise: Sequence[Tensor] | None = None
    ) -> Tensor:
        """Images (B, 3, R, R) in ``out_dtype``; ``noise`` as in ``sampling.sample``."""
        for end in self.stages(inputs, guided, noise):  # noqa: B007, the last one is what is needed
            pass
        return self.final(end, inputs, out_dtype)

    def stream(self, inputs: Inputs, guided: bool, out_dtype: torch.dtype) -> Iterator[StageImages]:
        """The same decode, with the images of every stage."""
        last = len(self.tables) - 1
        for s, end in enumerate(self.stages(inputs, guided, None)):
            if s == last:
                state = self.final(end, inputs, torch.float32)
                images = state if out_dtype == torch.float32 else self.final(end, inputs, out_dtype)
                yield StageImages(s, images, state)
                return
            step = self.tables[s].steps[-1]
            v = end.v if end.v_uncond is None else self.ops.cfg_combine(end.v, end.v_uncond, inputs.scale)
            x_t, velocity = (unpatchify(r, self.config.patch_size).float() for r in (end.x, v))
            t = self.schedule.time_grid(s, len(self.tables[s].steps))[1][-2]
            images = clean_estimate(x_t, velocity, float(t), self.schedule[s])
            yield StageImages(s, convert(images, out_dtype), x_t + step.dt * velocity)

    def stages(self, inputs: Inputs, guided: bool, noise: Sequence[Tensor] | None = None) -> Iterator[StageEnd]:
        """Every stage up to its last evaluation; ``final`` takes the last one to an image."""
        config, rho = self.config, self.schedule.config.block_correlation
        p = config.patch_size
        context = self.network.context(inputs.z, guided)
        size = config.stage_resolution(0)
        if noise is None:
            x = self.ops.start_noise(inputs.seeds, (3, size, size), self.dtype, p)
        else:
            x = patchify(noise[0].to(self.dtype), p)
        for s, tables in enumerate(profiling.ranges(self.tables, lambda i: f"scale {config.stage_resolution(i)}")):
            for step in tables.steps[:-1]:
                end = self._evaluate(x, context, tables, step, guided)
                x = self._euler(end, step.dt, inputs.scale)
            step = tables.steps[-1]
            end = self._evaluate(x, context, tables, step, guided)
            yield end
            if s + 1 == len(self.tables):
                return
            alpha, beta = self.tables[s + 1].alpha, self.tables[s + 1].beta
            if noise is None:
                x = self.ops.stage_transition(
                    end.x,
                    end.v,
                    step.dt,
                    alpha,
                    beta,
                    inputs.seeds,
                    s + 1,
                    p,
                    rho,
                    end.v_uncond,
                    self._scale(end, inputs),
                )
            else:
                state = unpatchify(self._euler(end, step.dt, inputs.scale), p).float()
                x = patchify(renoise_upsample_with(state, alpha, beta, noise[s + 1].float()).to(self.dtype), p)

    def _evaluate(self, x: Tensor, context: Context, tables: StageTables, step: Step, guided: bool) -> StageEnd:
        v = self.network.velocity(x, context, step.modulation, tables.rope)
        batch = x.shape[1]
        return StageEnd(x, v[:, :batch], v[:, batch:]) if guided else StageEnd(x, v, None)

    def _euler(self, end: StageEnd, dt: Tensor, scale: Tensor) -> Tensor:
        if end.v_uncond is None:
            return self.ops.euler_step(end.x, end.v, dt)
        return self.ops.cfg_euler(end.x, end.v, end.v_uncond, scale, dt)

    def final(self, end: StageEnd, inputs: Inputs, out_dtype: torch.dtype) -> Tensor:
        """Images (B, 3, R, R) in ``out_dtype``."""
        dt = self.tables[-1].steps[-1].dt
        return self.ops.final_step(
            end.x, end.v, dt, self.config.patch_size, out_dtype, end.v_uncond, self._scale(end, inputs)
        )

    @staticmethod
    def _scale(end: StageEnd, inputs: Inputs) -> Tensor | None:
        return None if end.v_uncond is None else inputs.scale
