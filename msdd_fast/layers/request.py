"""What a decode is asked for, what it takes and what it gives, for any family."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from msdd_fast import native
from msdd_fast.backends.extension import extension_status
from msdd_fast.diffusion.config import Config
from msdd_fast.ops._checks import FLOAT_DTYPES
from msdd_fast.ops._patches import to_uint8


class StageImages(NamedTuple):
    """What ``FastDecoder.stream`` yields when a stage is done.

    Attributes:
        stage: its index.
        images: (B, 3, H, H) clean estimate at this scale (docs/spec.md#clean-estimate); of the last stage the decoded
            image.
        state: float32 (B, 3, H, H), still noisy at the stage's end level unless it is the last.
    """

    stage: int
    images: Tensor
    state: Tensor


class Inputs(NamedTuple):
    """What changes from call to call, all on the device.

    Attributes:
        z: latents (B, ...).
        seeds: int64 (B,).
        scale: of the guidance, float32 ().
        conditions: what else the family's decode reads, each (B, ...) (``families.base.Conditions``).
    """

    z: Tensor
    seeds: Tensor
    scale: Tensor
    conditions: tuple[Tensor, ...] = ()

    def part(self, images: slice) -> Inputs:
        """Those of some of the images."""
        return Inputs(self.z[images], self.seeds[images], self.scale, tuple(c[images] for c in self.conditions))


class Way(NamedTuple):
    """How much of an image a program works on at a time.

    Attributes:
        parts: parts of an image that pixels or tokens are worked on in; more than one changes nothing beyond rounding.
        tile: side in pixels of overlapping tiles whose velocities are blended, which changes images; 0 for no tiles.
    """

    parts: int = 1
    tile: int = 0

    def __str__(self) -> str:
        if self.tile:
            return f"tiled, {self.tile} px"
        return f"chunked, {self.parts} parts" if self.parts > 1 else "whole"


WHOLE = Way()


class Request(NamedTuple):
    """What is asked of a program, apart from the values of its inputs; the key of a graph.

    Attributes:
        shape: of the latents, (B, ...).
        guided: whether the velocity is guided.
        out_dtype: of the images.
        streaming: whether every stage's images are wanted.
        size: height and width of the images, if they do not follow from ``shape`` alone.
        conditions: shape of one image's, and dtype, of each of the inputs' conditions.
        way: how much of an image is worked on at a time.
    """

    shape: tuple[int, ...]
    guided: bool
    out_dtype: torch.dtype
    streaming: bool = False
    size: tuple[int, int] | None = None
    conditions: tuple[tuple[tuple[int, ...], torch.dtype], ...] = ()
    way: Way = WHOLE

    def image_shape(self, config: Config) -> tuple[int, int, int]:
        """Shape of an image."""
        return config.stage_shapes(self.shape)[-1] if self.size is None else (3, *self.size)

    def with_batch(self, batch: int) -> Request:
        """The same for another number of images."""
        return self._replace(shape=(batch, *self.shape[1:]))


class DecodeProgram(Protocol):
    """A whole decode of one family, as a function of its inputs. It never synchronises with the host."""

    @property
    def network(self) -> Any:
        """With its weights as ``w``."""
        ...

    def decode(self, inputs: Inputs, request: Request, noise: Sequence[Tensor] | None = None) -> Tensor:
        """Images (B, 3, H, W) in ``request.out_dtype``; ``noise`` as in ``sampling.sample``."""
        ...

    def stages(self, inputs: Inputs, request: Request) -> Iterator[Any]:
        """The same decode stage by stage: yields what ``images`` makes pictures of."""
        ...

    def images(self, stage: int, end: Any, inputs: Inputs, request: Request) -> StageImages:
        """Images and state of a stage from what ``stages`` yielded for it; that is not changed."""
        ...

    def activations(self, request: Request) -> int:
        """Most bytes that ``decode`` holds at once, its images included, without weights, tables and inputs."""
        ...


@runtime_checkable
class NotRecordable(Protocol):
    """A program that cannot become a recorded one on a CPU.

    Attributes:
        not_recordable: why.
    """

    not_recordable: str


def stream(program: DecodeProgram, inputs: Inputs, request: Request) -> Iterator[StageImages]:
    """A decode with the images of every stage."""
    for stage, end in enumerate(program.stages(inputs, request)):
        yield program.images(stage, end, inputs, request)


@runtime_checkable
class AnySize(Protocol):
    """What a program has besides if images may have any size: it can work on parts of one where memory is short."""

    @property
    def min_tile(self) -> int:
        """Least side of a tile, in pixels."""
        ...

    def ways(self, request: Request) -> list[Way]:
        """From ``WHOLE``, the fastest, to the one that takes least memory."""
        ...


def ways_of(program: DecodeProgram, request: Request) -> list[Way]:
    """All ways in which a program can decode what is requested, from the fastest to the smallest."""
    return program.ways(request) if isinstance(program, AnySize) else [WHOLE]


def convert(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Images in [-1, 1] in another dtype; uint8 is clamped and quantised.

    On a CPU by the extension, if it is there: a program records that.
    """
    if dtype != torch.uint8:
        return images.to(dtype)
    native_one = images.device.type == "cpu" and images.dtype in FLOAT_DTYPES and extension_status()[0]
    return native.to_pixels(images) if native_one else to_uint8(images)
