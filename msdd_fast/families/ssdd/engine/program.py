"""SSDD's whole decode: no host synchronisation, so it can be captured in a CUDA graph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from msdd_fast import profiling
from msdd_fast.families.ssdd.engine.network import SSDDNetwork
from msdd_fast.families.ssdd.engine.tables import SSDDStep
from msdd_fast.layers.convolution import channels_last
from msdd_fast.layers.request import Inputs, Request, StageImages, convert


class SSDDProgram:
    """Decodes with the given steps; ``engine.program.Program`` for a schedule of one stage. Never guided.

    The state stays float32, as in the eager sampler: it has 3 channels among hundreds.
    """

    def __init__(self, network: SSDDNetwork, steps: Sequence[SSDDStep]) -> None:
        self.network, self.steps, self.ops = network, steps, network.ops

    def decode(self, inputs: Inputs, request: Request, noise: Sequence[Tensor] | None = None) -> Tensor:
        """Images (B, 3, H, W) in ``request.out_dtype``; ``noise`` as in ``sampling.sample``."""
        assert not request.guided
        network = self.network
        height, width = (s * network.factor for s in inputs.z.shape[2:])
        context = network.context(inputs.z)
        x = self.ops.start_noise(inputs.seeds, (3, height, width)) if noise is None else noise[0].float()
        x = channels_last(x)
        for step in profiling.ranges(self.steps, lambda i: f"step {i}"):
            x = self.ops.euler_step(x, network.velocity(x, context, step), step.dt)
        return convert(x, request.out_dtype).contiguous()

    def stages(self, inputs: Inputs, request: Request) -> Iterator[Tensor]:
        """The one stage: its images in float32."""
        yield self.decode(inputs, request._replace(out_dtype=torch.float32))

    def images(self, stage: int, end: Tensor, inputs: Inputs, request: Request) -> StageImages:
        return StageImages(stage, convert(end, request.out_dtype), end)
