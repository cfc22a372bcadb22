"""PiD's whole decode: no host synchronisation, so it can be captured in a CUDA graph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from msdd_fast import profiling
from msdd_fast.errors import InputError
from msdd_fast.families.pid import sampler
from msdd_fast.families.pid.engine.memory import activation_bytes, bytes_per_row, chunk_rows
from msdd_fast.families.pid.engine.network import Context, PiDNetwork, Text
from msdd_fast.families.pid.engine.tables import PiDStep
from msdd_fast.layers.request import Inputs, Request, StageImages, convert
from msdd_fast.ops.sde_step import fold_pixels


class PiDProgram:
    """Decodes with the given steps. States are float32 (B, 3, H, W).

    Attributes:
        not_recordable: why there is no recorded program on a CPU.
    """

    not_recordable = "the convolutions of PiD's latents are PyTorch's, which a program cannot repeat"

    def __init__(self, network: PiDNetwork, steps: Sequence[PiDStep]) -> None:
        self.network, self.steps, self.ops, self.config = network, steps, network.ops, network.config

    def fit(self, guided: bool, room: int) -> int:
        """Let pixel blocks take fewer rows at once if the activations of an image exceed ``room``; their bytes then."""
        config, itemsize = self.config, self.network.w.dtype.itemsize
        activations = activation_bytes(config, itemsize, guided)
        if activations <= room:
            return activations
        others = activation_bytes(config, itemsize, guided, chunk=0)
        self.network.chunk = chunk_rows(config, itemsize, room - others)
        return activation_bytes(config, itemsize, guided, chunk=self.network.chunk * bytes_per_row(config, itemsize))

    def decode(self, inputs: Inputs, request: Request, noise: Sequence[Tensor] | None = None) -> Tensor:
        """Images (B, 3, H, W) in ``request.out_dtype``; ``noise`` is the start and, with "sde", one for each step."""
        network, (text, sigma, *null) = self.network, inputs.conditions
        assert request.size is not None
        context = network.context(inputs.z, sigma, request.size)
        caption = network.embed_text(text, context)
        shape = (3, *request.size)
        x = self.ops.start_noise(inputs.seeds, shape) if noise is None else noise[0].float()
        if self.config.sampler == "dpm":
            other = network.embed_text(null[0], context) if null else None
            x = self._solve(x, context, caption, other, inputs.scale, request.size)
        else:
            x = self._distilled(x, context, caption, inputs.seeds, noise)
        return convert(x, request.out_dtype)

    def stages(self, inputs: Inputs, request: Request) -> Iterator[Tensor]:
        """The one stage: its images in float32."""
        yield self.decode(inputs, request._replace(out_dtype=torch.float32))

    def images(self, stage: int, end: Tensor, inputs: Inputs, request: Request) -> StageImages:
        return StageImages(stage, convert(end, request.out_dtype), end)

    def _distilled(
        self, x: Tensor, context: Context, text: Text, seeds: Tensor, noise: Sequence[Tensor] | None
    ) -> Tensor:
        ops, p = self.ops, self.network.patch
        for i, step in enumerate(profiling.ranges(self.steps, lambda i: f"step {i}")):
            v = self.network.velocity(x, context, text, step)
            if step.following is None:
                x = ops.sde_step(x, v, step.time, None, None, 0, None, p)
            elif self.config.sampler == "ode":
                assert step.dt is not None
                x = ops.euler_step(x, fold_pixels(v, context.grid[0], p), step.dt)
            elif noise is None:
                x = ops.sde_step(x, v, step.time, step.following, seeds, i + 1, None, p)
            else:
                x = ops.sde_step(x, v, step.time, step.following, None, 0, noise[i + 1].float(), p)
        return x

    def _solve(
        self, x: Tensor, context: Context, text: Text, null: Text | None, scale: Tensor, size: tuple[int, int]
    ) -> Tensor:
        """The undistilled sampler, as ``sampler.sample_undistilled``."""
        side = self.config.image_size
        mine, wanted = sampler.shift_of(self.config, side, side), sampler.shift_of(self.config, *size)
        if abs(mine - wanted) > 1e-9:
            raise InputError(
                f"images of {size[0]} x {size[1]} pixels take their times with shift {wanted:g}, but this engine's "
                f"tables were made for {mine:g} (config.image_size={side}): set config.image_size or config.shift"
            )
        m: Tensor | None = None
        for step in profiling.ranges(self.steps, lambda i: f"step {i}"):
            t = step.time
            e = (1 - t) * self._velocity_image(x, context, text, step) + x
            if null is not None:
                e_null = (1 - t) * self._velocity_image(x, context, null, step) + x
                e = e_null + scale * (e - e_null)
            m, before = sampler.clean_of_noise(x, e, t), m
            assert step.solver is not None
            x = sampler.solve(step.solver, x, m, before)
        return x

    def _velocity_image(self, x: Tensor, context: Context, text: Text, step: PiDStep) -> Tensor:
        v = self.network.velocity(x, context, text, step)
        return fold_pixels(v, context.grid[0], self.network.patch).float()
