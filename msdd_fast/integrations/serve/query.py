"""The parameters of ``POST /decode``, as FastAPI reads and documents them."""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict, Field

from msdd_fast.integrations.serve.wire import DTYPES, ImageFormat, Output, OutputType


class DecodeQuery(BaseModel):
    """In the query string. Unknown names are refused."""

    model_config = ConfigDict(extra="forbid")

    shape: list[int] | None = Field(
        None, description="Shape (n, ...) of the raw latents in the body; shape=1&shape=128&shape=32. Or as a header."
    )
    dtype: str | None = Field(
        None, description=f"Of the raw latents, little-endian: {', '.join(DTYPES)}. Or as a header."
    )
    output_type: OutputType = Field("pil", description="pil: one image file. pt: the raw tensor of all images.")
    image_format: ImageFormat = Field("png", description="Of output_type=pil.")
    quality: int = Field(95, ge=1, le=100, description="Of JPEG and WebP.")
    partial_postprocess: bool = Field(
        False,
        description="Of output_type=pt. true: uint8 (n, H, W, 3). false: (n, 3, H, W) in [-1, 1], not clamped, in the "
        "dtype of the latents (float64: float32).",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Image i has the noise of seed + i.")
    cfg_scale: float | None = Field(None, description="Classifier-free guidance; default: the server's.")
    scaling_factor: float | None = Field(None, description="Latents are divided by it.")
    shift_factor: float | None = Field(None, description="Added to the latents after scaling_factor.")
    do_scaling: bool = Field(
        True, description="Sent by older clients instead of scaling_factor; the factor of these models is 1."
    )
    height: int | None = Field(None, description="If given, the height that the images must have.")
    width: int | None = Field(None, description="If given, the width that the images must have.")

    def output(self, latents: torch.dtype) -> Output:
        """What is asked for, of latents of a dtype."""
        dtype = torch.float32 if latents == torch.float64 else latents
        return Output(self.output_type, self.image_format, self.quality, dtype, self.partial_postprocess)
