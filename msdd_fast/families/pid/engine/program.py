"""PiD's whole decode: no host synchronisation, so it can be captured in a CUDA graph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from msdd_fast import profiling
from msdd_fast.errors import InputError
from msdd_fast.families.pid import sampler
from msdd_fast.families.pid.engine.memory import activation_bytes
from msdd_fast.families.pid.engine.network import Context, PiDNetwork, Text
from msdd_fast.families.pid.engine.parts import PiDParts
from msdd_fast.families.pid.engine.tables import PiDStep
from msdd_fast.layers.request import WHOLE, Inputs, Request, StageImages, Way, convert
from msdd_fast.layers.tiles import parts_and_tiles
from msdd_fast.ops.sde_step import fold_pixels

MIN_TILE = 8  # patches


class PiDProgram:
    """Decodes with the given steps. States are float32 (B, 3, H, W).

    Attributes:
        not_recordable: why there is no recorded program on a CPU.
    """

    not_recordable = "the convolutions of PiD's latents are PyTorch's, which a program cannot repeat"

    def __init__(self, network: PiDNetwork, steps: Sequence[PiDStep]) -> None:
        self.network, self.steps, self.ops, self.config = network, steps, network.ops, network.config
        self.min_tile = MIN_TILE * network.patch

    def decode(self, inputs: Inputs, request: Request, noise: Sequence[Tensor] | None = None) -> Tensor:
        """Images (B, 3, H, W) in ``request.out_dtype``; ``noise`` is the start and, with "sde", one for each step."""
        text, sigma, *null = inputs.conditions
        assert request.size is not None
        way = request.way
        network = self.network if way == WHOLE else PiDParts(self.network, way.parts, way.tile // self.network.patch)
        context = network.context(inputs.z, sigma, request.size)
        caption = network.embed_text(text, context)
        if self.config.sampler == "dpm":
            other = network.embed_text(null[0], context) if null else None
            x = self._solve(network, inputs, context, caption, other, request.size, noise)
        else:
            x = self._distilled(network, inputs, context, caption, request.size, noise)
        del context, caption
        return convert(x, request.out_dtype)

    def stages(self, inputs: Inputs, request: Request) -> Iterator[Tensor]:
        """The one stage: its images in float32."""
        yield self.decode(inputs, request._replace(out_dtype=torch.float32))

    def images(self, stage: int, end: Tensor, inputs: Inputs, request: Request) -> StageImages:
        return StageImages(stage, convert(end, request.out_dtype), end)

    def ways(self, request: Request) -> list[Way]:
        _, height, width = request.image_shape(self.config)
        return parts_and_tiles(height, width, self.network.patch, self.min_tile)

    def activations(self, request: Request) -> int:
        w = self.network.w
        assert w.joint[0].image.gate_up is not None
        swiglu = w.joint[0].image.gate_up.row_bytes
        return activation_bytes(self.config, request, w.dtype.itemsize, self.network.chunk, swiglu)

    def _start(self, inputs: Inputs, size: tuple[int, int], noise: Sequence[Tensor] | None) -> Tensor:
        return self.ops.start_noise(inputs.seeds, (3, *size)) if noise is None else noise[0].float()

    def _distilled(
        self,
        network: PiDNetwork,
        inputs: Inputs,
        context: Context,
        text: Text,
        size: tuple[int, int],
        noise: Sequence[Tensor] | None,
    ) -> Tensor:
        ops, p, x = self.ops, self.network.patch, self._start(inputs, size, noise)
        for i, step in enumerate(profiling.ranges(self.steps, lambda i: f"step {i}")):
            v = network.velocity(x, context, text, step)
            if step.following is None:
                x = ops.sde_step(x, v, step.time, None, None, 0, None, p)
            elif self.config.sampler == "ode":
                assert step.dt is not None
                x = ops.euler_step(x, fold_pixels(v, context.grid[0], p), step.dt)
            elif noise is None:
                x = ops.sde_step(x, v, step.time, step.following, inputs.seeds, i + 1, None, p)
            else:
                x = ops.sde_step(x, v, step.time, step.following, None, 0, noise[i + 1].float(), p)
            del v  # before the next one is there
        return x

    def _solve(
        self,
        network: PiDNetwork,
        inputs: Inputs,
        context: Context,
        text: Text,
        null: Text | None,
        size: tuple[int, int],
        noise: Sequence[Tensor] | None,
    ) -> Tensor:
        """The undistilled sampler, as ``sampler.sample_undistilled``."""
        side = self.config.image_size
        mine, wanted = sampler.shift_of(self.config, side, side), sampler.shift_of(self.config, *size)
        if abs(mine - wanted) > 1e-9:
            raise InputError(
                f"images of {size[0]} x {size[1]} pixels take their times with shift {wanted:g}, but this engine's "
                f"tables were made for {mine:g} (config.image_size={side}): set config.image_size or config.shift"
            )
        x, m = self._start(inputs, size, noise), None
        for step in profiling.ranges(self.steps, lambda i: f"step {i}"):
            t = step.time
            e = (1 - t) * _velocity_image(network, x, context, text, step) + x
            if null is not None:
                e_null = (1 - t) * _velocity_image(network, x, context, null, step) + x
                e = e_null + inputs.scale * (e - e_null)
                del e_null
            m, before = sampler.clean_of_noise(x, e, t), m
            assert step.solver is not None
            x = sampler.solve(step.solver, x, m, before)
            del e, before
        return x


def _velocity_image(network: PiDNetwork, x: Tensor, context: Context, text: Text, step: PiDStep) -> Tensor:
    v = network.velocity(x, context, text, step)
    return fold_pixels(v, context.grid[0], network.patch).float()
