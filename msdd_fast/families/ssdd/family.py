"""SSDD, as ``families.base.Family`` asks for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from msdd_fast.diffusion.checks import shape_of
from msdd_fast.diffusion.config import Config
from msdd_fast.diffusion.schedule import StageSchedule
from msdd_fast.errors import InputError
from msdd_fast.families.base import ReleasedFormat
from msdd_fast.families.ssdd.config import SSDDConfig
from msdd_fast.families.ssdd.decoder import UViTDecoder
from msdd_fast.families.ssdd.encoder import KLEncoder
from msdd_fast.families.ssdd.engine.network import SSDDNetwork
from msdd_fast.families.ssdd.engine.program import SSDDProgram
from msdd_fast.families.ssdd.engine.tables import SSDDStep, ssdd_steps
from msdd_fast.families.ssdd.engine.weights import pack_ssdd
from msdd_fast.families.ssdd.presets import SSDD_PRESETS
from msdd_fast.families.ssdd.released import RELEASED
from msdd_fast.families.ssdd.work import decode_work
from msdd_fast.families.work import Work
from msdd_fast.layers.linear.base import MakeLinear
from msdd_fast.ops import Ops


class SSDDFamily:
    """Spatial latents of any height and width, one scale, no guidance, no fast tier."""

    name: ClassVar[str] = "ssdd"
    config_type: ClassVar[type[Any]] = SSDDConfig
    presets: ClassVar[Mapping[str, Config]] = SSDD_PRESETS
    released: ClassVar[ReleasedFormat | None] = RELEASED
    no_fast_tier: ClassVar[str] = "SSDD's products are convolutions, of which there is no 8-bit kind"
    no_encoder: ClassVar[str] = ""

    def __init__(self, config: SSDDConfig) -> None:
        self.config = config

    @property
    def example(self) -> tuple[int, ...]:
        side = self.config.image_size // self.config.factor
        return self.config.latent_channels, side, side

    @property
    def model(self) -> str:
        cfg, dec = self.config, self.config.decoder
        return (
            f"SSDD, U-Net of {', '.join(map(str, dec.widths))} with {dec.mid_layers} layers of attention in windows of "
            f"{2 * dec.window - 1}, {cfg.image_size} px, f{cfg.factor}"
        )

    @property
    def constant(self) -> tuple[str, ...]:
        return (
            "time: weight and bias of each residual block's second norm, so that its matrices need not be kept",
            "all modulations by the latents: two matrix products once per image, never brought to full resolution",
            "the latents' part of the first convolution: once per image",
        )

    def describe_sampling(self, steps: int, cfg_scale: float) -> str:
        return f"{steps} step(s), no guidance"

    def build(self) -> tuple[KLEncoder, UViTDecoder]:
        return KLEncoder(self.config), UViTDecoder(self.config)

    def check_images(self, images: Tensor) -> None:
        f = self.config.factor
        is_image = isinstance(images, Tensor) and images.ndim == 4 and images.shape[1] == 3
        if not is_image or any(s < 1 or s % f for s in images.shape[2:]):
            raise InputError(
                f"images must have shape (B, 3, H, W), H and W positive multiples of {f}, got {shape_of(images)}"
            )

    def tables(self, decoder: UViTDecoder, schedule: StageSchedule, steps: int, device: torch.device) -> list[SSDDStep]:
        return ssdd_steps(decoder, schedule, steps, device)

    def program(
        self,
        decoder: UViTDecoder,
        schedule: StageSchedule,
        tables: list[SSDDStep],
        dtype: torch.dtype,
        device: torch.device,
        ops: Ops,
        make: MakeLinear,
    ) -> SSDDProgram:
        weights, dec = pack_ssdd(decoder, dtype, device, ops), self.config.decoder
        network = SSDDNetwork(weights, dec.groups, dec.heads, self.config.factor, ops)
        return SSDDProgram(network, tables, self.config)

    def quantizable(self, decoder: UViTDecoder) -> list[tuple[str, Tensor]]:
        return []

    def tables_memory(self, tables: list[SSDDStep]) -> int:
        return sum(t.nbytes for step in tables for norm in step.norms for t in norm)

    def decode_work(
        self, batch: int = 1, steps: int = 1, cfg_scale: float = 1.0, itemsize: int = 2, hoisted: bool = True
    ) -> list[Work]:
        return decode_work(self.config, batch, steps, itemsize, hoisted)

    def encode_work(self, batch: int = 1, itemsize: int = 2) -> list[Work]:
        raise InputError("the work of an SSDD encode is not counted: its encoder is a plain convolutional network")
