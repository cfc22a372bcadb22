"""SSDD's whole decode: no host synchronisation, so it can be captured in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from msdd_fast import profiling
from msdd_fast.families.ssdd.config import SSDDConfig
from msdd_fast.families.ssdd.engine.memory import activation_bytes
from msdd_fast.families.ssdd.engine.network import SSDDNetwork
from msdd_fast.families.ssdd.engine.strips import MIN_ROWS, SSDDStrips
from msdd_fast.families.ssdd.engine.tables import SSDDStep
from msdd_fast.layers.convolution import channels_last
from msdd_fast.layers.request import Inputs, Request, StageImages, Way, convert
from msdd_fast.layers.tiles import parts_and_tiles, tiles

MIN_TILE = 16  # cells; a window of the transformer reaches 15 pixels of the map at an eighth


class SSDDProgram:
    """Decodes with the given steps; ``engine.program.Program`` for a schedule of one stage. Never guided.

    The state stays float32, as in the eager sampler: it has 3 channels among hundreds.

    Attributes:
        not_recordable: why there is no recorded program on a CPU; only there with PyTorch's convolutions.
    """

    def __init__(self, network: SSDDNetwork, steps: Sequence[SSDDStep], config: SSDDConfig) -> None:
        self.network, self.steps, self.ops, self.config = network, steps, network.ops, config
        self.min_tile = MIN_TILE * config.factor
        if not network.w.fused:
            self.not_recordable = "SSDD's convolutions are PyTorch's, which a program cannot repeat"

    def decode(self, inputs: Inputs, request: Request, noise: Sequence[Tensor] | None = None) -> Tensor:
        """Images (B, 3, H, W) in ``request.out_dtype``; ``noise`` as in ``sampling.sample``."""
        assert not request.guided
        network = self.network
        height, width = (s * network.factor for s in inputs.z.shape[2:])
        velocity = self._velocity(inputs.z, request.way)
        x = self.ops.start_noise(inputs.seeds, (3, height, width)) if noise is None else noise[0].float()
        x = channels_last(x)
        for step in profiling.ranges(self.steps, lambda i: f"step {i}"):
            x = self.ops.euler_step(x, velocity(x, step), step.dt)
        del velocity  # and what is kept of the latents
        return convert(x, request.out_dtype).contiguous()

    def stages(self, inputs: Inputs, request: Request) -> Iterator[Tensor]:
        """The one stage: its images in float32."""
        yield self.decode(inputs, request._replace(out_dtype=torch.float32))

    def images(self, stage: int, end: Tensor, inputs: Inputs, request: Request) -> StageImages:
        return StageImages(stage, convert(end, request.out_dtype), end)

    def ways(self, request: Request) -> list[Way]:
        _, height, width = request.image_shape(self.config)
        ways = parts_and_tiles(height, width, MIN_ROWS, self.min_tile)
        # The extension's convolutions hold nothing that strips would spare.
        return [w for w in ways if w.parts == 1] if self.network.w.fused else ways

    def activations(self, request: Request) -> int:
        batch, _, *cells = request.shape
        itemsize = self.network.w.dtype.itemsize
        way, fused = request.way, self.network.w.fused
        return activation_bytes(self.config, (cells[0], cells[1]), batch, itemsize, way, fused)

    def _velocity(self, z: Tensor, way: Way) -> Callable[[Tensor, SSDDStep], Tensor]:
        """The velocity of states and steps, for latents z."""
        if way.tile:
            return partial(self._velocity_of_tiles, z, way.tile // self.config.factor)
        network = self.network if way.parts == 1 else SSDDStrips(self.network, way.parts)
        context = network.context(z)
        return lambda x, step: network.velocity(x, context, step)

    def _velocity_of_tiles(self, z: Tensor, side: int, x: Tensor, step: SSDDStep) -> Tensor:
        """Each tile of ``side`` cells as if it were an image, blended; float32."""
        v = torch.zeros_like(x)
        for tile in tiles((z.shape[2], z.shape[3]), side, self.config.factor, x.device):
            context = self.network.context(z[:, :, tile.rows, tile.columns])
            part = self.network.velocity(x[:, :, tile.high, tile.wide], context, step)
            v[:, :, tile.high, tile.wide] += (part * tile.down[:, None]).mul_(tile.across)
            del context, part
        return v
